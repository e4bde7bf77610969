"""One row for the tokens of a text since the last paired one."""

import numpy as np

from gemma_jax.alignment.pairing import last_of_each

POOLING = ("last", "mean", "max")


def pool_spans(values, ends, common, *, how: str = "last") -> np.ndarray:
  """One row for all tokens since the common end before.

  Args:
    values: [n, D], of n tokens of a text in their order; without BOS, which
      would be in the first span.
    ends: whole numbers [n], their ends.
    common: whole numbers [P], some of the ends, ascending.
    how: "last" token, "mean" or "max" over tokens.

  Returns:
    [P, D], in the dtype of `values`, float32 for the mean of shorter ones.

  Raises:
    ValueError: shapes that do not fit, a common end that is not an end, ends
      that do not ascend, or another `how`.
  """
  if how not in POOLING:
    raise ValueError(f"expected how to be one of {POOLING}, got {how!r}")
  values, common = np.asarray(values), np.asarray(common, np.int64)
  if values.ndim != 2 or np.shape(ends) != values.shape[:1]:
    raise ValueError(
      f"expected values [n, D] and ends [n] of the same tokens, got "
      f"{values.shape} and {np.shape(ends)}"
    )
  known, last = last_of_each(ends)
  strange = common[~np.isin(common, known[known >= 0])]
  if len(strange):
    raise ValueError(
      f"expected common ends that are ends of the tokens, got {len(strange)} "
      f"others of {len(common)}, such as {strange[0]}"
    )
  last = last[np.searchsorted(known, common)]
  if (np.diff(last) <= 0).any() or (np.diff(common) <= 0).any():
    raise ValueError(
      "expected ends and common ends that ascend; give the tokens of one text "
      "in their order, and each common end once"
    )
  if how == "last" or not len(last):
    return values[last]
  # What follows the last common end would join the last span.
  values, first = values[: last[-1] + 1], np.append(0, last[:-1] + 1)
  if how == "max":
    return np.maximum.reduceat(values, first, axis=0)
  sums = np.add.reduceat(values.astype(np.float64), first, axis=0)
  means = sums / (last - first + 1)[:, None]
  return means.astype(np.result_type(values.dtype, np.float32))
