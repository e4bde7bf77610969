"""Intervals over documents: against SciPy, and how often they are right."""

import numpy as np
import pytest
from scipy import stats

from gemma_jax.metrics import (
  RunningReconstruction,
  document_interval,
  intervals,
)


def sums(documents=30, seed=0, skew=0.4):
  rng = np.random.default_rng(seed)
  bottom = rng.integers(5, 50, documents).astype(float)
  return bottom * rng.lognormal(0, skew, documents), bottom


def by_scipy(top, bottom, method="BCa", **options):
  """One sample of pairs, a statistic of one sample: no paired data."""
  pairs = np.stack([top, bottom], 1)

  def ratio(index, axis):
    drawn = pairs[index.astype(int)]
    return drawn[..., 0].sum(axis) / drawn[..., 1].sum(axis)

  found = stats.bootstrap(
    (np.arange(len(top)),),
    ratio,
    method=method,
    vectorized=True,
    random_state=np.random.default_rng(7),
    **{"n_resamples": 20_000} | options,
  )
  return found.confidence_interval


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_it_is_the_bca_interval_of_scipy(level):
  top, bottom = sums()
  expected = by_scipy(top, bottom, confidence_level=level)
  got = document_interval(top, bottom, level=level, resamples=20_000)
  width = expected.high - expected.low
  assert got == pytest.approx(tuple(expected), abs=0.03 * width)


def test_skew_moves_it_from_the_percentiles_as_it_moves_scipys():
  top, bottom = sums(skew=1.2)
  plain, exact = (by_scipy(top, bottom, m) for m in ("percentile", "BCa"))
  got = document_interval(top, bottom, resamples=20_000)
  width = exact.high - exact.low
  assert got == pytest.approx(tuple(exact), abs=0.02 * width)
  assert got[0] > plain.low + 0.03 * width
  assert got[1] > plain.high + 0.06 * width


def test_a_seed_decides():
  top, bottom = sums()
  got = [document_interval(top, bottom, seed=seed) for seed in (0, 0, 1)]
  assert got[0] == got[1] != got[2]
  assert got[0][0] < top.sum() / bottom.sum() < got[0][1]


@pytest.mark.parametrize("documents", [0, 1])
def test_a_single_document_has_no_interval(documents):
  assert document_interval(np.ones(documents), np.ones(documents)) is None


def test_two_documents_lie_at_the_ends():
  low, high = document_interval([1.0, 3.0], [1.0, 1.0])
  assert 1 <= low < high <= 3


@pytest.mark.parametrize("ratio", [0.0, 0.25])
def test_documents_that_agree_leave_no_doubt(ratio):
  bottom = np.arange(1.0, 20)
  assert document_interval(ratio * bottom, bottom) == (ratio, ratio)


def test_a_denominator_that_vanishes_has_no_interval():
  assert document_interval([1.0, 2.0, 3.0], [0.0, 0.0, 1.0]) is None
  assert document_interval([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]) is None


def test_bad_sums_are_refused():
  with pytest.raises(ValueError, match=r"\[documents\]"):
    document_interval(np.ones(3), np.ones(4))
  with pytest.raises(ValueError, match=r"\[documents\]"):
    document_interval(np.ones((3, 2)), np.ones((3, 2)))
  with pytest.raises(ValueError, match="not finite"):
    document_interval([1, np.nan, 2], np.ones(3))


# --------------------------------------------------- FVU over documents


def clustered(rng, documents=40, tokens=25, width=2):
  """Tokens that share their document's mean and its quality."""
  x = rng.normal(size=(documents, tokens, width))
  x += rng.normal(size=(documents, 1, width))
  quality = rng.gamma(4, 0.25, (documents, 1, 1))
  x_hat = x + np.sqrt(0.5 * quality) * rng.normal(size=x.shape)
  owner = np.repeat(np.arange(documents), tokens)
  return x.reshape(-1, width), x_hat.reshape(-1, width), owner


TRUTH = 0.25  # 0.5 / (1 + 1)


