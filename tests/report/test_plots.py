"""The pictures show the numbers that went in."""

import json

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from gemma_jax.report import plots

METRICS = [
  {"step": s, "tokens": 100 * s, "loss": 5 / s, "fvu": 1 / s, "l0": 9.0}
  for s in range(1, 11)
]


def labels(figure):
  return [axes.get_ylabel() for axes in figure.axes]


def bars(figure):
  return [patch.get_height() for patch in figure.axes[0].patches]


def legend(figure):
  return [t.get_text() for t in figure.axes[0].get_legend().get_texts()]


def test_training_curves_draw_the_logged_values_over_tokens():
  figure = plots.training_curves_figure(METRICS)
  assert labels(figure) == ["loss", "FVU", "L0 (latents per token)"]
  line = figure.axes[1].lines[0]
  np.testing.assert_array_equal(line.get_xdata(), np.arange(1, 11) * 100)
  np.testing.assert_allclose(line.get_ydata(), 1 / np.arange(1, 11))


def test_training_curves_skip_what_was_not_logged():
  rows = [{"step": 1, "loss": 2.0}, {"step": 2, "fvu": None}, {"step": 3}]
  rows += [{"step": 4, "loss": float("nan")}, {"step": 5, "loss": 1.0}]
  figure = plots.training_curves_figure(rows)
  assert labels(figure) == ["loss"]
  np.testing.assert_array_equal(figure.axes[0].lines[0].get_xdata(), [1, 5])
  assert figure.axes[0].get_xlabel() == "step"


def test_training_curves_of_an_empty_log_say_so():
  for rows in ([], [{"step": 3}]):
    (axes,) = plots.training_curves_figure(rows).axes
    assert "no metrics" in axes.texts[0].get_text()


def test_training_curves_read_what_a_jsonl_file_gives_back(tmp_path):
  rows = [json.loads(json.dumps(row)) for row in METRICS]
  path = plots.training_curves(rows, tmp_path / "deep" / "curves.png")
  assert imread(path).shape[1] == round(plots.WIDTH * plots.DPI)


def test_prefix_plot_draws_the_curve_and_each_baseline():
  figure = plots.fvu_prefixes_figure(
    [512, 1024, 4096],
    [0.5, 0.4, 0.3],
    {"mean predictor": 1.0, "ridge": 0.34, "absent": None},
  )
  (axes,) = figure.axes
  curve, mean, ridge = axes.lines
  np.testing.assert_array_equal(curve.get_xdata(), [512, 1024, 4096])
  np.testing.assert_array_equal(curve.get_ydata(), [0.5, 0.4, 0.3])
  assert set(mean.get_ydata()) == {1.0}
  assert set(ridge.get_ydata()) == {0.34}
  assert axes.get_xscale() == "log"
  assert axes.get_ylim()[0] == 0
  assert axes.get_ylim()[1] > 1
  assert legend(figure)[1:] == ["mean predictor: 1", "ridge: 0.34"]


def test_prefix_plot_asks_for_one_fvu_for_each_width():
  with pytest.raises(ValueError, match="2 widths and 1 FVUs"):
    plots.fvu_prefixes_figure([1, 2], [0.1])


def test_density_plot_keeps_dead_latents_apart():
  density = np.r_[np.zeros(7), 10.0 ** np.linspace(-4, -1, 50)]
  figure = plots.latent_density_figure(density, tokens=100_000)
  dead, *alive = bars(figure)
  assert dead == 7
  assert sum(alive) == 50
  patches = figure.axes[0].patches
  assert patches[0].get_x() + patches[0].get_width() < patches[1].get_x()
  np.testing.assert_allclose(figure.axes[0].lines[0].get_xdata(), -5)


@pytest.mark.parametrize(
  "density", [np.zeros(9), np.ones(9), np.r_[np.zeros(9000), 0.1]]
)
def test_density_plot_survives_extremes(density, tmp_path):
  dead, *alive = bars(plots.latent_density_figure(density, tokens=1000))
  assert dead == (density == 0).sum()
  assert sum(alive) == (density > 0).sum()
  path = plots.latent_density(density, tmp_path / "a.png", tokens=1000)
  assert imread(path).std() > 0


def test_density_plot_refuses_counts():
  with pytest.raises(ValueError, match="divide counts by tokens"):
    plots.latent_density_figure(np.array([3.0, 0.0]), tokens=10)
  with pytest.raises(ValueError, match="tokens >= 1"):
    plots.latent_density_figure(np.array([0.5]), tokens=0)


def test_norm_histogram_accounts_for_every_vector():
  rng = np.random.default_rng(0)
  body = rng.lognormal(3, 0.3, 996)
  norms = {
    "input": np.r_[body, 0.0, 0.0, np.nan, 1e30],
    "error": np.r_[rng.lognormal(2, 0.3, 999), 4000.0],
    "nothing": np.zeros(0),
  }
  figure = plots.norm_histogram_figure(norms)
  shares = [p.get_data().values.sum() for p in figure.axes[0].patches]
  np.testing.assert_allclose(shares, [0.996, 1.0, 0.0])
  first, second, third = legend(figure)
  assert "2 zero, 1 not finite, 1 off scale" in first
  assert f"median {np.median(np.r_[body, 1e30]):.3g}" in first
  assert "max 4000" in second
  assert third == "nothing: no values"


def test_drawing_leaves_the_settings_of_matplotlib_alone(tmp_path):
  before = dict(matplotlib.rcParams)
  path = plots.norm_histogram({"input": [1.0, 2.0]}, tmp_path / "n.png")
  plots.fvu_prefixes([8], [0.5], tmp_path / "f.png")
  assert dict(matplotlib.rcParams) == before
  assert path == tmp_path / "n.png"


def test_the_same_numbers_give_the_same_bytes(tmp_path):
  one = plots.training_curves(METRICS, tmp_path / "1.png").read_bytes()
  two = plots.training_curves(METRICS, tmp_path / "2.png").read_bytes()
  assert one == two
