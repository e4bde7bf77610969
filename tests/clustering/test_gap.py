import numpy as np
import pytest
from sklearn.cluster import KMeans

from gemma_jax.clustering.gap import gap_statistic


def inertia(clusters):
  """What scikit-learn's k-means leaves."""
  method = KMeans(clusters, n_init=3, random_state=0)
  return lambda x: method.fit(x).inertia_


def squares(x):
  """The inertia of a single cluster."""
  return np.sum((x - x.mean(0)) ** 2, dtype=np.float64)


@pytest.mark.parametrize("null", ["permuted", "gaussian"])
def test_separated_blobs_have_their_gap_at_the_right_number(null):
  rng = np.random.default_rng(0)
  means = np.array([[0, 0], [0, 9], [9, 0], [12, 12]])
  x = means[np.arange(160) % 4] + rng.normal(size=(160, 2))
  gaps = {
    c: gap_statistic(x, inertia(c), null=null, draws=5) for c in range(1, 6)
  }
  assert gaps[4].gap > 0.5
  assert max(gaps, key=lambda c: gaps[c].gap) == 4
  assert gaps[4].gap >= gaps[5].gap - gaps[5].standard_error
  assert gaps[3].gap < gaps[4].gap - gaps[4].standard_error


def test_rows_of_the_null_itself_have_no_gap():
  rng = np.random.default_rng(1)
  for x, null in (
    (rng.uniform(size=(800, 2)), "permuted"),
    (rng.normal(size=(800, 2)) @ [[2, 1], [0, 1]], "gaussian"),
  ):
    found = gap_statistic(x, inertia(4), null=null, draws=8)
    assert abs(found.gap) < 3 * found.standard_error < 0.25


def test_gap_and_standard_error_are_those_of_the_paper():
  answers = iter([10.0, 20.0, 30.0, 50.0])
  found = gap_statistic(
    np.eye(3), lambda x: next(answers), null="permuted", draws=3
  )
  logs = np.log([20, 30, 50])
  np.testing.assert_allclose(found.null_log_inertia, logs)
  assert found.log_inertia == pytest.approx(np.log(10))
  assert found.gap == pytest.approx(logs.mean() - np.log(10))
  assert found.standard_error == pytest.approx(logs.std() * np.sqrt(4 / 3))


def test_permuted_rows_keep_the_values_of_each_dim_and_nothing_else():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(200, 1)) * [1, -1, 2] + [0, 5, 0]
  x = x.astype(np.float32)
  seen = []
  gap_statistic(x, lambda x: seen.append(x) or 1.0, null="permuted", draws=2)
  np.testing.assert_array_equal(seen[0], x)
  for draw in seen[1:]:
    np.testing.assert_array_equal(np.sort(draw, 0), np.sort(x, 0))
    assert np.abs(np.corrcoef(draw.T) - np.eye(3)).max() < 0.3
  assert (seen[1] != seen[2]).any()


def test_gaussian_rows_have_the_mean_and_the_covariance():
  rng = np.random.default_rng(0)
  x = rng.exponential(size=(9_000, 2)) @ rng.normal(size=(2, 3)) + [0, 50, 0]
  seen = []
  gap_statistic(x, lambda x: seen.append(x) or 1.0, null="gaussian", draws=2)
  covariance = np.cov(x.T)  # of rank 2
  for draw in seen[1:]:
    assert draw.dtype == np.float32
    assert draw.shape == x.shape
    np.testing.assert_allclose(draw.mean(0), x.mean(0), atol=0.1)
    size = np.abs(covariance).max()
    np.testing.assert_allclose(np.cov(draw.T), covariance, atol=0.05 * size)


def test_draws_are_those_of_the_seed():
  x = np.random.default_rng(0).normal(size=(50, 2))
  for null in ("permuted", "gaussian"):
    first, again, other = (
      gap_statistic(x, inertia(2), null=null, draws=2, seed=seed)
      for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(
      first.null_log_inertia, again.null_log_inertia
    )
    assert (first.null_log_inertia != other.null_log_inertia).all()


def test_what_has_no_gap_is_refused():
  x = np.eye(4)
  with pytest.raises(ValueError, match="nulls"):
    gap_statistic(x, squares, null="uniform")
  with pytest.raises(ValueError, match="at least 2 draws"):
    gap_statistic(x, squares, null="permuted", draws=1)
  with pytest.raises(ValueError, match=r"rows \[N, D\]"):
    gap_statistic(x[0], squares, null="permuted")
  with pytest.raises(ValueError, match="positive inertia"):
    gap_statistic(np.ones((5, 2)), squares, null="permuted")
  x[2, 1] = np.inf
  with pytest.raises(FloatingPointError, match="Row 2"):
    gap_statistic(x, squares, null="gaussian")
