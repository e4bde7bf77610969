"""The text, the pictures and the page show the numbers of the study."""

import csv
import itertools
import json
import statistics

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread

from gemma_jax.report import convergence, plots
from gemma_jax.report import convergence_plots as figures

CAPABILITIES = ("truthfulness", "safety", "instructions")
MEASURES = {
  "behaviour": "jsd",
  "activations": "linear_cka",
  "features": "feature_matching",
}
LONG = "somebody/a-very-long-name-of-a-model-" + "x" * 300


def row(a, b, level, capability="all", **changes):
  values = {
    "a": a,
    "b": b,
    "level": level,
    "measure": MEASURES[level],
    "capability": capability,
    "primary": True,
    "prompts": 40,
    "value": 0.75,
    "low": 0.7,
    "high": 0.8,
    "null": 0.125,
    "null_p": 0.005,
    "floor": 0.25,
    "identity": 1.0,
    "share": 0.5,
    "share_low": 0.4,
    "share_high": 0.6,
    "p": 0.001,
    "p_corrected": 0.0025,
    "verdict": "convergent",
  }
  return values | changes


def study(models=4, levels=figures.LEVELS, maps=2, seed=0, names=None):
  """Results of a study of all pairs of so many models."""
  rng = np.random.default_rng(seed)
  names = names or [f"model-{i}" for i in range(models)]
  pairs = list(itertools.combinations(names, 2))
  rows = []
  for (a, b), level in itertools.product(pairs, levels):
    for capability in ("all", *CAPABILITIES):
      share = rng.uniform(0.2, 0.9)
      rows.append(
        row(
          a,
          b,
          level,
          capability,
          share=share,
          share_low=share - 0.1,
          share_high=share + 0.05,
          verdict=str(rng.choice([*figures.VERDICTS])),
        )
      )
  rows.append(row(*pairs[0], levels[0], primary=False, measure="top1"))
  return {
    "models": {name: {"layers": 4} for name in names},
    "margin": 0.1,
    "rows": rows,
    "maps": [one_map(*pairs[i % len(pairs)], seed=i) for i in range(maps)],
    "refused": [
      {
        "a": names[0],
        "b": names[1],
        "measure": "sae_jaccard",
        "reason": "two dictionaries <of other widths>",
      }
    ],
    "definitions": {"share": "Of the way.", "jsd": "Jensen and Shannon's."},
    "seed": 3,
  }


def one_map(a="gemma", b="noise-0.1", *, shape=(5, 7), seed=0, **changes):
  rng = np.random.default_rng(seed)
  scores = rng.uniform(0, 0.8, shape)
  best = [3, 2]
  scores[tuple(best)] = 0.9
  values = {
    "a": a,
    "b": b,
    "measure": "linear_cka",
    "layers_a": list(range(shape[0])),
    "layers_b": list(range(10, 10 + shape[1])),
    "scores": scores.tolist(),
    "calibrated": np.clip(scores - 0.25, 0, 1).tolist(),
    "p": np.full(shape, 0.015).tolist(),
    "threshold": 0.5,
    "best": best,
    "null_best": rng.uniform(0.2, 0.55, 200).tolist(),
  }
  return values | changes


def replaced(results, **changes):
  """The same study with other primary rows on all prompts."""
  rows = [
    r | changes if r["primary"] and r["capability"] == "all" else r
    for r in results["rows"]
  ]
  return results | {"rows": rows}


def points(axes):
  """Markers at a single place, as (x, y, marker, colour), from the top."""
  found = [
    (*line.get_xydata()[0], line.get_marker(), to_hex(line.get_color()))
    for line in axes.lines
    if len(line.get_xydata()) == 1
  ]
  return sorted(found, key=lambda point: point[1])


def bars(axes):
  """Horizontal lines as (from, to, y)."""
  data = [line.get_xydata() for line in axes.lines]
  return [
    (d[0, 0], d[1, 0], d[0, 1])
    for d in data
    if len(d) == 2 and d[0, 1] == d[1, 1]
  ]


def upright(axes):
  """Places of the vertical lines."""
  data = [np.asarray(line.get_xdata(), float) for line in axes.lines]
  ends = [line.get_ydata() for line in axes.lines]
  return [
    d[0]
    for d, y in zip(data, ends, strict=True)
    if len(d) == 2 and d[0] == d[1] and list(y) == [0, 1]
  ]


