"""Scores against chance: the same measure after rows were permuted.

Groeger, Wen and Brbic 2026, "Revisiting the Platonic Representation
Hypothesis: An Aristotelian View" (arXiv 2602.14486). For measures of which
more is more similar; of a distance, take its negative and its `maximum`.
"""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gemma_jax import progress

log = logging.getLogger("gemma_jax")


@dataclasses.dataclass(frozen=True)
class Calibration:
  """A score beside those of permuted rows.

  Attributes:
    score: of the rows as they are.
    null: float64 [K], of each permutation.
    threshold: that a score must exceed to be above chance at `alpha`.
    p: share of permutations at least as high, (1 + #) / (K + 1), never 0
      (Phipson and Smyth 2010).
    calibrated: (score - threshold) / (maximum - threshold), cut to [0, 1].
  """

  score: float
  null: np.ndarray
  threshold: float
  p: float
  calibrated: float

  @property
  def excess(self) -> float:
    """Score less the mean of the null."""
    return self.score - float(self.null.mean())


@dataclasses.dataclass(frozen=True)
class LayerCalibration:
  """Scores of all pairs of layers against the best of each permutation.

  Attributes:
    scores: float64 [A, B], of the rows as they are.
    null: float64 [K, A, B], of each permutation, the same for all layers.
    threshold: that a score must exceed for the best pair to be above chance.
    p: [A, B], share of permutations whose best pair is at least as high: right
      for each pair although one may look at all (Westfall and Young 1993).
    calibrated: [A, B], as in `Calibration`.
    best: layers (a, b) of the largest score; its p is `p[best]`.
  """

  scores: np.ndarray
  null: np.ndarray
  threshold: float
  p: np.ndarray
  calibrated: np.ndarray
  best: tuple[int, int]


def permute_rows(y, order: np.ndarray):
  """Rows [n, D], dense or sparse, in another order."""
  return y[order]


def permute_kernel(k: np.ndarray, order: np.ndarray) -> np.ndarray:
  """The kernel [n, n] of rows in another order."""
  return k[np.ix_(order, order)]


def permute_neighbours(near: np.ndarray, order: np.ndarray) -> np.ndarray:
  """The neighbours [n, k] of rows in another order."""
  return np.argsort(order)[near[order]]


def calibrate(
  x,
  y,
  measure: Callable[[Any, Any], float],
  *,
  draws: int = 200,
  alpha: float = 0.05,
  blocks=None,
  seed: int = 0,
  maximum: float = 1.0,
  permute: Callable[[Any, np.ndarray], Any] = permute_rows,
) -> Calibration:
  """Compares a score with those after permuting the rows of y.

  Args:
    x: rows, n of them.
    y: rows, or what `permute` can permute, n along the first axis.
    measure: takes x and y; more is more similar.
    draws: K, permutations.
    alpha: chance that a score of unrelated rows is above the threshold.
    blocks: [n], numbers or names; rows are permuted within equal ones only,
      such as positions. Rows of one document are no independent samples:
      keep their permutations within positions, or measure pooled rows.
    seed: of the permutations.
    maximum: largest score that the measure can give.
    permute: takes y and an order, [n]. `permute_kernel` with kernels and
      `kernel_cka`, or `permute_neighbours` with `nearest_neighbours` and
      `neighbour_overlap`, save what does not change between permutations.

  Raises:
    ValueError: other numbers of rows, blocks of one row each, too few draws
      for `alpha`, or a score that is not finite.
  """
  found = calibrate_layers(
    [x],
    [y],
    measure,
    draws=draws,
    alpha=alpha,
    blocks=blocks,
    seed=seed,
    maximum=maximum,
    permute=permute,
  )
  return Calibration(
    float(found.scores[0, 0]),
    found.null[:, 0, 0],
    found.threshold,
    float(found.p[0, 0]),
    float(found.calibrated[0, 0]),
  )


