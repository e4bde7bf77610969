"""Centred kernel alignment: do the same rows lie close in both models?

Everything comes from three sums over rows about their mean. With K and L the
Gram matrices of centred rows, k_ii and l_ii their diagonals,

  HSIC_1 = [sum_ij k_ij l_ij - n / (n - 2) sum_i k_ii l_ii
            + tr K tr L / ((n - 1) (n - 2))] / (n (n - 3)),

which is eq. 5 of Song et al. 2012, "Feature selection via dependence
maximization" (JMLR 13): HSIC_1 does not change when rows are shifted, and of
centred rows the sums of K's rows without the diagonal are -k_ii. Only the
first sum couples rows, and it is also |X^T Y|_F^2.
"""

import logging
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from gemma_jax.metrics.reconstruction import pilot
from gemma_jax.metrics.similarity.rows import (
  centred,
  finite,
  pair,
  pair_shapes,
)

log = logging.getLogger("gemma_jax")

_BLOCK = 4096  # rows that are float64 at once
_MASSIVE = 0.5  # share of the squared norm in one row that is warned of


def linear_cka(x, y, *, debiased: bool = True) -> float:
  """Linear CKA, 1 for rows that agree up to rotation and isotropic scale.

  |X^T Y|_F^2 / (|X^T X|_F |Y^T Y|_F) of centred columns (Kornblith et al.
  2019, "Similarity of neural network representations revisited"). Of
  independent Gaussian rows that is near d / (n + d), not 0; debiased, it is
  the same ratio of HSIC_1 (Song et al. 2012, eq. 5; Nguyen et al. 2021, "Do
  wide and deep networks learn the same things?"), near 0 for
  independent rows and sometimes below.

  Uses n x n memory for n < D + E rows and (D + E)^2 from there on. A row that
  carries most of the norm decides the result and is warned of in the log.

  Args:
    x: rows [n, D].
    y: rows [n, E], row i of the same item as row i of `x`.
    debiased: whether HSIC_1 is used.

  Raises:
    ValueError: shapes that do not fit, too few rows (4, biased 2), values
      that are not finite, or rows that all are alike.
  """
  n = pair_shapes(x, y, least=4 if debiased else 2)
  if n >= np.shape(x)[1] + np.shape(y)[1]:
    return StreamedCKA().update(x, y).compute(debiased=debiased)
  x, y = (centred(rows) for rows in pair(x, y))
  _warn_massive(x, "x")
  _warn_massive(y, "y")
  return _ratio(_hsic(*_gram_sums(x @ x.T, y @ y.T), debiased))


def kernel_cka(k, l, *, debiased: bool = True) -> float:
  """CKA of two kernels, `linear_cka` for k = x x^T and l = y y^T.

  Args:
    k: symmetric, [n, n].
    l: symmetric, [n, n], of the same rows.
    debiased: as in `linear_cka`.

  Raises:
    ValueError: as `linear_cka`, or kernels that are not square.
  """
  n = pair_shapes(k, l, least=4 if debiased else 2)
  if not np.shape(k) == np.shape(l) == (n, n):
    raise ValueError(
      f"expected two kernels [n, n], got {np.shape(k)} and {np.shape(l)}; of "
      "rows, take linear_cka"
    )
  k, l = (_doubly_centred(rows) for rows in pair(k, l))
  return _ratio(_hsic(*_gram_sums(k, l), debiased))


def minibatch_cka(batches: Iterable[tuple]) -> float:
  """Debiased CKA with each HSIC_1 averaged over batches before the ratio.

  Nguyen et al. 2021. Compares rows within batches only; where (D +
  E)^2 numbers fit, `StreamedCKA` compares all.

  Args:
    batches: pairs of x [b, D] and y [b, E], at least 4 rows each; they count
      alike.

  Raises:
    ValueError: as `linear_cka`, or no batch.
  """
  total, count = np.zeros((2, 2)), 0
  for x, y in batches:
    n = pair_shapes(x, y, least=4)
    x, y = (centred(rows) for rows in pair(x, y))
    if n < x.shape[1] + y.shape[1]:
      sums = _gram_sums(x @ x.T, y @ y.T)
    else:
      sums = _feature_sums(_sums(x, y), x.shape[1])
    total += _hsic(*sums, True)
    count += 1
  if not count:
    raise ValueError("expected at least one batch of rows, got none")
  return _ratio(total / count)


