"""Moments and the ridge map, against NumPy in float64."""

import numpy as np
import pytest

from gemma_jax.activations import ActivationStore, Writer
from gemma_jax.activations.store import LABELS
from gemma_jax.dictionaries import linear


def data(n=600, d=5, e=3, *, mean=0.0, seed=0):
  """Correlated float32 x [n, d] and y [n, e]; y is partly linear in x."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(n, d)) @ rng.normal(size=(d, d))
  y = x @ rng.normal(size=(d, e)) + rng.normal(size=(n, e)) + mean
  return (x + mean).astype(np.float32), y.astype(np.float32)


def blocks(x, y, *sizes):
  """x and y cut into blocks of the given sizes, the last one repeated."""
  sizes, start = list(sizes), 0
  while start < len(x):
    size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
    yield x[start : start + size], y[start : start + size]
    start += size


def ridge_by_rows(x, y, penalty):
  """Least squares on centred rows with sqrt(n * penalty) rows appended."""
  x, y = x.astype(np.float64), y.astype(np.float64)
  xc, yc = x - x.mean(0), y - y.mean(0)
  weight = np.sqrt(len(x) * penalty * xc.var(0).mean())
  xa = np.concatenate([xc, weight * np.eye(x.shape[1])])
  ya = np.concatenate([yc, np.zeros((x.shape[1], y.shape[1]))])
  w = np.linalg.lstsq(xa, ya, rcond=None)[0]
  return w, y.mean(0) - x.mean(0) @ w


@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize("sizes", [(600,), (100,), (1, 599), (7,), (599, 1)])
def test_moments_are_numpys_for_any_chunking(sizes, mean):
  x, y = data(mean=mean)
  m = linear.moments(blocks(x, y, *sizes))
  both = np.cov(np.concatenate([x, y], 1, dtype=np.float64).T, bias=True)
  # Inputs are float32: with a mean of 1e3 its rounding is in x already, so
  # both sides see the same rows.
  size = np.abs(both).max()
  np.testing.assert_allclose(m.covariance, both[:5, :5], atol=2e-6 * size)
  np.testing.assert_allclose(m.cross_covariance, both[:5, 5:], atol=2e-6 * size)
  np.testing.assert_allclose(m.variance_y, np.diag(both[5:, 5:]), rtol=2e-6)
  for got, a in ((m.mean_x, x), (m.mean_y, y)):
    np.testing.assert_allclose(
      got, a.mean(0, dtype=np.float64), rtol=0, atol=1e-6 * a.std(0).max()
    )
  assert m.count == 600


def test_sums_about_one_shift_add_up():
  x, y = data()
  whole = linear.moments(blocks(x, y, 600))
  shift = whole.shift_x, whole.shift_y
  first = linear.moments([(x[:250], y[:250])], shift=shift)
  second = linear.moments([(x[250:], y[250:])], shift=shift)
  both = first + second
  assert both.count == 600
  np.testing.assert_allclose(both.covariance, whole.covariance, rtol=1e-5)
  np.testing.assert_allclose(both.variance_y, whole.variance_y, rtol=1e-6)


@pytest.mark.parametrize("which", [0, 1])
def test_sums_about_different_shifts_are_not_added(which):
  x, y = data()
  a = linear.moments([(x, y)])
  moved = [a.shift_x, a.shift_y]
  moved[which] = moved[which] + 1
  b = linear.moments([(x, y)], shift=tuple(moved))
  with pytest.raises(ValueError, match="different shifts"):
    a + b


def test_no_rows_are_refused():
  with pytest.raises(ValueError, match="No rows"):
    linear.moments([])


@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_squared_error_is_that_of_the_rows(mean):
  x, y = data(mean=mean)
  rng = np.random.default_rng(9)
  w = rng.normal(size=(5, 3))
  bias = y.mean(0) - x.mean(0) @ w + rng.normal(size=3)
  got = linear.moments(blocks(x, y, 128)).squared_error(w, bias)
  rest = y.astype(np.float64) - x.astype(np.float64) @ w - bias
  assert got == pytest.approx(np.mean(np.sum(rest**2, 1)), rel=1e-5)


def halves(x, y):
  cut = len(x) * 2 // 3
  fit = linear.moments([(x[:cut], y[:cut])])
  shift = fit.shift_x, fit.shift_y
  return fit, linear.moments([(x[cut:], y[cut:])], shift=shift)


@pytest.mark.parametrize("penalty", linear.RIDGE)
def test_the_map_is_ridge_regression_on_all_rows(penalty, monkeypatch):
  x, y = data(mean=20.0)
  monkeypatch.setattr(linear, "RIDGE", (penalty,))
  ridge = linear.fit_ridge(*halves(x, y))
  w, bias = ridge_by_rows(x, y, penalty)
  np.testing.assert_allclose(ridge.linear, w, rtol=0, atol=2e-5)
  np.testing.assert_allclose(ridge.bias, bias, rtol=0, atol=5e-4)
  assert ridge.penalty == penalty


def test_without_penalty_it_is_least_squares_with_an_intercept(monkeypatch):
  x, y = data(n=3_000)
  monkeypatch.setattr(linear, "RIDGE", (0.0,))
  ridge = linear.fit_ridge(*halves(x, y))
  design = np.concatenate([x, np.ones((len(x), 1))], 1, dtype=np.float64)
  w = np.linalg.lstsq(design, y.astype(np.float64), rcond=None)[0]
  np.testing.assert_allclose(ridge.linear, w[:-1], rtol=0, atol=2e-5)
  np.testing.assert_allclose(ridge.bias, w[-1], rtol=0, atol=2e-5)
  np.testing.assert_allclose(ridge(x), design @ w, rtol=0, atol=2e-4)


def test_the_penalty_is_the_one_that_predicts_the_other_rows_best():
  # Few rows, many dims, weak signal: some shrinking must win.
  rng = np.random.default_rng(1)
  x = rng.normal(size=(90, 40)).astype(np.float32)
  y = (0.1 * x[:, :2] + rng.normal(size=(90, 2))).astype(np.float32)
  ridge = linear.fit_ridge(*halves(x, y))
  errors = {}
  for penalty in linear.RIDGE:
    w, bias = ridge_by_rows(x[:60], y[:60], penalty)
    errors[penalty] = np.mean((y[60:] - x[60:] @ w - bias) ** 2)
  assert ridge.penalty == min(errors, key=errors.get)
  assert ridge.penalty > 0


def test_dims_that_never_vary_do_not_blow_up():
  x, y = data()
  x = np.concatenate([x, np.full((600, 2), 7, np.float32)], 1)
  ridge = linear.fit_ridge(*halves(x, y))
  w, bias = ridge_by_rows(x[:, :5], y, 0.0)
  expected = x[:, :5] @ w + bias
  np.testing.assert_allclose(ridge(x), expected, rtol=0, atol=1e-3)
  np.testing.assert_allclose(ridge.linear[5:], 0, atol=1e-3)


def test_a_copied_dim_does_not_blow_up():
  x, y = data()
  x = np.concatenate([x, x[:, :1]], 1)
  ridge = linear.fit_ridge(*halves(x, y))
  w, bias = ridge_by_rows(x[:, :5], y, 0.0)
  np.testing.assert_allclose(ridge(x), x[:, :5] @ w + bias, rtol=0, atol=2e-2)
  assert np.abs(ridge.linear).max() < 10 * np.abs(w).max()


def test_a_constant_input_predicts_the_mean():
  _, y = data()
  x = np.full((600, 4), 3, np.float32)
  ridge = linear.fit_ridge(*halves(x, y))
  np.testing.assert_array_equal(ridge.linear, 0)
  np.testing.assert_allclose(ridge.bias, y.mean(0), atol=1e-5)


def test_a_store_is_fitted_with_its_last_tenth_as_the_judge(
  tmp_path, monkeypatch
):
  x, y = data(n=95)
  labels = dict.fromkeys(LABELS, np.zeros(95, np.int32))
  sites = {"x": 5, "y": 3}
  with Writer(tmp_path, sites=sites, dtype="float32", metadata={}) as writer:
    writer.append({"x": x, "y": y} | labels)
  monkeypatch.setattr(linear, "BLOCK", 20)
  total, ridge = linear.fit(ActivationStore.open(tmp_path), "x", "y")
  both = np.cov(x.T.astype(np.float64), bias=True)
  assert total.count == 95
  np.testing.assert_allclose(total.covariance, both, atol=2e-6 * both.max())
  errors = {}
  for penalty in linear.RIDGE:
    w, bias = ridge_by_rows(x[:86], y[:86], penalty)
    errors[penalty] = np.mean((y[86:] - x[86:] @ w - bias) ** 2)
  assert ridge.penalty == min(errors, key=errors.get)
  w, bias = ridge_by_rows(x, y, ridge.penalty)
  np.testing.assert_allclose(ridge.linear, w, rtol=0, atol=2e-5)
  np.testing.assert_allclose(ridge.bias, bias, rtol=0, atol=2e-5)
