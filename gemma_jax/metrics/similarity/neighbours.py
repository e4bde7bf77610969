"""Nearest neighbours: are the same rows near each other in both models?"""

import numpy as np
from scipy import sparse

from gemma_jax.metrics.similarity.rows import (
  centred,
  finite,
  pair_shapes,
  unit_rows,
)

METRICS = ("cosine", "euclidean")

_BLOCK = 2**24  # products of rows that exist at once


def mutual_knn(x, y, *, k: int = 10, metric: str = "cosine") -> float:
  """Mean share of the k nearest neighbours that both models agree on.

  Huh et al. 2024, "The platonic representation hypothesis", appendix A.
  Identical rows give 1 and independent ones k / (n - 1) in the mean.

  Args:
    x: rows [n, D].
    y: rows [n, E], row i of the same item as row i of `x`.
    k: neighbours, fewer than n.
    metric: "cosine", about the origin, or "euclidean".

  Raises:
    ValueError: as `nearest_neighbours`, or shapes that do not fit.
  """
  pair_shapes(x, y)
  return neighbour_overlap(
    nearest_neighbours(x, k=k, metric=metric),
    nearest_neighbours(y, k=k, metric=metric),
  )


def nearest_neighbours(x, *, k: int = 10, metric: str = "cosine") -> np.ndarray:
  """The k nearest other rows of each row, in no order.

  Of rows equally far, any: leave duplicates out, or they decide the overlap.

  Args:
    x: rows [n, D]; n x n products never exist at once.
    k: neighbours, fewer than n.
    metric: "cosine" or "euclidean".

  Returns:
    int32 [n, k], numbers of rows.

  Raises:
    ValueError: not [n, D], n <= k, another metric, a value that is not
      finite, or a row of zeros that has no cosine.
  """
  if np.ndim(x) != 2 or not 1 <= k < len(x):
    raise ValueError(
      f"expected rows [n, D] and 1 <= k < n, got {np.shape(x)} and k = {k}"
    )
  if metric not in METRICS:
    raise ValueError(f"expected a metric of {METRICS}, got {metric!r}")
  x = finite(x, "the rows")
  if metric == "cosine":
    x = unit_rows(x, "the rows")
    squares = np.zeros(len(x))
  else:
    x = centred(x)  # or large means would cancel
    squares = np.sum(x * x, axis=1)
  found = np.empty((len(x), k), np.int32)
  size = max(1, _BLOCK // len(x))
  for start in range(0, len(x), size):
    rows = np.arange(start, min(start + size, len(x)))
    # A row's own square is the same for all that it is compared with.
    far = squares - 2 * x[rows] @ x.T
    far[rows - start, rows] = np.inf
    found[rows] = np.argpartition(far, k - 1, axis=1)[:, :k]
  return found


def neighbour_overlap(a, b) -> float:
  """Mean share of neighbours in both lists, in [0, 1].

  Args:
    a: of `nearest_neighbours`, [n, k].
    b: the same, of the other model's rows.

  Raises:
    ValueError: other shapes.
  """
  a, b = np.asarray(a), np.asarray(b)
  if a.ndim != 2 or a.shape != b.shape:
    raise ValueError(
      f"expected two lists of neighbours [n, k], got {a.shape} and {b.shape}"
    )
  n, k = a.shape
  # Pairs (row, neighbour) as numbers, each at most once in a list.
  rows = n * np.arange(n)[:, None]
  shared = np.intersect1d(rows + a, rows + b, assume_unique=True)
  return len(shared) / (n * k)


def cknna(x, y, *, k: int = 10) -> float:
  """CKA of the similarities to neighbours that both models share.

  Debiased CKA of the cosines, with those set to 0 that are not among the k
  largest of their row in both models (Huh et al. 2024, appendix A, as
  `metrics.py` of their platonic-rep computes it: kernels are then no longer
  symmetric, and a pair of rows counts in tr(K L) only where each is the
  other's neighbour). Local where CKA is global: unlike it, sensitive to the
  nearest rows alone.

  Args:
    x: rows [n, D], at least 4.
    y: rows [n, E], row i of the same item as row i of `x`.
    k: neighbours, fewer than n.

  Raises:
    ValueError: as `nearest_neighbours`, shapes that do not fit, or rows whose
      neighbours say nothing.
  """
  pair_shapes(x, y, least=4)
  kernels = [_nearest_cosines(rows, k) for rows in (x, y)]
  # Neighbours at right angles are stored and shared, too.
  near = [
    sparse.csr_array((np.ones(a.nnz), a.indices, a.indptr), shape=a.shape)
    for a in kernels
  ]
  shared = [kernel.multiply(near[0]).multiply(near[1]) for kernel in kernels]
  both = _sparse_hsic(*shared)
  own = np.array([_sparse_hsic(kernel, kernel) for kernel in kernels])
  if not (own > 0).all():
    raise ValueError(
      f"expected neighbours that say something, got HSICs {own} of x and of y "
      f"with themselves; try another k than {k}"
    )
  return float(both / np.sqrt(own[0]) / np.sqrt(own[1]))


def _nearest_cosines(x, k: int) -> sparse.csr_array:
  """Cosines [n, n] to the k nearest neighbours, 0 elsewhere."""
  near = nearest_neighbours(x, k=k)
  x = unit_rows(finite(x, "the rows"), "the rows")
  cosines = np.empty(near.shape)
  size = max(1, _BLOCK // (k * x.shape[1]))
  for start in range(0, len(x), size):
    part = slice(start, start + size)
    cosines[part] = np.einsum("nd,nkd->nk", x[part], x[near[part]])
  ends = np.arange(0, near.size + 1, k)
  return sparse.csr_array(
    (cosines.ravel(), near.ravel(), ends), shape=(len(x), len(x))
  )


def _sparse_hsic(k, l) -> float:
  """HSIC_1 (Song et al. 2012, eq. 5) of kernels [n, n] without diagonals."""
  n = k.shape[0]
  coupled = k.multiply(l.T).sum()
  sums = k.sum() * l.sum() / ((n - 1) * (n - 2))
  through = k.sum(axis=0) @ l.sum(axis=1)
  return (coupled + sums - 2 / (n - 2) * through) / (n * (n - 3))