def calibrate_layers(
  xs: Sequence,
  ys: Sequence,
  measure: Callable[[Any, Any], float],
  *,
  draws: int = 200,
  alpha: float = 0.05,
  blocks=None,
  seed: int = 0,
  maximum: float = 1.0,
  permute: Callable[[Any, np.ndarray], Any] = permute_rows,
) -> LayerCalibration:
  """Compares all layers of two models with the same rows permuted in all.

  The threshold is the ceil((1 - alpha) (K + 1))-th smallest of K + 1 scores,
  that of the best pair of the rows as they are and of each permutation. Where
  layers differ in width take a measure whose null does not, such as debiased
  CKA: the pairs of the highest null would decide for all. Takes (K + 1) A B
  calls of `measure`.

  Args:
    xs: A layers of one model, n rows each.
    ys: B layers of the other, n rows each.
    measure: as in `calibrate`.
    draws: K.
    alpha: as in `calibrate`.
    blocks: as in `calibrate`.
    seed: as in `calibrate`.
    maximum: as in `calibrate`.
    permute: as in `calibrate`.

  Raises:
    ValueError: as `calibrate`, or no layers.
  """
  n = _rows(xs, ys)
  if not 0 < alpha < 1 or alpha * (draws + 1) < 1 - 1e-9:
    raise ValueError(
      f"expected alpha in (0, 1) and at least 1 / alpha - 1 draws, got {alpha} "
      f"and {draws}: a smaller p than 1 / (draws + 1) cannot come out"
    )
  groups = _groups(n, blocks)
  scores = _score_all(xs, ys, measure)
  null = np.empty((draws, *scores.shape))
  rng = np.random.default_rng(seed)
  with (
    progress.bar(draws, "permutations", unit="draws") as bar,
    _without_warnings(),
  ):
    for i in range(draws):
      order = np.arange(n)
      for group in groups:
        order[group] = rng.permutation(group)
      null[i] = _score_all(xs, [permute(y, order) for y in ys], measure)
      bar.update(1)
  top = null.max(axis=(1, 2))
  # Rounding in 1 - alpha must not move the rank.
  rank = math.ceil((1 - alpha) * (draws + 1) - 1e-9)
  threshold = np.sort(np.append(top, scores.max()))[rank - 1]
  # Nor must that of a measure whose order of sums has changed break a tie.
  slack = 1e-12 * np.maximum(np.abs(scores), 1)
  higher = (top[:, None, None] >= scores - slack).sum(0)
  room = maximum - threshold
  above = np.clip((scores - threshold) / room, 0, 1) if room > 0 else 0 * scores
  best = np.unravel_index(scores.argmax(), scores.shape)
  return LayerCalibration(
    scores,
    null,
    float(threshold),
    (1 + higher) / (draws + 1),
    above,
    (int(best[0]), int(best[1])),
  )


def _rows(xs: Sequence, ys: Sequence) -> int:
  counts = [np.shape(a)[:1] for a in (*xs, *ys)]
  if not len(xs) or not len(ys) or len(set(counts)) != 1 or () in counts:
    raise ValueError(
      "expected at least one layer of each model, with the same number of "
      f"rows, got {[c[0] if c else None for c in counts[: len(xs)]]} and "
      f"{[c[0] if c else None for c in counts[len(xs) :]]}"
    )
  return counts[0][0]


def _groups(n: int, blocks) -> list[np.ndarray]:
  """Numbers of the rows that are permuted with one another."""
  blocks = np.zeros(n, np.int8) if blocks is None else np.asarray(blocks)
  if blocks.shape != (n,):
    raise ValueError(
      f"expected a block for each of the {n} rows, got {blocks.shape}"
    )
  _, own, counts = np.unique(blocks, return_inverse=True, return_counts=True)
  groups = np.split(np.argsort(own, kind="stable"), np.cumsum(counts)[:-1])
  groups = [group for group in groups if len(group) > 1]
  if not groups:
    raise ValueError(
      f"expected rows that can change places, got {n} blocks of one row each; "
      "take wider blocks, such as bins of positions"
    )
  return groups


def _score_all(xs, ys, measure) -> np.ndarray:
  found = np.array([[float(measure(x, y)) for y in ys] for x in xs])
  if not np.isfinite(found).all():
    raise ValueError(
      f"expected finite scores, got {(~np.isfinite(found)).sum()} others; the "
      "measure is undefined for these rows"
    )
  return found


@contextlib.contextmanager
def _without_warnings():
  """What is wrong with the rows was said of those that are not permuted."""

  def quiet(record):
    return record.levelno != logging.WARNING

  log.addFilter(quiet)
  try:
    yield
  finally:
    log.removeFilter(quiet)
