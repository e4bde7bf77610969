"""Sums of paired rows, against NumPy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.alignment import moments
from gemma_jax.alignment.moments import Moments

pytestmark = pytest.mark.usefixtures("quick_compiles")


def paired(n=700, d=5, e=3, *, mean=0.0, seed=0):
  """Correlated float32 x [n, d] and y [n, e] about a mean."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(n, d)) @ rng.normal(size=(d, d))
  y = x @ rng.normal(size=(d, e)) + rng.normal(size=(n, e)) - mean
  return (x + mean).astype(np.float32), y.astype(np.float32)


def assert_numpys(m, x, y, tolerance):
  x, y = np.float64(x), np.float64(y)
  away = np.concatenate([x - x.mean(0), y - y.mean(0)], axis=1)
  whole, d = away.T @ away, x.shape[1]
  size = tolerance * np.abs(whole).max()
  assert m.count == len(x)
  assert m.widths == (d, y.shape[1])
  np.testing.assert_allclose(m.mean_x, x.mean(0), rtol=1e-7, atol=1e-6)
  np.testing.assert_allclose(m.mean_y, y.mean(0), rtol=1e-7, atol=1e-6)
  np.testing.assert_allclose(m.xx, whole[:d, :d], rtol=0, atol=size)
  np.testing.assert_allclose(m.xy, whole[:d, d:], rtol=0, atol=size)
  np.testing.assert_allclose(m.yy, whole[d:, d:], rtol=0, atol=size)
  squares = whole[d:, d:].diagonal()
  np.testing.assert_allclose(m.squares_y, squares, rtol=10 * tolerance)


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("sizes", [(700,), (100,), (1, 699), (699, 1), (7,)])
def test_rows_in_chunks_far_from_the_origin_are_summed_as_by_numpy(sizes, mean):
  x, y = paired(mean=mean)
  m, start, sizes = Moments(), 0, list(sizes)
  while start < len(x):
    size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
    m.update(x[start : start + size], y[start : start + size])
    start += size
  assert_numpys(m, x, y, 2e-6)


def test_an_update_is_cut_into_blocks(monkeypatch):
  monkeypatch.setattr(moments, "BLOCK", 64)
  x, y = paired(mean=1e4)
  assert_numpys(Moments().update(x, y), x, y, 2e-6)


def test_other_coordinates_need_no_row_again():
  x, y = paired(mean=3.0)
  rng = np.random.default_rng(1)
  sites = [(rng.normal(size=n), rng.uniform(0.5, 2, n)) for n in (5, 3)]
  a, b = (
    (np.float64(rows) - mean) / scale
    for rows, (mean, scale) in zip((x, y), sites, strict=True)
  )
  m, wanted = Moments().update(x, y).standardised(*sites), Moments()
  wanted.update(a, b)
  assert m.count == 700
  for name in ("mean_x", "mean_y", "xx", "xy", "squares_y"):
    got, want = getattr(m, name), getattr(wanted, name)
    size = 1e-5 * np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=size, err_msg=name)
  with pytest.raises(ValueError, match="only the diagonal"):
    m.yy  # noqa: B018


def test_rows_of_float64_keep_their_digits():
  x, y = (np.float64(a) + np.pi for a in paired(mean=1e4))
  m = Moments().update(x[:300], y[:300]).update(x[300:], y[300:])
  assert_numpys(m, x, y, 1e-12)


def test_device_arrays_and_bfloat16_are_taken_at_their_value():
  x, y = paired()
  x, y = jnp.asarray(x, jnp.bfloat16), jnp.asarray(y)
  assert_numpys(Moments().update(x, y), x, y, 2e-6)


@pytest.mark.parametrize("full", [True, False])
def test_merged_moments_are_those_of_all_rows(full):
  x, y = paired(mean=1e4)
  parts = [slice(0, 200), slice(200, 210), slice(210, None)]
  merged = Moments(full=full)
  for part in parts:
    merged.merge(Moments(full=full).update(x[part], y[part]))
  merged.merge(Moments(full=full))
  whole = Moments().update(x, y)
  for name in ("mean_x", "mean_y", "xx", "xy", "squares_y"):
    expected = getattr(whole, name)
    size = 2e-6 * np.abs(expected).max()
    np.testing.assert_allclose(getattr(merged, name), expected, atol=size)
  assert merged.count == 700


def test_a_merge_leaves_the_other_as_it_was():
  x, y = paired()
  other = Moments().update(x[:300], y[:300])
  before = other.xx
  Moments().merge(other).update(x[300:], y[300:])
  np.testing.assert_array_equal(other.xx, before)


def test_what_was_not_kept_is_not_given():
  m = Moments(full=False).update(*paired())
  with pytest.raises(ValueError, match="full=True"):
    m.yy  # noqa: B018
  with pytest.raises(ValueError, match="full=False, got full=True"):
    m.merge(Moments())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_are_not_finite_are_refused_and_named(value):
  x, y = paired()
  m = Moments().update(x, y)
  before = m.xx
  bad = y.copy()
  bad[41, 1] = value
  with pytest.raises(ValueError, match="1 rows of y, first in row 41"):
    m.update(x, bad)
  np.testing.assert_array_equal(m.xx, before)
  with pytest.raises(ValueError, match="first in row 41"):
    (fresh := Moments()).update(x, bad)
  assert fresh.count == 0
  assert_numpys(fresh.update(x, y), x, y, 2e-6)


def test_rows_whose_squares_overflow_are_refused():
  x, y = paired()
  with pytest.raises(ValueError, match="fit float32"):
    Moments().update(np.float32(1e30) * x, y)


def test_shapes_that_do_not_fit_are_refused():
  x, y = paired()
  with pytest.raises(ValueError, match="pair the rows first"):
    Moments().update(x, y[:-1])
  with pytest.raises(ValueError, match=r"\(5, 3\) as before, got \(4, 3\)"):
    Moments().update(x, y).update(x[:, :4], y)
  with pytest.raises(ValueError, match="got none"):
    Moments().xx  # noqa: B018


def test_turned_moments_are_those_of_the_other_direction():
  rng = np.random.default_rng(3)
  x, y = rng.normal(2, 1, (40, 5)), rng.normal(-1, 2, (40, 3))
  found, wanted = Moments().update(x, y).turned(), Moments().update(y, x)
  assert found.count == wanted.count
  assert found.widths == (3, 5)
  for name in ("mean_x", "mean_y", "xx", "xy", "yy"):
    np.testing.assert_allclose(
      getattr(found, name), getattr(wanted, name), atol=1e-9
    )
  found.update(y, x)
  assert found.count == 80
  with pytest.raises(ValueError, match="full=True"):
    Moments(full=False).update(x, y).turned()
