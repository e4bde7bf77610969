"""How far two labelings of the same rows agree, and clusters with tokens."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from scipy import sparse, special, stats

DEFINITIONS = {
  "nmi": (
    "Mutual information of cluster and token over the mean of their entropies."
  ),
  "token_given_cluster": "H(token | cluster), bits.",
  "cluster_given_token": "H(cluster | token), bits.",
  "purity": "Share of rows whose token is the commonest of their cluster.",
  "null": "The same for labels that were shuffled over the rows, once.",
}

_TERMS = 2**20  # of the expected mutual information that exist at once
_TAIL = 60.0  # probabilities below exp(-60) are left out


@dataclasses.dataclass(frozen=True)
class Stability:
  """Agreement between labelings of the same rows.

  Attributes:
    mean: of the adjusted mutual information over all pairs.
    sd: over pairs (n - 1 in the denominator); NaN for a single pair. Pairs
      share labelings: it is no basis of a standard error.
    pairs: float64 [P], of labelings (0, 1), (0, 2), ..., (1, 2), ...
  """

  mean: float
  sd: float
  pairs: np.ndarray


def contingency(a, b) -> sparse.csr_array:
  """How many rows have each pair of labels.

  Args:
    a: whole numbers [N].
    b: whole numbers [N].

  Returns:
    int64, a row for each label that occurs in `a` and a column for each in
    `b`, ascending.

  Raises:
    ValueError: labels that are not two [N] of whole numbers, or no rows.
  """
  a, b = np.asarray(a), np.asarray(b)
  whole = a.dtype.kind in "iu" and b.dtype.kind in "iu"
  if a.ndim != 1 or a.shape != b.shape or not a.size or not whole:
    raise ValueError(
      "expected two labelings [N] of the same rows, whole numbers, got "
      f"{a.dtype} {a.shape} and {b.dtype} {b.shape}"
    )
  (left, i), (right, j) = (np.unique(v, return_inverse=True) for v in (a, b))
  ones = np.ones(len(a), np.int64)
  shape = len(left), len(right)
  return sparse.coo_array((ones, (i, j)), shape).tocsr()


def adjusted_rand_index(a, b) -> float:
  """Agreement on pairs of rows, 1 for the same clusters and 0 by chance.

  Hubert and Arabie 1985, "Comparing partitions"; in whole numbers, so
  that nothing cancels.

  Args:
    a: whole numbers [N].
    b: whole numbers [N].

  Raises:
    ValueError: as `contingency`.
  """
  table = contingency(a, b)
  both, left, right = (
    int((counts * (counts - 1)).sum()) // 2
    for counts in (table.data, *_margins(table))
  )
  rows = len(np.asarray(a))
  pairs = rows * (rows - 1) // 2
  # The expectation is left * right / pairs, the maximum (left + right) / 2.
  most = (left + right) * pairs - 2 * left * right
  return 2 * (both * pairs - left * right) / most if most else 1.0


def normalised_mutual_information(a, b) -> float:
  """Mutual information over the mean of both entropies, in [0, 1].

  As scikit-learn's default, 1 for two single clusters. Not corrected for
  chance: many small clusters agree with anything.

  Args:
    a: whole numbers [N].
    b: whole numbers [N].

  Raises:
    ValueError: as `contingency`.
  """
  return _normalised(contingency(a, b))


def adjusted_mutual_information(a, b) -> float:
  """Mutual information above chance, 1 for the same clusters and 0 by chance.

  (I - E[I]) / (mean(H_a, H_b) - E[I]), with E over labelings of the same
  sizes (Vinh, Epps and Bailey 2010, "Information theoretic measures for
  clusterings comparison"), as scikit-learn's default.

  Args:
    a: whole numbers [N].
    b: whole numbers [N].

  Raises:
    ValueError: as `contingency`.
  """
  table = contingency(a, b)
  if table.nnz == table.shape[0] == table.shape[1]:
    return 1.0  # the same clusters; below it can be 0 / 0
  expected = _expected_information(*_margins(table))
  most = sum(map(stats.entropy, _margins(table))) / 2
  return float((_information(table) - expected) / (most - expected))


def stability(labelings: Sequence) -> Stability:
  """Mean adjusted mutual information over all pairs of labelings.

  Args:
    labelings: at least two, each whole numbers [N] of the same rows, such as
      those of several seeds.

  Raises:
    ValueError: fewer than two, or as `contingency`.
  """
  if len(labelings) < 2:
    raise ValueError(
      f"expected at least two labelings, got {len(labelings)}; cluster again "
      "with another seed"
    )
  pairs = np.array(
    [
      adjusted_mutual_information(a, b)
      for a, b in itertools.combinations(labelings, 2)
    ]
  )
  sd = float(pairs.std(ddof=1)) if len(pairs) > 1 else float("nan")
  return Stability(float(pairs.mean()), sd, pairs)


def token_information(labels, tokens, *, seed: int = 0) -> dict:
  """How much clusters and token identities tell about each other.

  Args:
    labels: whole numbers [N], the cluster of each row.
    tokens: whole numbers [N], its token id.
    seed: of the shuffle.

  Returns:
    {name: {"value": ..., "null": ...}} for the names in `DEFINITIONS`, for a
    JSON file; what is at its null comes from the sizes alone.

  Raises:
    ValueError: as `contingency`.
  """
  shuffled = np.random.default_rng(seed).permutation(np.asarray(labels))
  value, null = (
    _token_information(contingency(v, tokens)) for v in (labels, shuffled)
  )
  return {name: {"value": value[name], "null": null[name]} for name in value}


def _token_information(table) -> dict[str, float]:
  joint = stats.entropy(table.data, base=2)
  cluster, token = (stats.entropy(m, base=2) for m in _margins(table))
  return {
    "nmi": _normalised(table),
    "token_given_cluster": max(0.0, float(joint - cluster)),
    "cluster_given_token": max(0.0, float(joint - token)),
    "purity": float(table.max(axis=1).sum() / table.sum()),
  }


def _margins(table) -> tuple[np.ndarray, np.ndarray]:
  return table.sum(axis=1), table.sum(axis=0)


def _normalised(table) -> float:
  if table.shape == (1, 1):
    return 1.0
  return float(
    2 * _information(table) / sum(map(stats.entropy, _margins(table)))
  )


def _information(table) -> float:
  """Mutual information, nats."""
  rows, columns = (np.log(margin) for margin in _margins(table))
  cells = table.tocoo()
  count = table.sum()
  logs = np.log(cells.data) - rows[cells.row] - columns[cells.col]
  return max(0.0, float(cells.data @ (logs + np.log(count))) / count)


def _expected_information(rows: np.ndarray, columns: np.ndarray) -> float:
  """Mutual information expected of random labelings with these sizes, nats.

  A pair of clusters counts only by its two sizes,
  so that each pair of distinct sizes is worked out once.
  """
  count = rows.sum()
  sizes, times = zip(
    *(np.unique(v, return_counts=True) for v in (rows, columns)), strict=True
  )
  a, b = (v.ravel() for v in np.meshgrid(*sizes, indexing="ij"))
  times = np.multiply.outer(*times).ravel()
  # Bernstein's inequality: beyond these both tails are below exp(-_TAIL).
  mean = a * (b / count)
  reach = np.sqrt(2 * _TAIL * mean)
  low = np.floor(np.maximum(mean - reach, 0)).astype(np.int64)
  high = np.ceil(mean + reach + 2 * _TAIL / 3).astype(np.int64)
  low = np.maximum(low, a + b - count)
  high = np.minimum(high, np.minimum(a, b))
  order = np.argsort(low - high)  # pairs of like width share a block
  total, start = 0.0, 0
  while start < len(order):
    widest = order[start]
    size = max(1, _TERMS // int(high[widest] - low[widest] + 1))
    part = order[start : start + size]
    total += times[part] @ _of_pairs(
      *(v[part, None].astype(np.float64) for v in (a, b, low, high)),
      float(count),
    )
    start += size
  return float(total)


def _of_pairs(a, b, low, high, count) -> np.ndarray:
  """Each pair's part of the expectation, [P], from sizes and ranges [P, 1].

  The rows n that two clusters share are hypergeometric. Probabilities come
  from the ratio of each to the one before, and are scaled to sum to 1: no
  factorials, whose logarithms would lose digits for millions of rows.
  """
  n = low + np.arange((high - low).max() + 1)
  before = n[:, :-1]
  with np.errstate(divide="ignore", invalid="ignore"):
    ratio = (a - before) * (b - before)
    ratio /= (before + 1) * (count - a - b + before + 1)
    steps = np.where(n[:, 1:] <= high, np.log(ratio), -np.inf)
  logs = np.concatenate([np.zeros((len(n), 1)), np.cumsum(steps, axis=1)], 1)
  p = special.softmax(logs, axis=1)
  return np.sum(p * special.xlogy(n, n * (count / (a * b))), axis=1) / count
