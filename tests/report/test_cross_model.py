"""The text, the pictures and the page show what maps between models do."""

import base64
import itertools
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread

from gemma_jax.report import cross_model, plots
from gemma_jax.report import cross_model_plots as figures
from gemma_jax.report import cross_model_tables as numbers
from gemma_jax.report.page import format_value

NASTY = "<script>alert(\"1\")</script>' onload='x|*$y$"
LONG = "somebody/a-very-long-name-of-a-model-" + "x" * 300
ROLES = {
  "mean": "floor",
  "token": "floor",
  "position": "floor",
  "procrustes": "linear",
  "scaled_procrustes": "linear",
  "ridge": "linear",
  "reduced_rank": "linear",
  "cca": "linear",
  "code_ridge": "linear",
  "translator": "network",
  "hypernetwork": "network",
  "hypernetwork_unseen": "network",
  "shuffled_across": "control",
  "shuffled_within": "control",
  "shuffled_token": "control",
  "redrawn": "control",
  "other_seed": "ceiling",
  "own": "ceiling",
}
LEVEL = {"floor": 0.12, "linear": 0.4, "network": 0.45, "control": -0.12}
LEVEL |= {"ceiling": 0.7}
PICTURES = (
  "codes",
  "splice",
  "over_ridge",
  "unseen",
  "matches",
  "inject",
  "substitution",
)
PARTS = (
  "models",
  "pairs",
  "coverage",
  "dictionaries",
  "rows",
  "splice",
  "differences",
  "matches",
  "features",
  "causal",
  "unseen",
  "verdicts",
)


def ends(value, low="low", high="high", by=0.03):
  return {low: value - by, high: value + by}


def row(route, name, rng, unseen=False):
  source, target = route.split(" > ")
  r2 = LEVEL[ROLES[name]] + rng.uniform(-0.08, 0.08)
  r2 = 0.0 if name == "mean" else r2
  delta = rng.choice([-1, 1]) * rng.uniform(0.032, 0.08)
  return {
    "route": route,
    "kind": "across",
    "source": f"{source}.resid_post",
    "target": f"{target}.resid_post",
    "map": name,
    "role": ROLES[name],
    "space": "activations",
    "parameters": 409_601,
    "unseen": unseen,
    "fvu": None if name == "translator" else 1 - r2,
    "fvu_decoded": rng.uniform(0.2, 0.9),
    "r2_median": rng.uniform(0, 0.5),
    "r2_pooled": r2,
    **ends(r2, "r2_low", "r2_high"),
    "pearson_median": rng.uniform(0, 0.9),
    "auroc_median": rng.uniform(0.5, 0.99),
    "top_k_recall": rng.uniform(0, 0.7),
    "centred_cosine": rng.uniform(0, 0.7),
    "raw_cosine": rng.uniform(0.3, 0.9),
    "l0": rng.uniform(20, 60),
    "delta_ridge": delta,
    **ends(delta, "delta_ridge_low", "delta_ridge_high"),
    "delta_token": 0.2,
    **ends(0.2, "delta_token_low", "delta_token_high"),
    "columns": 2_048,
    "tokens": 65_536,
  }


def spliced(route, name, rng):
  recovered = LEVEL[ROLES[name]] * 1.3
  recovered = 0.0 if name == "mean" else recovered + rng.uniform(-0.1, 0.1)
  return {
    "route": route,
    "map": name,
    "role": ROLES[name],
    "tokens": 8_192,
    "documents": 64,
    "delta_ce": rng.uniform(0, 3),
    "kl": rng.uniform(0, 3),
    "recovered": recovered,
    **ends(recovered),
    "gap": 3.25,
  }


