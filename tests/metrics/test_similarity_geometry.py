"""RSA, Procrustes and cosines, against SciPy."""

import numpy as np
import pytest
from scipy import linalg, stats
from scipy.spatial.distance import pdist

from gemma_jax.metrics.similarity import (
  cosine,
  procrustes_distance,
  rsa,
  rsa_noise_ceiling,
)


@pytest.fixture
def rows():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(40, 6)) + 2
  y = x @ rng.normal(size=(6, 9)) + 2 * rng.normal(size=(40, 9))
  return x, y


def test_rsa_is_the_rank_correlation_of_correlation_distances(rows):
  x, y = rows
  distances = [pdist(a, "correlation") for a in rows]
  expected = stats.spearmanr(*distances).statistic
  assert 0.1 < expected < 0.9
  assert rsa(x, y) == pytest.approx(expected, rel=1e-9)
  assert rsa(x, x) == pytest.approx(1)
  # Per row, Pearson does not see what is added or multiplied.
  assert rsa(3 * x + 5, y) == pytest.approx(expected, rel=1e-9)


def test_the_noise_ceiling_is_what_the_noise_leaves():
  rng = np.random.default_rng(1)
  signal = rng.normal(size=(30, 50))
  clean = rsa_noise_ceiling(np.stack([signal] * 4))
  assert clean == pytest.approx((1, 1))
  noise = rng.normal(size=(8, 30, 50))
  loud = rsa_noise_ceiling(signal + 4 * noise)
  soft = rsa_noise_ceiling(signal + noise)
  assert loud.half < soft.half < 1
  assert soft.full == pytest.approx(2 * soft.half / (1 + soft.half))
  # Of two repeats there is one halving.
  two = signal + noise[:2]
  assert rsa_noise_ceiling(two).half == pytest.approx(rsa(two[0], two[1]))
  nothing = rsa_noise_ceiling(noise[:2])
  assert abs(nothing.half) < 0.2
  # Two thirds of the halvings mix the first two repeats with the others.
  mixed = rsa_noise_ceiling(noise[[0, 0, 1, 1]], splits=50)
  assert 0.5 < mixed.half < 0.8


def test_procrustes_is_the_distance_after_the_best_rotation(rows):
  x, y = rows
  padded = np.pad(x, ((0, 0), (0, 3)))
  a, b = (m - m.mean(0) for m in (padded, y))
  a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
  turn, _ = linalg.orthogonal_procrustes(a, b)
  expected = np.linalg.norm(a @ turn - b) ** 2
  assert 0.1 < expected < 1.9
  for pair in ((x, y), (y, x), (padded, y)):
    assert procrustes_distance(*pair) == pytest.approx(expected, rel=1e-9)


def test_rotation_scale_and_shift_leave_no_distance(rows):
  x, y = rows
  turn = np.linalg.qr(np.random.default_rng(2).normal(size=(6, 6)))[0]
  assert procrustes_distance(x, -7 * x @ turn + 4) == pytest.approx(0, abs=1e-9)
  moved = procrustes_distance(5 * x @ turn + 1, y)
  assert moved == pytest.approx(procrustes_distance(x, y), rel=1e-9)
  skewed = procrustes_distance(x @ np.diag([9, 1, 1, 1, 1, 1]), y)
  assert abs(skewed - moved) > 0.01


def test_more_dims_than_rows_are_reduced_without_a_difference():
  x, y = np.random.default_rng(3).normal(size=(2, 10, 50))
  a, b = (m - m.mean(0) for m in (x, y))
  a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
  expected = 2 - 2 * linalg.svdvals(a.T @ b).sum()
  assert procrustes_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_the_cosine_is_the_mean_of_the_rows_own():
  x = np.array([[1.0, 0], [0, 2], [3, 4]])
  y = np.array([[5.0, 0], [0, -1], [4, 3]])
  assert cosine(x, y) == pytest.approx((1 - 1 + 24 / 25) / 3)


def test_other_widths_have_no_cosine():
  with pytest.raises(ValueError, match="linear_cka, or fit a map"):
    cosine(np.ones((3, 2)), np.ones((3, 4)))
  with pytest.raises(ValueError, match="row 1 of y is all zeros"):
    cosine(np.ones((3, 2)), np.array([[1, 1], [0, 0], [1, 1]]))


def test_rows_without_distances_are_errors(rows):
  x, y = rows
  flat = y.copy()
  flat[4] = 0.1
  with pytest.raises(ValueError, match="row 4 of y is constant"):
    rsa(x, flat)
  with pytest.raises(ValueError, match="distances that differ"):
    rsa(x, np.arange(40.0)[:, None] * [1, 2, 3] + [1, 2, 3])
  with pytest.raises(ValueError, match="at least 3 rows"):
    rsa(x[:2], y[:2])
  with pytest.raises(ValueError, match="alike in x"):
    procrustes_distance(np.full((40, 3), 0.1), y)
  for repeats in (x, x[None]):
    with pytest.raises(ValueError, match="R >= 2"):
      rsa_noise_ceiling(repeats)
  for measure in (rsa, procrustes_distance, cosine):
    with pytest.raises(ValueError, match="row i of both"):
      measure(x, x[1:])
    with pytest.raises(ValueError, match="finite"):
      measure(x, np.where(x > 3, np.inf, x))
