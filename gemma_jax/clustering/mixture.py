"""Gaussian mixtures as density models of activations.

Every covariance is W W^T + noise: diagonal noise without W at rank 0, else a
probabilistic principal component analyser with isotropic noise (Tipping and
Bishop 1999, "Mixtures of probabilistic principal component analysers", Neural
Computation 11). Products are about the mean of the rows: an offset costs no
precision.
"""

import dataclasses
import functools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from gemma_jax.clustering import gaussian, lloyd
from gemma_jax.clustering.rows import as_rows


class Terms(NamedTuple):
  """A mixture about a centre as the device wants it, float32.

  With Psi the noise, M = I + W^T Psi^-1 W = L L^T and A = Psi^-1 W L^-T, the
  inverse of a covariance is Psi^-1 - A A^T (Woodbury) and its determinant
  |Psi| |M|. The posterior mean of the factors is z = L^-T A^T (x - mean).
  """

  precision: jax.Array  # 1 / Psi, [C, D]
  linear: jax.Array  # mean / Psi, [C, D]
  directions: jax.Array  # A, [C, D, r]
  offset: jax.Array  # A^T mean, [C, r]
  constant: jax.Array  # all of the log-density that no row changes, [C]


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
  """C Gaussians with weights.

  Attributes:
    weights: float64 [C], sum to 1.
    means: float64 [C, D].
    noise: variances at rank 0, float64 [C, D]; else s^2 of the isotropic
      noise, [C, 1].
    loadings: W, float64 [C, D, r].
    history: mean log-likelihood of a training row in nats, at the start and
      after each iteration, float64 [iterations + 1].
    converged: whether the last iteration changed it by less than `tol`.
  """

  weights: np.ndarray
  means: np.ndarray
  noise: np.ndarray
  loadings: np.ndarray
  history: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0))
  converged: bool = False

  @property
  def rank(self) -> int:
    """r, the columns of each W; 0 for diagonal covariances."""
    return self.loadings.shape[2]

  @property
  def variances(self) -> np.ndarray:
    """Diagonals of the covariances, float64 [C, D]."""
    return self.noise + np.sum(self.loadings**2, axis=2)

  def log_likelihood(self, rows) -> np.ndarray:
    """Log-density of rows [N, D] or `Rows`, float32 [N], in nats.

    Raises:
      ValueError: rows of another width.
      FloatingPointError: a row that is not finite; names the first.
    """
    return self._score(rows, _log_likelihood)

  def assign(self, rows) -> np.ndarray:
    """The most likely component of each of `rows`, int32 [N].

    Raises:
      As `log_likelihood`.
    """
    return self._score(rows, _most_likely)

  def responsibilities(self, x) -> np.ndarray:
    """Probability of each component given each row of a block, [B, C].

    Args:
      x: [B, D].

    Raises:
      As `log_likelihood`.
    """
    return self._score(x, jax.nn.softmax)

  def reconstruct(self, x) -> np.ndarray:
    """A block of rows as the most likely component has them, [B, D].

    Its mean, and at rank > 0 with it W z, z the posterior mean of the factors:
    mean + W (s^2 I + W^T W)^-1 W^T (x - mean) (Tipping and Bishop 1999).

    Args:
      x: [B, D].

    Raises:
      As `log_likelihood`.
    """
    best = self.assign(x)
    centre, terms = self._centred
    part = _factors_of(np.asarray(x, np.float32) - centre, best, terms)
    return np.float32(self.means[best] + self.noise[best] * np.asarray(part))

  def save(self, path: pathlib.Path) -> None:
    """Writes the parameters as a safetensors file."""
    names = ("weights", "means", "noise", "loadings")
    arrays = {n: np.ascontiguousarray(getattr(self, n)) for n in names}
    save_file(arrays, pathlib.Path(path))

  @functools.cached_property
  def _centred(self) -> tuple[np.ndarray, Terms]:
    """A centre near the mean of the rows, and the terms about it."""
    centre = (self.weights @ self.means).astype(np.float32)
    return centre, terms_about(self, centre)

  def _score(self, rows, function) -> np.ndarray:
    rows, width = as_rows(rows), self.means.shape[1]
    if rows.width != width:
      raise ValueError(f"Expected rows of {width} dims, got {rows.width}.")
    centre, terms = self._centred
    found = []
    for start, x, _ in gaussian.blocks(rows, centre):
      joint, _ = log_joint(x, terms)
      gaussian.require_finite(_log_likelihood(joint), start)
      found.append(np.asarray(function(joint)))
    return np.concatenate(found)[: len(rows)]


