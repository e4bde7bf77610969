"""The terms of the loss: against NumPy, and what the train mean gets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics

from gemma_jax.alignment import objective
from gemma_jax.alignment.objective import (
  TERMS,
  activation_losses,
  code_losses,
  code_statistics,
  total,
)
from gemma_jax.alignment.scores import Scores

pytestmark = pytest.mark.usefixtures("quick_compiles")

ALL = np.arange(40)
losses = jax.jit(code_losses)


def sparse(n=2_000, m=40, *, seed=0):
  """Codes of many scales; 0 never fires, 1 always does, 2 is constant."""
  rng = np.random.default_rng(seed)
  rate = np.geomspace(0.002, 0.5, m)
  fires = rng.random((n, m)) < rate
  codes = rng.exponential(size=(n, m)) * np.geomspace(20, 0.1, m) * fires
  codes[:, 0] = 0
  codes[:, 1] = 3 + rng.random(n)
  codes[:, 2] = 7
  return np.float32(codes)


def guesses(actual, seed=1):
  """Codes and logits that know something."""
  rng = np.random.default_rng(seed)
  noise = rng.normal(size=actual.shape) * (actual.std(0) + 0.1)
  predicted = 0.6 * actual + 0.5 * noise + 0.1
  logits = 2.0 * (actual > 0) - 1 + rng.normal(size=actual.shape)
  return np.float32(predicted), np.float32(logits)


def by_hand(predicted, logits, actual, train):
  """The terms in float64, of the docstrings' formulas."""
  p, y, train = (np.float64(a) for a in (predicted, actual, train))
  mean, std = train.mean(0), train.std(0)
  unit = np.maximum(std, 0.1 * np.sqrt(np.mean(std**2)))
  error = np.sum(np.mean((p - y) ** 2, 0) / unit**2)
  cosines = metrics.pairwise.paired_cosine_distances(p - mean, y - mean)
  with np.errstate(invalid="ignore"):
    of_p, of_y = (np.nan_to_num(np.corrcoef(a.T)) for a in (p, y))
  off = ~np.eye(len(mean), dtype=bool)
  l1 = [np.mean(np.sum(np.abs(a) / unit, 1)) for a in (p, y)]
  rate = np.clip((train > 0).mean(0), 1e-6, 1 - 1e-6)
  chance = 1 / (1 + np.exp(-np.float64(logits)))
  fires = y > 0
  crossed = -np.where(fires, np.log(chance), np.log(1 - chance)).mean(0)
  entropy = -rate * np.log(rate) - (1 - rate) * np.log(1 - rate)
  return {
    "reconstruction": error / np.sum((std / unit) ** 2),
    "cosine": cosines.mean(),
    "correlation": np.mean((of_p - of_y)[off] ** 2),
    "sparsity": ((l1[0] - l1[1]) / np.sum(mean / unit)) ** 2,
    "firing": crossed.sum() / entropy.sum(),
  }


# ------------------------------------------------------------------- statistics
@pytest.mark.parametrize("block", [40 * 7, 2**22])
def test_statistics_are_numpys_whatever_the_batches(block, monkeypatch):
  monkeypatch.setattr(objective, "_BLOCK", block)
  codes = sparse() + np.float32(1e3) * (np.arange(40) == 1)
  about = code_statistics([codes[:3], jnp.asarray(codes[3:900]), codes[900:]])
  exact = np.float64(codes)
  np.testing.assert_allclose(about.mean, exact.mean(0), rtol=1e-6)
  np.testing.assert_allclose(about.std, exact.std(0), rtol=1e-5, atol=1e-12)
  np.testing.assert_allclose(about.rate, (codes > 0).mean(0), rtol=1e-6)
  assert all(a.dtype == jnp.float32 for a in about)


def test_units_have_a_floor_and_log_odds_are_finite():
  about = code_statistics([sparse()])
  usual = np.sqrt(np.mean(np.square(about.std)))
  assert about.unit.min() == pytest.approx(0.1 * usual, rel=1e-6)
  above = about.std > 0.1 * usual
  assert 0 < above.sum() < 40
  np.testing.assert_array_equal(about.unit[above], about.std[above])
  np.testing.assert_allclose(
    jax.nn.sigmoid(about.log_odds)[3:], about.rate[3:], rtol=1e-5
  )
  np.testing.assert_allclose(about.log_odds[:2], [-13.8, 13.8], atol=0.1)


