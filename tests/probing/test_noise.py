import numpy as np
import pytest
import scipy.stats

from gemma_jax.probing import noise


def test_the_spread_over_seeds_is_that_of_the_seeds():
  draws = dict(zip(range(6), [0.5, 0.7, 0.6, 0.4, 0.9, 0.2], strict=True))
  found = noise.reseeded(draws.get, range(6))
  values = list(draws.values())
  assert found.value == pytest.approx(np.mean(values))
  assert found.reseed_sd == pytest.approx(np.std(values, ddof=1))
  assert found.mdd == pytest.approx(2.8 * found.reseed_sd)
  assert found.seeds == tuple(range(6))
  np.testing.assert_array_equal(found.values[:, 0], values)
  assert np.isnan(found.interval).all()  # a single unit


def test_the_interval_is_scipys_over_units():
  units = np.random.default_rng(0).exponential(size=25)
  found = noise.reseeded(lambda seed: units + 0.1 * (seed - 2))
  expected = scipy.stats.bootstrap(
    (units,), np.mean, n_resamples=20_000, random_state=1
  ).confidence_interval
  width = expected.high - expected.low
  np.testing.assert_allclose(found.interval, expected, atol=0.06 * width)
  assert found.interval[0] < found.value < found.interval[1]
  # Skewed: BCa is not symmetric about the mean.
  low, high = np.abs(np.array(found.interval) - found.value)
  assert high > 1.05 * low
  assert found.reseed_sd == pytest.approx(0.1 * np.std(range(5), ddof=1))
  narrow = noise.reseeded(lambda seed: units, confidence=0.5)
  assert np.ptp(narrow.interval) < 0.5 * np.ptp(found.interval)


def test_units_without_a_score_are_left_out():
  table = np.array([[0.2, 0.4, np.nan, 0.9, 0.3, 0.5, 0.8]] * 5)
  table[0, 0] = np.nan
  found = noise.reseeded(lambda seed: table[seed])
  by_seed = np.nanmean(table, axis=1)
  assert found.value == pytest.approx(by_seed.mean())
  assert found.values.shape == (5, 7)
  low, high = found.interval
  assert 0.2 < low < found.value < high < 0.9
  # What is left is too few units to resample.
  table[:, 4:] = np.nan
  assert np.isnan(noise.reseeded(lambda seed: table[seed]).interval).all()


def test_equal_units_have_an_interval_without_width():
  found = noise.reseeded(lambda seed: np.full(5, 0.7))
  assert found.interval == (0.7, 0.7)
  assert found.reseed_sd == found.mdd == 0


def test_what_has_no_noise_to_measure_is_refused():
  for seeds in (range(4), [1, 2, 3, 4, 4], [0, 1, 2, 3, 4, 4]):
    with pytest.raises(ValueError, match="at least 5 different seeds"):
      noise.reseeded(float, seeds)
  with pytest.raises(ValueError, match="the same units"):
    noise.reseeded(lambda seed: np.ones(seed + 1))
  with pytest.raises(ValueError, match=r"with seeds \[3\]"):
    noise.reseeded(lambda seed: np.nan if seed == 3 else 1.0)
