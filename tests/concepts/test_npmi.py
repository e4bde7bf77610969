"""Coherence in a corpus, against loops over every window and every pair."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from gemma_jax.concepts.npmi import count, npmi, null

EPSILON = 1e-12


def sliding(windows, families, width):
  """The set of families in each window."""
  for row in windows:
    for start in range(len(row) - width + 1):
      yield set(families[row[start : start + width]].tolist()) - {-1}


def text(rng, n=60, length=15, vocabulary=30):
  """Tokens with Zipf's frequencies; two of a family, a fifth of none."""
  p = 1 / np.arange(1, vocabulary + 1)
  windows = rng.choice(vocabulary, (n, length), p=p / p.sum())
  families = np.arange(vocabulary) // 2
  families[::5] = -1
  return windows, families.astype(np.int32)


def zipf_corpus(rng, families=400, n=500, length=64):
  """A family's number is its rank."""
  p = 1 / (np.arange(families) + 10.0)
  return rng.choice(families, (n, length), p=p / p.sum())


@pytest.mark.parametrize("width", [1, 4, 15])
def test_windows_are_those_of_a_loop(width):
  windows, families = text(np.random.default_rng(0))
  wanted = np.array([9, 2, 0, 1, 7, 14, 99])
  counts = count(windows, families, wanted, width=width)
  every = list(sliding(windows, families, width))
  assert counts.windows == len(every)
  single = [sum(f in seen for seen in every) for f in wanted]
  np.testing.assert_array_equal(counts.single, single)
  joint = np.zeros((7, 7), int)
  for i, j in itertools.permutations(range(7), 2):
    joint[i, j] = sum(wanted[i] in seen and wanted[j] in seen for seen in every)
  np.testing.assert_array_equal(counts.joint.toarray(), joint)
  assert counts.joint.nnz == np.count_nonzero(joint)


def test_a_corpus_of_many_chunks_is_counted_as_one(monkeypatch):
  windows, families = text(np.random.default_rng(1))
  whole = count(windows, families, np.arange(15), width=5)
  monkeypatch.setattr("gemma_jax.concepts.npmi.CHUNK", 40)
  parts = count(windows, families, np.arange(15), width=5)
  np.testing.assert_array_equal(parts.single, whole.single)
  assert (parts.joint != whole.joint).nnz == 0


def test_npmi_is_that_of_a_loop_over_pairs():
  rng = np.random.default_rng(2)
  windows, families = text(rng)
  counts = count(windows, families, np.arange(15), width=4)
  every = list(sliding(windows, families, 4))
  sets = np.stack([rng.permutation(15)[:6] for _ in range(50)])
  sets[::2, 1:3] = -1
  sets[:4, 2:] = -1
  least = int(np.sort(counts.single)[4])
  found = npmi(counts, sets, least=least)
  for row, value, pairs in zip(sets, *found, strict=True):
    expected = []
    for f, g in itertools.combinations(row[row >= 0].tolist(), 2):
      here = [sum(s <= seen for seen in every) for s in ({f}, {g}, {f, g})]
      if min(here[:2]) < least:
        continue
      p, q, both = (k / len(every) for k in here)
      both += EPSILON
      expected.append(math.log(both / (p * q)) / -math.log(both))
    assert pairs == len(expected)
    if len(expected) < 3:
      assert np.isnan(value)
    else:
      assert value == pytest.approx(np.mean(expected))
  assert np.isnan(found.value).any()
  assert (~np.isnan(found.value)).sum() > 20


def test_npmi_is_1_of_families_always_together_and_closed_of_those_never():
  windows = np.full((90, 10), 9)
  windows[:30, [0, 4, 9]] = [0, 1, 2]
  for i in range(3):
    windows[30 + 20 * i : 50 + 20 * i, 3] = 3 + i
  counts = count(windows, np.arange(10), np.arange(10), width=10)
  found = npmi(counts, [[0, 1, 2], [3, 4, 5]])
  assert counts.windows == 90
  assert found.value[0] == pytest.approx(1)
  never = -1 + 2 * math.log(20 / 90) / math.log(EPSILON)
  assert found.value[1] == pytest.approx(never)
  assert never == pytest.approx(-1, abs=0.12)