# ------------------------------------------------------------------------ codes
def test_every_term_is_numpys():
  train, actual = sparse(), sparse(300, seed=2)
  predicted, logits = guesses(actual)
  predicted[:, 5] = 0.25  # constant where the codes are not
  found = losses(predicted, logits, actual, code_statistics([train]), ALL)
  expected = by_hand(predicted, logits, actual, train)
  assert set(found) == set(TERMS) == set(expected)
  for name in TERMS:
    # Short lengths are bounded below, by a thousandth of the usual one.
    assert found[name] == pytest.approx(expected[name], rel=1e-3), name


def test_only_the_sampled_latents_are_correlated():
  train, actual = sparse(), sparse(300, seed=2)
  predicted, logits = guesses(actual)
  about, some = code_statistics([train]), np.array([30, 17, 22])
  found = losses(predicted, logits, actual, about, some)["correlation"]
  of_p, of_y = (np.corrcoef(a[:, some].T) for a in (predicted, actual))
  expected = np.sum((of_p - of_y) ** 2) / 6
  assert found == pytest.approx(expected, rel=1e-3)


def test_the_train_mean_gets_what_the_table_says():
  train = sparse()
  about = code_statistics([train])
  mean = np.broadcast_to(about.mean, train.shape)
  logits = np.broadcast_to(about.log_odds, train.shape)
  found = losses(mean, logits, train, about, ALL)
  assert found["reconstruction"] == pytest.approx(1, rel=1e-4)
  assert found["cosine"] == pytest.approx(1, abs=1e-5)
  assert found["sparsity"] == pytest.approx(0, abs=1e-6)
  assert found["firing"] == pytest.approx(1, rel=1e-4)
  with np.errstate(invalid="ignore"):
    squares = np.nan_to_num(np.corrcoef(train.T)) ** 2
  expected = (squares.sum() - squares.trace()) / (40 * 39)
  assert found["correlation"] == pytest.approx(expected, rel=1e-3)


def test_a_perfect_prediction_gets_nothing():
  train = sparse()
  logits = np.where(train > 0, 30.0, -30.0)
  about = code_statistics([train])
  found = losses(train, logits, train, about, ALL)
  for name in TERMS:
    assert found[name] == pytest.approx(0, abs=1e-4), name


def test_the_cosine_is_that_of_the_scores():
  train, actual = sparse(), sparse(300, seed=2)
  predicted, logits = guesses(actual)
  about = code_statistics([train])
  found = losses(predicted, logits, actual, about, ALL)["cosine"]
  scores = Scores(about.mean).update(predicted, actual).compute()
  assert 1 - found == pytest.approx(scores["centred_cosine"], abs=1e-4)


def test_a_rare_latent_that_fires_does_not_blow_up():
  train = np.tile(sparse(), (50, 1))
  train[:, 0] = 0
  train[0, 0] = 1.0  # one of 100,000 rows
  about = code_statistics([train])
  actual = train[:64]
  mean = np.broadcast_to(about.mean, actual.shape)
  found, without = (
    losses(mean, mean, y, about, ALL)["reconstruction"]
    for y in (actual, actual * (np.arange(40) != 0))
  )
  # In units of its own std it alone would be 316^2 / 64 / 39, forty.
  assert 0 < found - without < 0.3


def test_firing_is_least_at_the_rate_itself():
  train = sparse()
  about = code_statistics([train])
  off = jnp.zeros(40).at[10].set(0.2)
  mean = np.broadcast_to(about.mean, train.shape)

  def firing(size):
    logits = jnp.broadcast_to(about.log_odds + size * off, train.shape)
    return losses(mean, logits, train, about, ALL)["firing"]

  assert firing(0) < min(firing(1), firing(-1))