def effects(route, rng):
  inject = [
    {
      "vector": vector,
      "dose": dose,
      "effect": slope * dose,
      **ends(slope * dose, by=0.05),
      "elsewhere": 0.01,
      "kl": rng.uniform(0, 1),
    }
    for vector, slope in (
      ("native", 0.5),
      ("transferred", 0.4),
      ("other", 0.05),
      ("random", 0.01),
    )
    for dose in (0.5, 1.0, 2.0, 4.0)
  ]
  substitution = [
    {
      "count": count,
      "codes": codes,
      "kl": rng.uniform(0, 1),
      "recovered": height - 0.1 * np.log10(count),
      **ends(height - 0.1 * np.log10(count), by=0.02),
    }
    for codes, height in (
      ("matched", 0.95),
      ("dealt", 0.33),
      ("zero", 0.21),
      ("mean", 0.26),
    )
    for count in (10, 100, 1000)
  ]
  return {
    "route": route,
    "latents": 32,
    "fingerprints": {
      "matched": 0.61,
      **ends(0.61),
      "null": 0.0625,
      "p": 0.00125,
    },
    "inject": inject,
    "substitution": substitution,
  }


def matched(pair, rng, count=400):
  return {
    "pair": pair,
    "kind": "across",
    "eligible": 2_000,
    "matched": 1_433,
    "significant": 611,
    "r_median": 0.437,
    "null_median": 0.0781,
    "r": np.sort(rng.beta(3, 3, count)).tolist(),
    "null": np.sort(rng.beta(2, 12, count)).tolist(),
    "methods": {
      "hungarian": 1_501,
      "mutual": 702,
      "sinkhorn": 903,
      "greedy": 4,
    },
  }


def study(layers=((5, 9), (10, 18)), names=("gemma", "smollm2"), seed=0):
  """Results of both directions between the layers of two models."""
  rng = np.random.default_rng(seed)
  a, b = names
  pairs = [(f"{a}:{i}", f"{b}:{j}") for i, j in layers]
  routes = [f"{x} > {y}" for x, y in pairs]
  routes += [f"{y} > {x}" for x, y in pairs]
  named = [f"{x} | {y}" for x, y in pairs]
  rows = [
    row(route, name, rng, unseen=name == "hypernetwork_unseen")
    for route, name in itertools.product(routes, ROLES)
  ]
  unseen = ("hypernetwork", "nearest", "mean_of_neighbours", "pooled_ridge")
  return {
    "models": {
      a: {"path": "/models/a", "layers": 18, "width": 640},
      b: {"path": "/models/b", "layers": 30, "width": 576},
    },
    "pairs": [
      {
        "name": name,
        "a": f"{x.replace(':', ':blocks.')}.resid_post",
        "b": f"{y.replace(':', ':blocks.')}.resid_post",
        "kind": "across",
        "unseen": False,
      }
      for name, (x, y) in zip(named, pairs, strict=True)
    ],
    "coverage": [
      {
        "a": a,
        "b": b,
        "side": side,
        "tokens_a": 0.8125,
        "tokens_b": 0.7375,
        "bytes": 0.905,
        "one_to_one": 0.6625,
        "pairs": 131_072,
        "documents": 256,
      }
      for side in ("train", "heldout")
    ],
    "dictionaries": [
      {
        "site": f"{a}:blocks.5.resid_post",
        "seed": seed,
        "width": 16_384,
        "fvu": 0.2135,
        "l0": 31.75,
        "dead_fraction": 0.0175,
      }
      for seed in (0, 1)
    ],
    "rows": rows,
    "splice": [
      spliced(route, name, rng)
      for route, name in itertools.product(routes, ROLES)
    ],
    "differences": [
      {
        "route": route,
        "first": "own",
        "second": "stitching",
        "difference": 0.124,
        **ends(0.124),
        "clear": True,
      }
      for route in routes
    ],
    "matches": [matched(name, rng) for name in named],
    "features": [
      {
        "pair": named[0],
        "latent_a": 123,
        "latent_b": 45_678,
        "r": 0.8765,
        "q": 0.00321,
        "contexts_a": [[["▁the", 0.0], [NASTY, 4.0], ["\n", 1.0]], []],
        "contexts_b": [[[" cat", 2.5], ["s", 10.0]]],
      }
    ]
    * 2,
    "causal": [effects(route, rng) for route in routes],
    "unseen": [
      {"route": routes[0], "map": name, "fvu": value, **ends(value)}
      for name, value in zip(
        (*unseen, "ridge"), (0.5, 0.65, 0.6, 0.75, 0.4), strict=True
      )
    ],
    "verdicts": ["The network beats ridge on 2 of 4 routes.", "No <b>."],
    "definitions": {"fvu": "Unexplained.", "r2_pooled": "Of <all> latents."},
    "versions": {"jax": "0.10.2"},
    "seeds": {"study": 7},
  }


