"""The text, the pictures and the page show what the study of concepts found."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread

from gemma_jax.report import concept_cards as cards
from gemma_jax.report import concept_damage_plots as damage
from gemma_jax.report import concept_plots as found
from gemma_jax.report import concepts, plots

NASTY = "<script>alert(\"1\")</script>' onload='x|*$y$"
TURNED = "a\u202eb\x9b\x00c"
PLOTS = (
  "kurtosis",
  "scores",
  "concepts",
  "damage",
  "controls",
  "matrix",
  "doses",
)


def change(**values):
  base = {"effect": 0.03, "control": 0.01, "general": None, "ratio": 1.0}
  base |= {"kl": 0.2, "kl_control": 0.1, "rank": 3.0, "flipped": 0.25}
  return base | values


def candidate(row, layer=0, words=(" cat", " dog"), **values):
  """A vector that was scored."""
  base = {
    "row": row,
    "layer": layer,
    "neuron": 10 + row,
    "sign": "+-"[row % 2],
    "category": "animals",
    "kind": "content",
    "words": list(words),
    "words_other_sign": [" the", "\n"],
    "kurtosis": 7.25,
    "skew": -0.5,
    "kurtosis_z": 12.5,
    "kurtosis_q": 0.002,
    "score": 0.875,
    "score_q": 0.0123,
    "content": 0.9,
    "total": 44.5,
    "tail": 6.75,
    "coherence": 0.31,
    "npmi": None,
    "p_parts": {
      "tail": 0.011,
      "coherence": 0.012,
      "lexicon": 0.013,
      "npmi": 1.0,
    },
    "mean": 0.21,
    "mass": 0.43,
    "positive": 0.96,
    "contexts": [{"coefficient": 8.5, "text": ["I saw a", " cat", " run"]}],
    "agreement": 0.5,
  }
  return base | values


def damaged(row, ratio=5.0, passes=True, **values):
  """The same once it was damaged, as `describe.row(...) | row` makes it."""
  own = {
    "effect": 0.04,
    "control": 0.005,
    "general": None,
    "difference": 0.035,
    "low": 0.02,
    "high": 0.05,
    "ratio": ratio,
    "auroc": 0.77,
    "cliffs_delta": 0.54,
    "d_z": 0.88,
    "p": 0.0017,
    "q": 0.0034,
    "passes": passes,
    "prompts": 24,
    "clean_log_prob": -2.5,
    "clean_log_prob_control": -2.6,
    "clean_rank": 2.0,
    "changes": {
      "mean": change(ratio=ratio),
      "zero": change(),
      "norm_only": change(ratio=9.75),
      "replace": change(ratio=9.5),
      "neuron_0": change(ratio=0.62),
      "neuron_1": change(ratio=0.41),
      "random_0": change(ratio=-0.25),
    },
    "lost": {"concept": [0.1], "control": [0.0], "general": []},
  }
  return candidate(row) | own | values


def noise(row, ratio, **values):
  """A random direction, of which the study keeps little."""
  own = damaged(row, ratio, False, effect=0.001, control=0.002, p=0.4, q=0.9)
  return {k: v for k, v in own.items() if k not in candidate(row)} | {
    "row": row,
    "p": 0.4,
    "q": 0.9,
    **values,
  }


def study(**changes):
  """Results with three validated vectors, two others, and one not tested."""
  rows = [
    damaged(0, ratio=2.5),
    damaged(2, ratio=8.125, words=[NASTY, TURNED, "猫", "قط", "แมว", "x"]),
    damaged(4, passes=False, p=0.3, ratio=0.4, category=None),
    damaged(7, ratio=4.0, layer=2, category=None, words=["猫", "ünder$$"]),
    damaged(8, passes=False, p=0.2, ratio=0.5),
  ]
  kinds = ("layer", "vectors", "scored", "tested", "validated")
  values = {
    "model": "tiny",
    "pipeline_stats": {
      "total_candidates": 4_096,
      "scored": 61,
      "examined": 17,
      "tested": 5,
      "validated_vectors": 3,
      "success_rate": 3 / 4_096,
    },
    "random": {
      "directions": 300,
      "scored": 2,
      "tested": 9,
      "p_below_alpha": 1,
      "validated": 0,
      "scored_and_validated": 0,
      "rows": [noise(2 * i, ratio=i / 10) for i in range(9)],
    },
    "concept_distribution": {"animals": 2, "unnamed": 1},
    "validation_results": rows,
    "matrix": {
      "rows": [2, 7, 0],
      "loss": [[0.5, 0.1, 0.0], [0.0, 0.25, -0.1], [0.1, 0.0, 0.125]],
      "difference": 0.271,
      "p": 0.0375,
    },
    "doses": [
      {
        "row": row,
        "factors": [
          {"factor": f, "concept": 0.1 * (1 - f), "control": 0.01 * (1 - f)}
          for f in (1.0, 0.5, 0.0, -1.0)
        ],
        "noise": [{"noise": 0.5, "concept": 0.02, "control": 0.015}],
        "slope": 0.101,
      }
      for row in (2, 7)
    ],
    "groups": [
      {
        "layer": 0,
        "category": "animals",
        "neurons": [10, 12],
        "together": 0.0815,
        "sum": 0.061,
        "prompts": 16,
      }
    ],
    "kurtosis": [
      {
        "layer": layer,
        "median": 0.5 + layer,
        "p95": 3.0,
        "p99": 9.0,
        "max": 70.0,
        "null_median": -0.01,
        "null_p99": 0.25,
        "share_above_null_p99": 0.375,
      }
      for layer in range(3)
    ],
    "candidates": [
      *(candidate(row) for row in (0, 2, 4, 7, 8)),
      candidate(20, layer=1, words=["alone"]),
    ],
    "by_layer": [
      dict(zip(kinds, counts, strict=True))
      for counts in (
        (0, 1365, 50, 4, 2),
        (1, 1365, 10, 0, 0),
        (2, 1366, 1, 1, 1),
      )
    ],
    "lexicons": {"animals": {"families": 40, "split": ["wombat"]}},
    "threshold": 0.75,
    "alpha": 0.05,
    "tokens_usage": 1000,
    "tokens_heldout": 2000,
    "seeds": {"study": 0, "data": 1},
    "definitions": {
      "ratio": "Effect over control.",
      "random": "Along a random direction.",
      "p": "Of a permutation.",
      "dominance": "Of the diagonal.",
      "group": "Set together.",
    },
    "versions": {"jax": "0.10.2"},
  }
  return values | changes


def nothing():
  """What is left where no vector was tested and none kept."""
  random = study()["random"] | {"tested": 0, "p_below_alpha": 0, "rows": []}
  stats = study()["pipeline_stats"] | {"tested": 0, "validated_vectors": 0}
  return study(
    pipeline_stats=stats | {"success_rate": 0.0},
    random=random,
    concept_distribution={},
    validation_results=[],
    matrix=None,
    doses=[],
    groups=[],
    candidates=[],
  )


class Page(HTMLParser):
  """Tags, and the texts of the articles by id."""

  def __init__(self, html):
    super().__init__()
    self.tags, self.texts, self.articles, self.now = [], [], {}, None
    self.feed(html)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag == "article":
      self.now = dict(attrs)["id"]
      self.articles[self.now] = ""

  def handle_endtag(self, tag):
    if tag == "article":
      self.now = None

  def handle_data(self, data):
    self.texts.append(data)
    if self.now:
      self.articles[self.now] += data

  def all(self, tag):
    return [attributes for name, attributes in self.tags if name == tag]

  def flat(self, article):
    return re.sub(r"\s+", " ", self.articles[article])


def write(folder, results=None):
  path = concepts.write(
    folder, results=study() if results is None else results, config={"seed": 3}
  )
  html = path.read_text("utf-8")
  return Page(html), html


def drawn(figure):
  """The figure once laid out; a missing glyph would be a warning."""
  figure.canvas.draw()
  return figure


def legend(axes):
  return [text.get_text() for text in axes.get_legend().get_texts()]


def offsets(axes):
  """Label -> places of the markers."""
  return {
    one.get_label(): np.asarray(one.get_offsets()).tolist()
    for one in axes.collections
  }


def line(text, start):
  (own,) = [l for l in text.split("\n") if l.strip().startswith(start)]
  return own.split()


def test_the_summary_sets_random_directions_beside_the_vectors():
  text = concepts.summary(study())
  assert line(text, "projected") == ["projected", "4096", "300"]
  assert line(text, "scored >=") == ["scored", ">=", "0.75", "61", "2"]
  assert line(text, "examined") == ["examined", "17", "-"]
  assert line(text, "tested") == ["tested", "5", "9"]
  assert line(text, "p <=") == ["p", "<=", "0.05", "3", "1"]
  assert line(text, "validated  ") == ["validated", "3", "0"]
  assert line(text, "scored and")[-2:] == ["3", "0"]
  assert line(text, "validated of tested")[-2:] == ["60.000%", "0.000%"]
  assert line(text, "success rate")[-2:] == ["0.073%", "-"]
  assert "CONCEPT VECTORS OF tiny" in text


def test_the_summary_has_kurtosis_by_layer_and_concepts_by_number():
  text = concepts.summary(study())
  row = "2 2.5 3 9 70 -0.01 0.25 0.375"
  assert row.split() in [l.split() for l in text.split("\n")]
  assert text.index("animals  ") < text.index("unnamed  ")


def test_the_summary_ends_with_the_best_validated_vectors():
  lines = concepts.summary(study()).split("\n")
  best = lines[-3:]
  assert [l.split()[:3] for l in best] == [
    ["0", "12", "+"],
    ["2", "17", "-"],
    ["0", "10", "+"],
  ]
  assert best[2].split()[3:] == [
    "animals",
    "0.875",
    "0.04",
    "0.005",
    "0.035",
    "[0.02,",
    "0.05]",
    "2.5",
    "0.62",
    "0.0034",
    "cat,",
    "dog",
  ]
  assert "\x9b" not in best[0]
  assert "\u202e" not in best[0]
  assert "แมว" in best[0]
  many = study(validation_results=[damaged(i, ratio=i) for i in range(1, 40)])
  lines = concepts.summary(many).split("\n")
  last = lines.index("BEST VALIDATED VECTORS, nats a byte")
  assert len(lines) - last == 2 + 20
  assert lines[last + 2].split()[1] == "49"


def test_a_study_without_tests_has_a_summary_and_a_page(tmp_path):
  text = concepts.summary(nothing())
  assert text.endswith("BEST VALIDATED VECTORS, nats a byte\n  none")
  assert line(text, "validated of tested")[-2:] == ["-", "-"]
  page, _ = write(tmp_path, nothing())
  assert page.articles == {}
  assert page.all("script") == []
  assert "nan" not in "".join(page.texts).lower()
  assert {p.stem for p in (tmp_path / "plots").iterdir()} == {
    "kurtosis",
    "scores",
  }


def test_every_plot_is_written_and_on_the_page(tmp_path):
  page, _ = write(tmp_path)
  images = page.all("img")
  assert [image["alt"] for image in images] == [
    concepts.CAPTIONS[name] for name in PLOTS
  ]
  for image, name in zip(images, PLOTS, strict=True):
    path = tmp_path / "plots" / f"{name}.png"
    data = image["src"].removeprefix("data:image/png;base64,")
    assert base64.b64decode(data, validate=True) == path.read_bytes()
    assert imread(path).std() > 0


def test_validated_vectors_come_first_and_noise_last(tmp_path):
  page, _ = write(tmp_path)
  names = list(page.articles)
  assert names[:6] == ["v2", "v7", "v0", "v8", "v4", "v20"]
  # From the largest ratio to the smallest, and neither end is left out.
  noise = names[6:]
  assert len(noise) == cards.RANDOM
  assert (noise[0], noise[-1]) == ("r16", "r0")
  assert noise == sorted(noise, key=lambda name: -int(name[1:]))
  for article, state in (
    ("v7", "validated"),
    ("v4", "not confirmed"),
    ("v20", "not tested"),
    ("r16", "random"),
  ):
    assert f" {state} " in page.flat(article)
  assert "random direction 8 + random" in page.flat("r16")


def test_a_card_has_words_texts_scores_and_damage(tmp_path):
  page, html = write(tmp_path)
  text = page.flat("v0")
  for part in (
    "L0 n10 +",
    "lexicon animals",
    "score 0.875 ratio 2.5 q 0.0034",
    "says cat dog",
    "other sign the ⏎",
    "8.5 I saw a cat run",
    "mean coefficient 0.21 mean |coefficient| 0.43",
    "share of it positive 0.96 top contexts at its own words 0.5",
    "effect 0.04 control 0.005 general – ratio 2.5 auroc 0.77",
    "cliffs_delta 0.54 d_z 0.88 p 0.0017 q 0.0034",
    "difference 0.035 [0.02, 0.05] ratio of the best control 0.62",
    "prompts 24",
    "neuron_1",
  ):
    assert part in text
  assert '<mark class="peak"> cat</mark>' in html
  assert "tail6.75p 0.011" in text
  assert "lexiconanimalsp 0.013" in text
  assert "npmi–p 1" in text
  assert "evidence44.5q 0.0123" in text
  assert "kurtosis7.25z 12.5, q 0.002" in text
  assert "norm_only0.030.01–9.750.20.130.25" in text


def test_doses_are_on_the_cards_of_their_vectors(tmp_path):
  page, _ = write(tmp_path)
  assert "slope 0.101" in page.flat("v2")
  assert "factor 0.50.050.005" in page.flat("v2")
  assert "noise 0.50.020.015" in page.flat("v7")
  assert "slope" not in page.flat("v0")
  # A random direction may have the number of a vector that has doses.
  doses = [study()["doses"][0] | {"row": 0}]
  page, _ = write(tmp_path, study(doses=doses))
  assert "slope" in page.flat("v0")
  assert "slope" not in page.flat("r0")


def test_text_from_anywhere_is_escaped_and_cannot_turn_the_page(tmp_path):
  page, html = write(tmp_path)
  (script,) = page.all("script")
  assert script == {}
  assert html.count("<script") == 1
  assert not any("onload" in attributes for _, attributes in page.tags)
  assert NASTY in page.articles["v2"]
  assert (
    "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}␀c"
    in (page.articles["v2"])
  )
  assert not re.search("[\x00\x80-\x9f\u202a-\u202e\u2066-\u2069]", html)
  assert "猫" in page.articles["v2"]


def test_the_policy_allows_the_script_of_the_page_and_no_other(tmp_path):
  page, html = write(tmp_path)
  own = re.search("<script>(.*?)</script>", html, re.DOTALL).group(1)
  digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
  (policy,) = [a["content"] for a in page.all("meta") if "http-equiv" in a]
  assert policy.startswith("default-src 'none'; ")
  assert policy.endswith(f"; script-src 'sha256-{digest}'")
  assert "http://" not in html
  assert "https://" not in html


def test_links_within_the_page_lead_somewhere(tmp_path):
  page, _ = write(tmp_path)
  ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
  assert len(ids) == len(set(ids))
  assert {a["href"][1:] for a in page.all("a")} < set(ids)


def test_the_filter_knows_words_lexicon_and_state_of_every_card(tmp_path):
  page, _ = write(tmp_path)
  searched = {a["id"]: a["data-search"] for a in page.all("article")}
  assert searched["v0"] == "L0 n10 + validated animals  cat  dog  the ⏎"
  assert searched["r0"].split() == ["random", "direction", "0", "+", "random"]
  # Without scripts there is no field that does nothing.
  (field,) = [a for a in page.all("p") if a.get("class") == "find"]
  assert "hidden" in field


def test_all_results_are_those_that_no_card_or_picture_shows(tmp_path):
  page, _ = write(tmp_path)
  text = re.sub(r"\s+", " ", "".join(page.texts))
  assert "of 9 tested, 1 with p <= 0.05; 0 also score 0.75 or more" in text
  assert "random_directions.p_below_alpha1 " in text
  assert "dominance0.271Of the diagonal." in text
  assert "dominance_p0.0375 " in text
  assert "group.L0 animals.together0.0815Set together." in text
  assert "validation_results" not in text
  assert "Along a random direction." in text


def test_the_table_has_every_tested_vector_and_no_marks_of_the_words(tmp_path):
  write(tmp_path)
  text = (tmp_path / "table.md").read_text("utf-8")
  rows = [l.split(" | ") for l in text.split("\n") if l.startswith("| ")]
  vectors = [r for r in rows if r[0] in ("| yes", "| no")]
  assert [r[2] for r in vectors] == ["12", "17", "10", "18", "14"]
  assert {len(r) for r in vectors} == {13}
  assert "<script" not in text
  assert "&#60;script&#62;" in text
  assert "\u202e" not in text


def test_the_same_study_gives_the_same_bytes(tmp_path):
  for folder in ("1", "2"):
    write(tmp_path / folder)
  kept = [
    {p.relative_to(tmp_path / f): p.read_bytes() for p in files}
    for f in ("1", "2")
    for files in [sorted((tmp_path / f).rglob("*.*"))]
  ]
  assert len(kept[0]) == 9
  assert kept[0] == kept[1]


def test_kurtosis_stands_beside_that_of_random_directions():
  rows = study()["kurtosis"]
  top, below = drawn(found.kurtosis_figure(rows)).axes
  drawn_lines = {l.get_label(): l for l in top.lines}
  assert drawn_lines["median"].get_xydata().tolist() == [
    [0, 0.5],
    [1, 1.5],
    [2, 2.5],
  ]
  assert list(drawn_lines["random, 99th"].get_ydata()) == [0.25] * 3
  assert len(drawn_lines) == 6
  assert top.get_yscale() == "symlog"
  assert [bar.get_height() for bar in below.patches] == [0.375] * 3
  assert found.kurtosis_figure([]) is None
  rows[1] |= {"max": None, "share_above_null_p99": None}
  drawn(found.kurtosis_figure(rows))


def test_bars_of_layers_say_how_many_came_how_far():
  (axes,) = drawn(found.scores_figure(study()["by_layer"])).axes
  heights = [bar.get_height() for bar in axes.patches]
  assert heights == [50, 10, 1, 4, 0, 1, 2, 0, 1]
  assert legend(axes) == ["scored, 61", "tested, 5", "validated, 3"]
  assert found.scores_figure([]) is None


def test_concepts_are_stacked_layer_by_layer():
  (axes,) = drawn(found.concepts_figure(study())).axes
  bars = [(b.get_y(), b.get_height()) for b in axes.patches]
  assert bars == [(0, 2), (0, 0), (0, 0), (2, 0), (0, 0), (0, 1)]
  assert legend(axes) == ["animals, 2", "unnamed, 1"]
  assert found.concepts_figure(nothing()) is None


def test_no_two_of_eighteen_concepts_look_alike():
  rows = [damaged(i, category=f"c{i:02}") for i in range(18)]
  (axes,) = drawn(found.concepts_figure(study(validation_results=rows))).axes
  looks = {(to_hex(b.get_facecolor()), b.get_hatch()) for b in axes.patches}
  assert len(looks) == 18


def test_damage_is_drawn_over_that_of_controls():
  results = study()
  (axes,) = drawn(damage.damage_figure(results)).axes
  assert offsets(axes) == {
    "random, 9": [[0.002, 0.001]] * 9,
    "not confirmed, 2": [[0.005, 0.04]] * 2,
    "validated, 3": [[0.005, 0.04]] * 3,
  }
  for ratio in (1, 2, 5):
    (own,) = [l for l in axes.lines if l.get_label().startswith(f"{ratio} ")]
    x, y = own.get_xydata().T
    np.testing.assert_allclose(y, ratio * np.abs(x))
    assert x.min() == -x.max()
  assert axes.get_xlim()[1] > 0.04
  assert damage.damage_figure(nothing()) is None
  still = noise(0, 0.0, effect=0.0, control=0.0)
  random = nothing()["random"] | {"rows": [still]}
  drawn(damage.damage_figure(nothing() | {"random": random}))


def test_controls_stand_in_the_line_of_their_vector():
  (axes,) = drawn(damage.controls_figure(study())).axes
  assert offsets(axes) == {
    "the vector": [[8.125, 0], [4.0, 1], [2.5, 2]],
    "other neurons": [[x, y] for y in range(3) for x in (0.62, 0.41)],
    "random directions": [[-0.25, y] for y in range(3)],
  }
  # No script tag, no character that the font lacks or draws backwards.
  assert [text.get_text() for text in axes.get_yticklabels()] == [
    "L0 n12 + <script>ale…",
    "L2 n17 - ünder$$",
    "L0 n10 + cat",
  ]
  assert axes.get_ylim()[0] > axes.get_ylim()[1]
  assert damage.controls_figure(nothing()) is None
  many = study(validation_results=[damaged(i) for i in range(50)])
  (axes,) = drawn(damage.controls_figure(many)).axes
  assert axes.get_xlabel().endswith("the first 40 of 50")


@pytest.mark.parametrize(
  ("words", "label"),
  [
    (["猫", " кот"], "L0 n10 + кот"),
    (["قط", "חתול"], "L0 n10 +"),
    ([], "L0 n10 +"),
    (["แมว", "\u202ea"], "L0 n10 + \N{REPLACEMENT CHARACTER}a"),
  ],
)
def test_labels_have_the_first_word_that_can_be_drawn(words, label):
  assert damage.label_of(candidate(0, words=words)) == label


def test_the_matrix_has_its_vectors_and_how_far_the_diagonal_stands_out():
  results = study()
  axes, _ = drawn(damage.matrix_figure(results)).axes
  (image,) = axes.images
  np.testing.assert_array_equal(image.get_array(), results["matrix"]["loss"])
  low, high = image.get_clim()
  assert low == -high
  assert [text.get_text() for text in axes.get_yticklabels()] == [
    "L0 n12 + <script>ale…  1",
    "L2 n17 - ünder$$  2",
    "L0 n10 + cat  3",
  ]
  assert axes.get_title(loc="left") == (
    "own prompts lose 0.271 nats a byte more, p = 0.0375"
  )
  assert damage.matrix_figure(nothing()) is None


def test_a_matrix_of_one_vector_has_no_dominance():
  matrix = {"rows": [2], "loss": [[0.0]], "difference": None, "p": None}
  axes, _ = drawn(damage.matrix_figure(study(matrix=matrix))).axes
  assert axes.get_title(loc="left") == ""


def test_the_labels_of_a_large_matrix_are_thinned():
  rows = list(range(60))
  results = study(
    validation_results=[damaged(row) for row in rows],
    matrix={"rows": rows, "loss": np.eye(60).tolist()},
  )
  axes, _ = drawn(damage.matrix_figure(results)).axes
  labels = [text.get_text() for text in axes.get_yticklabels()]
  assert len(labels) == 20
  assert labels[1] == "L0 n13 - cat  4"


def test_doses_are_drawn_by_factor_and_by_noise():
  figure = drawn(damage.doses_figure(study()))
  by_factor, by_noise = figure.axes
  effect, control = by_factor.lines[:2]
  np.testing.assert_allclose(
    effect.get_xydata(), [[-1, 0.2], [0, 0.1], [0.5, 0.05], [1, 0]], atol=1e-12
  )
  np.testing.assert_allclose(control.get_ydata(), effect.get_ydata() / 10)
  assert by_factor.xaxis_inverted()
  assert by_noise.lines[2].get_xydata().tolist() == [[0.5, 0.02]]
  assert [text.get_text() for text in figure.legends[0].get_texts()] == [
    "L0 n12 + <script>ale…",
    "L2 n17 - ünder$$",
    "its concept's prompts",
    "control prompts",
  ]
  assert damage.doses_figure(nothing()) is None


def test_only_the_first_doses_have_a_colour_of_their_own():
  (one, _) = study()["doses"]
  figure = drawn(damage.doses_figure(study(doses=[one] * 9)))
  assert len(figure.axes[0].lines) == 2 * len(plots.COLOURS)
