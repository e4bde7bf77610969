"""Latent codes of one dictionary on the same tokens, compared token by token.

Codes are [n, M], dense or SciPy sparse, M the latents of one dictionary: by
index, latents of two dictionaries have nothing in common before they are
matched.
"""

from collections.abc import Callable

import numpy as np
from scipy import sparse

from gemma_jax.metrics.similarity.calibration import Calibration, calibrate

KINDS = ("jaccard", "ruzicka", "cosine")


def token_overlaps(x, y, *, kind: str = "jaccard") -> np.ndarray:
  """Overlap of each token's codes, in [0, 1] where no code is negative.

  "jaccard": active in both over active in either (Jaccard 1912); "ruzicka":
  sum of the smaller over sum of the larger values (Ruzicka 1958); "cosine".

  Args:
    x: codes [n, M]; a latent is active where it is not 0.
    y: codes [n, M] of the same tokens and latents.
    kind: one of `KINDS`.

  Returns:
    float64 [n]; NaN where neither has an active latent.

  Raises:
    ValueError: other shapes, another kind, values that are not finite, or
      negative ones with "ruzicka".
  """
  if kind not in KINDS:
    raise ValueError(f"expected a kind of {KINDS}, got {kind!r}")
  x, y = _codes(x), _codes(y)
  if x.shape != y.shape:
    raise ValueError(
      f"expected codes [n, M] of the same tokens and latents, got {x.shape} "
      f"and {y.shape}; of two dictionaries, match the latents first"
    )
  if kind == "jaccard":
    x, y = x.astype(bool).astype(np.float64), y.astype(bool).astype(np.float64)
  if kind == "cosine":
    top = x.multiply(y).sum(axis=1)
    squares = [x.multiply(x).sum(axis=1), y.multiply(y).sum(axis=1)]
    bottom = np.sqrt(squares[0]) * np.sqrt(squares[1])
    empty = squares[0] + squares[1] == 0
  else:
    if kind == "ruzicka" and min(x.min(), y.min()) < 0:
      raise ValueError(
        "expected codes that are not negative, got some; their sums of smaller "
        "and larger values mean nothing. Take the cosine"
      )
    top = x.minimum(y).sum(axis=1)
    bottom = x.sum(axis=1) + y.sum(axis=1) - top
    empty = bottom == 0
  # Of one empty code and another, too: nothing in common.
  bottom[bottom == 0] = 1
  return np.where(empty, np.nan, top / bottom)


def jaccard(x, y) -> float:
  """Mean over tokens of the Jaccard index of active latents.

  Latents that fire often make it large by chance: see `frequency_null`.
  Tokens on which neither fires are left out; `token_overlaps` has them as NaN.

  Args:
    x: codes [n, M], dense or sparse.
    y: codes [n, M] of the same tokens and latents.

  Raises:
    ValueError: as `token_overlaps`, or no token with an active latent.
  """
  return _mean(token_overlaps(x, y))


def ruzicka(x, y) -> float:
  """Mean over tokens of the weighted Jaccard index, sum min / sum max.

  Args and errors as `jaccard`; codes must not be negative.
  """
  return _mean(token_overlaps(x, y, kind="ruzicka"))


def code_cosine(x, y) -> float:
  """Mean over tokens of the cosine of codes; 0 where one code is empty.

  Args and errors as `jaccard`.
  """
  return _mean(token_overlaps(x, y, kind="cosine"))


def frequency_null(
  x,
  y,
  positions,
  *,
  measure: Callable = jaccard,
  draws: int = 200,
  alpha: float = 0.05,
  seed: int = 0,
) -> Calibration:
  """Overlap beside that of unrelated tokens at like positions.

  Permutes the tokens of y within bins of positions 0, 1 to 2, 3 to 6, and so
  on, so that each latent keeps how often it fires, and where; `excess` is
  what the pairing adds.

  Args:
    x: codes [n, M], dense or sparse.
    y: codes [n, M] of the same tokens and latents.
    positions: whole numbers [n], of each token in its text, from 0.
    measure: of this file, or another of x and y.
    draws: permutations.
    alpha: as in `calibrate`.
    seed: of the permutations.

  Raises:
    ValueError: as `jaccard` and `calibrate`, or negative positions.
  """
  positions = np.asarray(positions)
  if positions.dtype.kind not in "iu" or (positions < 0).any():
    raise ValueError(
      f"expected positions as whole numbers from 0, got {positions.dtype} "
      f"{positions.shape}"
    )
  x, y = _codes(x), _codes(y)
  # Exponents of a float64 are exact, other than its rounded logarithm.
  bins = np.frexp(positions.astype(np.float64) + 1)[1]
  return calibrate(
    x, y, measure, draws=draws, alpha=alpha, blocks=bins, seed=seed
  )


def _codes(codes) -> sparse.csr_array:
  """Float64 [n, M]."""
  if not sparse.issparse(codes):
    codes = np.asarray(codes)
  if codes.ndim != 2 or 0 in codes.shape:
    raise ValueError(f"expected codes [n, M], got {codes.shape}")
  found = sparse.csr_array(codes, dtype=np.float64)
  if not np.isfinite(found.data).all():
    raise ValueError(
      f"expected finite codes, got {(~np.isfinite(found.data)).sum()} others; "
      "leave those tokens out of x and y"
    )
  return found


def _mean(overlaps: np.ndarray) -> float:
  there = ~np.isnan(overlaps)
  if not there.any():
    raise ValueError(
      f"expected active latents, got none on any of {len(overlaps)} tokens"
    )
  return float(overlaps[there].mean())