class Page(HTMLParser):
  """Checks that tags nest, and collects what the tests look at."""

  def __init__(self, html):
    super().__init__()
    self.stack, self.tags, self.texts, self.errors = [], [], [], []
    self.feed(html)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in ("meta", "img", "br", "wbr"):
      self.stack.append(tag)

  def handle_endtag(self, tag):
    if not self.stack or self.stack.pop() != tag:
      self.errors.append(f"</{tag}> at {self.getpos()}")

  def handle_data(self, data):
    self.texts.append(data)

  @property
  def cells(self):
    return {text.strip() for text in self.texts}

  def all(self, tag, **wanted):
    return [
      attributes
      for name, attributes in self.tags
      if name == tag and wanted.items() <= attributes.items()
    ]


def written(folder, results, config=None):
  """The page of these results, which have been through JSON."""
  results = json.loads(json.dumps(results))
  path = cross_model.write(folder, results=results, config=config or {})
  html = path.read_text("utf-8")
  page = Page(html)
  assert page.errors == []
  assert page.stack == []
  return page, html


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """Folder, results, page and HTML of the study."""
  folder = tmp_path_factory.mktemp("study") / "new"
  results = study()
  return folder, results, *written(folder, results, {"fit": {"rank": 64}})


def replaced(value, change):
  """The same results with every leaf changed."""
  if isinstance(value, dict):
    return {k: replaced(v, change) for k, v in value.items()}
  if isinstance(value, list):
    return [replaced(v, change) for v in value]
  return change(value)


def without_numbers(results):
  return replaced(results, lambda v: v if isinstance(v, str) else None)


def interval(one, *names):
  centre, low, high = (f"{one[name]:.3f}" for name in names)
  return f"{centre} [{low}, {high}]"


def points(axes):
  """Markers at a single place, as (x, y, marker, colour), from the top."""
  found = [
    (*line.get_xydata()[0], line.get_marker(), to_hex(line.get_color()))
    for line in axes.lines
    if len(line.get_xydata()) == 1
  ]
  return sorted(found, key=lambda point: point[1])


def curve(axes, label):
  (line,) = [one for one in axes.lines if one.get_label() == label]
  return line.get_xydata()


def legend(figure):
  return [text.get_text() for text in figure.legends[0].get_texts()]


def fits(figure):
  """Whether texts are within the figure and clear of one another."""
  figure.canvas.draw()
  renderer = figure.canvas.get_renderer()
  texts = [figure._supxlabel, figure._supylabel, *figure.legends]
  for axes in figure.axes:
    low, high = sorted(axes.get_ylim())
    texts += [axes.title, axes.xaxis.label]
    texts += [
      label
      for label in axes.get_yticklabels()
      if low <= label.get_position()[1] <= high
    ]
  boxes = [text.get_window_extent(renderer) for text in filter(None, texts)]
  boxes = [box for box in boxes if box.width > 1]
  within = all(
    min(box.x0, box.y0) >= -1
    and box.x1 <= figure.bbox.width + 1
    and box.y1 <= figure.bbox.height + 1
    for box in boxes
  )
  pairs = itertools.combinations(boxes, 2)
  return within and not any(a.overlaps(b) for a, b in pairs)