@pytest.mark.parametrize("case", ["mean", "silent", "usual", "perfect"])
def test_gradients_are_finite_and_those_of_differences(case):
  train = sparse()
  about = code_statistics([train])
  actual = train[:50]
  predicted, logits = guesses(actual)
  mean = np.broadcast_to(np.asarray(about.mean), actual.shape)
  if case == "mean":
    predicted = mean
  if case == "silent":
    actual, predicted = np.zeros_like(actual), np.zeros_like(actual)
  if case == "perfect":
    predicted = actual

  @jax.jit
  def terms(predicted, logits):
    return losses(predicted, logits, actual, about, ALL)

  jacobian = jax.jacrev(terms, argnums=(0, 1))(predicted, logits)
  for name in TERMS:
    assert all(np.isfinite(g).all() for g in jacobian[name]), name
  if case != "usual":
    return
  rng = np.random.default_rng(0)
  steps = tuple(np.float32(rng.normal(size=(2, *predicted.shape))))
  ends = [
    by_hand(predicted + h * steps[0], logits + h * steps[1], actual, train)
    for h in (1e-4, -1e-4)
  ]
  for name in TERMS:
    slope = sum(
      np.sum(np.float64(g) * step)
      for g, step in zip(jacobian[name], steps, strict=True)
    )
    expected = (ends[0][name] - ends[1][name]) / 2e-4
    assert slope == pytest.approx(expected, rel=2e-2, abs=1e-6), name


# ------------------------------------------------------------------ activations
def test_of_activations_the_mean_gets_one_and_all_is_numpys():
  rng = np.random.default_rng(0)
  train = rng.normal(size=(500, 9)) * np.arange(1, 10) + 100
  mean, variance = train.mean(0), train.var(0).sum()
  of_mean = activation_losses(np.tile(mean, (500, 1)), train, mean, variance)
  assert of_mean["reconstruction"] == pytest.approx(1, rel=1e-5)
  assert of_mean["cosine"] == pytest.approx(1, abs=1e-4)
  perfect = activation_losses(train, train, mean, variance)
  assert max(perfect.values()) == pytest.approx(0, abs=1e-5)
  predicted = train + 5 * rng.normal(size=train.shape)
  found = activation_losses(predicted, train, mean, variance)
  error = np.sum((predicted - train) ** 2) / np.sum((train - mean) ** 2)
  assert found["reconstruction"] == pytest.approx(error, rel=1e-4)
  cosines = metrics.pairwise.paired_cosine_distances(
    predicted - mean, train - mean
  )
  assert found["cosine"] == pytest.approx(cosines.mean(), rel=1e-3)
  for where in (np.tile(mean, (500, 1)), train, predicted):
    gradients = jax.jacrev(activation_losses)(
      jnp.float32(where), train, mean, variance
    )
    assert all(np.isfinite(g).all() for g in gradients.values())


# ------------------------------------------------------------------------ total
def test_the_total_is_the_weighted_sum_of_the_terms_that_are_asked_for():
  found = dict(zip(TERMS, (0.5, 0.25, 3.0, 2.0, 1.0), strict=True))
  weights = {"reconstruction": 1.0, "firing": 0.1, "kl": 2.0}
  assert total(found | {"kl": 4.0}, weights) == pytest.approx(8.6)
  with pytest.raises(ValueError, match=r"reconstruction, sparsity, got kl;"):
    total(found, weights)
  with pytest.raises(ValueError, match="got none"):
    total(found, {})


def test_what_does_not_fit_is_refused():
  codes = sparse(20)
  about = code_statistics([codes])
  with pytest.raises(ValueError, match=r"\[n, 40\], got .*\(20, 39\)"):
    losses(codes, codes, codes[:, 1:], about, ALL)
  with pytest.raises(ValueError, match=r"two or more, got \(1,\)"):
    losses(codes, codes, codes, about, ALL[:1])
  with pytest.raises(ValueError, match=r"mean \[E\], got .* and \(39,\)"):
    activation_losses(codes, codes, codes[0, 1:], 1.0)
  with pytest.raises(ValueError, match="got no rows"):
    code_statistics([codes[:0]])
  with pytest.raises(ValueError, match=r"\[n, 40\], got \(20, 39\)"):
    code_statistics([codes, codes[:, 1:]])
  with pytest.raises(ValueError, match="that vary, got 20 rows"):
    code_statistics([np.ones((20, 3))])
  for bad in (-1, np.nan, np.inf):
    broken = codes.copy()
    broken[3, 3] = bad
    with pytest.raises(ValueError, match="rows from 20 on"):
      code_statistics([codes, broken])
