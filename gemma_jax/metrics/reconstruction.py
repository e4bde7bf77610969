"""How well a reconstruction explains its target."""

import numpy as np


class RunningFVU:
  """Fraction of variance unexplained, pooled over everything it was given.

  FVU = sum |x - x_hat|^2 / sum |x - mean(x)|^2, both sums over all rows and
  the mean over all rows too.
  Sums are float64, shifted by the first batch's mean, so that a mean far
  larger than the spread does not cancel.
  """

  def __init__(self):
    self.count = 0
    self._error = 0.0
    self._square = 0.0
    self._shift = None
    self._sum = None

  def update(self, x, x_hat) -> "RunningFVU":
    """Adds rows.

    Args:
      x: target [..., D].
      x_hat: its reconstruction, the same shape.

    Raises:
      ValueError: shapes that differ, or another width than before.
      FloatingPointError: a value that is not finite.
    """
    x, x_hat = _rows(x, x_hat)
    if not len(x):
      return self
    # The difference of float32 inputs is taken in float64: exact.
    with np.errstate(invalid="ignore"):  # inf - inf; the sum tells
      error = np.square(x - x_hat).sum()
    if not np.isfinite(error):
      raise FloatingPointError(
        "FVU of values that are not finite: "
        f"{int((~np.isfinite(x)).sum())} in the target, "
        f"{int((~np.isfinite(x_hat)).sum())} in the reconstruction."
      )
    if self._shift is None:
      self._shift = x.mean(0)
      self._sum = np.zeros_like(self._shift)
    if x.shape[1:] != self._shift.shape:
      raise ValueError(
        f"Rows of width {x.shape[1]} after rows of width {len(self._shift)}; "
        "give each site a RunningFVU of its own."
      )
    centred = x - self._shift
    self.count += len(x)
    self._error += error
    self._square += np.square(centred).sum()
    self._sum += centred.sum(0)
    return self

  @property
  def variance(self) -> float:
    """Mean over rows of |x - mean(x)|^2."""
    mean = self._sum / self.count
    return float(self._square / self.count - mean @ mean)

  @property
  def mean(self) -> np.ndarray:
    """The target's mean, float64 [D]."""
    return self._shift + self._sum / self.count

  def compute(self) -> float:
    """The FVU so far; NaN before any row, and where the target is constant."""
    if not self.count or self.variance <= 0:
      return float("nan")
    return float(self._error / self.count / self.variance)


def fvu(x, x_hat) -> float:
  """Fraction of variance unexplained, about the mean of `x` over its rows.

  Args:
    x: target [..., D].
    x_hat: its reconstruction, the same shape.

  Raises:
    ValueError: shapes that differ.
    FloatingPointError: a value that is not finite.
  """
  return RunningFVU().update(x, x_hat).compute()


def _rows(x, x_hat) -> tuple[np.ndarray, np.ndarray]:
  x, x_hat = np.asarray(x), np.asarray(x_hat)
  if x.shape != x_hat.shape or x.ndim < 1:
    raise ValueError(
      f"Target {x.shape} and reconstruction {x_hat.shape} must have one shape, "
      "[..., D]."
    )
  width = x.shape[-1]
  return (
    x.reshape(-1, width).astype(np.float64),
    x_hat.reshape(-1, width).astype(np.float64),
  )
