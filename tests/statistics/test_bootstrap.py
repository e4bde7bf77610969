"""Bootstrap intervals: against SciPy, and how often they are right."""

import numpy as np
import pytest
from scipy import stats

from gemma_jax.statistics import bootstrap_ci


def skewed(n=40, seed=0):
  return np.random.default_rng(seed).lognormal(0, 1, n)


def by_scipy(data, statistic, **options):
  return stats.bootstrap(
    data,
    statistic,
    random_state=np.random.default_rng(7),
    **{"n_resamples": 20_000} | options,
  ).confidence_interval


def ends(interval):
  return interval.low, interval.high


def near(expected, share=0.03):
  """Ends of two bootstraps of 20,000 differ by a share of their distance."""
  return pytest.approx(
    tuple(expected), abs=share * (expected.high - expected.low)
  )


def difference(a, b, axis=-1):
  return np.mean(a, axis) - np.mean(b, axis)


def correlation(a, b):
  return np.corrcoef(a, b)[0, 1]


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_it_is_the_bca_interval_of_scipy(level):
  x = skewed()
  got = bootstrap_ci(x, level=level, resamples=20_000)
  expected = by_scipy((x,), np.mean, confidence_level=level)
  plain = by_scipy((x,), np.mean, confidence_level=level, method="percentile")
  assert ends(got) == near(expected)
  assert ends(got) != near(plain)
  assert (got.value, got.level, got.units) == (x.mean(), level, 40)


def test_other_statistics_are_those_of_scipy():
  x = skewed()
  got = bootstrap_ci(x, statistic=stats.skew, resamples=5_000)
  expected = by_scipy((x,), stats.skew)
  assert got.value == stats.skew(x)
  assert ends(got) == near(expected, 0.06)


def test_pairs_are_drawn_together():
  x = skewed()
  y = x + skewed(seed=1)
  got = bootstrap_ci(x, y, statistic=correlation, resamples=5_000)
  expected = by_scipy(
    (x, y), correlation, paired=True, vectorized=False, n_resamples=5_000
  )
  assert got.value == correlation(x, y)
  assert ends(got) == near(expected, 0.06)
  assert bootstrap_ci(x, y) == bootstrap_ci(x - y)


def test_two_independent_samples_are_drawn_apart():
  x, y = skewed(), skewed(25, seed=1) / 2
  expected = by_scipy((x, y), difference)
  for statistic, resamples in ((None, 20_000), (difference, 5_000)):
    got = bootstrap_ci(
      x,
      y,
      design="independent",
      statistic=statistic,
      resamples=resamples,
    )
    assert got.value == pytest.approx(x.mean() - y.mean())
    assert got.units == 25
    assert ends(got) == near(expected, 0.06)


def test_a_seed_decides():
  got = [bootstrap_ci(skewed(), seed=seed) for seed in (0, 0, 1)]
  assert got[0] == got[1] != got[2]


def test_the_95_percent_interval_is_right_95_percent_of_the_time():
  rng = np.random.default_rng(0)
  right = 0
  for seed in range(1_000):
    x = rng.exponential(size=80)
    got = bootstrap_ci(x, resamples=999, seed=seed)
    right += got.low <= 1 <= got.high
  assert 930 <= right <= 970


# ---------------------------------------------------------------- documents


def tokens(rng, documents=40):
  """Tokens that share their document's mean; documents of unequal length."""
  own = np.repeat(np.arange(documents), rng.integers(5, 40, documents))
  return rng.exponential(size=documents)[own] + rng.normal(size=len(own)), own


def test_documents_are_right_where_tokens_are_far_too_narrow():
  rng = np.random.default_rng(0)
  right = {"documents": 0, "tokens": 0}
  for seed in range(200):
    x, own = tokens(rng)
    for name, clusters in (("documents", own), ("tokens", None)):
      got = bootstrap_ci(x, clusters=clusters, resamples=399, seed=seed)
      right[name] += got.low <= 1 <= got.high
  assert 0.90 <= right["documents"] / 200 <= 0.98
  assert right["tokens"] / 200 < 0.6