def factors(mixture: Mixture) -> tuple[np.ndarray, np.ndarray]:
  """A [C, D, r] and L [C, r, r] of `Terms`, float64."""
  scaled = mixture.loadings / mixture.noise[:, :, None]
  inner = np.eye(mixture.rank) + mixture.loadings.mT @ scaled
  factor = np.linalg.cholesky(inner)
  return scaled @ np.linalg.inv(factor).mT, factor


def terms_about(mixture: Mixture, centre: np.ndarray) -> Terms:
  """What scores rows from which `centre` [D] was subtracted."""
  means = mixture.means - centre
  precision = np.broadcast_to(1 / mixture.noise, means.shape)
  directions, factor = factors(mixture)
  offset = np.einsum("cd,cdr->cr", means, directions)
  determinant = 2 * np.log(np.einsum("crr->cr", factor)).sum(1)
  determinant -= np.log(precision).sum(1)
  constant = np.log(mixture.weights) - 0.5 * (
    means.shape[1] * np.log(2 * np.pi)
    + determinant
    + np.sum(means**2 * precision, axis=1)
  )
  found = Terms(precision, means * precision, directions, offset, constant)
  return Terms(*(jnp.asarray(a, jnp.float32) for a in found))


@jax.jit
def log_joint(x, terms: Terms):
  """log(weight * density) [B, C] of centred rows, and A^T (x - mean)."""
  # GPUs would otherwise round the factors to TF32.
  with jax.default_matmul_precision("highest"):
    y = jnp.einsum("bd,cdr->bcr", x, terms.directions) - terms.offset
    squares = (x * x) @ terms.precision.T - 2 * x @ terms.linear.T
  return terms.constant - 0.5 * (squares - jnp.sum(y * y, axis=2)), y


@jax.jit
def _log_likelihood(joint):
  return jax.nn.logsumexp(joint, axis=1)


_most_likely = jax.jit(lloyd.first_largest)


@jax.jit
def _factors_of(x, component, terms):
  """Psi^-1 W z of one component of each row, [B, D]."""
  _, y = log_joint(x, terms)
  y = y * jax.nn.one_hot(component, y.shape[1])[:, :, None]
  # W L^-T = Psi A, and a gather of [B, D, r] would not fit.
  return jnp.einsum("bcr,cdr->bd", y, terms.directions, precision="highest")


def held_out(
  mixture: Mixture, rows, baselines: gaussian.Baselines
) -> dict[str, float]:
  """How likely rows are that the mixture was not fitted on, in nats.

  Args:
    mixture: of training rows.
    rows: [N, D] or `Rows`, others.
    baselines: of the training rows.

  Returns:
    `per_row`, the mean log-likelihood, and `per_dim`, that divided by D;
    `over_full_per_row` and `over_full_per_dim`, the same minus that of the
    Gaussian with full covariance, and `over_diagonal_...` with diagonal
    covariance. Above 0 the mixture is better.
  """
  rows = as_rows(rows)
  own, full, diagonal = (
    float(model.log_likelihood(rows).mean(dtype=np.float64))
    for model in (mixture, baselines.full, baselines.diagonal)
  )
  found = {
    "": own,
    "over_full_": own - full,
    "over_diagonal_": own - diagonal,
  }
  return {
    f"{name}per_{unit}": value / size
    for name, value in found.items()
    for unit, size in (("row", 1), ("dim", rows.width))
  }
