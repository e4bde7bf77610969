import itertools

import numpy as np
import pytest

from gemma_jax.probing import rules

COST = np.full(2, 5.0)


def test_code_lengths_are_those_of_the_sequential_laplace_code():
  for ones, zeros in ((0, 0), (3, 0), (2, 5), (40, 17)):
    bits, seen = 0.0, [0, 0]
    for symbol in [1] * ones + [0] * zeros:
      bits -= np.log2((seen[symbol] + 1) / (sum(seen) + 2))
      seen[symbol] += 1
    assert rules.code_length(ones, zeros) == pytest.approx(bits)


def _length(codes, y, chosen):
  """Bits of a list of rules and of y, by the definition."""
  left, bits = np.ones(len(y), bool), 0.0
  for c, value in chosen:
    here = left & (codes[c] == value)
    left &= ~here
    bits += COST[c] + rules.code_length(y[here].sum(), (~y[here]).sum())
  return bits + rules.code_length(y[left].sum(), (~y[left]).sum())


@pytest.mark.parametrize("seed", range(6))
def test_no_list_of_two_rules_is_shorter(seed):
  rng = np.random.default_rng(seed)
  codes = np.stack([rng.integers(0, 6, 120), rng.integers(0, 2, 120)])
  p = np.where(codes[0] == 2, 0.95, np.where(codes[1] == 1, 0.4, 0.05))
  y = rng.random(120) < p
  learned, rest = rules.learn(codes, y, COST, 8)
  got = _length(codes, y, [(c, v) for c, v, *_ in learned])
  single = [(0, v) for v in range(6)] + [(1, v) for v in range(2)]
  lists = [[], *([a] for a in single), *itertools.permutations(single, 2)]
  assert got <= min(_length(codes, y, a) for a in lists) + 1e-9
  assert sum(n + m for *_, n, m in learned) + sum(rest) == 120


def test_the_first_rule_that_holds_decides():
  codes = np.array([[1, 1, 2, 3], [0, 5, 5, -1]])
  learned = [(1, 5, 3, 0), (0, 1, 0, 8)]
  p = rules.predict(codes, learned, (1, 1))
  np.testing.assert_allclose(p, [1 / 10, 4 / 5, 4 / 5, 2 / 4])
  assert rules.bits(p[:2], np.array([False, True])) == pytest.approx(
    -np.log2(9 / 10) - np.log2(4 / 5)
  )


def test_a_wide_rule_gives_way_to_the_narrow_ones_in_it():
  rng = np.random.default_rng(0)
  token = rng.integers(0, 30, 400)
  codes = np.stack([token, token % 3])
  y = np.isin(token, [1, 4, 22])  # all of them 1 modulo 3
  learned, _ = rules.learn(codes, y, COST, 16)
  assert {(c, v) for c, v, *_ in learned} == {(0, 1), (0, 4), (0, 22)}


def test_there_is_no_rule_for_noise_or_for_the_undefined():
  rng = np.random.default_rng(1)
  y = rng.random(200) < 0.5
  codes = np.stack([rng.integers(0, 50, 200), np.where(y, -1, 3)])
  learned, rest = rules.learn(codes[:1], y, COST, 16)
  assert learned == []
  assert rest == (y.sum(), (~y).sum())
  learned, _ = rules.learn(codes, y, COST, 16)
  assert [(c, v) for c, v, *_ in learned] == [(1, 3)]