def drawn(figure):
  """The figure once laid out; a warning of the layout would be an error."""
  figure.canvas.draw()
  return figure


def legend(figure):
  return [text.get_text() for text in figure.legends[0].get_texts()]


def inside(figure):
  """Whether words are within the figure, and none of it over its panels."""
  renderer = figure.canvas.get_renderer()
  texts = [figure._suptitle, figure._supylabel, *figure.legends]
  for text in filter(None, texts):
    box = text.get_window_extent(renderer)
    if any(box.overlaps(a.get_tightbbox(renderer)) for a in figure.axes):
      return False
  for axes in figure.axes:
    texts += [axes.title, axes._left_title, axes.xaxis.label]
    texts += axes.get_yticklabels()
  for text in filter(None, texts):
    box = text.get_window_extent(renderer)
    if box.width and not (
      box.x0 >= -1
      and box.x1 <= figure.bbox.width + 1
      and box.y0 >= -1
      and box.y1 <= figure.bbox.height + 1
    ):
      return False
  return True


def test_the_summary_has_a_line_for_each_level_and_pair():
  results = study()
  lines = convergence.summary(results).split("\n")
  assert "Models: 4 (model-0, model-1, model-2, model-3)" in lines
  assert "Prompts: 40" in lines
  assert "Refused comparisons: 1" in lines
  starts = [lines.index(level.upper()) for level in figures.LEVELS]
  assert starts == sorted(starts)
  for level, start in zip(figures.LEVELS, starts, strict=True):
    own = [
      r
      for r in results["rows"]
      if r["level"] == level and r["capability"] == "all" and r["primary"]
    ]
    assert len(own) == 6
    for r, line in zip(own, lines[start + 2 :], strict=False):
      assert f"{r['a']} and {r['b']}  " in line
      assert f"  {MEASURES[level]}  0.750 [0.700, 0.800]  0.125  0.250" in line
      ends = f"[{r['share_low']:.3f}, {r['share_high']:.3f}]"
      assert f"  {r['share']:.3f} {ends}" in line
      assert line.endswith(f"  {r['verdict']}")
      assert "  0.0025  " in line
  assert "top1" not in "\n".join(lines)


def test_the_summary_ends_a_level_with_mean_deviation_and_range():
  results = study()
  shares = [
    r["share"]
    for r in results["rows"]
    if (r["level"], r["capability"], r["primary"]) == ("features", "all", True)
  ]
  mean, deviation = statistics.mean(shares), statistics.stdev(shares)
  assert convergence.summary(results).split("\n")[-2:] == [
    f"  Average share: {mean:.3f} ± {deviation:.3f}",
    f"  Range: {min(shares):.3f} to {max(shares):.3f}",
  ]


def test_the_summary_of_one_pair_or_of_no_share_has_no_mean():
  text = convergence.summary(study(2, levels=("activations",)))
  assert "ACTIVATIONS" in text
  assert "BEHAVIOUR" not in text
  assert "Average" not in text
  none = {"share": None, "share_low": None, "share_high": None}
  results = replaced(study(), **none, null_p=None, null=None, prompts=12)
  text = convergence.summary(results)
  assert "Average" not in text
  assert "Prompts: 12\n" in text
  assert "nan" not in text
  assert "None" not in text


def test_different_numbers_of_prompts_are_given_as_a_range():
  results = study(2)
  results["rows"][0]["prompts"] = 35
  assert "Prompts: 35 to 40\n" in convergence.summary(results)


def test_a_heat_map_has_both_scores_on_one_scale_and_its_best_pair():
  given = one_map(p=np.linspace(0, 1, 35).reshape(5, 7).tolist())
  figure = drawn(figures.heat_map_figure(given))
  raw, calibrated, bar = figure.axes
  for axes, name in ((raw, "scores"), (calibrated, "calibrated")):
    (image,) = axes.images
    np.testing.assert_array_equal(image.get_array(), given[name])
    assert image.get_clim() == (0, 1)
    assert image.origin == "lower"
    (ring,) = axes.lines
    np.testing.assert_array_equal(ring.get_xydata(), [[2, 3]])
  assert raw.get_title() == "scores, 0.900 at the ring"
  assert calibrated.get_title() == "calibrated, 0.650 at the ring"
  assert raw.get_xlabel() == "layer of noise-0.1"
  assert raw.get_ylabel() == "layer of gemma"
  assert figure.get_suptitle() == (
    f"linear_cka: best at layers 3 and 12, p = {given['p'][3][2]:.4g}"
  )
  assert bar.get_ylim() == (0, 1)


