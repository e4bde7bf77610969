"""Tests by exchange: against enumeration, SciPy, and how often they err."""

import itertools

import numpy as np
import pytest
from scipy import stats

from gemma_jax.statistics import (
  arrangements,
  least_n,
  max_permutation_test,
  permutation_test,
  smallest_p,
)

ALTERNATIVES = ("two-sided", "greater", "less")


def normal(n, mean=0.0, seed=0):
  return np.random.default_rng(seed).normal(mean, 1, n)


def flipped(d, statistic=np.mean):
  """The statistic of every choice of signs, one after the other."""
  every = itertools.product((1, -1), repeat=len(d))
  return np.array([statistic(np.multiply(signs, d)) for signs in every])


def tails(null, observed):
  """One-sided p and the two-sided one, by counting."""
  p = {
    "greater": np.mean(null >= observed - 1e-12),
    "less": np.mean(null <= observed + 1e-12),
  }
  return p | {"two-sided": min(1, 2 * min(p.values()))}


# ------------------------------------------------------------- exact tests


@pytest.mark.parametrize("alternative", ALTERNATIVES)
@pytest.mark.parametrize("n", [2, 5, 9])
def test_signs_of_few_prompts_are_all_looked_at(n, alternative):
  d = normal(n, 0.4)
  got = permutation_test(d, alternative=alternative)
  null = flipped(d)
  assert got.exact
  assert got.draws == 2**n == len(got.null)
  assert got.statistic == pytest.approx(d.mean())
  np.testing.assert_allclose(np.sort(got.null), np.sort(null), atol=1e-12)
  assert got.p == pytest.approx(tails(null, d.mean())[alternative])


def test_ties_that_only_rounding_tells_apart_are_ties():
  d = [0.1, 0.2, 0.3, -0.3, 0.7, -0.7]  # 0.1 + 0.2 - 0.3 is 5.6e-17
  exact = tails(flipped([1, 2, 3, -3, 7, -7]), 0.5)
  for alternative, p in exact.items():
    assert permutation_test(d, alternative=alternative).p == pytest.approx(p)


def test_two_samples_of_the_same_prompts_are_their_differences():
  x, y = normal(9), normal(9, seed=1)
  got, expected = permutation_test(x, y), permutation_test(x - y)
  assert (got.p, got.statistic) == (expected.p, expected.statistic)


@pytest.mark.parametrize("alternative", ALTERNATIVES)
@pytest.mark.parametrize(("n", "m"), [(4, 5), (6, 7), (2, 20)])
def test_exchanged_groups_are_those_of_scipy(n, m, alternative):
  x, y = normal(n, 0.7), normal(m, seed=1)
  got = permutation_test(x, y, design="independent", alternative=alternative)
  expected = stats.permutation_test(
    (x, y),
    lambda a, b, axis: a.mean(axis) - b.mean(axis),
    n_resamples=np.inf,
    alternative=alternative,
  )
  assert got.exact
  assert got.statistic == pytest.approx(expected.statistic)
  assert got.p == pytest.approx(expected.pvalue)
  assert len(got.null) == len(expected.null_distribution)


def test_other_statistics_are_those_of_scipy():
  x, y = normal(7, 1.0), normal(6, seed=1)
  got = permutation_test(
    x,
    y,
    design="independent",
    statistic=lambda values, in_x: [
      np.median(values[row]) - np.median(values[~row]) for row in in_x
    ],
  )
  expected = stats.permutation_test(
    (x, y),
    lambda a, b, axis: np.median(a, axis) - np.median(b, axis),
    n_resamples=np.inf,
  )
  assert got.p == pytest.approx(expected.pvalue)
  paired = permutation_test(x, statistic=lambda d: np.median(d, axis=1))
  null = flipped(x, np.median)
  assert paired.p == pytest.approx(tails(null, np.median(x))["two-sided"])


def test_identical_groups_have_p_1():
  same = np.full(5, 0.1)
  got = permutation_test(same, same[:3], design="independent")
  assert (got.p, got.statistic) == (1, 0)
  assert permutation_test(np.zeros(6)).p == 1


# ----------------------------------------------------- what can be shown


def test_three_prompts_can_show_nothing_and_six_can(caplog):
  assert [smallest_p(n) for n in (3, 5, 6)] == [0.25, 0.0625, 0.03125]
  assert smallest_p(5, alternative="less") == 0.03125
  for n in (3, 5, 6):
    caplog.clear()
    got = permutation_test(np.arange(1, n + 1))
    assert got.p == got.smallest_p == smallest_p(n)
    warned = ["can show nothing" in r.message for r in caplog.records]
    assert warned == ([True] if n < 6 else [])


