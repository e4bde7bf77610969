"""The pictures of a store show the numbers of its statistics."""

import functools

import jax
import numpy as np
import pytest
from matplotlib.image import imread

from gemma_jax.activations.statistics import Statistics, block
from gemma_jax.report import activations, plots

pytestmark = pytest.mark.usefixtures("quick_compiles")

D, T, N = 24, 16, 1_024


@functools.cache
def summary(seed=0, *, covariance=True, rows=N):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(N, D)) * np.geomspace(1, 5, D) + seed
  x[100] *= 40
  x[:, 3] = 7  # constant
  statistics = Statistics(
    D, positions=T, sources=("a",), covariance=covariance, chunk=128
  )
  run = jax.jit(block, static_argnames="covariance")
  for start in range(0, rows, 128):
    at = np.arange(start, start + 128, dtype=np.int32)
    sums = run(
      x[at].astype(np.float32), np.ones(128, bool), covariance=covariance
    )
    statistics.update(
      jax.device_get(sums),
      first_row=start,
      position=np.maximum(at % T, 1),  # nothing at position 0
      source=0 * at,
      document=at,
      token=at,
    )
  return statistics.summary()


def legend(axes):
  return [t.get_text() for t in axes.get_legend().get_texts()]


def test_norms_by_position_are_drawn_where_there_are_rows():
  sites = {"one": summary(0), "two": summary(1)}
  (axes,) = activations.norm_by_position_figure(sites).axes
  for line, s in zip(axes.lines, sites.values(), strict=True):
    np.testing.assert_array_equal(line.get_xdata(), np.arange(1, T))
    means = s["norm_by_position"]["mean"][1:]
    np.testing.assert_allclose(line.get_ydata(), means)
  assert legend(axes) == ["one", "two"]
  bands = [band.get_paths()[0].vertices[:, 1] for band in axes.collections]
  table = sites["one"]["norm_by_position"]
  top = np.add(table["mean"][1:], table["std"][1:]).max()
  assert bands[0].max() == pytest.approx(top)


@pytest.mark.parametrize(("first", "scale"), [(0, "symlog"), (1, "log")])
def test_position_zero_has_a_place_where_it_has_rows(first, scale):
  table = {"mean": [9.0, 2.0, 1.0], "std": [1.0, 1.0, 1.0]}
  table = {k: [None] * first + v[first:] for k, v in table.items()}
  sites = {"one": {"norm_by_position": table}}
  (axes,) = activations.norm_by_position_figure(sites).axes
  assert axes.get_xscale() == scale
  assert axes.get_xlim()[0] < first < 2 < axes.get_xlim()[1]


def test_the_norms_histogram_holds_every_row_and_marks_the_outliers():
  s = summary()
  top, below = activations.norms_figure({"one": s}).axes
  (outline,) = top.patches
  values, edges, _ = outline.get_data()
  assert values.sum() == pytest.approx(1)
  np.testing.assert_allclose(np.log2(edges) * 8 % 1, 0, atol=1e-9)
  peak = edges[values.argmax() : values.argmax() + 2]
  assert peak[0] < s["norm_quantiles"]["0.75"]
  assert peak[1] > s["norm_quantiles"]["0.25"]
  *_, median, dots = below.lines
  assert median.get_xdata() == [s["norm_quantiles"]["0.5"]]
  largest = s["outliers"]["largest"][0]
  assert largest["row"] == 100
  assert max(dots.get_xdata()) == largest["norm"]
  assert len(dots.get_xdata()) == 32
  assert f"(row 100, z = {largest['z']:.3g})" in legend(top)[0]


def test_dimensions_are_ranked_and_the_first_is_named():
  s = summary()
  figure = activations.dimensions_figure({"one": s, "two": summary(1)})
  deviation, ratio, kurtosis = figure.axes
  dims = {name: np.array(v, float) for name, v in s["dims"].items()}
  spread = np.delete(np.sqrt(dims["variance"]), 3)
  np.testing.assert_allclose(
    deviation.lines[0].get_ydata(), np.sort(spread)[::-1]
  )
  far = np.abs(np.delete(dims["mean"], 3)) / spread
  np.testing.assert_allclose(ratio.lines[0].get_ydata(), np.sort(far)[::-1])
  tails = np.delete(dims["kurtosis"], 3)
  np.testing.assert_allclose(
    kurtosis.lines[0].get_ydata(), np.sort(tails)[::-1]
  )
  first = int(np.argmax(dims["variance"]))
  assert legend(deviation)[0].startswith(f"dim {first}: ")
  (sites,) = figure.legends
  assert [t.get_text() for t in sites.get_texts()] == ["one", "two"]


def test_drift_is_drawn_from_the_second_chunk_on():
  s = summary()
  shift, ratio = activations.drift_figure({"one": s}).axes
  np.testing.assert_array_equal(
    shift.lines[0].get_xdata(), np.arange(1, 8) * 128
  )
  drift = s["drift"]
  np.testing.assert_allclose(shift.lines[0].get_ydata(), drift["shift"][1:])
  np.testing.assert_allclose(shift.lines[1].get_ydata(), drift["chance"][1:])
  np.testing.assert_allclose(
    ratio.lines[0].get_ydata(), drift["norm_ratio"][1:]
  )
  assert f"from row {drift['largest']['first_row']:,}" in legend(shift)[0]


def test_one_chunk_of_rows_has_no_drift_to_draw():
  (axes,) = activations.drift_figure({"one": summary(rows=128)}).axes
  assert "no drift" in axes.texts[0].get_text()


def test_the_spectrum_is_of_shares_and_of_the_sites_that_have_one():
  sites = {"with": summary(), "without": summary(covariance=False)}
  (axes,) = activations.spectrum_figure(sites).axes
  (line,) = axes.lines
  values = np.array(sites["with"]["eigenvalues"])
  kept = values[values > 1e-8 * values.sum()]
  assert len(kept) == D - 1  # one dim is constant
  np.testing.assert_allclose(line.get_ydata(), kept / values.sum())
  ratio = sites["with"]["participation_ratio"]
  assert legend(axes) == [
    f"with: participation ratio {ratio:.3g} of 24",
    "without: no covariance",
  ]


@pytest.mark.parametrize("sites", [1, 4, 7])
def test_every_picture_is_written_for_few_sites_and_for_many(sites, tmp_path):
  statistics = {f"blocks.{i}.mlp_out": summary(i) for i in range(sites)}
  paths = activations.write(statistics, tmp_path / "deep")
  assert [path.name for path in paths] == [
    "norm_by_position.png",
    "norms.png",
    "dimensions.png",
    "drift.png",
    "spectrum.png",
  ]
  for path in paths:
    assert imread(path).shape[1] == round(plots.WIDTH * plots.DPI)


def test_without_covariance_or_rows_the_rest_is_still_written(tmp_path):
  statistics = {
    "empty": summary(covariance=False, rows=0),
    "some": summary(covariance=False),
  }
  names = [p.name for p in activations.write(statistics, tmp_path)]
  assert "spectrum.png" not in names
  assert len(names) == 4
  only = {"empty": statistics["empty"]}
  assert len(activations.write(only, tmp_path)) == 4
  with pytest.raises(ValueError, match="no site"):
    activations.write({}, tmp_path)