def test_documents_of_equal_length_are_their_means():
  x = skewed(120)
  expected = by_scipy((x.reshape(20, 6).mean(1),), np.mean)
  got = bootstrap_ci(x, clusters=np.repeat(np.arange(20), 6), resamples=20_000)
  assert got.units == 20
  assert ends(got) == near(expected)


def test_a_document_of_one_row_is_a_row():
  x = skewed()
  got = bootstrap_ci(x, clusters=[f"document {i}" for i in range(100, 140)])
  assert ends(got) == pytest.approx(ends(bootstrap_ci(x)))


@pytest.mark.parametrize("design", ["paired", "independent"])
def test_rows_of_whole_documents_give_the_same_as_their_sums(design):
  """The acceleration too: documents left out, not rows."""
  x, own = tokens(np.random.default_rng(0), documents=15)
  y, other = tokens(np.random.default_rng(1), documents=12)
  if design == "paired":
    y, clusters = skewed(len(x)), own[::-1]
  else:
    clusters = np.append(own, 100 + other)
  expected, got = (
    bootstrap_ci(
      x,
      y,
      design=design,
      clusters=clusters,
      statistic=statistic,
      resamples=500,
    )
    for statistic in (None, difference)
  )
  assert got.value == pytest.approx(expected.value)
  assert ends(got) == pytest.approx(ends(expected))
  assert got.units == (15 if design == "paired" else 12)


# ------------------------------------------------------------ special cases


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0])
def test_prompts_that_agree_leave_no_doubt(value):
  got = bootstrap_ci(np.full(12, value))
  assert got.low == got.value == got.high == pytest.approx(value)
  # Equal documents of unequal length, whose means differ by rounding.
  own = np.repeat(np.arange(12), np.arange(1, 13))
  got = bootstrap_ci(np.full(len(own), value), clusters=own)
  assert got.low == got.value == got.high == pytest.approx(value)


def test_where_bca_is_undefined_it_is_the_percentiles():
  x = skewed()

  def different(x):
    return float(len(np.unique(x)))

  got = bootstrap_ci(x, statistic=different, resamples=999)
  expected = by_scipy(
    (x,), different, vectorized=False, method="percentile", n_resamples=999
  )
  assert got.value == 40 > got.high
  assert ends(got) == tuple(expected)


def test_few_prompts_are_said_to_be_few(caplog):
  got = bootstrap_ci(skewed(9))
  assert got.units == 9
  assert "9 units" in caplog.text
  caplog.clear()
  bootstrap_ci(skewed(10))
  assert not caplog.records
  bootstrap_ci(skewed(200), clusters=np.arange(200) % 7)
  assert "7 units" in caplog.text


def test_what_cannot_be_drawn_is_refused():
  x = skewed()
  with pytest.raises(ValueError, match="at least 2 values"):
    bootstrap_ci([1.0])
  with pytest.raises(ValueError, match="finite x, got nan at 1"):
    bootstrap_ci([1.0, np.nan, 2.0])
  with pytest.raises(ValueError, match="same prompts, got 40 and 39"):
    bootstrap_ci(x, x[1:])
  with pytest.raises(ValueError, match="expected y"):
    bootstrap_ci(x, design="independent")
  with pytest.raises(ValueError, match="two clusters"):
    bootstrap_ci(x, clusters=np.zeros(40))
  with pytest.raises(ValueError, match="one label for each of 40 rows"):
    bootstrap_ci(x, clusters=np.arange(39))
  with pytest.raises(ValueError, match="different clusters"):
    bootstrap_ci(x, x, design="independent", clusters=np.tile(np.arange(40), 2))
  with pytest.raises(ValueError, match="level between 0 and 1"):
    bootstrap_ci(x, level=95)
  with pytest.raises(ValueError, match="resamples"):
    bootstrap_ci(x, resamples=0)
  with pytest.raises(ValueError, match="design"):
    bootstrap_ci(x, x, design="two")


def test_a_statistic_that_some_resamples_do_not_have_is_refused():
  x = np.array([0.0, 0, 0, 0, 0, 0, 0, 0, 0, 1])
  with pytest.raises(ValueError, match="expected a finite statistic"):
    bootstrap_ci(x, statistic=lambda x: 1 / x.sum() if x.any() else np.inf)
