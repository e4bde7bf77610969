"""The page opens offline, escapes everything and shows the right latents."""

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from gemma_jax.report import Context, Latent, plots, select_interesting
from gemma_jax.report import write_page as write
from gemma_jax.report.page import INTEREST, format_value

VOID = {"meta", "img", "br", "wbr", "link", "input", "hr"}
NASTY = "<script>alert(\"1\")</script>' onload='x"


class Page(HTMLParser):
  """Checks that tags nest, and collects what the tests look at."""

  def __init__(self, html):
    super().__init__()
    self.stack, self.tags, self.texts, self.errors = [], [], [], []
    self.feed(html)
    self.close()

  def handle_starttag(self, tag, attrs):
    names = [name for name, _ in attrs]
    if len(names) != len(set(names)):
      self.errors.append(f"attribute twice in {tag}")
    self.tags.append((tag, dict(attrs)))
    if tag not in VOID:
      self.stack.append(tag)

  def handle_endtag(self, tag):
    if not self.stack or self.stack.pop() != tag:
      self.errors.append(f"</{tag}> at {self.getpos()}")

  def handle_data(self, data):
    self.texts.append(data)

  @property
  def text(self):
    return "".join(self.texts)

  def all(self, tag, **wanted):
    return [
      attributes
      for name, attributes in self.tags
      if name == tag and wanted.items() <= attributes.items()
    ]


def latent(index=3, **changes):
  context = Context(
    ["▁the", "\n", "\t", NASTY], [0.0, 1.0, 2.0, 4.0], 3, NASTY, NASTY
  )
  values = {
    "index": index,
    "density": 0.00123,
    "mean_activation": 2.0,
    "max_activation": 8.0,
    "interest": 0.5,
    "contexts": [context],
    "promoted": [NASTY],
    "suppressed": ["▁a"],
    "prefix": 1024,
  }
  return Latent(**values | changes)


def write_page(path, **changes):
  values = {
    "title": "A run",
    "results": {"fvu": 0.25, "definitions": {"fvu": "Unexplained."}},
    "config": {"train": {"steps": 10}},
    "plots": {},
    "latents": [latent()],
    "summary": [("FVU", 0.25, "Mean predictor 1.")],
  }
  html = write(path / "report.html", **values | changes).read_text("utf-8")
  page = Page(html)
  assert page.errors == []
  assert page.stack == []
  return page, html


