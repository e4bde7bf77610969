"""What is exchanged for what: never across strata, and blocks whole."""

import numpy as np
import pytest

from gemma_jax.statistics import permutation_test, smallest_p


def normal(n, mean=0.0, seed=0):
  return np.random.default_rng(seed).normal(mean, 1, n)


def spy(seen):
  """A mean difference that keeps the arrangements it was asked about."""

  def statistic(values, in_x):
    seen.append(in_x.copy())
    rows = in_x.sum(1)
    return in_x @ values / rows - (~in_x) @ values / (len(values) - rows)

  return statistic


@pytest.mark.parametrize("n", [3, 20])
def test_labels_never_cross_a_stratum(n):
  x, y = normal(2 * n), normal(2 * n, seed=1)
  strata = np.tile(np.repeat(["facts", "code"], n), 2)
  # In facts one of x is missing, so that the strata differ.
  x, strata = x[1:], strata[1:]
  seen = []
  got = permutation_test(
    x,
    y,
    design="independent",
    strata=strata,
    statistic=spy(seen),
    draws=200,
  )
  labels = np.concatenate(seen)
  assert got.exact == (n == 3)
  assert (labels[:, strata == "facts"].sum(1) == n - 1).all()
  assert (labels[:, strata == "code"].sum(1) == n).all()
  if n == 3:  # each arrangement once, after the observed one
    assert got.draws == len(np.unique(labels, axis=0)) == 10 * 20
  else:  # and they do move
    assert (labels[1:].mean(0) > 0.3).all()
    assert (labels[1:].mean(0) < 0.7).all()


def test_every_stratum_counts_alike():
  facts, code = normal(2, 3.0), normal(9, seed=1)
  strata = ["facts"] * 2 + ["code"] * 9
  expected = (facts.mean() + code.mean()) / 2
  both = np.append(facts, code)
  assert permutation_test(both, strata=strata).statistic == pytest.approx(
    expected
  )
  zeros = np.zeros(4)
  got = permutation_test(
    both,
    zeros,
    design="independent",
    strata=[*strata, "facts", "facts", "code", "code"],
  )
  assert got.statistic == pytest.approx(expected)


def test_strata_take_out_what_differs_between_them():
  """Groups of other proportions in an easy and a hard capability."""
  rng = np.random.default_rng(0)
  p = {"with": [], "without": []}
  strata = np.array([0] * 16 + [1] * 4 + [0] * 4 + [1] * 16)
  for seed in range(150):
    values = rng.normal(2.0 * strata)
    options = {"design": "independent", "draws": 199, "seed": seed}
    x, y = values[:20], values[20:]
    p["without"].append(permutation_test(x, y, **options).p)
    p["with"].append(permutation_test(x, y, strata=strata, **options).p)
  # 13 of 150 or more have a probability of 2.5 % at a rate of 5 %.
  assert np.sum(np.array(p["with"]) <= 0.05) <= 13
  assert np.mean(np.array(p["without"]) <= 0.05) > 0.6


@pytest.mark.parametrize("documents", [5, 20])
def test_rows_of_a_block_move_together(documents):
  blocks = np.arange(2 * documents)
  blocks = np.repeat(blocks, np.resize([1, 2, 3, 4], len(blocks)))
  values = normal(len(blocks))
  mine = blocks < documents
  seen = []
  got = permutation_test(
    values[mine],
    values[~mine],
    design="independent",
    blocks=blocks,
    statistic=spy(seen),
    draws=99,
  )
  labels = np.concatenate(seen)
  for b in range(2 * documents):
    rows = labels[:, blocks == b]
    assert (rows == rows[:, :1]).all()
  first = np.unique(blocks, return_index=True)[1]
  assert (labels[:, first].sum(1) == documents).all()
  # The default statistic is the same, from sums of blocks of unequal size.
  default = permutation_test(
    values[mine],
    values[~mine],
    design="independent",
    blocks=blocks,
    draws=99,
  )
  np.testing.assert_allclose(default.null, got.null, atol=1e-12)
  assert default.exact == (documents == 5)


def test_signs_of_a_block_are_the_same():
  blocks = np.array(list("aabbbcdde"))
  d = normal(len(blocks))
  seen = []

  def statistic(flipped):
    seen.append(flipped / d)
    return flipped.mean(1)

  got = permutation_test(d, blocks=blocks, statistic=statistic)
  signs = np.concatenate(seen)
  assert got.draws == 2**5 == len(np.unique(signs[1:], axis=0))
  for b in "abcde":
    rows = signs[:, blocks == b]
    assert (rows == rows[:, :1]).all()
  default = permutation_test(d, blocks=blocks)
  np.testing.assert_allclose(default.null, got.null, atol=1e-12)
  assert got.smallest_p == smallest_p(5)


def test_blocks_keep_the_error_where_tokens_do_not():
  rng = np.random.default_rng(0)
  blocks = np.repeat(np.arange(20), 30)
  found = {"blocks": 0, "tokens": 0}
  for seed in range(150):
    d = rng.normal(size=20)[blocks] + rng.normal(size=600)
    options = {"draws": 199, "seed": seed}
    found["tokens"] += permutation_test(d, **options).p <= 0.05
    found["blocks"] += permutation_test(d, blocks=blocks, **options).p <= 0.05
  assert found["blocks"] <= 13
  assert found["tokens"] > 75
