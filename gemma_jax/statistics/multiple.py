"""p-values of many tests, adjusted for their number."""

import numpy as np
from statsmodels.stats.multitest import multipletests


def holm(p) -> np.ndarray:
  """Holm's adjusted p: the chance of any false discovery is at most alpha.

  Under any dependence (Holm 1979, "A simple sequentially rejective multiple
  test procedure", Scandinavian Journal of Statistics 6).

  Args:
    p: any shape; NaN where there was no test, which counts for nothing.

  Returns:
    float64, the shape of `p`, NaN where `p` is.

  Raises:
    ValueError: a p outside 0 to 1.
  """
  return _adjusted(p, "holm")


def benjamini_hochberg(p) -> np.ndarray:
  """Adjusted p that controls the share of false discoveries.

  For tests that are independent or positively dependent (Benjamini and
  Hochberg 1995, "Controlling the false discovery rate", JRSS B 57). Arguments
  and errors as in `holm`.
  """
  return _adjusted(p, "fdr_bh")


def benjamini_yekutieli(p) -> np.ndarray:
  """As `benjamini_hochberg`, under any dependence.

  Larger by the harmonic number 1 + 1/2 + ... + 1/m (Benjamini and Yekutieli
  2001, "The control of the false discovery rate in multiple testing under
  dependency", Annals of Statistics 29, theorem 1.3). Arguments and errors as
  in `holm`.
  """
  return _adjusted(p, "fdr_by")


def _adjusted(p, method: str) -> np.ndarray:
  out = np.array(p, np.float64)
  tested = ~np.isnan(out)
  values = out[tested]
  if ((values < 0) | (values > 1)).any():
    raise ValueError(
      f"expected p from 0 to 1, got {values.min()} to {values.max()}"
    )
  if len(values):
    out[tested] = multipletests(values, method=method)[1]
  return out
