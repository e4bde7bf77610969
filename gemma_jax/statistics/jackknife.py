"""What each prompt contributes to a number that is no mean."""

from collections.abc import Callable

import numpy as np


def pseudo_values(
  statistic: Callable[[np.ndarray], float], n: int
) -> np.ndarray:
  """n theta - (n - 1) theta without unit i, for each unit i.

  Treated as n independent values, their mean is the statistic less the
  jackknife's estimate of its bias, and their spread that of the statistic
  (Tukey 1958, "Bias and confidence in not-quite large samples"; Miller 1974,
  "The jackknife: a review", Biometrika 61). For smooth statistics, such as
  CKA; not for medians or nearest neighbours.

  Args:
    statistic: numbers of the units [m] -> a number, called n + 1 times.
    n: units, at least 2.

  Returns:
    float64 [n].

  Raises:
    ValueError: fewer than 2 units, or a statistic that is not finite.
  """
  if n < 2:
    raise ValueError(f"expected at least 2 units, got {n}")
  units = np.arange(n)
  whole = statistic(units)
  without = np.array([statistic(np.delete(units, i)) for i in units])
  found = n * whole - (n - 1) * without
  if not np.isfinite(found).all():
    raise ValueError(
      "expected a finite statistic with and without each unit, got others "
      f"without {np.flatnonzero(~np.isfinite(found))[:10].tolist()}"
    )
  return found
