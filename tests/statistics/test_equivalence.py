"""Equivalence and power: against statsmodels, and by simulation."""

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats import power, weightstats

from gemma_jax.statistics import (
  minimum_detectable_difference,
  minimum_n,
  tost,
)

SOLVERS = {
  "paired": power.TTestPower(),
  "independent": power.TTestIndPower(),
}


def sample(n, mean=0.0, sd=1.0, seed=0):
  return np.random.default_rng(seed).normal(mean, sd, n)


@pytest.mark.parametrize(("low", "high"), [(-0.5, 0.5), (-1, 2), (0.3, 0.4)])
def test_p_is_that_of_statsmodels(low, high):
  x, y = sample(20), sample(20, 0.2, seed=1)
  got = tost(x, y, low=low, high=high)
  assert got.p == pytest.approx(weightstats.ttost_paired(x, y, low, high)[0])
  assert got.value == pytest.approx(np.mean(x - y))
  assert tost(x - y, low=low, high=high) == got
  y = sample(13, 0.2, 3.0, seed=1)
  got = tost(x, y, low=low, high=high, design="independent")
  expected = weightstats.ttost_ind(x, y, low, high, usevar="unequal")[0]
  assert got.p == pytest.approx(expected)
  assert got.value == pytest.approx(x.mean() - y.mean())


def test_the_interval_is_that_of_scipy():
  x, y = sample(20), sample(13, 0.2, 3.0, seed=1)
  for got, test in (
    (tost(x, low=-1, high=1), stats.ttest_1samp(x, 0)),
    (
      tost(x, y, low=-1, high=1, design="independent"),
      stats.ttest_ind(x, y, equal_var=False),
    ),
  ):
    expected = test.confidence_interval(0.9)
    assert (got.low, got.high) == pytest.approx(tuple(expected))


def test_a_group_that_does_not_vary_leaves_the_other_ones_error():
  x = sample(9, seed=3)
  got = tost(x, np.full(7, 0.1), low=-1, high=1, design="independent")
  expected = tost(x - 0.1, low=-1, high=1)
  assert (got.p, got.low) == pytest.approx((expected.p, expected.low))


@pytest.mark.parametrize("design", SOLVERS)
@pytest.mark.parametrize("alpha", [0.05, 0.1])
def test_the_interval_is_within_the_bounds_where_p_is_below_alpha(
  design, alpha
):
  seen = set()
  for seed in range(60):
    x, y = sample(15, seed=seed), sample(15, 0.1, seed=100 + seed)
    got = tost(x, y, low=-0.7, high=0.8, design=design, alpha=alpha)
    within = -0.7 < got.low < got.high < 0.8
    assert within == (got.p < alpha)
    seen.add(within)
  assert seen == {True, False}


def test_no_evidence_of_a_difference_is_no_evidence_of_none():
  x = sample(5, 0.3)
  assert stats.ttest_1samp(x, 0).pvalue > 0.05
  assert tost(x, low=-0.2, high=0.2).p > 0.05


def test_a_difference_at_the_bound_passes_no_more_often_than_alpha():
  passed = sum(
    tost(sample(30, 0.5, 0.6, seed), low=-0.5, high=0.5).p < 0.05
    for seed in range(1_000)
  )
  low, high = stats.binom.interval(0.998, 1_000, 0.05)
  assert low <= passed <= high


# --------------------------------------------------------------------- power


@pytest.mark.parametrize("design", SOLVERS)
@pytest.mark.parametrize("effect", [0.1, 0.35, 0.8, 1.5])
@pytest.mark.parametrize(("alpha", "wanted"), [(0.05, 0.8), (0.01, 0.95)])
def test_the_fewest_prompts_are_those_of_statsmodels(
  design, effect, alpha, wanted
):
  options = {"alpha": alpha, "power": wanted}
  name = "nobs" if design == "paired" else "nobs1"
  solved = SOLVERS[design].solve_power(effect, **{name: None}, **options)
  got = minimum_n(effect, design=design, **options)
  assert got == math.ceil(solved)
  assert minimum_n(-effect, design=design, **options) == got


def test_known_numbers_of_prompts():
  """Cohen 1988, table 2.4.1: 64 in each group for d = .5, 26 for d = .8."""
  assert minimum_n(0.5, design="independent") == 64
  assert minimum_n(0.8, design="independent") == 26


@pytest.mark.parametrize("design", SOLVERS)
@pytest.mark.parametrize("n", [2, 3, 10, 77, 2_000])
def test_the_two_are_inverse(design, n):
  sd = 3.0
  difference = minimum_detectable_difference(sd, n, design=design)
  for nudge, expected in ((1 + 1e-6, n), (1 - 1e-6, n + 1)):
    assert minimum_n(nudge * difference / sd, design=design) == expected


@pytest.mark.parametrize("design", SOLVERS)
def test_the_difference_is_found_as_often_as_said(design):
  rng = np.random.default_rng(0)
  n, sd = 12, 2.5
  difference = minimum_detectable_difference(sd, n, power=0.7, design=design)
  x = rng.normal(difference, sd, (4_000, n))
  if design == "paired":
    p = stats.ttest_1samp(x, 0, axis=1).pvalue
  else:
    p = stats.ttest_ind(x, rng.normal(0, sd, x.shape), axis=1).pvalue
  assert np.mean(p < 0.05) == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize("design", SOLVERS)
def test_effects_of_any_size_have_a_number_of_prompts(design):
  """Also where SciPy has no value for the power, as at 3 or 1000."""
  effects = [1e-3, 0.01, 0.1, 1, 3, 10, 30, 100, 1_000]
  n = [minimum_n(effect, design=design) for effect in effects]
  assert n == sorted(n, reverse=True)
  assert n[-1] == 2
  # (z_.975 + z_.8)^2 / effect^2, twice that for two groups
  expected = 7.8489 * 1e6 * (1 if design == "paired" else 2)
  assert n[0] == pytest.approx(expected, rel=1e-3)


# ------------------------------------------------------------------ refusals


def test_impossible_tests_are_refused():
  x = sample(8)
  for low, high in ((1, -1), (0, 0), (-1, math.inf), (math.nan, 1)):
    with pytest.raises(ValueError, match="low < high"):
      tost(x, low=low, high=high)
  with pytest.raises(ValueError, match=r"alpha between 0 and \.5"):
    tost(x, low=-1, high=1, alpha=0.5)
  with pytest.raises(ValueError, match="values that vary"):
    tost(np.full(7, 0.1), low=-1, high=1)
  with pytest.raises(ValueError, match="values that vary"):
    tost(x * 0, x * 0 + 0.1, low=-1, high=1, design="independent")
  with pytest.raises(ValueError, match="same prompts"):
    tost(x, x[1:], low=-1, high=1)
  with pytest.raises(ValueError, match="finite"):
    tost([1.0, np.nan], low=-1, high=1)
  with pytest.raises(ValueError, match="design"):
    tost(x, low=-1, high=1, design="welch")


def test_impossible_powers_are_refused():
  with pytest.raises(ValueError, match="not 0"):
    minimum_n(0)
  with pytest.raises(ValueError, match="alpha < power"):
    minimum_n(0.5, alpha=0.9)
  with pytest.raises(ValueError, match="alpha < power"):
    minimum_detectable_difference(1, 10, power=1)
  with pytest.raises(ValueError, match="sd > 0"):
    minimum_detectable_difference(0, 10)
  with pytest.raises(ValueError, match="n of at least 2"):
    minimum_detectable_difference(1, 1)
  with pytest.raises(ValueError, match="design"):
    minimum_n(0.5, design="two groups")
