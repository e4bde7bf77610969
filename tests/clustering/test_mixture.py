"""Mixtures against scikit-learn, SciPy and the closed form of one PPCA."""

import logging
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from gemma_jax.clustering import em
from gemma_jax.clustering.em import fit_mixture
from gemma_jax.clustering.gaussian import gaussian_baselines
from gemma_jax.clustering.mixture import Mixture, held_out

pytestmark = pytest.mark.usefixtures("quick_compiles")

CENTRES = np.array([[4.0, 0, 0, 0, 0], [0, 5, 0, 0, 0], [0, 0, -3, 2, 0]])
SHARES = np.array([0.5, 0.3, 0.2])


def planted(n=2_000, *, distance=1.0, seed=0):
  """Rows of three Gaussians that differ in everything, and whose they are."""
  rng = np.random.default_rng(seed)
  labels = rng.choice(3, size=n, p=SHARES)
  spread = np.array([0.5, 1.0, 1.5])[labels, None] * [1, 0.5, 1, 2, 1]
  x = distance * CENTRES[labels] + spread * rng.normal(size=(n, 5))
  return x.astype(np.float32), labels


def correlated(n=2_000, *, seed=0):
  """Rows of one Gaussian with variances from 9 to 0.25 along turned axes."""
  axes = np.linalg.qr(np.random.default_rng(9).normal(size=(5, 5)))[0]
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(n, 5)) * [3, 2, 0.5, 0.6, 0.7] @ axes.T
  return (x + 2).astype(np.float32)


def made(rank, *, distance=1.0):
  """A mixture of three with nothing special about it."""
  rng = np.random.default_rng(0)
  return Mixture(
    SHARES,
    distance * rng.normal(size=(3, 5)),
    rng.uniform(0.3, 1.5, size=(3, 1 if rank else 5)),
    rng.normal(size=(3, 5, rank)),
  )


def drawn(mixture, n=2_000, *, seed):
  """Rows of a mixture, and whose they are."""
  rng = np.random.default_rng(seed)
  labels = rng.choice(3, size=n, p=mixture.weights)
  z = rng.normal(size=(n, mixture.rank))
  noise = np.sqrt(mixture.noise[labels]) * rng.normal(size=(n, 5))
  x = np.einsum("ndr,nr->nd", mixture.loadings[labels], z) + noise
  return (x + mixture.means[labels]).astype(np.float32), labels


def covariances(mixture):
  """[C, D, D]."""
  for noise, w in zip(mixture.noise, mixture.loadings, strict=True):
    yield np.diag(np.broadcast_to(noise, len(w))) + w @ w.T


def scipys_log_likelihood(mixture, x):
  parts = zip(mixture.means, covariances(mixture), strict=True)
  each = [stats.multivariate_normal(*part).logpdf(x) for part in parts]
  return special.logsumexp(np.stack(each, 1) + np.log(mixture.weights), axis=1)


def fit(x, centroids=CENTRES, labels=None, **kwargs):
  return fit_mixture(x, centroids, labels, progress=False, **kwargs)


@pytest.mark.parametrize("iterations", [1, 7])
def test_diagonal_em_is_scikit_learns(iterations):
  x, labels = planted(distance=0.4)
  means = np.stack([x[labels == c].mean(0) for c in range(3)])
  variances = np.stack([x[labels == c].var(0) for c in range(3)])
  theirs = GaussianMixture(
    3,
    covariance_type="diag",
    tol=0,
    reg_covar=0,
    max_iter=iterations,
    weights_init=np.bincount(labels) / len(x),
    means_init=means,
    precisions_init=1 / variances,
  )
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", ConvergenceWarning)  # it is stopped early
    theirs.fit(x.astype(np.float64))
  ours = fit(x, means, labels, max_iter=iterations, tol=0, floor=1e-6)
  assert len(ours.history) == iterations + 1
  assert ours.history[-1] == pytest.approx(theirs.score(x), abs=1e-5)
  np.testing.assert_allclose(ours.weights, theirs.weights_, atol=1e-4)
  np.testing.assert_allclose(ours.means, theirs.means_, atol=1e-4)
  np.testing.assert_allclose(ours.variances, theirs.covariances_, atol=1e-4)
  np.testing.assert_allclose(
    ours.responsibilities(x), theirs.predict_proba(x), atol=1e-4
  )