def test_npmi_is_0_of_independent_families():
  rng = np.random.default_rng(3)
  windows = rng.integers(0, 40, (3000, 10))
  counts = count(windows, np.arange(40), np.arange(40))
  found = npmi(counts, rng.permutation(40).reshape(8, 5))
  # A window of 10 places has a little less room for two than for each alone.
  assert np.abs(found.value).max() < 0.05
  assert (found.pairs == 10).all()


def test_random_sets_have_a_uniform_p_whatever_their_frequency():
  rng = np.random.default_rng(4)
  corpus = zipf_corpus(rng)
  counts = count(corpus, np.arange(400), np.arange(400))
  kinds = [np.arange(40), np.arange(360, 400), np.arange(400)]
  sets = np.concatenate(
    [
      np.stack([rng.choice(kind, 6, False) for _ in range(500)])
      for kind in kinds
    ]
  )
  sets[::4, 4:] = -1
  value = npmi(counts, sets).value
  assert value[:500].mean() > value[500:1000].mean() + 0.1
  p = null(counts, sets)
  for i in range(3):
    own = p[500 * i : 500 * (i + 1)]
    assert stats.kstest(own, "uniform").pvalue > 0.001


def test_families_that_meet_have_the_least_p_and_undefined_ones_1():
  rng = np.random.default_rng(5)
  corpus = zipf_corpus(rng)
  planted = np.arange(50, 290, 4).reshape(10, 6)
  for i, row in enumerate(corpus[:200]):
    row[30:36] = rng.permutation(planted[i % 10])
  counts = count(corpus, np.arange(400), np.arange(401))
  random = np.stack([rng.choice(400, 6, False) for _ in range(300)])
  undefined = np.full((2, 6), -1)
  undefined[1, :3] = 0, 1, 400  # of which the last never occurs
  p = null(counts, np.concatenate([planted, random, undefined]), draws=2000)
  assert (p[:10] == 1 / 2001).all()
  assert np.median(p[10:310]) > 0.3
  np.testing.assert_array_equal(p[310:], 1)


def test_p_is_1_where_no_family_is_frequent():
  windows, families = text(np.random.default_rng(6))
  counts = count(windows, families, np.arange(15))
  assert np.isnan(npmi(counts, [[0, 1, 2]], least=10**6).value)
  few = null(counts, [[0, 1, 2]], least=10**6, draws=9)
  np.testing.assert_array_equal(few, [1])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"windows": np.zeros(5, int)}, r"\[N, T\]"),
    ({"width": 16}, "smaller width"),
    ({"width": 0}, "at least 1"),
    ({"windows": np.full((2, 15), 30)}, "below V = 30, got 30 to 30"),
    ({"windows": np.full((2, 15), -1)}, "got -1 to -1"),
    ({"wanted": [1, 1]}, "1 of them different"),
    ({"wanted": [-1, 1]}, "1 negative"),
    ({"wanted": []}, "got 0"),
  ],
)
def test_a_corpus_that_cannot_be_counted_is_an_error(change, message):
  windows, families = text(np.random.default_rng(7))
  given = {"windows": windows, "families": families, "wanted": [0, 1]}
  with pytest.raises(ValueError, match=message):
    count(**{**given, **change})


@pytest.mark.parametrize(
  ("sets", "least", "message"),
  [
    ([0, 1, 2], 5, r"\[n, m\]"),
    ([[0.0, 1, 2]], 5, "whole numbers"),
    ([[0, 1, 2]], 0, "least from 1"),
    ([[0, 1, 77]], 5, "1 others and 0 rows"),
    ([[0, 1, 1]], 5, "0 others and 1 rows"),
  ],
)
def test_sets_that_cannot_be_looked_up_are_errors(sets, least, message):
  windows, families = text(np.random.default_rng(8))
  counts = count(windows, families, np.arange(15))
  for measure in (npmi, null):
    with pytest.raises(ValueError, match=message):
      measure(counts, sets, least=least)