@pytest.mark.parametrize("alternative", ALTERNATIVES)
@pytest.mark.parametrize("alpha", [0.3, 0.05, 0.01, 1e-4])
def test_the_fewest_prompts_reach_alpha_and_one_less_does_not(
  alpha, alternative
):
  n = least_n(alpha, alternative=alternative)
  assert smallest_p(n, alternative=alternative) <= alpha
  assert smallest_p(n - 1, alternative=alternative) > alpha
  if alpha == 0.05:
    assert n == (6 if alternative == "two-sided" else 5)


def test_separated_groups_have_the_smallest_p():
  x, y = np.arange(4.0) + 10, np.arange(5.0)
  got = permutation_test(x, y, design="independent")
  assert got.p == got.smallest_p == pytest.approx(2 / 126)
  many = permutation_test(
    np.arange(30.0), alternative="greater", draws=499, seed=3
  )
  assert not many.exact
  assert many.p == many.smallest_p == 1 / 500


# ------------------------------------------------------ random arrangements


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_random_arrangements_come_near_all_of_them(monkeypatch, alternative):
  x, y = normal(8, 0.5), normal(7, seed=1)
  for design, other in (("paired", None), ("independent", y)):
    options = {"design": design, "alternative": alternative}
    exact = permutation_test(x, other, **options)
    monkeypatch.setattr(arrangements, "EXACT", 1)
    random = permutation_test(x, other, draws=40_000, **options)
    monkeypatch.undo()
    assert exact.exact
    assert not random.exact
    # Four standard errors.
    assert random.p == pytest.approx(exact.p, abs=8 * np.sqrt(0.25 / 40_000))
    assert random.p != exact.p


def test_the_number_in_memory_changes_nothing(monkeypatch):
  x, y = normal(40, 0.3), normal(30, seed=1)
  calls = [
    lambda: permutation_test(x, draws=777),
    lambda: permutation_test(x, y, design="independent", draws=777),
    lambda: permutation_test(x[:5], y[:6], design="independent"),
    lambda: max_permutation_test(x.reshape(20, 2), draws=777),
  ]
  whole = [call() for call in calls]
  monkeypatch.setattr(arrangements, "CHUNK", 1_000)
  for call, expected in zip(calls, whole, strict=True):
    got = call()
    np.testing.assert_allclose(got.null, expected.null, atol=1e-12)
    assert got.draws == expected.draws


def test_a_seed_decides():
  d = normal(30, 0.2)
  p = [permutation_test(d, seed=seed).p for seed in (0, 0, 1)]
  assert p[0] == p[1] != p[2]


@pytest.mark.parametrize("alternative", ALTERNATIVES)
@pytest.mark.parametrize("design", ["paired", "independent"])
def test_p_is_uniform_where_there_is_no_difference(design, alternative):
  rng = np.random.default_rng(5)
  p = []
  for seed in range(400):
    x = rng.exponential(size=20) - 1
    if design == "paired":
      x, y = x * rng.choice((-1, 1), 20), None
    else:
      y = rng.exponential(size=17) - 1
    p.append(
      permutation_test(
        x, y, design=design, alternative=alternative, draws=999, seed=seed
      ).p
    )
  assert min(p) >= 1 / 1_000
  assert stats.kstest(p, "uniform").pvalue > 0.01


# ----------------------------------------------------------- the maximum


def layers(rng, n=20, K=12):
  """Differences of layers that resemble their neighbours, in other units."""
  shared = rng.normal(size=(n, K + 3))
  x = sum(shared[:, i : i + K] for i in range(4))
  return x * 10.0 ** np.arange(K)


def test_the_largest_layer_is_wrong_no_more_often_than_alpha():
  rng = np.random.default_rng(0)
  wrong = {"corrected": 0, "plain": 0}
  for seed in range(400):
    d = layers(rng)
    got = max_permutation_test(d, draws=199, seed=seed)
    wrong["corrected"] += got.p_of_max <= 0.05
    wrong["plain"] += stats.ttest_1samp(d, 0).pvalue.min() <= 0.05
  assert wrong["corrected"] <= stats.binom.isf(0.01, 400, 0.05)
  assert wrong["corrected"] >= stats.binom.ppf(0.01, 400, 0.05)
  assert wrong["plain"] > 80


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_corrected_p_is_a_count_over_every_choice_of_signs(alternative):
  d = layers(np.random.default_rng(2), n=8, K=3) + np.array([0, 10, 200])
  got = max_permutation_test(d, alternative=alternative)
  direction = {"two-sided": abs, "greater": float, "less": lambda t: -t}
  of = direction[alternative]
  t = [
    [of(v) for v in stats.ttest_1samp(np.array(s)[:, None] * d, 0).statistic]
    for s in itertools.product((1, -1), repeat=8)
  ]
  largest = np.max(t, axis=1)
  expected = [np.mean(largest >= observed - 1e-9) for observed in t[0]]
  np.testing.assert_allclose(got.p, expected)
  assert got.p_of_max == min(expected)
  assert got.exact
  np.testing.assert_allclose(got.statistic, d.mean(0))


