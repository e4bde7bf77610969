"""Effect sizes: by hand, against statsmodels and effsize, and coverage."""

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats import meta_analysis

from gemma_jax.statistics import cliffs_delta, cohens_d, d_z, hedges_g

X, Y = [2.0, 4, 6, 8], [1.0, 3, 5]
# Of the R package effsize, tests/testthat/testCliff.R.
TREATMENT = [10, 10, 20, 20, 20, 30, 30, 30, 40, 50]
CONTROL = [10, 20, 30, 40, 40, 50]


def sample(n, mean=0.0, seed=0):
  return np.random.default_rng(seed).normal(mean, 1, n)


def test_by_hand():
  # Means 5 and 3; squares 9 + 1 + 1 + 9 = 20 and 4 + 0 + 4 = 8, over 5.
  d = 2 / math.sqrt(28 / 5)
  assert cohens_d(X, Y).value == pytest.approx(d)
  assert hedges_g(X, Y).value == pytest.approx(d * (1 - 3 / 19))
  # Differences 1, 1, 1, 5: mean 2, squares 1 + 1 + 1 + 9 = 12, over 3.
  assert d_z([1.0, 1, 1, 5]).value == pytest.approx(2 / math.sqrt(4))
  assert d_z([3.0, 2, 5, 9], [2.0, 1, 4, 4]) == d_z([1.0, 1, 1, 5])


def test_g_is_that_of_statsmodels():
  x, y = sample(12, 1), sample(9, seed=1)
  expected, _ = meta_analysis.effectsize_smd(
    x.mean(), x.std(ddof=1), 12, y.mean(), y.std(ddof=1), 9
  )
  assert hedges_g(x, y).value == pytest.approx(expected)


def test_the_correction_takes_out_the_bias():
  rng = np.random.default_rng(0)
  pairs = [(rng.normal(1, 1, 5), rng.normal(0, 1, 5)) for _ in range(4_000)]
  d = np.array([cohens_d(x, y).value for x, y in pairs])
  g = np.array([hedges_g(x, y).value for x, y in pairs])
  error = d.std() / math.sqrt(len(d))
  assert d.mean() > 1 + 4 * error
  assert g.mean() == pytest.approx(1, abs=3 * error)


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("shift", [-2.0, 0.0, 0.5, 20.0])
def test_the_ends_are_noncentralities_that_just_give_this_t(shift, level):
  x, y = sample(7, shift), sample(12, seed=1)
  root = math.sqrt(7 * 12 / 19)
  tail = (1 - level) / 2
  for got, t, freedom, scale in (
    (cohens_d(x, y, level=level), stats.ttest_ind(x, y), 17, root),
    (d_z(x, level=level), stats.ttest_1samp(x, 0), 6, math.sqrt(7)),
  ):
    assert got.value * scale == pytest.approx(t.statistic)
    above = stats.nct.sf(t.statistic, freedom, got.low * scale)
    below = stats.nct.cdf(t.statistic, freedom, got.high * scale)
    assert (above, below) == pytest.approx((tail, tail), rel=1e-3)


def test_the_interval_excludes_0_where_the_t_test_is_significant():
  for seed in range(40):
    x, y = sample(8, 1, seed), sample(9, seed=100 + seed)
    got = cohens_d(x, y)
    significant = stats.ttest_ind(x, y).pvalue < 0.05
    assert (got.low > 0 or got.high < 0) == significant


def test_intervals_are_right_95_percent_of_the_time():
  rng = np.random.default_rng(0)
  right = dict.fromkeys(("d", "g", "d_z"), 0)
  for _ in range(1_500):
    x, y = rng.normal(0.9, 1, 8), rng.normal(0, 1, 11)
    for name, got in (
      ("d", cohens_d(x, y)),
      ("g", hedges_g(x, y)),
      ("d_z", d_z(x)),
    ):
      right[name] += got.low <= 0.9 <= got.high
  low, high = stats.binom.interval(0.998, 1_500, 0.95)
  assert all(low <= count <= high for count in right.values()), right


# --------------------------------------------------------------- Cliff's delta


def test_delta_is_the_mean_sign_over_all_pairs():
  rng = np.random.default_rng(0)
  for _ in range(20):
    x, y = rng.integers(0, 6, 9), rng.integers(1, 8, 14)  # many ties
    expected = np.sign(x[:, None] - y).mean()
    assert cliffs_delta(x, y).value == pytest.approx(expected)


def test_delta_and_its_interval_are_those_of_effsize():
  got = cliffs_delta(TREATMENT, CONTROL)
  assert got.value == -0.25
  assert (got.low, got.high) == pytest.approx((-0.7265846, 0.3890062), abs=1e-7)


def test_exchanged_samples_mirror_the_interval():
  for x, y in ((TREATMENT, CONTROL), (X, Y), ([1, 2, 3], [7, 8])):
    one, other = cliffs_delta(x, y), cliffs_delta(y, x)
    assert one.value == -other.value
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))


def test_only_the_order_counts():
  x, y = sample(9, 1), sample(7, seed=1)
  assert cliffs_delta(np.exp(5 * x), np.exp(5 * y)) == cliffs_delta(x, y)


def test_separated_samples_have_delta_1_and_still_an_interval():
  few = cliffs_delta([5, 6, 7], [1, 2, 3, 4])
  many = cliffs_delta(np.arange(50) + 100, np.arange(60))
  for got in (few, many):
    assert got.value == got.high == 1
    assert got.low < 1
  assert many.low > 0.8 > few.low
  assert few.low >= -1


def test_ties_alone_do_not_make_delta_certain():
  got = cliffs_delta([2, 2, 2], [2, 2])
  assert got.value == 0
  assert -1 < got.low < -0.5 < 0.5 < got.high < 1


def test_deltas_interval_is_right_95_percent_of_the_time():
  rng = np.random.default_rng(0)
  for delta in (0.0, 0.5, 0.8):
    shift = math.sqrt(2) * stats.norm.ppf((delta + 1) / 2)
    right = 0
    for _ in range(800):
      got = cliffs_delta(rng.normal(shift, 1, 20), rng.normal(0, 1, 15))
      right += got.low <= delta <= got.high
    assert 0.925 <= right / 800 <= 0.98, delta


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize("effect", [cohens_d, hedges_g, cliffs_delta, d_z])
def test_what_has_no_effect_size_is_refused(effect):
  with pytest.raises(ValueError, match="at least 2 values"):
    effect([1.0], [2.0])
  with pytest.raises(ValueError, match="finite"):
    effect([1.0, np.inf, 2.0], [1.0, 2.0, 4.0])
  with pytest.raises(ValueError, match="level between 0 and 1"):
    effect([1.0, 2.0, 3.0], [1.0, 2.0, 4.0], level=95)


def test_what_does_not_vary_has_no_standardised_size():
  same = np.full(5, 0.1)
  for effect in (cohens_d, hedges_g):
    with pytest.raises(ValueError, match="values that vary"):
      effect(same, same + 1)
  with pytest.raises(ValueError, match="values that vary"):
    d_z(same)
  with pytest.raises(ValueError, match="same prompts"):
    d_z(same, same[1:])
  assert cliffs_delta(same, same).value == 0
