"""One Gaussian of all rows: what a mixture has to beat."""

import dataclasses
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gemma_jax.clustering.rows import Blocks, Rows, as_rows

log = logging.getLogger("gemma_jax")

BLOCK = 8_192  # rows in one product
LARGEST = 1e17  # beyond, sums of squares leave float32


def blocks(rows: Rows, centre: np.ndarray, size: int = BLOCK) -> Blocks:
  """The rows on the first device, about `centre` [D]."""
  mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",))
  return Blocks(rows, size, centre=centre, mesh=mesh)


def require_finite(values, start: int) -> None:
  """Raises where a row, of which `start` is the first, has no finite value."""
  finite = np.isfinite(np.asarray(values))
  if not finite.all():
    raise FloatingPointError(
      f"Row {start + int(np.argmin(finite))} is not finite, or too large for "
      "float32 to square. Find what made it, or leave it out."
    )


class Moments(NamedTuple):
  """What one pass over N rows tells of each dim, in float64.

  Attributes:
    mean: [D].
    variance: with N in the denominator, [D].
    constant: bool [D], dims with the same value in every row.
  """

  mean: np.ndarray
  variance: np.ndarray
  constant: np.ndarray


def moments(rows: Rows) -> Moments:
  """Mean and variance of every dim.

  Raises:
    FloatingPointError: a row that is not finite, or too large; names
      the first.
    ValueError: rows that do not differ.
  """
  shift = rows.read(0, 1).astype(np.float64)[0]
  total, squares = np.zeros_like(shift), np.zeros_like(shift)
  for start in range(0, len(rows), BLOCK):
    x = rows.read(start, min(start + BLOCK, len(rows))) - shift
    size = np.abs(x).max(1)
    require_finite(np.where(size > LARGEST, np.inf, size), start)
    total += x.sum(0)
    squares += np.einsum("nd,nd->d", x, x)
  constant = squares == 0
  if constant.all():
    raise ValueError(
      f"All {len(rows)} rows are equal: a density needs rows that differ."
    )
  mean = total / len(rows)
  return Moments(shift + mean, squares / len(rows) - mean**2, constant)


@dataclasses.dataclass(frozen=True)
class Gaussian:
  """A Gaussian by its principal axes.

  Attributes:
    mean: float64 [D].
    variances: along the axes, float64 [D].
    axes: orthonormal columns, float64 [D, D]; None: the dims themselves.
  """

  mean: np.ndarray
  variances: np.ndarray
  axes: np.ndarray | None = None

  def log_likelihood(self, rows) -> np.ndarray:
    """Log-density of rows [N, D] or `Rows`, float32 [N], in nats."""
    rows, width = as_rows(rows), len(self.mean)
    if rows.width != width:
      raise ValueError(f"Expected rows of {width} dims, got {rows.width}.")
    whiten = 1 / np.sqrt(self.variances)
    if self.axes is not None:
      whiten = self.axes * whiten
    centre = self.mean.astype(np.float32)
    rest, whiten = (self.mean - centre).astype(np.float32), jnp.float32(whiten)
    constant = width * np.log(2 * np.pi) + np.log(self.variances).sum()
    found = []
    for start, x, _ in blocks(rows, centre):
      found.append(np.asarray(_squares(x, rest, whiten)))
      require_finite(found[-1], start)
    squares = np.concatenate(found)[: len(rows)]
    return (-0.5 * (constant + squares)).astype(np.float32)


@jax.jit
def _squares(x, rest, whiten):
  x = x - rest
  z = x * whiten if whiten.ndim == 1 else _product(x, whiten)
  return jnp.sum(z * z, axis=1)


@jax.jit
def _product(a, b):
  # GPUs would otherwise round the factors to TF32.
  return jnp.matmul(a, b, precision="highest")


class Baselines(NamedTuple):
  """Single Gaussians of the training rows: full covariance, and diagonal."""

  full: Gaussian
  diagonal: Gaussian


def gaussian_baselines(train_rows, *, floor: float = 1e-3) -> Baselines:
  """The most likely single Gaussians of the rows.

  Args:
    train_rows: [N, D] or `Rows`, those that the mixture was fitted on.
    floor: least variance of a dim or along a principal axis, times the mean
      variance. That of the mixture, so that neither side gains by dims that
      hardly vary.

  Raises:
    FloatingPointError: a row that is not finite, or too large; names
      the first.
    ValueError: rows that do not differ.
  """
  rows = as_rows(train_rows)
  mean, variance, _ = moments(rows)
  outer = np.zeros((rows.width, rows.width))
  # The rows that fill up the last block are zeros and add nothing.
  for _, x, _ in blocks(rows, mean):
    outer += np.asarray(_product(x.T, x))
  values, axes = np.linalg.eigh(outer / len(rows))
  least = floor * variance.mean()
  if low := int((values < least).sum()):
    log.info("full Gaussian: %d of %d variances floored", low, len(values))
  return Baselines(
    Gaussian(mean, np.maximum(values, least), axes),
    Gaussian(mean, np.maximum(variance, least)),
  )
