"""Straight-through estimators against their formulas, and what they mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.dictionaries.jump import jump, step

BANDWIDTH = 0.3


def make_case(seed=0):
  """Pre-activations on both sides of thresholds, some within the kernel."""
  rng = np.random.default_rng(seed)
  z = rng.normal(size=(50, 7)).astype(np.float32)
  threshold = rng.uniform(0.1, 0.8, size=7).astype(np.float32)
  g = rng.normal(size=z.shape).astype(np.float32)
  inside = np.abs(z - threshold) < BANDWIDTH / 2
  assert 20 < inside.sum() < 100
  return z, threshold, g, inside.astype(np.float64)


def pulled_back(function, z, threshold, g, to_input):
  out, back = jax.vjp(
    lambda z, t: function(z, t, BANDWIDTH, to_input), z, threshold
  )
  return np.asarray(out), *map(np.asarray, back(jnp.asarray(g)))


@pytest.mark.parametrize("to_input", [False, True])
def test_jump_passes_what_is_above_and_estimates_the_threshold_s_gradient(
  to_input,
):
  z, threshold, g, inside = make_case()
  out, dz, dt = pulled_back(jump, z, threshold, g, to_input)
  above = z > threshold
  np.testing.assert_array_equal(out, np.where(above, z, 0))
  estimate = threshold / BANDWIDTH * inside * g
  np.testing.assert_allclose(dt, -estimate.sum(0), rtol=1e-5, atol=1e-6)
  expected = above * g + (estimate if to_input else 0)
  np.testing.assert_allclose(dz, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("to_input", [False, True])
def test_step_is_0_or_1_and_estimates_the_threshold_s_gradient(to_input):
  z, threshold, g, inside = make_case()
  out, dz, dt = pulled_back(step, z, threshold, g, to_input)
  np.testing.assert_array_equal(out, z > threshold)
  estimate = inside * g / BANDWIDTH
  np.testing.assert_allclose(dt, -estimate.sum(0), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(dz, estimate if to_input else 0 * g, rtol=1e-5)


def test_neither_passes_what_equals_the_threshold():
  z = jnp.asarray([[0.5, 0.625]])
  threshold = jnp.asarray([0.5, 0.5])
  np.testing.assert_array_equal(jump(z, threshold, 0.1), [[0, 0.625]])
  np.testing.assert_array_equal(step(z, threshold, 0.1), [[0, 1]])


def test_the_estimates_are_the_derivatives_of_the_expectations():
  # z uniform on [0, 1]: d E[step] / dt = -1 and d E[z step] / dt = -t.
  z = (np.arange(100_000, dtype=np.float32)[:, None] + 0.5) / 100_000
  threshold = np.float32([0.3, 0.6])
  g = np.full((len(z), 2), 1 / len(z), np.float32)
  z = np.repeat(z, 2, axis=1)
  _, _, dt = pulled_back(step, z, threshold, g, False)
  np.testing.assert_allclose(dt, -1, rtol=1e-2)
  _, _, dt = pulled_back(jump, z, threshold, g, False)
  np.testing.assert_allclose(dt, -threshold, rtol=1e-2)


def test_the_logarithm_of_a_threshold_gets_its_gradient_times_the_threshold():
  z, threshold, g, inside = make_case()
  for function, estimate in (
    (jump, -threshold / BANDWIDTH * inside * g),
    (step, -inside * g / BANDWIDTH),
  ):

    def value(log, function=function):
      return jnp.sum(function(z, jnp.exp(log), BANDWIDTH) * g)

    got = jax.grad(value)(jnp.log(threshold))
    expected = threshold * estimate.sum(0)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