def test_the_summary_has_a_line_for_each_map_of_each_route():
  results = study()
  text = cross_model.summary(results)
  lines = text.split("\n")
  assert lines[1] == "Models: gemma, smollm2"
  for one, splice in zip(results["rows"], results["splice"], strict=True):
    assert (one["route"], one["map"]) == (splice["route"], splice["map"])
    start = lines.index(one["route"])
    table = lines[start + 2 : start + 2 + len(ROLES)]
    (line,) = [s for s in table if s.split()[0] == one["map"]]
    assert re.split(r"  +", line.strip()) == [
      one["map"],
      one["role"],
      format_value(one["fvu"]),
      format_value(one["fvu_decoded"]),
      interval(one, "r2_pooled", "r2_low", "r2_high"),
      interval(one, "delta_ridge", "delta_ridge_low", "delta_ridge_high"),
      interval(splice, "recovered", "low", "high"),
    ]
  assert lines[-3:] == ["VERDICTS", *(f"  {s}" for s in results["verdicts"])]
  for title in ("Coverage", "Matched latents", "Layers never seen"):
    assert title in lines
  assert re.search(r"own less stitching +0\.124 \[0\.094, 0\.154\] +yes", text)


def test_the_summary_of_nothing_says_so():
  lines = cross_model.summary({}).split("\n")
  assert lines == ["ACROSS MODELS", "Models: none", "", "VERDICTS", "  none"]


def test_a_difference_below_a_thousandth_is_not_shown_as_none():
  table = numbers.make(
    "", {"effect": ""}, [{"effect": 4.2e-5, "low": -3e-5, "high": 0.0}]
  )
  assert table.rows == [{"effect": "4.2e-05 [-3.0e-05, 0.000]"}]


def test_routes_are_grouped_by_the_direction_between_models():
  results = study()
  assert numbers.directions(results) == {
    "gemma > smollm2": ["gemma:5 > smollm2:9", "gemma:10 > smollm2:18"],
    "smollm2 > gemma": ["smollm2:9 > gemma:5", "smollm2:18 > gemma:10"],
  }
  routes = numbers.directions(results)["smollm2 > gemma"]
  codes, splices = numbers.of_direction(results, routes)
  assert [*codes.columns.values()] == ["map", "role", "9 > 5", "18 > 10"]
  for table, part, key in (
    (codes, "rows", "r2_pooled"),
    (splices, "splice", "recovered"),
  ):
    for one in results[part]:
      if one["route"] in routes:
        (shown,) = [r for r in table.rows if r["map"] == one["map"]]
        assert shown[one["route"]] == format_value(one[key])


def test_the_page_holds_the_numbers_of_the_study(made):
  _, results, page, _ = made
  cells = page.cells
  for one in results["rows"]:
    for name in numbers.MAPS:
      if name in ("r2_pooled", "delta_ridge", "delta_token"):
        short = name.removesuffix("_pooled")
        ends = (f"{short}_low", f"{short}_high")
        assert interval(one, name, *ends) in cells
      else:
        assert format_value(one[name]) in cells
  for one in results["splice"]:
    assert interval(one, "recovered", "low", "high") in cells
    assert format_value(one["delta_ce"]) in cells
  for one in results["causal"]:
    for point in one["inject"] + one["substitution"]:
      name = "effect" if "effect" in point else "recovered"
      assert interval(point, name, "low", "high") in cells
      assert format_value(point["kl"]) in cells
  for one in results["unseen"]:
    assert interval(one, "fvu", "low", "high") in cells
  for text in ("81.2%", "73.8%", "90.5%", "66.2%", "131,072", "heldout"):
    assert text in cells
  for text in ("0.2135", "31.75", "0.0175", "16,384"):  # dictionaries
    assert text in cells
  for text in ("1433", "611", "0.437", "0.0781", "1501", "sinkhorn"):
    assert text in cells
  for text in ("0.610 [0.580, 0.640]", "0.0625", "0.00125", "0.8765"):
    assert text in cells
  assert {"0.00321", "fit.", "rank", "64", *results["verdicts"]} <= cells
  assert "Of <all> latents." in cells


def test_the_page_begins_with_verdicts_and_ends_with_provenance(made):
  _, _, page, html = made
  ids = [attributes["id"] for attributes in page.all("section")]
  assert ids == [
    "verdicts",
    "directions",
    "tables",
    "pictures",
    "features",
    "definitions",
    "results",
    "config",
  ]
  assert html.index('id="config"') < html.index("Versions: jax 0.10.2")
  assert "Seeds: study 7" in html


