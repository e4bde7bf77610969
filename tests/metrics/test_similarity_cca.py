"""Canonical correlations, against the eigenvalues that define them."""

import numpy as np
import pytest
from scipy import linalg

from gemma_jax.metrics.similarity import canonical_correlations, pwcca, svcca


@pytest.fixture
def rows():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6)) + 3
  y = x[:, :4] @ rng.normal(size=(4, 8)) + 4 * rng.normal(size=(400, 8))
  return x, y


def by_eigenvalues(x, y):
  """Hotelling 1936: correlations and the variates of x, [n, r]."""
  x, y = x - x.mean(0), y - y.mean(0)
  xx, yy, xy = x.T @ x, y.T @ y, x.T @ y
  values, vectors = linalg.eigh(xy @ np.linalg.solve(yy, xy.T), xx)
  order = np.argsort(-values)[: min(x.shape[1], y.shape[1])]
  return np.sqrt(values[order]), x @ vectors[:, order]


def test_correlations_are_roots_of_the_eigenvalues(rows):
  x, y = rows
  expected = by_eigenvalues(x, y)[0]
  np.testing.assert_allclose(canonical_correlations(x, y), expected, rtol=1e-9)
  found = canonical_correlations(y, x)
  np.testing.assert_allclose(found, expected, rtol=1e-9)
  assert 0.05 < expected.min() < expected.max() < 0.95


def test_svcca_correlates_projections_onto_the_first_directions(rows):
  x, y = rows
  x = x @ np.diag([9, 5, 1, 0.1, 0.1, 0.1])
  kept = []
  for a in (x, y):
    values, vectors = np.linalg.eigh(np.cov(a.T))
    values, vectors = values[::-1], vectors[:, ::-1]
    share = np.cumsum(values) / values.sum()
    count = 1 + np.flatnonzero(share >= 0.9)[0]
    assert 1 < count < a.shape[1]
    kept.append(a @ vectors[:, :count])
  expected = by_eigenvalues(*kept)[0].mean()
  assert svcca(x, y, variance=0.9) == pytest.approx(expected, rel=1e-9)
  assert abs(svcca(x, y, variance=1) - expected) > 0.1


def test_svcca_keeps_99_percent_of_the_variance(rows):
  # Six equal directions and one of 1.1 %, or of .9 %, of the variance.
  basis = linalg.orth(np.random.default_rng(1).normal(size=(400, 7)))
  basis = linalg.orth(basis - basis.mean(0))
  for share, size in ((0.011, 7), (0.009, 6)):
    scale = np.sqrt([(1 - share) / 6] * 6 + [share])
    expected = canonical_correlations(basis[:, :size], rows[1]).mean()
    assert svcca(basis * scale, rows[1]) == pytest.approx(expected)


def test_pwcca_weighs_by_what_the_variates_carry(rows):
  for x, y in (rows, rows[::-1]):
    correlations, variates = by_eigenvalues(x, y)
    weights = np.zeros(len(correlations))
    for i, h in enumerate(variates.T):
      for column in (x - x.mean(0)).T:
        weights[i] += abs(h @ column) / np.linalg.norm(h)
    expected = np.sum(weights * correlations) / weights.sum()
    assert pwcca(x, y) == pytest.approx(expected, rel=1e-9)
    assert abs(expected - correlations.mean()) > 1e-3


def test_invertible_maps_change_no_correlation(rows):
  x, y = rows
  rng = np.random.default_rng(2)
  a, b = rng.normal(size=(6, 6)), rng.normal(size=(8, 8))
  before = canonical_correlations(x, y)
  np.testing.assert_allclose(
    canonical_correlations(x @ a + 5, y @ b), before, rtol=1e-8
  )
  assert pwcca(x, y @ b - 1) == pytest.approx(pwcca(x, y), rel=1e-8)
  mapped = svcca(x @ a, y @ b, variance=1)
  assert mapped == pytest.approx(svcca(x, y, variance=1), rel=1e-8)
  turn = np.linalg.qr(a)[0]
  assert svcca(4 * x @ turn, y) == pytest.approx(svcca(x, y), rel=1e-8)
  assert canonical_correlations(x, x @ a).max() <= 1
  assert pwcca(x, x @ a) == pytest.approx(1)


def test_dims_that_repeat_others_are_no_directions(rows):
  x, y = rows
  wide = np.concatenate([x, x[:, :3] - x[:, 3:]], axis=1)
  found = canonical_correlations(wide, y)
  np.testing.assert_allclose(found, canonical_correlations(x, y), rtol=1e-8)


def test_few_rows_are_refused_because_they_correlate_whatever_they_are():
  x, y = np.random.default_rng(3).normal(size=(2, 30, 16))
  for measure in (svcca, pwcca, canonical_correlations):
    with pytest.raises(ValueError, match=r"10 rows for each of the 1\d \+ 1\d"):
      measure(x, y)
  # p + q > n: the trivial answer.
  assert canonical_correlations(x, y, rows_per_direction=0)[:2] == (
    pytest.approx(1)
  )
  wide = np.random.default_rng(4).normal(size=(2, 20, 40))
  assert pwcca(*wide, rows_per_direction=0) == pytest.approx(1)
  x, y = np.random.default_rng(5).normal(size=(2, 40, 2))
  assert pwcca(x, y) < 0.5
  with pytest.raises(ValueError, match="got 39 rows"):
    pwcca(x[:39], y[:39])


def test_constant_rows_and_senseless_shares_are_errors(rows):
  x, y = rows
  with pytest.raises(ValueError, match="alike in y"):
    pwcca(x, np.full((400, 2), 0.1))
  with pytest.raises(ValueError, match="share of variance"):
    svcca(x, y, variance=1.5)
  with pytest.raises(ValueError, match="finite"):
    svcca(x, np.where(y > 5, np.nan, y))
  with pytest.raises(ValueError, match="row i of both"):
    svcca(x, y[:-1])
