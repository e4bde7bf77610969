"""A network between codes: what it learns that ridge regression cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gemma_jax.alignment import translator
from gemma_jax.alignment.maps import fit_ridge
from gemma_jax.alignment.objective import code_losses, code_statistics, total
from gemma_jax.alignment.scores import Scores

apply = jax.jit(translator.apply, static_argnames="dropout")

WEIGHTS = {"reconstruction": 1.0, "cosine": 0.3, "firing": 0.3}


def planted(n, *, seed):
  """Codes of 16 latents, and of 12 that fire where two of these sum up."""
  true = np.random.default_rng(99)
  mix = np.zeros((16, 12))
  for column in mix.T:
    column[true.choice(16, 3, replace=False)] = (1.0, 1.0, -1.0)
  rng = np.random.default_rng(seed)
  fires = rng.random((n, 16)) < 0.3
  source = rng.exponential(size=(n, 16)) * fires
  target = np.maximum(source @ mix - 1.5, 0) * np.geomspace(0.1, 10, 12)
  return np.float32(source), np.float32(target)


@pytest.fixture(scope="module")
def trained():
  """Parameters after training, and statistics of both sides."""
  z, y = planted(4_096, seed=0)
  source, target = code_statistics([z]), code_statistics([y])
  steps = 400
  schedule = optax.cosine_decay_schedule(3e-3, steps)
  optimizer = optax.adam(schedule)
  sampled = np.arange(12)

  def loss(params, z, y, key):
    codes, logits = translator.apply(
      params, source, target, z, dropout=0.05, key=key
    )
    losses = code_losses(codes, logits, y, target, sampled)
    return total(losses, WEIGHTS)

  @jax.jit
  def train(params, key):
    def step(carry, key):
      params, state = carry
      rows_key, dropout_key = jax.random.split(key)
      rows = jax.random.randint(rows_key, (512,), 0, len(z))
      gradient = jax.grad(loss)(
        params, jnp.asarray(z)[rows], jnp.asarray(y)[rows], dropout_key
      )
      updates, state = optimizer.update(gradient, state)
      return (optax.apply_updates(params, updates), state), None

    start = params, optimizer.init(params)
    return jax.lax.scan(step, start, jax.random.split(key, steps))[0][0]

  params = translator.init(jax.random.key(0), 16, 64, 12)
  return train(params, jax.random.key(1)), source, target


def small():
  z, y = planted(50, seed=3)
  params = translator.init(jax.random.key(0), 16, 8, 12)
  return params, code_statistics([z]), code_statistics([y]), z, y


def test_where_codes_are_thresholded_it_beats_ridge(trained):
  z, y = planted(4_096, seed=0)
  test_z, test_y = planted(4_096, seed=1)
  codes, logits = apply(*trained, test_z)
  ridge = fit_ridge(z, y)
  found, linear, fires = (
    Scores(y.mean(0), codes=True, top=5).update(p, test_y).compute()
    for p in (codes, ridge(test_z), logits)
  )
  assert linear["r2_median"] < 0.75
  assert found["r2_median"] > 0.85
  assert found["centred_cosine"] > linear["centred_cosine"] + 0.2
  assert fires["auroc_median"] > 0.99


def test_it_begins_at_the_train_mean_and_the_train_rates():
  params, source, target, z, _ = small()
  codes, logits = apply(params, source, target, z)
  assert codes.shape == logits.shape == (50, 12)
  np.testing.assert_array_equal(codes, np.tile(target.mean, (50, 1)))
  rates = jax.nn.sigmoid(logits)
  np.testing.assert_allclose(rates, np.tile(target.rate, (50, 1)), rtol=1e-4)


def test_codes_are_in_the_units_of_both_sides(trained):
  params, source, target = trained
  z = planted(20, seed=5)[0]
  codes, logits = apply(params, source, target, z)
  wide = [type(s)(4 * s.mean, 4 * s.std, s.rate) for s in (source, target)]
  scaled, same = apply(params, *wide, 4 * z)
  np.testing.assert_allclose(scaled, 4 * codes, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(same, logits, rtol=1e-4, atol=1e-4)
  one = apply(params, source, target, z[7])[0]
  np.testing.assert_allclose(one, codes[7], rtol=1e-4, atol=1e-5)


def test_dropout_takes_a_key_and_keeps_the_mean(trained):
  params, source, target = trained
  known = params, source, target
  z = planted(64, seed=4)[0]
  codes = apply(*known, z)[0]
  key = jax.random.key(0)
  np.testing.assert_array_equal(apply(*known, z, dropout=0.5)[0], codes)
  np.testing.assert_array_equal(apply(*known, z, key=key)[0], codes)
  noisy = apply(*known, z, dropout=0.1, key=key)[0]
  assert not np.allclose(noisy, codes)
  np.testing.assert_array_equal(
    apply(*known, z, dropout=0.1, key=key)[0], noisy
  )
  # Of the last layer, which is linear, the mean over many masks is known.
  last = jax.tree.map(jnp.zeros_like, params)
  last["norms"][1]["bias"] = jnp.ones(64)
  last["layers"][2]["weights"] = jnp.ones((64, 12))
  made = [
    apply(last, source, target, np.zeros((4_000, 16)), **options)[0]
    for options in ({}, {"dropout": 0.5, "key": key})
  ]
  out = [(a - target.mean) / target.unit for a in made]
  np.testing.assert_allclose(out[1].mean(), out[0].mean(), rtol=0.02)
  # A half of 64 units: the deviation of a binomial, times what each gives.
  expected = 8 * jax.nn.gelu(1.0)
  np.testing.assert_allclose(out[1].std(0), expected, rtol=0.05)


def test_gradients_reach_everything_and_are_finite_for_silent_codes():
  params, source, target, z, y = small()
  last = params["layers"][2]
  last["weights"] = 0.1 * jax.random.normal(jax.random.key(1), (8, 12))

  def loss(params, z):
    codes, logits = apply(params, source, target, z)
    losses = code_losses(codes, logits, y, target, np.arange(12))
    return total(losses, dict.fromkeys(losses, 1.0))

  gradient = jax.jit(jax.grad(loss))
  for leaf in jax.tree.leaves(gradient(params, z)):
    assert np.isfinite(leaf).all()
    assert np.abs(leaf).max() > 1e-7
  for leaf in jax.tree.leaves(gradient(params, np.zeros_like(z))):
    assert np.isfinite(leaf).all()


def test_parameters_are_the_numbers_that_are_stored():
  params = small()[0]
  layers = (16 * 8 + 8) + (8 * 8 + 8) + (8 * 12 + 12)
  assert translator.parameters(params) == layers + 2 * 2 * 8 + 2 * 12


def test_what_does_not_fit_is_refused():
  params, source, target, z, _ = small()
  with pytest.raises(ValueError, match=r"\[..., 16\], got \(50, 15\)"):
    apply(params, source, target, z[:, 1:])
  with pytest.raises(ValueError, match="to below 1, got 1"):
    apply(params, source, target, z, dropout=1.0)
  with pytest.raises(ValueError, match="got 16, 0 and 12"):
    translator.init(jax.random.key(0), 16, 0, 12)