def test_one_component_of_rank_r_is_ppca_in_closed_form():
  x = correlated()
  ours = fit(x, x[:1], rank=2, tol=0)
  # Tipping and Bishop 1999, "Probabilistic principal component analysis".
  covariance = np.cov(x.T.astype(np.float64), bias=True)
  values, axes = np.linalg.eigh(covariance)
  noise = values[:3].mean()
  values[:3] = noise
  assert ours.noise[0, 0] == pytest.approx(noise, rel=3e-4)
  expected = (axes * values) @ axes.T
  np.testing.assert_allclose(*covariances(ours), expected, atol=2e-3)
  nats = -0.5 * (
    5 * np.log(2 * np.pi)
    + np.log(values).sum()
    + np.trace(np.linalg.solve(expected, covariance))
  )
  assert ours.history[-1] == pytest.approx(nats, abs=1e-5)


@pytest.mark.parametrize("rank", [0, 2, 4])
def test_log_likelihood_is_scipys_with_full_covariances(rank):
  mixture = made(rank)
  x = (3 * np.random.default_rng(1).normal(size=(50, 5))).astype(np.float32)
  np.testing.assert_allclose(
    mixture.log_likelihood(x), scipys_log_likelihood(mixture, x), rtol=2e-5
  )


@pytest.mark.parametrize("rank", [0, 2])
def test_no_iteration_lowers_the_likelihood(rank):
  x, _ = planted(distance=0.5)
  found = fit(x, x[:3], rank=rank, tol=0, max_iter=40)
  assert len(found.history) > 15
  assert np.diff(found.history).min() > -1e-6
  assert found.history[-1] > found.history[0] + 0.05


@pytest.mark.parametrize("rank", [0, 2])
def test_a_planted_mixture_is_recovered(rank):
  truth = made(rank, distance=6)
  (x, labels), (test, _) = (drawn(truth, seed=seed) for seed in (0, 1))
  found = fit(x, truth.means + 1, rank=rank, tol=1e-6)
  assert found.converged
  assert (found.assign(x) == labels).mean() > 0.98
  np.testing.assert_allclose(found.weights, truth.weights, atol=0.03)
  np.testing.assert_allclose(found.means, truth.means, atol=0.3)
  for covariance, expected in zip(
    covariances(found), covariances(truth), strict=True
  ):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(covariance, expected, atol=0.15 * scale)
  # Nothing is as likely as the fit where it was fitted, and the truth wins by
  # little elsewhere.
  assert found.history[-1] > truth.log_likelihood(x).mean()
  lost = truth.log_likelihood(test).mean() - found.log_likelihood(test).mean()
  assert 0 < lost < 0.03


@pytest.mark.parametrize("rank", [0, 2])
def test_held_out_a_mixture_beats_one_gaussian_on_planted_clusters(rank):
  x, _ = planted()
  test, _ = planted(seed=1)
  scores = held_out(fit(x, rank=rank), test, gaussian_baselines(x))
  assert scores["over_full_per_row"] > 0.5
  assert scores["over_diagonal_per_row"] > scores["over_full_per_row"]


def test_held_out_a_mixture_is_no_better_than_one_gaussian_on_gaussian_rows():
  x, test = correlated(), correlated(seed=1)
  scores = held_out(fit(x, x[:2], rank=4), test, gaussian_baselines(x))
  assert abs(scores["over_full_per_dim"]) < 0.01
  assert scores["over_diagonal_per_dim"] > 0.1


