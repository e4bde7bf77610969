"""Short lists of rules for zeros and ones, by minimum description length.

A rule is "kind c has value v". The first rule of a list that holds decides.
"""

import numpy as np
import scipy.special


def code_length(ones, zeros):
  """Bits of the adaptive Laplace code: log2((n + 1) binom(n, ones))."""
  n = ones + zeros
  log = scipy.special.gammaln
  return (log(n + 2) - log(ones + 1) - log(zeros + 1)) / np.log(2)


def learn(codes, y, cost, max_rules):
  """A decision list whose code of y, and of itself, is short.

  Greedy: the rule that shortens the code most goes in front of the others or
  behind them; in the end, rules are taken out while that shortens it.
  (Two-part code: Rissanen 1978; the data's part by `code_length`, for what
  each rule decides and for the rest.)

  Args:
    codes: int [C, n], values of C kinds for n examples; -1 makes no rule.
    y: bool [n].
    cost: [C], bits of a rule of each kind.
    max_rules: before any is taken out.

  Returns:
    [(kind, value, ones, zeros)], with the examples that each rule decides,
    and (ones, zeros) of those that none does.
  """
  rules = []  # (kind, value), the first that holds decides
  while len(rules) < max_rules:
    cells = _cells(codes, rules)
    ones, zeros = _counts(cells, y, len(rules) + 1)
    best, found = 0.0, None
    for c, code in enumerate(codes):
      ok = code >= 0
      values, at = np.unique(code[ok], return_inverse=True)
      if not len(values):
        continue
      # What each value has in each cell.
      shape = len(ones), len(values)
      flat = np.ravel_multi_index((cells[ok], at), shape)
      has = (n.reshape(shape) for n in _counts(flat, y[ok], np.prod(shape)))
      front, back = _gains(ones[:, None], zeros[:, None], *has)
      for place, gain in ((0, front), (len(rules), back)):
        k = gain.argmax()
        if gain[k] - cost[c] > best:
          best, found = gain[k] - cost[c], (place, (c, int(values[k])))
    if found is None:
      break
    rules.insert(*found)
  rules = _prune(codes, y, cost, rules)
  counts = _counts(_cells(codes, rules), y, len(rules) + 1)
  rest, *decided = zip(*(n.astype(int).tolist() for n in counts), strict=True)
  return [(*r, *n) for r, n in zip(rules, decided, strict=True)], rest


def _gains(ones, zeros, has_ones, has_zeros):
  """Bits saved by a rule before all others, and by one behind them."""
  saved = code_length(ones, zeros)
  saved = saved - code_length(ones - has_ones, zeros - has_zeros)
  front = saved.sum(0) - code_length(has_ones.sum(0), has_zeros.sum(0))
  return front, saved[0] - code_length(has_ones[0], has_zeros[0])


def _prune(codes, y, cost, rules):
  def length(rules):
    counts = _counts(_cells(codes, rules), y, len(rules) + 1)
    return code_length(*counts).sum() + sum(cost[c] for c, _ in rules)

  while rules:
    fewer = [rules[:i] + rules[i + 1 :] for i in range(len(rules))]
    shortest = min(fewer, key=length)
    if length(shortest) >= length(rules):
      break
    rules = shortest
  return rules


def _cells(codes, rules):
  """1 + the number of the rule that decides, 0 for none; int [n]."""
  out = np.zeros(codes.shape[1], np.int64)
  for i, (c, value) in reversed(list(enumerate(rules))):
    out[codes[c] == value] = i + 1
  return out


def _counts(cells, y, size):
  return np.bincount(cells, y, size), np.bincount(cells, ~y, size)


def predict(codes, learned, rest):
  """P(one) of examples [C, n], from what `learn` returned: float64 [n]."""
  cells = _cells(codes, [(c, value) for c, value, *_ in learned])
  counts = np.array([rest, *((n, m) for *_, n, m in learned)])
  p = (counts[:, 0] + 1) / (counts.sum(1) + 2)
  return p[cells]


def bits(p, y) -> float:
  """Bits of y [n] under probabilities p [n]."""
  return float(-np.sum(np.log2(np.where(y, p, 1 - p))))