def test_the_95_percent_interval_is_right_95_percent_of_the_time():
  rng = np.random.default_rng(0)
  right = {"documents": 0, "tokens": 0}
  widths = {"documents": [], "tokens": []}
  for seed in range(200):
    x, x_hat, owner = clustered(rng)
    running = RunningReconstruction().update(x, x_hat, owner)
    found = {"documents": running.interval(resamples=300, seed=seed)}
    # As if tokens were independent: every token a document of its own.
    error = ((x - x_hat) ** 2).sum(1)
    spread = ((x - x.mean(0)) ** 2).sum(1)
    spread_of_ratio = (error - running.compute()["fvu"] * spread).std()
    half = 1.96 * spread_of_ratio / np.sqrt(len(x)) / spread.mean()
    value = running.compute()["fvu"]
    found["tokens"] = value - half, value + half
    for name, (low, high) in found.items():
      right[name] += low <= TRUTH <= high
      widths[name].append(high - low)
  assert 0.88 <= right["documents"] / 200 <= 0.99
  assert right["tokens"] / 200 < 0.75
  assert np.mean(widths["documents"]) > 1.7 * np.mean(widths["tokens"])


def test_a_bootstrap_of_tokens_is_as_narrow_as_its_formula():
  """That the comparison above is one with a bootstrap over tokens."""
  x, x_hat, _ = clustered(np.random.default_rng(0))
  running = RunningReconstruction().update(x, x_hat, np.arange(len(x)))
  low, high = running.interval(resamples=1_000)
  error = ((x - x_hat) ** 2).sum(1)
  spread = ((x - x.mean(0)) ** 2).sum(1)
  ratio = running.compute()["fvu"]
  expected = 2 * 1.96 * (error - ratio * spread).std() / np.sqrt(len(x))
  assert high - low == pytest.approx(expected / spread.mean(), rel=0.1)


def test_the_sums_of_a_document_are_about_the_mean_of_all():
  x, x_hat, owner = clustered(np.random.default_rng(0), documents=12)
  x, x_hat = x + 1e3, x_hat + 1e3
  mean = x.mean(0)
  spread = [np.sum((x[owner == i] - mean) ** 2) for i in range(12)]
  error = [np.sum((x - x_hat)[owner == i] ** 2) for i in range(12)]
  expected = document_interval(error, spread)
  for size in (300, 37, 1):
    running = RunningReconstruction()
    for start in range(0, 300, size):
      rows = slice(start, start + size)
      # Ids that fall: what counts is the order in which documents come.
      running.update(x[rows], x_hat[rows], 90 - owner[rows])
    assert running.interval() == pytest.approx(expected, rel=1e-9)


def test_the_mean_that_is_held_still_hardly_matters():
  x, x_hat, owner = clustered(np.random.default_rng(3))
  got = RunningReconstruction().update(x, x_hat, owner).interval()
  index = np.arange(40)
  by_document = x.reshape(40, -1, 2), ((x - x_hat) ** 2).reshape(40, -1)

  def whole(drawn):
    y = by_document[0][drawn].reshape(-1, 2)
    return by_document[1][drawn].sum() / np.sum((y - y.mean(0)) ** 2)

  exact = stats.bootstrap(
    (index,),
    whole,
    n_resamples=1_000,
    vectorized=False,
    random_state=np.random.default_rng(0),
  ).confidence_interval
  width = exact.high - exact.low
  assert got == pytest.approx(tuple(exact), abs=0.15 * width)


def test_masked_tokens_are_in_no_document():
  x, x_hat, owner = clustered(np.random.default_rng(0))
  mask = np.random.default_rng(1).random(len(x)) < 0.8
  expected = RunningReconstruction().update(x[mask], x_hat[mask], owner[mask])
  owner = np.where(mask, owner, -1)
  got = RunningReconstruction().update(x, x_hat, owner, mask=mask)
  assert got.interval() == expected.interval()


def test_no_documents_or_a_single_one_have_no_interval():
  x, x_hat, owner = clustered(np.random.default_rng(0))
  assert RunningReconstruction().interval() is None
  assert RunningReconstruction().update(x, x_hat).interval() is None
  one = RunningReconstruction().update(x, x_hat, np.zeros_like(owner))
  assert one.interval() is None
  assert one.compute() == RunningReconstruction().update(x, x_hat).compute()


def test_more_documents_than_clusters_share_sums(monkeypatch):
  x, x_hat, owner = clustered(np.random.default_rng(0), documents=400)
  alone = RunningReconstruction().update(x, x_hat, owner).interval()
  monkeypatch.setattr(intervals, "CLUSTERS", 50)
  running = RunningReconstruction()
  for start in range(0, len(x), 2_999):  # 120 documents at once
    rows = slice(start, start + 2_999)
    running.update(x[rows], x_hat[rows], owner[rows])
  expected = RunningReconstruction().update(x, x_hat, owner % 50).interval()
  assert running.interval() == pytest.approx(expected, rel=1e-9)
  low, high = running.interval()
  assert high - low == pytest.approx(alone[1] - alone[0], rel=0.4)
