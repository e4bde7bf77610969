"""Canonical correlations: what linear maps of both models have in common.

With as many directions as rows any two models correlate perfectly; hence the
least number of rows for each direction.
"""

import numpy as np
from scipy import linalg

from gemma_jax.metrics.similarity.rows import centred, pair

_ROWS_PER_DIRECTION = 10


def canonical_correlations(
  x, y, *, rows_per_direction: float = _ROWS_PER_DIRECTION
) -> np.ndarray:
  """Correlations of the canonical pairs, from the largest down.

  Singular values of Q_x^T Q_y, with Q orthonormal bases of the centred columns
  (Bjorck and Golub 1973, "Numerical methods for computing angles between
  linear subspaces"). Invertible linear maps of either side change nothing.

  Args:
    x: rows [n, D].
    y: rows [n, E], row i of the same item as row i of `x`.
    rows_per_direction: least n / (p + q), of ranks p and q.

  Returns:
    float64 [min(p, q)].

  Raises:
    ValueError: shapes that do not fit, values that are not finite, rows that
      all are alike, or too few rows.
  """
  return _correlate(x, y, 1.0, rows_per_direction)[0]


def svcca(
  x,
  y,
  *,
  variance: float = 0.99,
  rows_per_direction: float = _ROWS_PER_DIRECTION,
) -> float:
  """Mean canonical correlation of the directions of largest variance.

  Raghu et al. 2017, "SVCCA: singular vector canonical correlation analysis".

  Args:
    x: rows [n, D].
    y: rows [n, E], row i of the same item as row i of `x`.
    variance: share of each side's that its first singular directions keep.
    rows_per_direction: least n / (p + q), of p and q directions kept.

  Raises:
    ValueError: as `canonical_correlations`, or no share in (0, 1].
  """
  if not 0 < variance <= 1:
    raise ValueError(f"expected a share of variance in (0, 1], got {variance}")
  return float(_correlate(x, y, variance, rows_per_direction)[0].mean())


def pwcca(x, y, *, rows_per_direction: float = _ROWS_PER_DIRECTION) -> float:
  """Canonical correlations, weighted by how much of x each direction carries.

  Weights sum_j |<h_i, x_j>| over columns x_j, with h_i the canonical variates
  of x (Morcos et al. 2018, "Insights on representational similarity in neural
  networks with canonical correlation"). Not symmetric: invertible
  maps of y change nothing, those of x the weights.

  Args:
    x: rows [n, D].
    y: rows [n, E], row i of the same item as row i of `x`.
    rows_per_direction: least n / (p + q), of ranks p and q.

  Raises:
    ValueError: as `canonical_correlations`.
  """
  correlations, variates, x = _correlate(x, y, 1.0, rows_per_direction)
  weights = np.abs(variates.T @ x).sum(1)
  return float(weights @ correlations / weights.sum())


def _correlate(x, y, variance: float, rows_per_direction: float):
  """Correlations [r], variates of x [n, r] and x centred, [n, D]."""
  x, y = (centred(rows) for rows in pair(x, y))
  left, right = _basis(x, variance, "x"), _basis(y, variance, "y")
  kept = left.shape[1] + right.shape[1]
  if len(x) < rows_per_direction * kept:
    raise ValueError(
      f"expected at least {rows_per_direction:g} rows for each of the "
      f"{left.shape[1]} + {right.shape[1]} directions, got {len(x)} rows: "
      "correlations of so few are large whatever the models do. Take more "
      "rows, project onto fewer dims first, or lower rows_per_direction"
    )
  turn, correlations, _ = linalg.svd(left.T @ right, full_matrices=False)
  # Rounding takes equal directions above 1.
  return np.minimum(correlations, 1), left @ turn, x


def _basis(x: np.ndarray, variance: float, name: str) -> np.ndarray:
  """Orthonormal columns [n, p] with that share of the variance."""
  u, s, _ = linalg.svd(x, full_matrices=False)
  rank = np.sum(s > s[0] * max(x.shape) * np.finfo(np.float64).eps)
  if not rank:
    raise ValueError(f"expected rows that differ, got {len(x)} alike in {name}")
  shares = np.cumsum(s**2) / np.sum(s**2)
  # Rounding must not cost a direction where the share is met exactly.
  enough = np.searchsorted(shares, variance - 1e-12) + 1
  return u[:, : rank if variance == 1 else min(enough, rank)]
