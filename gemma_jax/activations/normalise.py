"""Linear changes of coordinates in which activations are easier to learn.

Every kind can be undone, and folds into a dictionary that was trained on
normalised activations. Errors belong in raw coordinates: FVU changes under
whitening.
"""

import dataclasses
import logging
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

log = logging.getLogger("gemma_jax")

KINDS = (
  "none",  # x
  "mean_square",  # x * c, so that mean |x|^2 = D
  "mean_norm",  # x * c, so that mean |x| = sqrt(D)
  "unit_square",  # x * c, so that mean |x|^2 = 1
  "scale",  # centred, one factor for all dims: mean variance 1
  "standardise",  # centred, one factor for each dim: every variance 1
  "pca",  # centred, turned to the eigenvectors, their variances 1
  "zca",  # the same, turned back: the least change that whitens
  "whiten",  # zca, then one factor: mean variance 1 whatever the shrinkage
)
CENTRED = KINDS[4:]
WHITENING = ("pca", "zca", "whiten")

# Eigenvalues below this share of the largest are rounding: the products
# behind a covariance are float32.
SINGULAR = 1e-7


class Measured(NamedTuple):
  """What `fit` reads of a site; a `Statistics` has the same attributes.

  Attributes:
    count: rows.
    mean: [D].
    variance: [D].
    covariance: [D, D], or None.
    mean_norm: mean |x|, or None.
  """

  count: int
  mean: np.ndarray
  variance: np.ndarray
  covariance: np.ndarray | None = None
  mean_norm: float | None = None


class _Statistics(Protocol):
  count: int
  mean: np.ndarray
  variance: np.ndarray
  covariance: np.ndarray | None
  mean_norm: float | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Normalisation:
  """z = (x - mean) map, and x = z inverse + mean.

  Attributes:
    kind: one of `KINDS`.
    mean: [D]; zeros for the kinds that do not centre.
    map: scalar, [D] (one factor for each dim) or [D, D] (x @ map).
    inverse: the same shape; undoes `map`.
  """

  kind: str = dataclasses.field(metadata={"static": True})
  mean: jax.Array
  map: jax.Array
  inverse: jax.Array

  def apply(self, x: jax.Array) -> jax.Array:
    """Raw x [..., D] in normalised coordinates, float32 or wider."""
    x = jnp.asarray(x)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return _times(x - self.mean, self.map)

  def invert(self, z: jax.Array) -> jax.Array:
    """Normalised z [..., D] in raw coordinates."""
    return _times(jnp.asarray(z), self.inverse) + self.mean

  def fold_encoder(self, W_enc, b_enc) -> tuple[np.ndarray, np.ndarray]:
    """An encoder of normalised activations, for raw ones.

    Args:
      W_enc: [D, M].
      b_enc: [M].

    Returns:
      Float32 W [D, M] and b [M]: x @ W + b = apply(x) @ W_enc + b_enc.
    """
    mean, to, _ = self._float64()
    W = to @ W_enc if to.ndim == 2 else to[..., None] * np.float64(W_enc)
    return _float32(W, b_enc - mean @ W)

  def fold_decoder(self, W_dec, b_dec) -> tuple[np.ndarray, np.ndarray]:
    """A decoder of normalised activations, to raw ones.

    Args:
      W_dec: [M, D].
      b_dec: [D].

    Returns:
      Float32 W [M, D] and b [D]: a @ W + b = invert(a @ W_dec + b_dec).
    """
    mean, _, back = self._float64()
    W_dec, b_dec = np.float64(W_dec), np.float64(b_dec)
    if back.ndim == 2:
      return _float32(W_dec @ back, b_dec @ back + mean)
    return _float32(W_dec * back, b_dec * back + mean)

  def _float64(self):
    return (
      np.asarray(a, np.float64) for a in (self.mean, self.map, self.inverse)
    )


def _float32(*arrays):
  return tuple(np.asarray(a, np.float32) for a in arrays)


def _times(x, factor):
  if factor.ndim < 2:
    return x * factor
  # GPUs would otherwise round the factors to TF32.
  return jnp.matmul(x, factor, precision="highest")


def oas(eigenvalues: np.ndarray, count: int) -> float:
  """Share of the identity in the Oracle Approximating Shrinkage estimate.

  Chen, Wiesel, Eldar and Hero 2010, "Shrinkage algorithms for MMSE covariance
  estimation" (arXiv 0907.4698), equation 23:
  rho = ((1 - 2/p) tr(S^2) + tr(S)^2) / ((n + 1 - 2/p) (tr(S^2) - tr(S)^2/p)),
  at most 1. It takes rows for independent and normal.

  Args:
    eigenvalues: of the sample covariance S, [p].
    count: rows n.
  """
  p = len(eigenvalues)
  trace, squares = eigenvalues.sum(), np.sum(eigenvalues**2)
  above = (1 - 2 / p) * squares + trace**2
  below = (count + 1 - 2 / p) * (squares - trace**2 / p)
  return 1.0 if below <= above else float(above / below)


