"""How well a reconstruction explains its target."""

import numpy as np


class RunningFVU:
  """Fraction of variance unexplained, pooled over everything it was given.

  FVU = sum |x - x_hat|^2 / sum |x - mean(x)|^2, both sums over all rows and
  the mean over all rows too.
  Sums are float64, shifted by the first batch's means, so that a mean far
  larger than the spread does not cancel.
  """

  def __init__(self):
    self.count = 0
    self._shift = None
    self._shift_hat = None
    self._square = 0.0
    self._sum = None
    self._error_square = 0.0
    self._error_sum = None

  def update(self, x, x_hat) -> "RunningFVU":
    """Adds rows.

    Args:
      x: target [..., D].
      x_hat: its reconstruction, the same shape.

    Raises:
      ValueError: shapes that differ, or another width than before.
      FloatingPointError: a value that is not finite.
    """
    x, x_hat = rows(x, x_hat)
    if len(x):
      self.add(x, x_hat)
    return self

  def add(self, x: np.ndarray, x_hat: np.ndarray) -> np.ndarray:
    """`update` with at least one row, float64 [n, D] each.

    Returns:
      x less the shift that all sums of this object share, [n, D].
    """
    shift, shift_hat = self._shift, self._shift_hat
    if shift is not None and x.shape[1:] != shift.shape:
      raise ValueError(
        f"Rows of width {x.shape[1]} after rows of width {len(shift)}; give "
        "each site an accumulator of its own."
      )
    with np.errstate(invalid="ignore"):  # inf - inf; the sum tells
      if shift is None:
        shift, shift_hat = pilot(x), pilot(x_hat)
      away = x - shift
      # Of a constant prediction the shift leaves nothing, to the bit: both
      # sums are then of the same values, and predicting the mean scores 1.
      error = away - (x_hat - shift_hat)
      error_square = np.square(error).sum()
    if not np.isfinite(error_square):
      raise FloatingPointError(
        "Reconstruction of values that are not finite: "
        f"{int((~np.isfinite(x)).sum())} in the target, "
        f"{int((~np.isfinite(x_hat)).sum())} in the reconstruction. Mask those "
        "rows, or find where they come from."
      )
    if not self.count:
      self._shift, self._shift_hat = shift, shift_hat
      self._sum = self._error_sum = np.zeros_like(shift)
    self.count += len(x)
    self._square += np.square(away).sum()
    self._sum = self._sum + away.sum(0)
    self._error_square += error_square
    self._error_sum = self._error_sum + error.sum(0)
    return away

  @property
  def variance(self) -> float:
    """Mean over rows of |x - mean(x)|^2."""
    mean = self._sum / self.count
    return float(self._square / self.count - mean @ mean)

  @property
  def error_variance(self) -> float:
    """Mean over rows of |e - mean(e)|^2, where e = x - x_hat."""
    mean = self._error_sum / self.count
    return max(float(self._error_square / self.count - mean @ mean), 0.0)

  @property
  def error(self) -> float:
    """Mean over rows of |x - x_hat|^2."""
    mean = self._shift - self._shift_hat + self._error_sum / self.count
    return self.error_variance + float(mean @ mean)

  @property
  def offset(self) -> np.ndarray:
    """The target's mean less the shift, float64 [D]."""
    return self._sum / self.count

  @property
  def mean(self) -> np.ndarray:
    """The target's mean, float64 [D]."""
    return self._shift + self.offset

  def compute(self) -> float:
    """The FVU so far; NaN before any row, and where the target is constant."""
    if not self.count or self.variance <= 0:
      return float("nan")
    return self.error / self.variance


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


def rows(x, x_hat) -> tuple[np.ndarray, np.ndarray]:
  """Both as float64 [n, D].

  Raises:
    ValueError: shapes that differ, or no axis at all.
  """
  x, x_hat = np.asarray(x), np.asarray(x_hat)
  if x.shape != x_hat.shape or x.ndim < 1:
    raise ValueError(
      f"Target {x.shape} and reconstruction {x_hat.shape} must have one shape, "
      "[..., D]."
    )
  width = x.shape[-1]
  # The difference of float32 inputs is then taken in float64: exact.
  return (
    x.reshape(-1, width).astype(np.float64, copy=False),
    x_hat.reshape(-1, width).astype(np.float64, copy=False),
  )


def pilot(x: np.ndarray) -> np.ndarray:
  """Mean of the rows of [n, D]; of equal rows it is the row, to the bit."""
  return x[0] + (x - x[0]).mean(0)
