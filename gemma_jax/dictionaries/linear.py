"""Second moments of two sites, and what follows from them in closed form.

The ridge map is the baseline that a transcoder must beat and where its affine
skip starts; the input's covariance gives its whitening.
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.activations import ActivationStore

BLOCK = 8_192  # rows in one product
RIDGE = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)  # times the mean input variance


@jax.jit
def _products(x, y, shift_x, shift_y):
  x = x.astype(jnp.float32) - shift_x
  y = y.astype(jnp.float32) - shift_y
  # GPUs would otherwise round the factors to TF32.
  with jax.default_matmul_precision("highest"):
    return x.sum(0), y.sum(0), x.T @ x, x.T @ y, jnp.sum(y * y, axis=0)


@dataclasses.dataclass
class Moments:
  """Sums over rows of x [D] and y [E], shifted, in float64.

  Attributes:
    count: rows.
    shift_x: what was taken from x before summing, [D].
    shift_y: the same for y, [E].
    x: sum of x, [D].
    y: sum of y, [E].
    xx: sum of outer products, [D, D].
    xy: the same, [D, E].
    yy: sum of squares of y, [E].
  """

  count: int
  shift_x: np.ndarray
  shift_y: np.ndarray
  x: np.ndarray
  y: np.ndarray
  xx: np.ndarray
  xy: np.ndarray
  yy: np.ndarray

  def __add__(self, other: "Moments") -> "Moments":
    """Sums of both; the two must share their shifts."""
    if not (
      np.array_equal(self.shift_x, other.shift_x)
      and np.array_equal(self.shift_y, other.shift_y)
    ):
      raise ValueError("Moments with different shifts cannot be added.")
    return dataclasses.replace(
      self,
      count=self.count + other.count,
      **{
        name: getattr(self, name) + getattr(other, name)
        for name in ("x", "y", "xx", "xy", "yy")
      },
    )

  @property
  def mean_x(self) -> np.ndarray:
    """Mean of x, float64 [D]."""
    return self.shift_x + self.x / self.count

  @property
  def mean_y(self) -> np.ndarray:
    """Mean of y, float64 [E]."""
    return self.shift_y + self.y / self.count

  @property
  def covariance(self) -> np.ndarray:
    """Covariance of x, float64 [D, D]."""
    return self.xx / self.count - np.outer(self.x, self.x) / self.count**2

  @property
  def cross_covariance(self) -> np.ndarray:
    """Covariance of x with y, float64 [D, E]."""
    return self.xy / self.count - np.outer(self.x, self.y) / self.count**2

  @property
  def variance_y(self) -> np.ndarray:
    """Variance of every dim of y, float64 [E]."""
    return self.yy / self.count - (self.y / self.count) ** 2

  def squared_error(self, linear: np.ndarray, bias: np.ndarray) -> float:
    """Mean over the rows of |y - x @ linear - bias|^2."""
    offset = self.mean_y - self.mean_x @ linear - bias
    quadratic = np.sum((self.covariance @ linear) * linear)
    cross = np.sum(self.cross_covariance * linear)
    errors = self.variance_y.sum() - 2 * cross + quadratic
    return float(errors + offset @ offset)


def moments(
  blocks: Iterable[tuple[np.ndarray, np.ndarray]],
  *,
  shift: tuple[np.ndarray, np.ndarray] | None = None,
) -> Moments:
  """Sums over blocks of (x [n, D], y [n, E]).

  Products are float32 within a block of a few thousand rows, about a shift
  near the mean, and float64 across blocks.

  Args:
    blocks: rows.
    shift: what to subtract; None takes the first block's means.
  """
  total = None
  for x, y in blocks:
    if shift is None:
      shift = tuple(np.asarray(a, np.float32).mean(0) for a in (x, y))
    sums = _products(x, y, *shift)
    sums = [np.asarray(s, np.float64) for s in sums]
    part = Moments(len(x), *(s.astype(np.float64) for s in shift), *sums)
    total = part if total is None else total + part
  if total is None:
    raise ValueError("No rows to take moments of.")
  return total


@dataclasses.dataclass(frozen=True)
class Ridge:
  """y = x @ linear + bias, with the penalty that was chosen.

  Attributes:
    linear: float32 [D, E].
    bias: float32 [E].
    penalty: times the mean input variance.
  """

  linear: np.ndarray
  bias: np.ndarray
  penalty: float

  def __call__(self, x):
    """[..., D] -> [..., E]."""
    return x @ self.linear + self.bias


def fit_ridge(fit: Moments, validation: Moments) -> Ridge:
  """Ridge regression; the penalty that validates best, refitted on all rows.

  Args:
    fit: moments of the rows to fit.
    validation: moments of other rows, about the same shifts.
  """

  def solve(m: Moments, penalties):
    values, vectors = np.linalg.eigh(m.covariance)
    projected = vectors.T @ m.cross_covariance
    scale = values.mean()
    for penalty in penalties:
      # Directions without variance carry no map; they must not blow up.
      floor = np.maximum(values + penalty * scale, 1e-9 * scale)
      # A constant input has no variance at all: its map is zero, not NaN.
      floor = np.maximum(floor, np.finfo(np.float64).tiny)
      linear = vectors @ (projected / floor[:, None])
      yield penalty, linear, m.mean_y - m.mean_x @ linear

  best = min(
    solve(fit, RIDGE), key=lambda s: validation.squared_error(s[1], s[2])
  )
  ((_, linear, bias),) = solve(fit + validation, (best[0],))
  return Ridge(linear.astype(np.float32), bias.astype(np.float32), best[0])


def rows(
  store: ActivationStore, start: int, stop: int, joined: str
) -> np.ndarray:
  """Rows of a site, or of several joined by "+", side by side."""
  parts = [store.read(start, stop, site) for site in joined.split("+")]
  return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def fit(store: ActivationStore, read: str, write: str) -> tuple[Moments, Ridge]:
  """Moments of a whole store, and the ridge map between two of its sites.

  The last tenth of the rows chooses the penalty: other documents, but for the
  one that the cut goes through.

  Args:
    store: training activations.
    read: site of x, or several joined by "+".
    write: site of y, likewise.
  """

  def blocks(start, stop):
    for at in range(start, stop, BLOCK):
      end = min(at + BLOCK, stop)
      yield rows(store, at, end, read), rows(store, at, end, write)

  cut = len(store) - len(store) // 10
  first = moments(blocks(0, cut))
  shift = first.shift_x, first.shift_y
  last = moments(blocks(cut, len(store)), shift=shift)
  return first + last, fit_ridge(first, last)
