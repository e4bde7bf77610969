"""Wrong partners for rows: what a map scores where there is nothing to map."""

from typing import NamedTuple

import numpy as np

KINDS = ("across", "within", "same_token")


class Partners(NamedTuple):
  """Pairs row i of x with row `order[i]` of y.

  Attributes:
    order: int64 [n], a permutation.
    alone: bool [n], rows for which there was no partner of the kind: their
      pair is no control, leave it out.
  """

  order: np.ndarray
  alone: np.ndarray


def shuffled(documents, how: str, *, seed: int, tokens=None) -> Partners:
  """Deals every row the partner of another row, as a control.

  "across": of another document; all that pairs share is lost but the corpus.
  "within": of the same document; what is left is its topic. "same_token":
  another occurrence of the same token; what is left is the token.

  Every row is dealt out once, so that means and variances stay.

  Args:
    documents: int [n], whose document each row is.
    how: one of `KINDS`.
    seed: of the shuffling.
    tokens: int [n], for "same_token".

  Raises:
    ValueError: no such kind, or shapes that do not fit.
  """
  groups = np.asarray(tokens if how == "same_token" else documents)
  if how not in KINDS:
    raise ValueError(f"expected one of {KINDS}, got {how!r}")
  if groups.shape != np.shape(documents) or groups.ndim != 1 or not len(groups):
    raise ValueError(
      f"expected documents [n], and tokens [n] for same_token, got "
      f"{np.shape(documents)} and {np.shape(tokens)}"
    )
  n, rng = len(groups), np.random.default_rng(seed)
  _, groups, sizes = np.unique(groups, return_inverse=True, return_counts=True)
  # Groups in random order, and their rows in random order.
  groups = rng.permutation(len(sizes))[groups]
  rows = np.lexsort((rng.random(n), groups))
  groups = groups[rows]
  order = np.empty(n, np.int64)
  if how == "across":
    # A step no shorter than any group leaves every group, on either side
    # of the end too where no group has more than half of the rows.
    most = int(sizes.max())
    step = rng.integers(most, max(n - most, most) + 1)
    order[rows] = np.roll(rows, -step)
    same = groups == np.roll(groups, -step)
  else:
    # The next of the group, and the first for the last.
    first = np.searchsorted(groups, groups, "left")
    last = np.searchsorted(groups, groups, "right") - 1
    at = np.arange(n)
    order[rows] = rows[np.where(at < last, at + 1, first)]
    same = first == last
  alone = np.empty(n, bool)
  alone[rows] = same
  return Partners(order, alone)