@pytest.mark.parametrize(
  ("shape", "y", "x"), [((4, 9), 4, 9), ((18, 30), 9, 6), ((10, 80), 5, 8)]
)
def test_ticks_of_a_heat_map_are_thinned_and_keep_their_layers(shape, y, x):
  figure = drawn(figures.heat_map_figure(one_map(shape=shape)))
  axes = figure.axes[0]
  assert (len(axes.get_yticks()), len(axes.get_xticks())) == (y, x)
  for at, text in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True):
    assert text.get_text() == str(int(at) + 10)


def test_a_heat_map_survives_missing_scores_and_long_names():
  given = one_map(LONG + "a", LONG + "b")
  given["scores"][0][0], given["scores"][1][1] = None, -0.2
  figure = drawn(figures.heat_map_figure(given))
  values = figure.axes[0].images[0].get_array()
  assert np.ma.getmaskarray(values).sum() == 1 or np.isnan(values).sum() == 1
  assert inside(figure)


def test_a_forest_has_a_panel_for_a_level_and_a_line_for_a_pair():
  results = study()
  figure = drawn(figures.forest_figure(results))
  assert [axes.get_title(loc="left") for axes in figure.axes] == [
    f"{level} ({measure})" for level, measure in MEASURES.items()
  ]
  for axes, level in zip(figure.axes, figures.LEVELS, strict=True):
    own = [
      r
      for r in results["rows"]
      if (r["level"], r["capability"], r["primary"]) == (level, "all", True)
    ]
    assert points(axes) == [
      (
        r["share"],
        y,
        figures.VERDICTS[r["verdict"]]["marker"],
        to_hex(figures.VERDICTS[r["verdict"]]["color"]),
      )
      for y, r in enumerate(own)
    ]
    assert bars(axes) == [
      (r["share_low"], r["share_high"], y) for y, r in enumerate(own)
    ]
    assert upright(axes) == [0, 1, 0.1, 0.9]
    assert [text.get_text() for text in axes.get_yticklabels()] == [
      f"{r['a']} and {r['b']}" for r in own
    ]
    # The first pair stands on top.
    assert axes.get_ylim()[0] > 5 > 0 > axes.get_ylim()[1]
  assert set(legend(figure)) == {
    *figures.VERDICTS,
    "0 floor, 1 identity",
    "margin of 0.1 from either",
  }


def test_intervals_are_cut_at_the_axis_and_arrows_say_so():
  results = replaced(
    study(2), share=0.5, share_low=-3.0, share_high=1.5, verdict="not shown"
  )
  axes = figures.forest_figure(results).axes[0]
  left, right = figures.SPAN
  assert bars(axes) == [(left, right, 0)]
  found = {(x, marker) for x, _, marker, _ in points(axes)}
  assert found == {(0.5, "D"), (left, "<"), (right, ">")}


def test_a_share_beyond_the_axis_is_an_arrow_without_a_point():
  results = replaced(study(2), share=-0.9, share_low=-1.0, share_high=-0.8)
  axes = figures.forest_figure(results).axes[0]
  assert [point[:3] for point in points(axes)] == [(-0.25, 0, "<")]


def test_a_share_without_an_interval_is_a_point():
  results = replaced(study(2), share=0.7, share_low=None, share_high=None)
  axes = figures.forest_figure(results).axes[0]
  assert [point[:2] for point in points(axes)] == [(0.7, 0)]
  assert bars(axes) == [(0.7, 0.7, 0)]


def test_pairs_without_a_share_and_levels_without_pairs_are_left_out():
  results = study(3, levels=("behaviour", "features"))
  results["rows"][0]["share"] = None
  figure = drawn(figures.forest_figure(results))
  assert [len(points(axes)) for axes in figure.axes] == [2, 3]
  labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
  assert labels == ["model-0 and model-2", "model-1 and model-2"]
  assert figures.forest_figure(replaced(study(), share=None)) is None


