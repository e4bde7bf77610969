"""Second moments of paired rows: all that a linear map is fitted from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.alignment import rows

BLOCK = 8_192  # rows in one product


class Moments:
  """Sums over paired rows x [n, D] and y [n, E] that come in batches.

  Products are float32 within a block of rows, about the means of the first
  block, and float64 across blocks; rows that come as float64 are multiplied
  as such. Keeps (D + E)^2 numbers.

  Args:
    full: False keeps only the diagonal of Y^T Y, which costs less; of the
      maps only `fit_cca` needs the rest.

  Attributes:
    count: rows so far.
  """

  def __init__(self, *, full: bool = True):
    self.count = 0
    self._full = full
    self._shift: tuple[np.ndarray, np.ndarray] | None = None
    # About the shift: of x, y, x^T x, x^T y, y^T y.
    self._sums: list[np.ndarray] = []

  def update(self, x, y) -> "Moments":
    """Adds rows.

    Args:
      x: [n, D], on the host or a device.
      y: [n, E], row i of the same item as row i of `x`.

    Raises:
      ValueError: shapes that do not fit, another width than before, or values
        that are not finite; blocks before the one with these stay added.
    """
    for start, count, *pair in rows.blocks(x, y, BLOCK):
      self._check_widths(tuple(a.shape[1] for a in pair))
      shift = self._shift
      if shift is None:
        # Rounded, so that what float32 rows are shifted by is known exactly.
        shift = tuple(
          np.asarray(a[:count]).mean(0, dtype=np.float64).astype(np.float32)
          for a in pair
        )
      if any(a.dtype == np.float64 for a in pair):
        sums = _exact_products(pair, shift, count, self._full)
      else:
        sums = _products(pair, shift, count, self._full)
      sums = [np.asarray(s) for s in sums]
      # A row that is not finite shows in all of these; D^2 need no pass.
      if not all(np.isfinite(s).all() for s in (*sums[:2], *_squares(sums))):
        rows.refuse(*(np.asarray(a[:count]) for a in pair), start)
      if self._shift is None:
        self._shift = tuple(s.astype(np.float64) for s in shift)
        self._sums = [np.zeros(s.shape) for s in sums]
      for total, part in zip(self._sums, sums, strict=True):
        total += part
      self.count += count
    return self

  def merge(self, other: "Moments") -> "Moments":
    """Adds the rows of another, which stays as it is.

    Raises:
      ValueError: other widths, or only one of the two is `full`.
    """
    if other._full != self._full:
      raise ValueError(
        f"expected moments with full={self._full}, got full={other._full}; "
        "build both alike"
      )
    if other._shift is None:
      return self
    self._check_widths(other.widths)
    if self._shift is None:
      self.count, self._shift = other.count, other._shift
      self._sums = [s.copy() for s in other._sums]
      return self
    a, b = (o - s for o, s in zip(other._shift, self._shift, strict=True))
    x, y, xx, xy, yy = other._sums
    n = other.count
    moved = (
      x + n * a,
      y + n * b,
      xx + _crossed(x, a, x, a, n),
      xy + _crossed(x, a, y, b, n),
      yy + (_crossed(y, b, y, b, n) if self._full else b * (2 * y + n * b)),
    )
    for total, part in zip(self._sums, moved, strict=True):
      total += part
    self.count += n
    return self

  def turned(self) -> "Moments":
    """Of the same rows with x and y in each other's place; a copy.

    Raises:
      ValueError: y^T y was not kept.
    """
    if not self._full:
      raise ValueError("expected Moments(full=True), got only the diagonal")
    out = Moments()
    out.count = self.count
    if self._shift is not None:
      x, y, xx, xy, yy = (s.copy() for s in self._sums)
      out._shift, out._sums = self._shift[::-1], [y, x, yy, xy.T, xx]
    return out

  def standardised(self, x, y) -> "Moments":
    """Of the same rows in other coordinates, (row - mean) / scale; a copy.

    Of Y^T Y it keeps the diagonal.

    Args:
      x: (mean, scale), [D] both.
      y: (mean, scale), [E] both.
    """
    (shift_x, a), (shift_y, b) = (
      [np.asarray(part, np.float64) for part in site] for site in (x, y)
    )
    out = Moments(full=False)
    out.count = self.count
    # About the means of the rows, so that the first sums are zero.
    out._shift = (self.mean_x - shift_x) / a, (self.mean_y - shift_y) / b
    out._sums = [
      *map(np.zeros_like, out._shift),
      self.xx / np.outer(a, a),
      self.xy / np.outer(a, b),
      self.squares_y / b**2,
    ]
    return out

  @property
  def widths(self) -> tuple[int, int]:
    """D and E."""
    self._check_rows()
    return tuple(map(len, self._shift))

  @property
  def mean_x(self) -> np.ndarray:
    """Mean of x, float64 [D]."""
    self._check_rows()
    return self._shift[0] + self._sums[0] / self.count

  @property
  def mean_y(self) -> np.ndarray:
    """Mean of y, float64 [E]."""
    self._check_rows()
    return self._shift[1] + self._sums[1] / self.count

  @property
  def xx(self) -> np.ndarray:
    """Sum of (x - mean)(x - mean)^T, float64 [D, D]."""
    self._check_rows()
    x, _, xx, _, _ = self._sums
    return xx - np.outer(x, x / self.count)

  @property
  def xy(self) -> np.ndarray:
    """Sum of (x - mean)(y - mean)^T, float64 [D, E]."""
    self._check_rows()
    x, y, _, xy, _ = self._sums
    return xy - np.outer(x, y / self.count)

  @property
  def yy(self) -> np.ndarray:
    """Sum of (y - mean)(y - mean)^T, float64 [E, E].

    Raises:
      ValueError: it was not kept.
    """
    self._check_rows()
    if not self._full:
      raise ValueError("expected Moments(full=True), got only the diagonal")
    _, y, _, _, yy = self._sums
    return yy - np.outer(y, y / self.count)

  @property
  def squares_y(self) -> np.ndarray:
    """Sum of (y - mean)^2 for every dim of y, float64 [E]."""
    self._check_rows()
    y = self._sums[1]
    return np.maximum(_squares(self._sums)[1] - y * y / self.count, 0)

  def _check_widths(self, widths) -> None:
    if self._shift is not None and self.widths != widths:
      raise ValueError(
        f"expected rows of widths {self.widths} as before, got {widths}; give "
        "each pair of sites Moments of its own"
      )

  def _check_rows(self) -> None:
    if not self.count:
      raise ValueError("expected paired rows, got none; call update first")


def _sums_of_products(x, y, full: bool):
  yy = y.T @ y if full else (y * y).sum(0)
  return x.sum(0), y.sum(0), x.T @ x, x.T @ y, yy


@functools.partial(jax.jit, static_argnames="full")
def _products(pair, shift, count, full):
  counted = (jnp.arange(len(pair[0])) < count)[:, None]
  x, y = (
    jnp.where(counted, a.astype(jnp.float32) - s, 0)
    for a, s in zip(pair, shift, strict=True)
  )
  # GPUs would otherwise round the factors to TF32.
  with jax.default_matmul_precision("highest"):
    return _sums_of_products(x, y, full)


def _exact_products(pair, shift, count, full):
  x, y = (
    np.asarray(a[:count], np.float64) - s
    for a, s in zip(pair, shift, strict=True)
  )
  return _sums_of_products(x, y, full)


def _squares(sums) -> tuple[np.ndarray, np.ndarray]:
  """Sums of squares of every dim of x and of y."""
  *_, xx, _, yy = sums
  return xx.diagonal(), yy.diagonal() if yy.ndim == 2 else yy


def _crossed(x, a, y, b, n: int) -> np.ndarray:
  """What sums of (x + a)(y + b)^T have beyond those of x y^T."""
  return np.outer(x, b) + np.outer(a, y + n * b)