def test_the_page_opens_offline(made):
  _, _, page, html = made
  for _, attributes in page.tags:
    assert attributes.get("src", "data:").startswith("data:")
    assert attributes.get("href", "#").startswith("#")
  assert not re.search(r"https?://|url\(|@import", html)
  ids = [a["id"] for _, a in page.tags if "id" in a]
  assert len(ids) == len(set(ids))
  assert {a["href"][1:] for a in page.all("a")} == set(ids)
  (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
  assert policy["content"].startswith("default-src 'none'")


def test_pictures_are_written_and_embedded_with_their_captions(made):
  folder, _, page, _ = made
  paths = {path.stem: path for path in (folder / "plots").iterdir()}
  assert set(paths) == set(PICTURES)
  images = page.all("img")
  assert [image["alt"] for image in images] == [
    cross_model.CAPTIONS[name] for name in PICTURES
  ]
  for name, image in zip(PICTURES, images, strict=True):
    data = image["src"].removeprefix("data:image/png;base64,")
    assert base64.b64decode(data) == paths[name].read_bytes()
    assert imread(paths[name]).shape[1] == round(plots.WIDTH * plots.DPI)


def test_matched_features_stand_side_by_side_in_shades(made):
  _, _, page, html = made
  assert html.count('<div class="pair">') == 2
  pair = html[html.index('<div class="pair">') :]
  pair = pair[: pair.index("</article>")]
  left, right = pair.split("smollm2:blocks.9.resid_post, latent 45,678")
  assert "gemma:blocks.5.resid_post, latent 123" in left
  spans = re.findall(
    r"<span[^>]*--a:(\S+)\" title=\"(\S+)\">(.*?)</span>", left
  )
  assert [(a, value) for a, value, _ in spans] == [
    ("1.000", "4"),
    ("0.250", "1"),
  ]
  spans = re.findall(r"--a:(\S+)\" title=\"(\S+)\">(.*?)</span>", right)
  assert spans == [("0.250", "2.5", "cat"), ("1.000", "10", "s")]
  assert len(page.all("span", **{"class": "peak"})) == 4


def test_texts_from_anywhere_are_escaped(tmp_path, made):
  _, _, page, _ = made
  assert page.cells >= {NASTY}
  results = study(names=(NASTY, f"b{NASTY}"), layers=((1, 2),))
  results |= {
    "verdicts": [NASTY],
    "definitions": {NASTY: NASTY, "fvu": NASTY},
    "versions": {NASTY: NASTY},
    "seeds": {NASTY: NASTY},
  }
  page, html = written(tmp_path, results, {NASTY: NASTY})
  assert "<script" not in html
  assert not any("onload" in attributes for _, attributes in page.tags)


def test_rows_of_markdown_have_a_cell_for_each_title(made):
  folder, results, _, _ = made
  lines = (folder / "table.md").read_text("utf-8").split("\n")
  assert lines[0] == "# Across models: gemma, smollm2"
  assert lines[2:4] == [f"- {results['verdicts'][0]}", "- No &lt;b>."]
  size = None
  for line in lines:
    bars = len(re.findall(r"(?<!\\)\|", line))
    size = None if not bars else size or bars
    assert bars == (size or 0)
  text = "\n".join(lines)
  assert r"| gemma:5 \| smollm2:9 | across | 2000 | 1433 | 611 |" in text
  for one in results["rows"]:
    assert interval(one, "r2_pooled", "r2_low", "r2_high") in text


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_empty_reads_as_one_that_is_missing(part):
  results = study(layers=((5, 9),))
  empty = results | {part: type(results[part])()}
  missing = {k: v for k, v in results.items() if k != part}
  for text in (cross_model.summary, lambda r: cross_model._markdown(r, "")):
    assert text(empty) == text(missing)
  assert cross_model._features(empty) == cross_model._features(missing)


@pytest.mark.parametrize("first", [0, 1])
def test_missing_parts_do_not_break_the_rest(tmp_path, first):
  results = study(layers=((5, 9),))
  for part in PARTS[first::2]:
    del results[part]
  written(tmp_path, results)
  pictures = {
    "rows": {"codes", "over_ridge"},
    "causal": {"inject", "substitution"},
  }
  kept = {path.stem for path in (tmp_path / "plots").glob("*")}
  assert kept == {
    picture
    for part in PARTS[1 - first :: 2]
    for picture in pictures.get(part, {part}) & set(PICTURES)
  }


def test_nothing_and_no_numbers_still_make_a_page(tmp_path):
  page, _ = written(tmp_path / "nothing", {})
  assert "Across models:" in page.cells
  results = without_numbers(study(layers=((5, 9),)))
  page, _ = written(tmp_path / "none", results)
  assert not list((tmp_path / "none/plots").glob("*"))
  text = cross_model.summary(results)
  for said in (*page.texts, text, (tmp_path / "none/table.md").read_text()):
    assert not re.search(r"\b(nan|None)\b", said)
  assert "hypernetwork_unseen" in page.cells


def test_dots_show_values_by_role_and_floors_and_ceilings_as_lines():
  results = study()
  keys = ("r2_pooled", "r2_low", "r2_high")
  figure = figures.dots_figure(results["rows"], keys, x="R²")
  assert len(figure.axes) == 4
  names = [name for name, role in ROLES.items() if role in figures.DOTS]
  for axes, route in zip(
    figure.axes, dict.fromkeys(r["route"] for r in results["rows"]), strict=True
  ):
    assert axes.get_title() == route
    own = {r["map"]: r for r in results["rows"] if r["route"] == route}
    assert points(axes) == [
      (
        own[name]["r2_pooled"],
        y,
        figures.DOTS[ROLES[name]]["marker"],
        to_hex(figures.DOTS[ROLES[name]]["color"]),
      )
      for y, name in enumerate(names)
    ]
    bars = [
      tuple(line.get_xdata())
      for line in axes.lines
      if len(line.get_xdata()) == 2 and np.ptp(line.get_ydata()) == 0
    ]
    assert bars == [(own[n]["r2_low"], own[n]["r2_high"]) for n in names]
    for name in ("mean", "token", "position", "other_seed", "own"):
      at = curve(axes, f"{ROLES[name]}: {name}")[:, 0]
      assert set(at) == {own[name]["r2_pooled"]}
    bands = {(p.get_x(), p.get_x() + p.get_width()) for p in axes.patches}
    np.testing.assert_allclose(
      sorted(bands),
      sorted(
        (own[n]["r2_low"], own[n]["r2_high"]) for n in ROLES if n not in names
      ),
    )
  labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
  assert labels == names
  assert {"linear", "network", "control", "ceiling: own"} <= set(legend(figure))


def test_what_leaves_the_axis_becomes_an_arrow():
  rng = np.random.default_rng(0)
  one = row("a:1 > b:2", "cca", rng) | {"r2_pooled": -40.0, "r2_low": None}
  one["r2_high"] = 0.5
  keys = ("r2_pooled", "r2_low", "r2_high")
  (axes,) = figures.dots_figure([one], keys, x="").axes
  left, _ = axes.get_xlim()
  assert left == pytest.approx(-0.55)
  assert [point[:3] for point in points(axes)] == [(left, 0, "<")]


def test_networks_stand_beside_zero_and_are_open_where_they_saw_nothing():
  results = study()
  figure = figures.over_ridge_figure(results["rows"])
  (axes,) = figure.axes
  networks = [r for r in results["rows"] if r["role"] == "network"]
  found = points(axes)
  assert {x for x, *_ in found} == {r["delta_ridge"] for r in networks}
  routes = list(dict.fromkeys(r["route"] for r in networks))
  for r in networks:
    ((_, y, _, _),) = [p for p in found if p[0] == r["delta_ridge"]]
    assert abs(y - routes.index(r["route"])) < 0.4
    (line,) = [n for n in axes.lines if [*n.get_xdata()] == [r["delta_ridge"]]]
    assert (line.get_markerfacecolor() == "white") == r["unseen"]
  assert [0, 0] in [list(line.get_xdata()) for line in axes.lines]
  assert legend(figure)[:3] == [
    name for name, role in ROLES.items() if role == "network"
  ]


def test_matched_correlations_are_steps_to_1_beside_the_null():
  one = matched("a:1 | b:2", np.random.default_rng(0)) | {
    "r": [0.1, None, 0.4, 0.4, 0.9],
    "null": [0.05],
  }
  figure = figures.matches_figure([one, one | {"pair": "c", "r": None}])
  (axes,) = figure.axes
  at, share = curve(axes, "matched latents").T
  np.testing.assert_allclose(at, [0.1, 0.1, 0.4, 0.4, 0.9])
  np.testing.assert_allclose(share, [0, 0.25, 0.5, 0.75, 1])
  np.testing.assert_allclose(curve(axes, "null"), [[0.05, 0], [0.05, 1]])
  assert axes.get_title() == "a:1 | b:2\n611 of 2,000 clear"


def test_doses_and_substitutions_have_a_line_for_each_kind():
  causal = [effects(route, np.random.default_rng(0)) for route in ("a", "b")]
  causal[1]["inject"][0]["effect"] = None
  figure = figures.inject_figure(causal)
  native, transferred = (
    curve(figure.axes[0], name) for name in ("native", "transferred")
  )
  np.testing.assert_allclose(native[:, 0], [0.5, 1, 2, 4])
  np.testing.assert_allclose(native[:, 1], [0.25, 0.5, 1, 2])
  np.testing.assert_allclose(transferred[:, 1], [0.2, 0.4, 0.8, 1.6])
  assert len(curve(figure.axes[1], "native")) == 3
  bars = figure.axes[0].collections[0].get_segments()
  np.testing.assert_allclose(bars[2], [[2, 0.95], [2, 1.05]])
  figure = figures.substitution_figure(causal)
  assert legend(figure) == ["matched", "dealt", "zero", "mean"]
  for axes in figure.axes:
    assert axes.get_xscale() == "log"
    np.testing.assert_allclose(
      curve(axes, "matched"), [[10, 0.85], [100, 0.75], [1000, 0.65]]
    )


@pytest.mark.parametrize(
  ("layers", "names"),
  [(((1, 2),), ("a", "b")), (((1, 2), (3, 4)), (f"{LONG}a", f"{LONG}b"))],
)
def test_texts_of_pictures_keep_apart(layers, names):
  drawn = list(cross_model._drawn(study(layers, names)))
  assert [name for name, _, _ in drawn] == [*PICTURES]
  for name, _, figure in drawn:
    assert fits(figure), name


def test_texts_of_twelve_routes_keep_apart():
  layers = tuple((i, i + 10) for i in range(10, 16))
  results = study(layers, ("gemma-3-270m-it", "SmolLM2-135M-Instruct"))
  keys = ("r2_pooled", "r2_low", "r2_high")
  assert fits(figures.dots_figure(results["rows"], keys, x="R²"))
  assert fits(figures.over_ridge_figure(results["rows"]))


def test_more_routes_than_a_picture_holds_go_into_the_next(
  tmp_path, monkeypatch
):
  assert figures.MOST_PANELS == 12
  monkeypatch.setattr(figures, "MOST_PANELS", 3)
  page, _ = written(tmp_path, {"splice": study()["splice"]})
  assert {path.name for path in (tmp_path / "plots").iterdir()} == {
    "splice.png",
    "splice_2.png",
  }
  first, second = (image["alt"] for image in page.all("img"))
  assert first.endswith(" Routes 1 to 3 of 4.")
  assert second.endswith(" Routes 4 to 4 of 4.")


def test_the_same_results_give_the_same_bytes(tmp_path, made):
  folder, results, _, _ = made
  written(tmp_path, results, {"fit": {"rank": 64}})
  files = [path for path in folder.rglob("*") if path.is_file()]
  assert len(files) == len(PICTURES) + 2
  for path in files:
    other = tmp_path / path.relative_to(folder)
    assert path.read_bytes() == other.read_bytes()
