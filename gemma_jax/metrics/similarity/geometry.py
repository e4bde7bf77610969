"""Distances and directions: RSA, Procrustes, cosines."""

from typing import NamedTuple

import numpy as np
from scipy import linalg, stats

from gemma_jax.metrics.similarity.rows import centred, pair, unit_rows


class NoiseCeiling(NamedTuple):
  """How well a model's distances agree with themselves.

  Attributes:
    half: mean RSA between means of two random halves of the repeats.
    full: what that implies for means of all repeats, 2 r / (1 + r) (Spearman
      1910 and Brown 1910); `half` where that is not positive.
  """

  half: float
  full: float


def rsa(x, y) -> float:
  """Representational similarity: Spearman of both models' distances.

  Distances are 1 - Pearson between all pairs of rows (Kriegeskorte, Mur and
  Bandettini 2008, "Representational similarity analysis"). Uses n x n memory.

  Args:
    x: rows [n, D], at least 3 of at least 2 dims.
    y: rows [n, E], row i of the same item as row i of `x`.

  Raises:
    ValueError: shapes that do not fit, values that are not finite, a row that
      is constant over dims, or distances that all are equal.
  """
  x, y = pair(x, y, least=3)
  return _spearman(_distances(x, "x"), _distances(y, "y"))


def rsa_noise_ceiling(
  repeats, *, splits: int = 20, seed: int = 0
) -> NoiseCeiling:
  """RSA of one model with itself over repeats, such as paraphrases.

  An RSA with another model can hardly be larger.

  Args:
    repeats: rows [R, n, D], the same n items in each, at least 2 repeats.
    splits: random halvings of the repeats.
    seed: of the halvings.

  Raises:
    ValueError: not [R, n, D] with R >= 2, no splits, or as `rsa`.
  """
  repeats = np.asarray(repeats)
  if repeats.ndim != 3 or len(repeats) < 2 or splits < 1:
    raise ValueError(
      "expected repeats [R, n, D] with R >= 2 and at least 1 split, got "
      f"{repeats.shape} and {splits}"
    )
  rng = np.random.default_rng(seed)
  found = []
  for _ in range(splits):
    halves = np.array_split(rng.permutation(len(repeats)), 2)
    found.append(rsa(*(repeats[h].mean(0, dtype=np.float64) for h in halves)))
  half = float(np.mean(found))
  return NoiseCeiling(half, 2 * half / (1 + half) if half > 0 else half)


def procrustes_distance(x, y) -> float:
  """Squared distance after the best rotation, in [0, 2]; 0 is the same.

  |X|^2 + |Y|^2 - 2 |X^T Y|_* of centred rows scaled to Frobenius norm 1
  (Ding, Denain and Steinhardt 2021, "Grounding representation similarity with
  statistical testing"). The narrower side counts as padded with
  zeros, which changes no singular value.

  Args:
    x: rows [n, D].
    y: rows [n, E], row i of the same item as row i of `x`.

  Raises:
    ValueError: shapes that do not fit, values that are not finite, or rows
      that all are alike.
  """
  found = []
  for name, rows in zip("xy", pair(x, y), strict=True):
    away = centred(rows)
    norm = np.linalg.norm(away)
    if not norm:
      raise ValueError(
        f"expected rows that differ, got {len(rows)} alike in {name}"
      )
    found.append(_few_dims(away / norm))
  nuclear = linalg.svdvals(found[0].T @ found[1]).sum()
  return float(np.clip(2 - 2 * nuclear, 0, 2))


def cosine(x, y) -> float:
  """Mean cosine of rows, in [-1, 1].

  Means that all rows share can make it large: see the same for rows paired at
  random.

  Args:
    x: rows [n, D].
    y: rows [n, D] in the same coordinates.

  Raises:
    ValueError: other widths, values that are not finite, or a row of zeros.
  """
  x, y = pair(x, y, least=1)
  if x.shape != y.shape:
    raise ValueError(
      f"expected rows of one width, got {x.shape[1]} and {y.shape[1]}: cosines "
      "need the same coordinates. Compare with linear_cka, or fit a map from "
      "one to the other first and compare on other rows"
    )
  products = np.sum(unit_rows(x, "x") * unit_rows(y, "y"), axis=1)
  return float(products.mean())


def _distances(x: np.ndarray, name: str) -> np.ndarray:
  """1 - Pearson of all pairs of rows [n (n - 1) / 2]."""
  constant = np.flatnonzero(np.ptp(x, axis=1) == 0)
  if len(constant):
    raise ValueError(
      f"row {constant[0]} of {name} is constant over its {x.shape[1]} dims and "
      "has no correlation; leave such rows out of x and y"
    )
  x = unit_rows(x - x.mean(1, keepdims=True), name)
  return 1 - (x @ x.T)[np.triu_indices(len(x), 1)]


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
  # Distances are of order 1: what differs by less is rounding.
  if min(np.ptp(a), np.ptp(b)) < 1e-12:
    raise ValueError(
      "expected distances that differ, got all the same in one model; take "
      "more rows"
    )
  # SciPy's own also works out a p that pairs of rows do not have.
  return float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])


def _few_dims(x: np.ndarray) -> np.ndarray:
  """Rows [n, D] rotated into no more than n dims."""
  if x.shape[1] <= len(x):
    return x
  return linalg.qr(x.T, mode="r")[0][: len(x)].T