class StreamedCKA:
  """Linear CKA of rows that come in batches: all of them, not of batches.

  Sums are about the running mean, so that an offset costs no precision. Keeps
  (D + E)^2 numbers and one block of rows; each batch passes over all of these,
  so give it thousands of rows at a time.
  """

  def __init__(self):
    self._total: _Sums | None = None
    self._widths: tuple[int, int] | None = None
    # Of x and y each: the farthest row, its number and squared distance.
    self._farthest = [(0.0, 0, None), (0.0, 0, None)]

  @property
  def count(self) -> int:
    """Rows so far."""
    return self._total.count if self._total else 0

  def update(self, x, y) -> "StreamedCKA":
    """Adds rows.

    Args:
      x: [n, D].
      y: [n, E], row i of the same item as row i of `x`.

    Raises:
      ValueError: shapes that do not fit, another width than before, or values
        that are not finite.
    """
    n = pair_shapes(x, y, least=0)
    widths = np.shape(x)[1], np.shape(y)[1]
    if self._widths not in (None, widths):
      raise ValueError(
        f"expected rows of widths {self._widths} as before, got {widths}; give "
        "each pair of sites a StreamedCKA of its own"
      )
    self._widths = widths
    for start in range(0, n, _BLOCK):
      part = slice(start, start + _BLOCK)
      # Slices first: a store that reads on demand is never whole in memory.
      block = finite(x[part], "x", start), finite(y[part], "y", start)
      sums = _sums(*block)
      before = self.count
      if self._total is None:
        self._total = sums
      else:
        self._total = _together(self._total, sums, widths[0])
      self._remember_farthest(block, before)
    return self

  def compute(self, *, debiased: bool = True) -> float:
    """CKA of all rows so far, as `linear_cka` of them at once.

    Raises:
      ValueError: too few rows (4, biased 2), or rows that all are alike.
    """
    least = 4 if debiased else 2
    if self.count < least:
      raise ValueError(f"expected at least {least} rows, got {self.count}")
    split = self._widths[0]
    for name, mean, total, (_, number, row) in zip(
      ("x", "y"),
      np.split(self._total.mean, [split]),
      self._total.total,
      self._farthest,
      strict=True,
    ):
      if row is not None:
        _warn_share(np.sum((row - mean) ** 2), total, number, name)
    return _ratio(_hsic(*_feature_sums(self._total, split), debiased))

  def _remember_farthest(self, block, before: int) -> None:
    means = np.split(self._total.mean, [self._widths[0]])
    for i, (rows, mean) in enumerate(zip(block, means, strict=True)):
      squares = np.sum((rows - mean) ** 2, axis=1)
      at = int(squares.argmax())
      if squares[at] > self._farthest[i][0]:
        self._farthest[i] = squares[at], before + at, rows[at].copy()


class _Sums(NamedTuple):
  """Sums over rows z = (x, y), [P], about their mean.

  With q = (|x|^2, |y|^2) of each row.
  """

  count: int
  mean: np.ndarray  # [P]
  outer: np.ndarray  # of z z^T, [P, P]
  cross: np.ndarray  # of q z^T, [2, P]
  square: np.ndarray  # of q q^T, [2, 2]
  total: np.ndarray  # of q, [2]


def _sums(x: np.ndarray, y: np.ndarray) -> _Sums:
  z = np.concatenate([x, y], axis=1)
  mean = pilot(z)
  away = z - mean
  q = np.add.reduceat(away * away, [0, x.shape[1]], axis=1)
  return _Sums(len(z), mean, away.T @ away, q.T @ away, q.T @ q, q.sum(0))


