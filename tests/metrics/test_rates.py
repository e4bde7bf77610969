"""What codes cost, against closed forms."""

import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import entropy

from gemma_jax.metrics import rates


@pytest.mark.parametrize(
  ("width", "l0"), [(1, 0), (1, 1), (5, 2), (10, 10), (16_384, 80)]
)
def test_the_support_costs_the_logarithm_of_the_number_of_supports(width, l0):
  expected = math.log2(math.comb(width, l0))
  assert rates.support_bits(width, l0) == pytest.approx(expected, abs=1e-6)


def test_eighty_of_16384_latents_take_725_bits():
  assert rates.support_bits(16_384, 80) == pytest.approx(725, abs=1)


def test_the_support_of_a_mean_l0_lies_between_its_neighbours():
  two, between, three = rates.support_bits(9, np.array([2, 2.5, 3]))
  assert two < between < three


@pytest.mark.parametrize("l0", [-1, 11, [2, 11]])
def test_more_active_latents_than_there_are_is_an_error(l0):
  with pytest.raises(ValueError, match="0 to 10 active latents"):
    rates.support_bits(10, l0)


def test_the_firing_entropy_is_the_sum_of_the_latents_own():
  density = np.array([0.5, 0.25, 0.01, 0.9])
  expected = sum(entropy([p, 1 - p], base=2) for p in density)
  assert rates.firing_entropy(density) == pytest.approx(expected, rel=1e-12)
  assert rates.firing_entropy(density[:1]) == pytest.approx(1)


def test_latents_that_never_or_always_fire_say_nothing():
  assert rates.firing_entropy([0, 1, 0, 1]) == 0
  assert rates.firing_entropy([0, 0.5, 1]) == pytest.approx(1)


def test_the_label_entropy_is_that_of_the_frequencies():
  counts = np.array([3, 0, 7, 1, 40])
  expected = entropy(counts, base=2)
  assert rates.label_entropy(counts) == pytest.approx(expected, rel=1e-12)
  assert rates.label_entropy([5] * 64) == pytest.approx(6)
  assert rates.label_entropy([9, 0]) == 0


DECAYING = 0.8 ** np.arange(40)


def flooded(values, bits):
  """Distortion with the water level found by bisection."""

  def rate(level):
    return np.sum(np.maximum(np.log2(values / level), 0)) / 2 - bits

  level = brentq(rate, 1e-30, values.max(), xtol=1e-18, rtol=1e-14)
  return np.minimum(values, level).sum() / values.sum()


@pytest.mark.parametrize("bits", [0.01, 0.3, 1, 4.7, 20, 60, 150, 400])
def test_the_bound_is_that_of_a_water_level_found_by_bisection(bits):
  found = rates.gaussian_bound(DECAYING, bits)
  assert found == pytest.approx(flooded(DECAYING, bits), rel=1e-9)


def test_a_white_source_falls_by_6_dB_for_every_bit_of_a_dim():
  bits = np.linspace(0, 50, 11)
  np.testing.assert_allclose(
    rates.gaussian_bound(np.full(16, 3.0), bits), 2 ** (-2 * bits / 16)
  )


def test_a_single_component_has_the_classical_bound():
  found = rates.gaussian_bound([2.5], np.array([0, 1, 2.5]))
  np.testing.assert_allclose(found, [1, 1 / 4, 1 / 32])


def test_without_bits_nothing_is_explained():
  rng = np.random.default_rng(0)
  for values in (DECAYING, rng.random(7), [1, 1, 0.5]):
    assert rates.gaussian_bound(values, 0) == pytest.approx(1)


def test_the_bound_falls_and_is_convex():
  found = rates.gaussian_bound(DECAYING, np.linspace(0, 200, 2_001))
  assert (np.diff(found) < 0).all()
  assert (np.diff(found, 2) > -1e-15).all()


def test_the_bound_is_continuous_where_a_component_joins():
  values = np.array([8.0, 2.0, 0.5])
  # Of component n: half the logarithms of what is above its level.
  joins = np.array([1.0, 3.0])
  distortion = np.array([2 + 2 + 0.5, 0.5 * 3]) / values.sum()
  for nudge in (-1e-9, 0, 1e-9):
    found = rates.gaussian_bound(values, joins + nudge)
    np.testing.assert_allclose(found, distortion, rtol=1e-8)


def test_the_order_and_dims_without_variance_do_not_matter():
  bits = np.array([[0.5, 3], [10, 80]])
  shuffled = np.random.default_rng(0).permutation(np.append(DECAYING, [0, 0]))
  found = rates.gaussian_bound(shuffled, bits)
  assert found.shape == bits.shape
  np.testing.assert_allclose(found, rates.gaussian_bound(DECAYING, bits))