def test_page_opens_offline_and_is_well_formed(tmp_path):
  plot = plots.training_curves([{"step": 1, "loss": 1.0}], tmp_path / "a.png")
  page, html = write_page(tmp_path, plots={"Loss": plot})
  for _, attributes in page.tags:
    assert attributes.get("src", "data:").startswith("data:")
    assert attributes.get("href", "#").startswith("#")
  assert "http://" not in html
  assert "https://" not in html
  assert not re.search(r"url\(|@import", html)
  (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
  assert policy["content"].startswith("default-src 'none'")


def test_links_within_the_page_lead_somewhere(tmp_path):
  plot = plots.training_curves([], tmp_path / "a.png")
  page, _ = write_page(
    tmp_path, latents=[latent(4), latent(5)], plots={"a": plot}
  )
  ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
  assert len(ids) == len(set(ids))
  assert {a["href"][1:] for a in page.all("a")} == set(ids)


def test_images_are_embedded_whole_with_their_captions(tmp_path):
  plot = plots.norm_histogram({"input": [1.0, 2.0]}, tmp_path / "a.png")
  page, _ = write_page(tmp_path, plots={f"Norms {NASTY}": plot})
  (image,) = page.all("img")
  data = image["src"].removeprefix("data:image/png;base64,")
  assert base64.b64decode(data, validate=True) == plot.read_bytes()
  assert image["alt"] == f"Norms {NASTY}"


def test_a_plot_that_is_no_png_is_refused(tmp_path):
  (tmp_path / "a.svg").write_text("<svg/>")
  with pytest.raises(ValueError, match=r"a\.svg, which is not"):
    write_page(tmp_path, plots={"a": tmp_path / "a.svg"})


def test_text_from_anywhere_is_escaped_everywhere(tmp_path):
  page, html = write_page(
    tmp_path,
    title=NASTY,
    summary=[(NASTY, NASTY, NASTY)],
    results={
      NASTY: NASTY,
      "definitions": {NASTY: NASTY},
      "versions": {NASTY: NASTY},
      "seeds": {NASTY: NASTY},
    },
    config={NASTY: {NASTY: [NASTY]}},
  )
  assert page.all("script") == []
  assert "<script" not in html
  assert not any("onload" in attributes for _, attributes in page.tags)
  # Title and heading, 3 in the card, 5 of the latent, 3 of the results, 2 keys
  # of the config (JSON puts backslashes into its value), 4 in the footer.
  assert page.text.count(NASTY) == 19
  (where,) = page.all("span", **{"class": "where"})
  assert where["title"] == f"{NASTY} · {NASTY}"


def test_tokens_are_coloured_by_activation_over_the_maximum(tmp_path):
  page, _ = write_page(tmp_path)
  spans = [s for s in page.all("span") if "--a" in s.get("style", "")]
  assert [s["style"] for s in spans] == ["--a:0.125", "--a:0.250", "--a:0.500"]
  assert [s["title"] for s in spans] == ["1", "2", "4"]
  assert [s.get("class") for s in spans] == [None, None, "peak"]


def test_whitespace_and_controls_are_visible(tmp_path):
  tokens = ["▁a", "▁", "\n", "\t", "\x00", "\u202e", "\ud800"]
  context = Context(tokens, [1.0] * 7, 0)
  page, html = write_page(tmp_path, latents=[latent(contexts=[context])])
  assert "a ⏎⇥␀\N{REPLACEMENT CHARACTER}?" in page.text
  assert "▁" not in html


def test_long_contexts_are_cut_around_the_peak(tmp_path):
  tokens = [f"w{i}." for i in range(500)]
  context = Context(tokens, [0.0] * 250 + [1.0] + [0.0] * 249, 250)
  page, _ = write_page(tmp_path, latents=[latent(contexts=[context] * 20)])
  assert page.text.count("w250.") == 1 + 8  # the index of latents, 8 contexts
  assert "…w218." in page.text
  assert "w266.…" in page.text
  assert "w217." not in page.text


def test_missing_values_become_dashes(tmp_path):
  bare = Latent(1, float("nan"), float("nan"), float("nan"), None)
  page, _ = write_page(
    tmp_path,
    results={"fvu": None, "ce": {"recovered": float("nan")}},
    config={},
    latents=[bare, latent(2, max_activation=float("nan"), prefix=None)],
    summary=[("FVU", None, "")],
  )
  assert "nan" not in page.text.lower()
  assert "None" not in page.text
  assert "No contexts were kept." in page.text
  assert "in prefix" not in page.text


def test_an_empty_run_still_has_a_page(tmp_path):
  page, _ = write_page(tmp_path, results={}, config={}, latents=[], summary=[])
  assert "All results" in page.text


def test_results_show_definitions_by_the_nearest_name(tmp_path):
  page, _ = write_page(
    tmp_path,
    results={
      "ce": {"clean": np.float32(2.5), "recovered": 0.9},
      "prefixes": [{"fvu": 0.5}],
      "definitions": {
        "ce": "In nats.",
        "ce.recovered": "Of the gap.",
        "fvu": "Unexplained.",
      },
      "versions": {"jax": "0.10.2"},
      "seed": 7,
    },
  )
  flat = re.sub(r"\s+", " ", page.text)
  assert "ce.clean2.5In nats." in flat
  assert "ce.recovered0.9Of the gap." in flat
  assert "prefixes.0.fvu0.5Unexplained." in flat
  assert "Versions: jax 0.10.2" in flat
  assert "Seeds: seed 7" in flat


def test_config_is_shown_exactly_and_results_rounded(tmp_path):
  rate = 0.00030000001
  page, _ = write_page(
    tmp_path, config={"lr": rate}, results={"lr": rate}, latents=[]
  )
  assert "lr0.00030000001" in page.text
  assert re.search(r"lr0\.0003\s", page.text)


@pytest.mark.parametrize(
  ("value", "text"),
  [
    (0.123456, "0.1235"),
    (1.0, "1"),
    (123456.7, "123,500"),
    (9999.99, "10,000"),
    (3e-7, "3e-07"),
    (2_000_000, "2,000,000"),
    (1024, "1024"),
    (float("nan"), "–"),
    (None, "–"),
    (float("-inf"), "−∞"),
    (True, "yes"),
    (np.float32(0.5), "0.5"),
    (np.array([0.5, np.nan]), "0.5, –"),
    (list(range(13)), "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, … (13 in all)"),
    ("4.1 %", "4.1 %"),
  ],
)
def test_values_read_well(value, text):
  assert format_value(value) == text


def test_the_same_run_gives_the_same_bytes(tmp_path):
  assert write_page(tmp_path / "1")[1] == write_page(tmp_path / "2")[1]


def test_context_says_what_does_not_fit():
  with pytest.raises(ValueError, match="2 tokens and 1 activations"):
    Context(["a", "b"], [1.0], 0)
  with pytest.raises(ValueError, match="received 2"):
    Context(["a", "b"], [1.0, 2.0], 2)


def planted(latents=400, contexts=8, seed=0):
  """Noise that fires on scattered tokens, and ten latents worth finding."""
  rng = np.random.default_rng(seed)
  inputs = {
    "density": 10 ** rng.uniform(-4, -2, latents),
    "mean_activation": rng.uniform(1, 3, latents),
    "max_activation": rng.uniform(4, 20, latents),
    "energy": rng.lognormal(3, 2, latents),
    "top_tokens": rng.integers(0, 50_000, (latents, contexts)),
    "top_documents": rng.integers(0, 10_000, (latents, contexts)),
  }
  good = np.arange(0, 100, 10)
  for g in good:
    # A family of two tokens, such as "his" and "her", in unlike documents.
    inputs["top_tokens"][g] = np.arange(contexts) % 2 + 60_000 + 2 * g
    inputs["top_documents"][g] = np.arange(contexts) + 100 * g
  inputs["energy"][good] = 1e3
  inputs["mean_activation"][good] = 2.0
  inputs["max_activation"][good] = 10.0
  inputs["density"][good] = 1e-3
  return inputs, good


def test_selection_finds_planted_latents():
  inputs, good = planted()
  picked, scores = select_interesting(**inputs, n=10)
  assert set(picked) == set(good)
  assert np.all(np.diff(scores) <= 0)
  assert np.all((scores > 0) & (scores <= 1))


@pytest.mark.parametrize(
  "spoil",
  [
    {"density": 0.0},
    {"density": 0.9},
    {"max_activation": 2.0, "mean_activation": 2.0},
    {"energy": 0.0},
    {"top_documents": 5},
    {"top_tokens": np.arange(8)},
    {"top_tokens": np.array([7, *[-1] * 7])},
  ],
  ids=["dead", "dense", "flat", "idle", "one text", "scattered", "singleton"],
)
def test_selection_passes_over(spoil):
  inputs, good = planted()
  bad = good[3]
  for name, value in spoil.items():
    inputs[name][bad] = value
  picked, _ = select_interesting(**inputs, n=9)
  assert set(picked) == set(good) - {bad}


def test_selection_never_picks_dead_latents_and_may_run_short():
  inputs, good = planted()
  dead = np.setdiff1d(np.arange(400), good[:4])
  inputs["density"][dead] = 0
  inputs["mean_activation"][dead] = np.nan
  inputs["max_activation"][dead] = np.nan
  picked, scores = select_interesting(**inputs, n=20)
  assert sorted(picked) == list(good[:4])
  assert np.isfinite(scores).all()
  inputs["density"][:] = 0
  assert [len(a) for a in select_interesting(**inputs)] == [0, 0]


def test_selection_does_not_fill_up_with_one_token():
  inputs, good = planted()
  same = good[:5]
  inputs["top_tokens"][same] = 99_999
  inputs["energy"][same] = 1e6
  picked, _ = select_interesting(**inputs, n=6)
  assert len(set(picked) & set(same)) == 1


def test_selection_computes_the_sentence_that_the_page_shows(tmp_path):
  tokens = np.array([[5, 5, 6, 7], [5, 5, 8, -1], [1, 2, 3, 4]])
  documents = np.array([[0, 1, 2, 2], [0, 1, 1, -1], [0, 0, 0, 0]])
  picked, scores = select_interesting(
    density=np.array([0.01, 0.03, 1.0]),
    mean_activation=np.array([1.0, 1.0, 1.0]),
    max_activation=np.array([4.0, 2.0, 2.0]),
    energy=np.array([2.0, 3.0, 1.0]),
    top_tokens=tokens,
    top_documents=documents,
  )
  first = 2 / 4 * 3 / 4 * 1 / 2 * 3 / 4 * 2 / 3
  second = 2 / 4 * 2 / 4 * 1 / 4 * 1 / 2 * 3 / 3 / 2
  np.testing.assert_array_equal(picked, [0, 1, 2])
  np.testing.assert_allclose(scores, [first, second, 0.0])
  page, _ = write_page(tmp_path)
  assert INTEREST in page.text


def test_selection_does_not_depend_on_the_order_of_latents():
  inputs, good = planted()
  # Ties are broken by index, so there must be none.
  inputs["energy"][good] += np.arange(len(good))
  order = np.random.default_rng(1).permutation(400)
  picked, scores = select_interesting(**inputs)
  moved, same = select_interesting(**{k: v[order] for k, v in inputs.items()})
  np.testing.assert_array_equal(order[moved], picked)
  np.testing.assert_array_equal(same, scores)


def test_selection_says_which_shapes_it_wants():
  inputs, _ = planted()
  with pytest.raises(ValueError, match="same M latents"):
    select_interesting(**inputs | {"energy": np.ones(3)})