def _together(a: _Sums, b: _Sums, split: int) -> _Sums:
  """Sums of two sets of rows, about the mean of both.

  As Chan, Golub and LeVeque 1983 ("Algorithms for computing the sample
  variance") move second moments, with those of q moved likewise.
  """
  n = a.count + b.count
  apart = b.mean - a.mean
  cross, square, total = (
    p + q
    for p, q in zip(
      _moved(a, apart * (b.count / n), split),
      _moved(b, apart * (-a.count / n), split),
      strict=True,
    )
  )
  outer = a.outer  # in place: of [P, P] numbers one array less
  outer += b.outer
  outer += np.outer(apart * (a.count * b.count / n), apart)
  mean = a.mean + apart * (b.count / n)
  return _Sums(n, mean, outer, cross, square, total)


def _moved(s: _Sums, by: np.ndarray, split: int):
  """Cross, square and total about the mean plus `by`, [P].

  There z is z - by, and q is q - 2 B^T z + e; sums of z alone are 0.
  """
  b = np.zeros((len(by), 2))
  b[:split, 0], b[split:, 1] = by[:split], by[split:]
  e = np.sum(b * b, axis=0)
  seen = s.outer @ b
  cross = s.cross - np.outer(s.total + s.count * e, by) - 2 * seen.T
  mixed = np.outer(s.total, e) - 2 * s.cross @ b
  square = s.square + mixed + mixed.T + 4 * b.T @ seen
  square += s.count * np.outer(e, e)
  return cross, square, s.total + s.count * e


def _feature_sums(s: _Sums, split: int):
  """What `_hsic` takes, from sums over rows."""
  xx, xy, yy = (
    np.linalg.norm(part) ** 2
    for part in (
      s.outer[:split, :split],
      s.outer[:split, split:],
      s.outer[split:, split:],
    )
  )
  return s.count, np.array([[xx, xy], [xy, yy]]), s.square, s.total


def _gram_sums(k: np.ndarray, l: np.ndarray):
  """What `_hsic` takes, from Gram matrices of centred rows."""
  kk, kl, ll = np.vdot(k, k), np.vdot(k, l), np.vdot(l, l)
  q = np.stack([k.diagonal(), l.diagonal()])
  return len(k), np.array([[kk, kl], [kl, ll]]), q @ q.T, q.sum(1)


def _hsic(n: int, products, square, total, debiased: bool) -> np.ndarray:
  """HSIC of (K, K), (K, L); (L, K), (L, L), [2, 2]: see the file's head."""
  if not debiased:
    return products / (n - 1) ** 2
  found = products - n / (n - 2) * square
  found += np.outer(total, total) / ((n - 1) * (n - 2))
  # What rounding leaves where everything cancels is no similarity.
  scale = np.sqrt(products.diagonal())
  found[np.abs(found) < 1e-12 * np.outer(scale, scale)] = 0
  return found / (n * (n - 3))


def _ratio(hsic: np.ndarray) -> float:
  """CKA from the HSICs of `_hsic`."""
  own = hsic.diagonal()
  if not (own > 0).all():
    raise ValueError(
      f"expected rows that differ, got HSICs {own} of x and of y with "
      "themselves; at 0 there is nothing to compare"
    )
  return float(hsic[0, 1] / np.sqrt(own[0]) / np.sqrt(own[1]))


def _doubly_centred(k: np.ndarray) -> np.ndarray:
  k = k - k.mean(0)
  return k - k.mean(1, keepdims=True)


def _warn_massive(x: np.ndarray, name: str) -> None:
  squares = np.sum(x * x, axis=1)
  at = int(squares.argmax())
  _warn_share(squares[at], squares.sum(), at, name)


def _warn_share(square: float, total: float, number: int, name: str) -> None:
  if square > _MASSIVE * total:
    log.warning(
      "Row %d of %s carries %.0f%% of the squared norm about the mean: CKA "
      "compares little but that row. Leave massive rows, such as BOS, out.",
      number,
      name,
      100 * square / total,
    )