@pytest.mark.parametrize("models", [2, 6])
@pytest.mark.parametrize("long", [False, True])
def test_a_forest_of_1_or_15_pairs_keeps_its_lines_apart(models, long):
  names = [f"{LONG if long else 'model'}-{i}" for i in range(models)]
  figure = drawn(figures.forest_figure(study(names=names)))
  assert inside(figure)
  renderer = figure.canvas.get_renderer()
  for axes in figure.axes:
    boxes = [t.get_window_extent(renderer) for t in axes.get_yticklabels()]
    assert len(boxes) == models * (models - 1) // 2
    for upper, lower in itertools.pairwise(boxes):
      assert lower.y1 < upper.y0
    # Names must leave room for what they are names of.
    assert axes.get_window_extent(renderer).width > 0.4 * figure.bbox.width


def test_capabilities_have_a_colour_for_each_pair():
  results = study(3)
  figure = drawn(figures.capabilities_figure(results))
  assert [axes.get_title(loc="left") for axes in figure.axes] == [*MEASURES]
  assert legend(figure)[:3] == [
    "model-0 and model-1",
    "model-0 and model-2",
    "model-1 and model-2",
  ]
  for axes, level in zip(figure.axes, figures.LEVELS, strict=True):
    own = [
      r
      for r in results["rows"]
      if r["level"] == level and r["capability"] != "all"
    ]
    assert len(points(axes)) == len(bars(axes)) == len(own) == 9
    for r in own:
      number = ["01", "02", "12"].index(r["a"][-1] + r["b"][-1])
      (point,) = [p for p in points(axes) if p[0] == r["share"]]
      assert point[3] == to_hex(plots.COLOURS[number])
      place = CAPABILITIES.index(r["capability"])
      assert abs(point[1] - place) < 0.4
      assert (r["share_low"], r["share_high"], point[1]) in bars(axes)
  names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
  assert names == [*CAPABILITIES]
  assert figure.get_suptitle() == ""


def test_of_many_pairs_those_with_the_largest_spread_are_shown():
  results = study(6)
  wide = {("model-0", f"model-{i}") for i in range(1, 6)}
  wide.add(("model-4", "model-5"))
  for r in results["rows"]:
    if r["capability"] == "safety" and r["level"] == "features":
      r["share"] = -2.0 if (r["a"], r["b"]) in wide else 0.5
  figure = drawn(figures.capabilities_figure(results))
  assert figure.get_suptitle().startswith("6 of 15 pairs")
  shown = {tuple(t.split(" and ")) for t in legend(figure) if " and " in t}
  assert shown == wide
  assert inside(figure)


def test_without_capabilities_or_maps_there_is_no_such_figure():
  results = study()
  results["rows"] = [r for r in results["rows"] if r["capability"] == "all"]
  assert figures.capabilities_figure(results) is None
  assert figures.null_figure([]) is None


def test_long_names_stay_within_the_figure_of_capabilities():
  results = study(names=[f"{LONG}-{i}" for i in range(3)])
  for r in results["rows"]:
    if r["capability"] == "safety":
      r["capability"] = "a capability with a name of " + "y" * 100
  assert inside(drawn(figures.capabilities_figure(results)))


def test_nulls_have_a_histogram_the_threshold_and_the_observed_score():
  maps = [one_map(seed=i, threshold=0.5 + i / 100) for i in range(4)]
  figure = drawn(figures.null_figure(maps))
  assert len(figure.axes) == 4
  for axes, one in zip(figure.axes, maps, strict=True):
    assert sum(patch.get_height() for patch in axes.patches) == 200
    assert upright(axes) == [one["threshold"], 0.9]
    assert axes.get_title().endswith("\nlinear_cka")
  assert legend(figure) == ["null", "threshold", "observed"]
  # One under another: the fourth stands below the first.
  labels = [axes.get_xlabel() for axes in figure.axes]
  assert labels == ["", *["best score of a map"] * 3]
  assert inside(figure)


def test_more_than_twelve_nulls_are_cut_and_counted():
  maps = [one_map(f"{LONG}-{i}", LONG, seed=i) for i in range(15)]
  figure = drawn(figures.null_figure(maps))
  assert len(figure.axes) == 12
  assert figure.get_suptitle() == "The first 12 of 15 maps"
  assert inside(figure)