def test_one_column_is_the_plain_test():
  d, blocks = normal(12, 0.4), np.repeat(np.arange(6), 2)
  strata = np.arange(12) % 3
  for options in ({}, {"blocks": blocks}, {"strata": strata}):
    got = max_permutation_test(d[:, None], **options)
    expected = permutation_test(d, **options)
    assert got.p == pytest.approx([expected.p])
    assert got.statistic == pytest.approx([expected.statistic])


def test_a_layer_that_differs_is_found_among_others_that_do_not():
  d = layers(np.random.default_rng(0), n=40)
  d[:, 4] = 1e4 * normal(40, 1.0, seed=2)
  got = max_permutation_test(d)
  assert got.p_of_max == got.p[4] == got.smallest_p == 1e-4
  assert (np.delete(got.p, 4) > 0.05).all()


def test_a_layer_without_any_difference_has_p_1():
  d = np.stack([normal(12, 2.0), np.zeros(12)], 1)
  got = max_permutation_test(d)
  assert got.p[0] < 0.01
  assert got.p[1] == 1


# -------------------------------------------------------------- refusals


def test_bad_samples_are_refused():
  ok = np.arange(4.0)
  for x in ([1.0], np.ones((2, 2)), []):
    with pytest.raises(ValueError, match="at least"):
      permutation_test(x)
  with pytest.raises(ValueError, match="finite"):
    permutation_test([1.0, np.nan])
  with pytest.raises(ValueError, match="same prompts, got 4 and 3"):
    permutation_test(ok, ok[:3])
  with pytest.raises(ValueError, match="expected y"):
    permutation_test(ok, design="independent")
  with pytest.raises(ValueError, match="design"):
    permutation_test(ok, design="unpaired")
  with pytest.raises(ValueError, match="alternative"):
    permutation_test(ok, alternative="larger")
  with pytest.raises(ValueError, match="draws"):
    permutation_test(ok, draws=0)
  with pytest.raises(ValueError, match=r"\[n, K\]"):
    max_permutation_test(ok)
  with pytest.raises(ValueError, match="finite"):
    max_permutation_test([[1.0], [np.inf]])


def test_bad_labels_are_refused():
  x, y = np.arange(4.0), np.arange(3.0)
  with pytest.raises(ValueError, match="one label for each of 4 rows"):
    permutation_test(x, blocks=[0, 1, 2])
  with pytest.raises(ValueError, match="two blocks"):
    permutation_test(x, blocks=[0] * 4)
  with pytest.raises(ValueError, match="two blocks"):
    max_permutation_test(x[:, None], blocks=[0] * 4)
  with pytest.raises(ValueError, match="in one group"):
    permutation_test(x, y, design="independent", blocks=[0, 0, 1, 1, 1, 2, 2])
  with pytest.raises(ValueError, match="in one stratum"):
    permutation_test(
      x,
      y,
      design="independent",
      blocks=[0, 0, 1, 1, 2, 2, 3],
      strata=[0, 1, 0, 0, 0, 1, 1],
    )
  with pytest.raises(ValueError, match="one group only"):
    permutation_test(x, y, design="independent", strata=[0] * 4 + [1] * 3)
  with pytest.raises(ValueError, match="either strata or a statistic"):
    permutation_test(x, strata=[0, 0, 1, 1], statistic=lambda d: d.sum(1))


def test_bad_statistics_are_refused():
  with pytest.raises(ValueError, match=r"finite statistics \[1\]"):
    permutation_test(np.arange(4.0), statistic=lambda d: d)
  with pytest.raises(ValueError, match="not finite"):
    permutation_test(np.arange(4.0), statistic=lambda d: d[:, 0] + np.inf)


def test_an_impossible_number_of_prompts_is_refused():
  with pytest.raises(ValueError, match="n to be a whole number"):
    smallest_p(0)
  with pytest.raises(ValueError, match="alpha between 0 and 1"):
    least_n(0)
