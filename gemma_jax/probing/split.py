"""Which rows may be learned from: whole groups on either side."""

import numpy as np


def split(groups: np.ndarray, *, fraction: float, seed: int) -> np.ndarray:
  """Marks the rows of about `fraction` of all rows, in whole groups.

  Tokens of one document share their context, so a probe that trains on some
  is not tested by the others.

  Args:
    groups: int [R], each row's document (or what else may not be divided).
    fraction: share of the rows to mark, in (0, 1).
    seed: of the order in which groups are drawn.

  Returns:
    bool [R]; True for the marked side. Both sides hold a group at least.

  Raises:
    ValueError: fewer than two groups, or a fraction out of range.
  """
  groups = np.asarray(groups)
  if not 0 < fraction < 1:
    raise ValueError(f"expected a fraction in (0, 1), got {fraction}")
  unique, at, counts = np.unique(
    groups, return_inverse=True, return_counts=True
  )
  if len(unique) < 2:
    raise ValueError(
      f"expected rows of at least 2 documents, got {len(unique)}: train and "
      "test may not share a document; give more text"
    )
  order = np.random.default_rng(seed).permutation(len(unique))
  before = np.cumsum(counts[order]) - counts[order]
  marked = before < fraction * len(groups)
  marked[-1] = False
  chosen = np.zeros(len(unique), bool)
  chosen[order[marked]] = True
  return chosen[at]


def subsample(groups: np.ndarray, limit: int, *, seed: int) -> np.ndarray:
  """Numbers of at most `limit` random rows of each group, ascending.

  Args:
    groups: int [R], e.g. token ids, so that frequent words do not drown others.
    limit: rows per group, at least 1.
    seed: of the draw.

  Raises:
    ValueError: a limit below 1.
  """
  if limit < 1:
    raise ValueError(f"expected a limit of at least 1 row, got {limit}")
  order = np.random.default_rng(seed).permutation(len(groups))
  order = order[np.argsort(np.asarray(groups)[order], kind="stable")]
  ordered = np.asarray(groups)[order]
  new = np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(order)]
  begin = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
  return np.sort(order[np.arange(len(order)) - begin < limit])