def test_file_names_of_maps_are_safe_and_distinct(tmp_path):
  named = [
    ("a/b", "c"),
    ("a b", "c"),
    ("a", "b_c"),
    ("A", "B_C"),
    ("../é", "c"),
  ]
  results = study(2, levels=("behaviour",)) | {
    "maps": [one_map(a, b) for a, b in [*named, (LONG, "c"), (LONG, "d")]]
  }
  convergence.write(tmp_path, results=results, config={})
  found = {p.name for p in (tmp_path / "plots").glob("map_*")}
  assert len({name.lower() for name in found}) == 7
  assert {name for name in found if len(name) < 100} == {
    "map_a_b_c_linear_cka.png",
    "map_a_b_c_linear_cka_2.png",
    "map_a_b_c_linear_cka_3.png",
    "map_A_B_C_linear_cka_4.png",
    "map_..___c_linear_cka.png",
  }
  assert all(len(name) < 255 for name in found)


def test_everything_is_written_and_the_page_tells_the_verdicts(tmp_path):
  results = json.loads(json.dumps(study(3)))
  page = convergence.write(
    tmp_path / "new", results=results, config={"margin": 0.1}
  )
  assert page == tmp_path / "new/report.html"
  assert {p.name for p in (tmp_path / "new/plots").iterdir()} == {
    "forest.png",
    "capabilities.png",
    "nulls.png",
    "map_model-0_model-1_linear_cka.png",
    "map_model-0_model-2_linear_cka.png",
  }
  for path in (tmp_path / "new/plots").iterdir():
    assert imread(path).shape[1] == round(plots.WIDTH * plots.DPI)
  html = page.read_text("utf-8")
  assert "Convergence of model-0, model-1, model-2" in html
  assert html.count("<img ") == 5
  whole = [
    r for r in results["rows"] if r["capability"] == "all" and r["primary"]
  ]
  for r in whole:
    label = f"<dt>{r['a']} and {r['b']}, {r['level']}</dt>"
    ends = f"[{r['share_low']:.3f}, {r['share_high']:.3f}]"
    text = f"share {r['share']:.3f} {ends} of the way"
    card = html[html.index(label) :][:300]
    assert r["verdict"] in card
    assert text in card
  assert "two dictionaries &lt;of other widths&gt;" in html
  assert "Of the way." in html
  assert "Jensen and Shannon" in html


def test_tables_hold_every_row_and_the_primary_ones(tmp_path):
  results = study(3)
  convergence.write(tmp_path, results=results, config={})
  with (tmp_path / "rows.csv").open(newline="") as file:
    read = list(csv.DictReader(file))
  assert len(read) == len(results["rows"]) == 37
  for back, r in zip(read, results["rows"], strict=True):
    assert float(back["share"]) == r["share"]
    assert back["verdict"] == r["verdict"]
  _, _, *lines = (tmp_path / "table.md").read_text("utf-8").splitlines()
  assert len(lines) == 36
  assert lines[1].startswith(
    "| behaviour | truthfulness | model-0 and model-1 | jsd | 0.750 [0.700, "
  )


def test_the_page_holds_the_first_maps_and_says_so(tmp_path, monkeypatch):
  assert convergence.MOST_MAPS == 24
  monkeypatch.setattr(convergence, "MOST_MAPS", 2)
  results = study(2, levels=("behaviour",), maps=4)
  html = convergence.write(tmp_path, results=results, config={}).read_text()
  assert len(list((tmp_path / "plots").glob("map_*.png"))) == 4
  assert html.count("<img ") == 3 + 2
  assert "2 more maps are only in the folder" in html


def test_a_study_of_little_still_has_its_page(tmp_path):
  results = replaced(study(2, levels=("activations",), maps=0), share=None)
  results["rows"] = [r for r in results["rows"] if r["capability"] == "all"]
  results["refused"] = []
  page = convergence.write(tmp_path, results=results, config={})
  assert "model-0 and model-1, activations" in page.read_text("utf-8")
  assert not list((tmp_path / "plots").glob("*.png"))


def test_the_same_results_give_the_same_bytes(tmp_path):
  for name in ("one", "two"):
    convergence.write(tmp_path / name, results=study(3), config={})
  files = [p for p in (tmp_path / "one").rglob("*") if p.is_file()]
  assert len(files) == 5 + 3
  for path in files:
    other = tmp_path / "two" / path.relative_to(tmp_path / "one")
    assert path.read_bytes() == other.read_bytes()
