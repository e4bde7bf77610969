"""Correlations of the latents of two dictionaries, over tokens in batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse

_BLOCK = 4096  # tokens that are dense at once


@dataclasses.dataclass(frozen=True, eq=False)
class PairwiseCorrelation:
  """Correlations of all latents of a with all of b.

  Attributes:
    pearson: float64 [M, N]; 0 where a latent never changes.
    fired_a: int64 [M], tokens on which each latent is not 0.
    fired_b: int64 [N].
    together: int64 [M, N], tokens on which neither is 0.
    count: tokens.
  """

  pearson: np.ndarray
  fired_a: np.ndarray
  fired_b: np.ndarray
  together: np.ndarray
  count: int


class Correlations:
  """Pearson correlations of latents whose codes come in batches.

  Keeps two numbers a pair of latents, 1 GiB for 8,192 of each, and a batch
  passes over all of them: give it thousands of tokens at a time. Sparse
  products are float64. Dense ones are float32 on the device, about the means
  of a block, so that an offset costs nothing, and some 1e-6 off; their sums
  are float64.
  """

  def __init__(self):
    self._count = 0
    self._sums = None  # of a and b each, [3, M]: values, squares, firings
    self._cross = None  # of products, float64 [M, N]
    self._together = None  # int64 [M, N]

  def update(self, codes_a, codes_b) -> "Correlations":
    """Adds tokens.

    Args:
      codes_a: [n, M], dense or SciPy sparse.
      codes_b: [n, N] of the same tokens; dense unless both are sparse.

    Raises:
      ValueError: shapes that do not fit, other widths than before, or values
        that are not finite.
    """
    shapes = np.shape(codes_a), np.shape(codes_b)
    if {len(s) for s in shapes} != {2} or shapes[0][0] != shapes[1][0]:
      raise ValueError(
        "expected codes [n, M] and [n, N] of the same tokens, got "
        f"{shapes[0]} and {shapes[1]}; pair the tokens first"
      )
    widths = shapes[0][1], shapes[1][1]
    if self._cross is None:
      self._sums = [np.zeros((3, width)) for width in widths]
      self._cross = np.zeros(widths)
      self._together = np.zeros(widths, np.int64)
    if self._cross.shape != widths:
      raise ValueError(
        f"expected {self._cross.shape} latents as before, got {widths}; give "
        "each pair of dictionaries Correlations of its own"
      )
    both = codes_a, codes_b = [
      sparse.csr_array(codes) if sparse.issparse(codes) else codes
      for codes in (codes_a, codes_b)
    ]
    if all(map(sparse.issparse, both)):
      self._add(*map(_compact, both), _sparse_products)
    else:
      for start in range(0, shapes[0][0], _BLOCK):
        part = slice(start, start + _BLOCK)
        self._add(_dense(codes_a[part]), _dense(codes_b[part]), _products)
    return self

  def compute(self) -> PairwiseCorrelation:
    """The correlations of all tokens so far.

    Raises:
      ValueError: fewer than two tokens.
    """
    n = self._count
    if n < 2:
      raise ValueError(f"expected at least 2 tokens, got {n}")
    (sum_a, _, fired_a), (sum_b, _, fired_b) = self._sums
    pearson = self._cross - np.outer(sum_a / n, sum_b)
    scale = np.outer(*(_deviation(sums, n) for sums in self._sums))
    np.divide(pearson, scale, out=pearson, where=scale > 0)
    pearson[scale == 0] = 0
    return PairwiseCorrelation(
      np.clip(pearson, -1, 1, out=pearson),
      fired_a.astype(np.int64),
      fired_b.astype(np.int64),
      self._together.copy(),
      n,
    )

  def _add(self, a, b, products) -> None:
    for sums, codes in zip(self._sums, (a, b), strict=True):
      fired = (codes != 0).sum(axis=0)
      sums += codes.sum(axis=0), (codes * codes).sum(axis=0), fired
    cross, together = products(a, b)
    self._cross += cross
    self._together += together
    self._count += a.shape[0]


def _deviation(sums: np.ndarray, n: int) -> np.ndarray:
  """Roots of the sums of squares about the mean; 0 of what rounding leaves."""
  total, square, _ = sums
  about = square - total * total / n
  return np.sqrt(np.where(about > 1e-12 * square, about, 0))


def _dense(codes) -> np.ndarray:
  if sparse.issparse(codes):
    codes = codes.toarray()
  return _finite(np.asarray(codes, np.float64))


def _compact(codes: sparse.csr_array) -> sparse.csr_array:
  """A copy that holds every value once, and no zeros."""
  codes = sparse.csr_array(codes, dtype=np.float64, copy=True)
  codes.sum_duplicates()
  codes.eliminate_zeros()
  _finite(codes.data)
  return codes


def _finite(values: np.ndarray) -> np.ndarray:
  bad = np.sum(~np.isfinite(values))
  if bad:
    raise ValueError(
      f"expected finite codes, got {bad} others; leave those tokens out of a "
      "and b"
    )
  return values


def _sparse_products(a: sparse.csr_array, b: sparse.csr_array):
  fired = [
    sparse.csr_array((np.ones(c.nnz, np.int64), c.indices, c.indptr), c.shape)
    for c in (a, b)
  ]
  return (a.T @ b).toarray(), (fired[0].T @ fired[1]).toarray()


def _products(a: np.ndarray, b: np.ndarray):
  n, means = len(a), [codes.mean(axis=0) for codes in (a, b)]
  # Programs for few numbers of rows; rows of zeros add nothing.
  more = (1 << (n - 1).bit_length()) - n
  inputs = [
    np.pad(x.astype(np.float32), ((0, more), (0, 0)))
    for x in (a - means[0], b - means[1], a != 0, b != 0)
  ]
  cross, together = _multiply(*inputs)
  cross = np.asarray(cross, np.float64) + n * np.outer(*means)
  return cross, np.asarray(together).astype(np.int64)


@jax.jit
def _multiply(a, b, fired_a, fired_b):
  # At lower precision a GPU rounds the factors to 10 bits; ones are exact.
  cross = jnp.matmul(a.T, b, precision=jax.lax.Precision.HIGHEST)
  return cross, fired_a.T @ fired_b