def check(kind: str, *, shrinkage: float | str, power: float) -> None:
  """Whether `fit` knows what these mean.

  Raises:
    ValueError: it does not; says what was expected.
  """
  if kind not in KINDS:
    raise ValueError(f"normalise={kind!r}; expected one of {', '.join(KINDS)}.")
  if not 0 <= power <= 1:
    raise ValueError(
      f"power={power}; expected 0 (nothing) to 1 (complete whitening)."
    )
  number = isinstance(shrinkage, (int, float)) and shrinkage >= 0
  if not number and shrinkage != "oas":
    raise ValueError(
      f"shrinkage={shrinkage!r}; expected 'oas' or a number from 0, times the "
      "mean eigenvalue."
    )


def matrices(
  statistics: _Statistics,
  kind: str,
  *,
  shrinkage: float | str = 0.0,
  power: float = 1.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Mean, map and inverse of a `Normalisation` in float64; see `fit`."""
  check(kind, shrinkage=shrinkage, power=power)
  mean = np.asarray(statistics.mean, np.float64)
  width = len(mean)
  if kind == "none":
    return np.zeros(width), np.float64(1), np.float64(1)
  variance = np.maximum(np.asarray(statistics.variance, np.float64), 0)
  if kind in ("mean_square", "mean_norm", "unit_square"):
    size = np.sqrt(variance.sum() + mean @ mean)
    if kind == "mean_norm":
      size = statistics.mean_norm
    if size is None:
      raise ValueError("normalise='mean_norm' needs the mean norm of the rows.")
    if not size > 0:
      raise ValueError(
        "Every activation is zero; nothing can be scaled. Check the site and "
        "the mask."
      )
    aim = 1.0 if kind == "unit_square" else np.sqrt(width)
    return np.zeros(width), aim / size, size / aim
  if not variance.mean() > 0:
    raise ValueError(
      "The site is constant over the rows; nothing can be normalised. Check "
      "the site and the mask."
    )
  if kind == "scale":
    deviation = np.sqrt(variance.mean())
    return mean, 1 / deviation, deviation
  (constant,) = np.nonzero(variance == 0)
  if len(constant):
    log.warning(
      "normalise=%r: %d of %d dims are constant: %s",
      kind,
      len(constant),
      width,
      ", ".join(map(str, constant[:16])) + ", ..." * (len(constant) > 16),
    )
  if kind == "standardise":
    # Nothing is known of their scale; that of the others keeps the units.
    typical = np.sqrt(variance[variance > 0].mean())
    deviation = np.where(variance > 0, np.sqrt(variance), typical)
    return mean, 1 / deviation, deviation
  return mean, *_whitening(statistics, kind, shrinkage, power)


def _whitening(statistics, kind, shrinkage, power):
  if statistics.covariance is None:
    raise ValueError(
      f"normalise={kind!r} needs the covariance, which was not kept. Take the "
      "statistics with covariance=True, or use 'standardise'."
    )
  values, vectors = np.linalg.eigh(np.asarray(statistics.covariance))
  values = np.maximum(values, 0)
  mean = values.mean()
  if shrinkage == "oas":
    share = oas(values, statistics.count)
    raised = (1 - share) * values + share * mean
  else:
    raised = values + shrinkage * mean
  floor = SINGULAR * values.max()
  if (lost := int((raised < floor).sum())) > 0:
    log.warning(
      "normalise=%r: %d of %d directions have no variance beyond rounding; "
      "they are scaled as if it were %.3g. Shrinkage avoids this.",
      kind,
      lost,
      len(values),
      floor,
    )
    raised = np.maximum(raised, floor)
  gain = np.sqrt(raised) ** power
  if kind == "pca":
    # The largest variance first, as principal components are counted.
    gain, vectors = gain[::-1], vectors[:, ::-1]
    return vectors / gain, (vectors * gain).T
  to, back = (vectors / gain) @ vectors.T, (vectors * gain) @ vectors.T
  if kind == "whiten":
    after = np.sqrt(np.mean(values / raised**power))
    to, back = to / after, back * after
  return to, back


def fit(
  statistics: _Statistics,
  kind: str,
  *,
  shrinkage: float | str = 0.0,
  power: float = 1.0,
) -> Normalisation:
  """The normalisation of one of `KINDS` for a site.

  "pca" is (x - mean) U G and "zca" (x - mean) U G U^T, with U the eigenvectors
  of the covariance, the largest first, and G = R^(-power / 2) of its raised
  eigenvalues R (Kessy, Lewin and Strimmer 2018, arXiv 1512.00809).
  "whiten" is "zca" divided by the root mean variance that comes out of it.

  A constant dim is named in the log and, by "standardise", scaled as the mean
  of the others; eigenvalues below 1e-7 of the largest are raised to that.

  Args:
    statistics: a `Statistics`, or a `Measured`.
    kind: one of `KINDS`.
    shrinkage: for whitening; a number raises every eigenvalue by that times
      their mean, "oas" shrinks towards their mean as `oas` says.
    power: alpha of partial whitening, from 0 (variances stay) to 1.

  Raises:
    ValueError: another kind, shrinkage or power; a covariance or norm that is
      needed and not there; a site that does not vary, or is zero.
  """
  found = matrices(statistics, kind, shrinkage=shrinkage, power=power)
  return Normalisation(kind, *(jnp.asarray(a, jnp.float32) for a in found))