def test_held_out_scores_are_differences_of_scipys():
  x, test = correlated(), correlated(seed=1)
  mixture, baselines = made(2), gaussian_baselines(x)
  scores = held_out(mixture, test, baselines)
  wide = x.astype(np.float64)
  full, diagonal = (
    stats.multivariate_normal(wide.mean(0), covariance).logpdf(test)
    for covariance in (np.cov(wide.T, bias=True), np.diag(wide.var(0)))
  )
  for ours, theirs in zip(baselines, (full, diagonal), strict=True):
    np.testing.assert_allclose(ours.log_likelihood(test), theirs, rtol=1e-4)
  full, diagonal = full.mean(), diagonal.mean()
  own = scipys_log_likelihood(mixture, test).mean()
  expected = {
    "per_row": own,
    "per_dim": own / 5,
    "over_full_per_row": own - full,
    "over_full_per_dim": (own - full) / 5,
    "over_diagonal_per_row": own - diagonal,
    "over_diagonal_per_dim": (own - diagonal) / 5,
  }
  assert scores == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_size_of_the_blocks_changes_nothing(rank):
  x, _ = planted(distance=0.5)
  whole, parts = (
    fit(x, rank=rank, max_iter=3, tol=0, block=block) for block in (2_000, 300)
  )
  np.testing.assert_allclose(parts.history, whole.history, rtol=1e-6)
  np.testing.assert_allclose(parts.means, whole.means, atol=1e-4)
  np.testing.assert_allclose(parts.variances, whole.variances, rtol=1e-3)


@pytest.mark.parametrize("rank", [0, 2])
def test_an_offset_of_1e4_costs_no_precision(rank):
  x, labels = planted(distance=0.5)
  x = np.round(x * 512) / 512  # float32 has these numbers at 1e4, too
  how = {"labels": labels, "rank": rank, "max_iter": 5, "tol": 0}
  near = fit(x, CENTRES, **how)
  far = fit(x + np.float32(1e4), CENTRES + 1e4, **how)
  np.testing.assert_allclose(far.history, near.history, atol=1e-5)
  np.testing.assert_allclose(far.means - 1e4, near.means, atol=1e-4)
  np.testing.assert_allclose(
    far.log_likelihood(x + np.float32(1e4)), near.log_likelihood(x), atol=1e-3
  )
  score = gaussian_baselines(x).full.log_likelihood(x)
  moved = gaussian_baselines(x + np.float32(1e4)).full
  np.testing.assert_allclose(
    moved.log_likelihood(x + np.float32(1e4)), score, atol=1e-3
  )


def test_sums_over_many_blocks_lose_nothing():
  part = (jnp.float32(1.1),)

  @jax.jit
  def many(total, lost):
    return jax.lax.fori_loop(
      0, 100_000, lambda _, s: em._add(*s, part), (total, lost)
    )

  (total,), _ = many((jnp.float32(0),), (jnp.float32(0),))
  assert float(total) == pytest.approx(1e5 * float(np.float32(1.1)), rel=1e-7)


def test_rows_that_are_read_are_as_good_as_an_array():
  x, _ = planted()

  class Stored:
    width = 5

    def __len__(self):
      return len(x)

    def read(self, start, stop):
      return x[start:stop]

  array, stored = fit(x), fit(Stored())
  np.testing.assert_array_equal(stored.history, array.history)
  np.testing.assert_array_equal(
    stored.log_likelihood(Stored()), array.log_likelihood(x)
  )


def test_labels_say_where_it_starts():
  x, labels = planted(distance=0.3)
  found = fit(x, CENTRES, labels, max_iter=1, floor=1e-6)
  start = Mixture(
    np.bincount(labels) / len(x),
    np.stack([x[labels == c].mean(0) for c in range(3)]),
    np.stack([x[labels == c].var(0) for c in range(3)]),
    np.zeros((3, 5, 0)),
  )
  expected = scipys_log_likelihood(start, x).mean()
  assert found.history[0] == pytest.approx(expected, abs=1e-5)


def test_without_labels_it_starts_at_the_nearest_centroids():
  x, _ = planted(distance=0.3)
  nearest = ((x[:, None] - CENTRES) ** 2).sum(2).argmin(1)
  np.testing.assert_array_equal(
    fit(x, max_iter=2).history, fit(x, labels=nearest, max_iter=2).history
  )


