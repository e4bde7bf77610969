"""Affine maps from one model's activations to another's, in closed form.

A map that is more than a table of numbers must beat these on other documents
than those that they were fitted on, and these must beat the lookups.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import linalg

from gemma_jax.alignment.moments import Moments

# Penalties that are tried, times the mean eigenvalue of X^T X.
ALPHAS = np.logspace(-8, 4, 37)

_SINGULAR = 1e-12  # share of the largest eigenvalue that is none
# The same where whitening divides by it: products are float32.
_UNWHITENABLE = 1e-7
_ROUNDING = 1e-9  # share of a sum of squares that is left of none


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Map:
  """y = x @ weights + bias.

  Attributes:
    weights: float32 [D, E].
    bias: float32 [E].
    about: numbers that the fit chose or was given, and `rows`.
    name: of the method.
    parameters: numbers that it takes to store the map.
  """

  weights: jax.Array
  bias: jax.Array
  about: dict
  name: str = dataclasses.field(metadata={"static": True})
  parameters: int = dataclasses.field(metadata={"static": True})

  def __call__(self, x) -> jax.Array:
    """[..., D] -> float32 [..., E]."""
    x = jnp.asarray(x, jnp.float32)
    # GPUs would otherwise round the factors to TF32.
    return jnp.matmul(x, self.weights, precision="highest") + self.bias


def fit_mean(x, y=None) -> Map:
  """The mean of y, whatever x is: what every other map must beat.

  Args:
    x: rows [n, D], or the `Moments` of both sides.
    y: rows [n, E], row i of the same item as row i of `x`.

  Raises:
    ValueError: shapes that do not fit, no rows, or values that are not finite.
  """
  m = _moments(x, y)
  width, out = m.widths
  return _map("mean", m, np.zeros((width, out)), {}, out)


def fit_procrustes(x, y=None, *, scaled: bool = False) -> Map:
  """The rotation, reflections included, that brings centred x nearest to y.

  R = U V^T, of the singular value decomposition U S V^T of the centred X^T Y
  (Schonemann 1966, "A generalized solution of the orthogonal Procrustes
  problem"), is the orthogonal matrix of least |X R - Y|. For D < E its rows
  are orthonormal and the same holds. For D > E its columns are: it maximises
  the sum of products of X R with Y, and is a part of the rotation of least
  |X R - Y| with Y padded by zeros.

  Args:
    x: rows [n, D], or the `Moments` of both sides.
    y: rows [n, E], row i of the same item as row i of `x`.
    scaled: whether R has a factor, that of least squares.

  Raises:
    ValueError: as `fit_mean`, fewer than D + 1 rows, or no covariance.
  """
  m = _moments(x, y)
  width, out = m.widths
  _check_determined(m, width + 1)
  left, singular, right = linalg.svd(m.xy, full_matrices=False)
  if not singular.any():
    raise ValueError(
      "expected x and y that vary together, got no covariance at all: every "
      "rotation is as good. Use fit_mean"
    )
  rotation, about = left @ right, {}
  if scaled:
    turned = np.sum((m.xx @ rotation) * rotation)
    about["scale"] = float(singular.sum() / turned)
    rotation *= about["scale"]
  return _map("procrustes", m, rotation, about, width * out + out + scaled)


def fit_ridge(
  x,
  y=None,
  *,
  alpha: float | None = None,
  alphas: Sequence[float] | None = None,
) -> Map:
  """Least |Y - X W - b|^2 + alpha |W|^2, b free of the penalty.

  Without `alpha` it is the one of least generalised cross-validation error,

    GCV(alpha) = n RSS(alpha) / (n - 1 - sum_i l_i / (l_i + alpha))^2,

  with the centred X^T X = V diag(l) V^T (Golub, Heath and Wahba 1979,
  "Generalized cross-validation as a method for choosing a good ridge
  parameter"; the 1 is the intercept). With q_i = |(V^T X^T Y)_i|^2 the
  residuals follow from moments alone,

    RSS(alpha) = |Y|^2 - sum_i q_i (l_i + 2 alpha) / (l_i + alpha)^2.

  All dims of y share one alpha, and those of large variance decide. Rows count
  as independent; tokens of one document are less, so that the choice is on
  the small side.

  Args:
    x: rows [n, D], or the `Moments` of both sides.
    y: rows [n, E], row i of the same item as row i of `x`.
    alpha: penalty on sums over rows, as scikit-learn's; None chooses.
    alphas: to choose from; None takes `ALPHAS` times the mean eigenvalue.

  Returns:
    A map whose `about` has `alpha`, and `freedom`, the effective number of
    directions of x that it reads: sum_i l_i / (l_i + alpha).

  Raises:
    ValueError: as `fit_mean`, a penalty that is negative, or none at all with
      fewer than D + 1 rows.
  """
  m = _moments(x, y)
  spectrum, alpha = _ridge(m, alpha, alphas)
  width, out = m.widths
  about = {"alpha": alpha, "freedom": spectrum.freedom(alpha)}
  weights = spectrum.solve(alpha)
  return _map("ridge", m, weights, about, width * out + out)


def fit_reduced_rank(
  x, y=None, rank: int | None = None, *, alpha: float | None = None
) -> Map:
  """Ridge regression through a bottleneck of `rank` dims.

  Of all W of that rank, the one of least |Y - X W - b|^2 + alpha |W|^2: the
  ridge map projected onto the first principal directions of its own fit
  (Mukherjee and Zhu 2011, "Reduced rank ridge regression and its kernel
  extensions", with the penalty as rows of X; Izenman 1975 without).

  Args:
    x: rows [n, D], or the `Moments` of both sides.
    y: rows [n, E], row i of the same item as row i of `x`.
    rank: 1 to min(D, E); None is the largest, and the ridge map.
    alpha: as in `fit_ridge`; None chooses as there, at full rank.

  Raises:
    ValueError: as `fit_ridge`, or a rank out of range.
  """
  m = _moments(x, y)
  rank = _checked_rank(m, rank)
  spectrum, alpha = _ridge(m, alpha, None)
  # Of the fit with the penalty as rows of X: its Gram matrix is half^T half.
  half = np.sqrt(spectrum.inverse(alpha))[:, None] * spectrum.projected
  top = linalg.svd(half, full_matrices=False)[2][:rank]
  weights = spectrum.solve(alpha) @ top.T @ top
  about = {"alpha": alpha, "rank": rank}
  return _map("reduced_rank", m, weights, about, _factors(m, rank))


def fit_cca(
  x, y=None, rank: int | None = None, *, shrinkage: float = 0.0
) -> Map:
  """Least squares from the first canonical directions of x.

  These are what x and y have most in common whatever the variance that it
  carries (Hotelling 1936, "Relations between two sets of variates"), whereas
  `fit_reduced_rank` keeps what explains most variance of y.

  Args:
    x: rows [n, D], or the `Moments` of both sides, `full`.
    y: rows [n, E], row i of the same item as row i of `x`.
    rank: 1 to min(D, E); None is the largest.
    shrinkage: added to both covariances before whitening, as a share of each
      dim's variance.

  Returns:
    A map whose `about` has the canonical `correlations`, float64 [rank]; with
    shrinkage they are smaller than those of the rows.

  Raises:
    ValueError: as `fit_mean`, a rank out of range, or without shrinkage fewer
      than D + E + 1 rows, with which all correlations are 1.
  """
  m = _moments(x, y, full=True)
  rank = _checked_rank(m, rank)
  if not 0 <= shrinkage < np.inf:
    raise ValueError(f"expected a shrinkage of 0 or more, got {shrinkage}")
  if not shrinkage:
    _check_determined(m, sum(m.widths) + 1)
  xy = m.xy
  white_x, white_y = _whitening(m.xx, shrinkage), _whitening(m.yy, shrinkage)
  turn, correlations, _ = linalg.svd(
    white_x.T @ xy @ white_y, full_matrices=False
  )
  directions = white_x @ turn[:, :rank]
  # Constant dims leave fewer directions than there are dims.
  found = np.zeros(rank)
  found[: len(correlations)] = np.minimum(correlations[:rank], 1)
  about = {"rank": rank, "shrinkage": shrinkage, "correlations": found}
  weights = directions @ (directions.T @ xy)
  return _map("cca", m, weights, about, _factors(m, rank))


class _Spectrum(NamedTuple):
  """X^T X in its eigenbasis, and X^T Y there."""

  values: np.ndarray  # [D], 0 where there is no variance
  vectors: np.ndarray  # [D, D]
  projected: np.ndarray  # [D, E], 0 there too

  def inverse(self, alpha: float) -> np.ndarray:
    out = np.zeros_like(self.values)
    there = self.values > 0
    out[there] = 1 / (self.values[there] + alpha)
    return out

  def freedom(self, alpha: float) -> float:
    return float(self.values @ self.inverse(alpha))

  def solve(self, alpha: float) -> np.ndarray:
    return self.vectors @ (self.inverse(alpha)[:, None] * self.projected)


def _ridge(m: Moments, alpha, alphas) -> tuple[_Spectrum, float]:
  given = [a for a in (alpha, alphas) if a is not None]
  grid = np.atleast_1d(np.asarray(given[0], np.float64)) if given else None
  if len(given) > 1 or (
    given and not (grid.size and np.all((grid >= 0) & (grid < np.inf)))
  ):
    raise ValueError(
      f"expected one penalty alpha >= 0, or alphas to choose from, got "
      f"alpha={alpha} and alphas={alphas}"
    )
  _check_determined(m, m.widths[0] + 1 if given and 0 in grid else 2)
  values, vectors = linalg.eigh(m.xx)
  # Of n centred rows, n - 1 directions vary: what else there is, is rounding.
  values[: max(len(values) - m.count + 1, 0)] = 0
  values[values <= _SINGULAR * values[-1]] = 0
  projected = vectors.T @ m.xy
  projected[values == 0] = 0
  spectrum = _Spectrum(values, vectors, projected)
  if alpha is not None:
    return spectrum, float(alpha)
  if alphas is None:
    grid = ALPHAS * values.mean()
  return spectrum, _least_gcv(spectrum, m, grid)


def _least_gcv(spectrum: _Spectrum, m: Moments, alphas: np.ndarray) -> float:
  there = spectrum.values > 0
  values = spectrum.values[there]
  squares = np.sum(spectrum.projected[there] ** 2, axis=1)
  total = m.squares_y.sum()
  errors = []
  for alpha in alphas:
    left = alpha / (values + alpha)
    freedom = m.count - 1 - len(values) + left.sum()
    if len(values) == m.count - 1:
      # Rows that alpha = 0 would interpolate: the same sum without what
      # cancels, as |Y|^2 = sum_i q_i / l_i.
      residual = np.sum(squares / values * left**2)
    else:
      seen = (values + 2 * alpha) / (values + alpha) ** 2
      residual = max(total - squares @ seen, _ROUNDING * total)
    errors.append(residual / freedom**2 if freedom > 0 else np.inf)
  return float(alphas[int(np.argmin(errors))])


def _whitening(squares: np.ndarray, shrinkage: float) -> np.ndarray:
  """W [D, r] with W^T (squares + shrinkage) W = I, of the r dims that vary."""
  # Canonical directions do not depend on the scale of a dim; rounding does.
  squared = squares.diagonal()
  varies = squared > _SINGULAR * squared.max()
  scale = np.zeros_like(squared)
  scale[varies] = 1 / np.sqrt(squared[varies])
  values, vectors = linalg.eigh(squares * scale * scale[:, None])
  kept = values > _UNWHITENABLE * values[-1]
  white = vectors[:, kept] / np.sqrt(values[kept] + shrinkage)
  return scale[:, None] * white


def _moments(x, y, *, full: bool = False) -> Moments:
  if not isinstance(x, Moments):
    return Moments(full=full).update(x, y)
  if y is not None:
    raise ValueError("expected Moments alone, or x and y, got Moments and y")
  return x


def _check_determined(m: Moments, least: int) -> None:
  if m.count < least:
    raise ValueError(
      f"expected at least {least} rows, got {m.count} of widths {m.widths}: "
      "fewer fit anything. Take more rows, or use fit_ridge with a penalty"
    )


def _checked_rank(m: Moments, rank: int | None) -> int:
  most = min(m.widths)
  if rank is None:
    return most
  if not 1 <= rank <= most:
    raise ValueError(
      f"expected a rank of 1 to {most}, the narrower side of {m.widths}, got "
      f"{rank}"
    )
  return int(rank)


def _factors(m: Moments, rank: int) -> int:
  """Numbers of the shorter of two ways to store weights of that rank."""
  width, out = m.widths
  return min(rank * (width + out), width * out) + out


def _map(name, m: Moments, weights, about: dict, parameters: int) -> Map:
  bias = m.mean_y - m.mean_x @ weights
  return Map(
    jnp.asarray(weights, jnp.float32),
    jnp.asarray(bias, jnp.float32),
    {"rows": m.count} | about,
    name,
    parameters,
  )