def test_rank_0_reconstructs_means_and_rank_r_posterior_means():
  x = (2 * np.random.default_rng(0).normal(size=(40, 5))).astype(np.float32)
  flat, mixture = made(0), made(2)
  np.testing.assert_allclose(
    flat.reconstruct(x), flat.means[flat.assign(x)], rtol=1e-6
  )
  for row, back, c in zip(
    x, mixture.reconstruct(x), mixture.assign(x), strict=True
  ):
    w, mean = mixture.loadings[c], mixture.means[c]
    inner = mixture.noise[c] * np.eye(2) + w.T @ w
    z = np.linalg.solve(inner, w.T @ (row - mean))
    np.testing.assert_allclose(back, mean + w @ z, atol=1e-5)


def test_the_seed_decides_the_directions_it_starts_from():
  x, _ = planted()
  first, again, other = (
    fit(x, rank=2, max_iter=1, seed=seed).loadings for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > 1e-3


def test_a_component_without_rows_starts_again_and_is_named(caplog):
  x, labels = planted()
  far = np.array([CENTRES[0], CENTRES[1], np.full(5, 1e3)])
  with caplog.at_level(logging.WARNING, "gemma_jax"):
    found = fit(x, far, tol=1e-6, max_iter=100)
  assert "component 2 holds 0 rows" in caplog.text
  assert found.history[-1] == pytest.approx(fit(x).history[-1], abs=0.02)
  assert (found.assign(x) == labels).mean() > 0.95


@pytest.mark.parametrize("rank", [0, 2])
def test_a_constant_dim_is_named_and_its_variance_is_the_floor(caplog, rank):
  x, _ = planted()
  x[:, 3] = 0.1
  with caplog.at_level(logging.WARNING, "gemma_jax"):
    found = fit(x, rank=rank, floor=1e-2)
  assert "dims [3] are constant" in caplog.text
  assert np.isfinite(found.history).all()
  if rank == 0:
    least = 1e-2 * x.var(0).mean()
    np.testing.assert_allclose(found.variances[:, 3], least, rtol=1e-4)


def test_a_row_that_is_not_finite_is_named():
  x, _ = planted()
  found, baselines = fit(x), gaussian_baselines(x)
  x[[417, 500]] = np.nan
  scores = found.log_likelihood, found.assign, baselines.full.log_likelihood
  for call in (fit, gaussian_baselines, *scores):
    with pytest.raises(FloatingPointError, match="Row 417 is not finite"):
      call(x)
  with pytest.raises(ValueError, match="rows of 5 dims, got 4"):
    baselines.full.log_likelihood(x[:, :4])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"centroids": np.zeros((2001, 5))}, "2001 components of 2000 rows"),
    ({"centroids": np.zeros((3, 4))}, r"with D = 5, got \(3, 4\)"),
    ({"rank": 5}, "rank=5: .* less than the 5 dims"),
    ({"labels": np.zeros(1999, int)}, r"\[N\], N = 2000; got int64 \(1999,\)"),
    ({"labels": np.zeros(2000)}, "whole numbers .* got float64"),
    ({"labels": np.full(2000, 3)}, "from 3 to 3; expected 0 to 2"),
    ({"floor": 0.0}, "floor > 0"),
    ({"x": np.ones((2000, 5))}, "All 2000 rows are equal"),
    ({"x": np.ones(2000)}, r"rows \[N, D\]"),
  ],
)
def test_what_does_not_go_together_is_an_error_that_says_so(change, message):
  x, _ = planted()
  with pytest.raises(ValueError, match=message):
    fit(**({"x": x} | change))


def test_a_row_too_large_for_float32_is_named():
  x, _ = planted()
  x[417] = 1e25
  with pytest.raises(FloatingPointError, match=r"Row 417 is .* too large"):
    fit(x)


def test_rows_of_another_width_are_not_scored():
  with pytest.raises(ValueError, match="rows of 5 dims, got 4"):
    made(0).log_likelihood(np.zeros((3, 4)))
