"""How well predictions rank the rows on which codes fire."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

BINS = 512  # of predictions


class RunningFiring:
  """Area under the ROC curve of every column, and recall of the largest codes.

  Predictions are counted in bins of each column, which are finest about the
  mean of the first rows; a code fires where it is above 0.

  Args:
    mean: of the codes over training rows, [E].
    top: k of the recall.

  Raises:
    ValueError: no k of 1 to E.
  """

  def __init__(self, mean, top: int):
    self._mean = jnp.asarray(mean, jnp.float32)
    if not 1 <= top <= len(self._mean):
      raise ValueError(f"expected a k of 1 to {len(self._mean)}, got {top}")
    self._top = top
    self._bins = None  # centre and scale of each column's
    # int32 [2 E BINS]: rows on which a column is silent, and fires.
    self._counts = jnp.zeros(2 * len(self._mean) * BINS, jnp.int32)
    self._recalls = np.zeros(3)

  def update(self, predicted, actual, count: int) -> None:
    """Adds the first `count` of some rows.

    Args:
      predicted: [n, E].
      actual: codes [n, E].
      count: rows that count; those behind are zeros.
    """
    if self._bins is None:
      first = np.asarray(predicted[:count], np.float32)
      scale = first.std(0)
      # Columns that are constant so far, as codes that do not fire yet.
      usual = np.sqrt(np.mean(scale**2)) or 1
      self._bins = first.mean(0), np.where(scale > 0, scale, usual)
    self._counts = _count(self._counts, predicted, actual, *self._bins, count)
    recalls = _recalls(predicted, actual, self._mean, self._top)
    self._recalls += np.asarray(recalls, np.float64)

  @property
  def firings(self) -> np.ndarray:
    """Rows on which each column fires, int64 [E]."""
    return self._by_column()[1].sum(1)

  @property
  def auroc(self) -> np.ndarray:
    """Chance that a row that fires is ranked above one that does not.

    Returns:
      float64 [E]; NaN where all rows fire, or none.
    """
    silent, fires = self._by_column()
    below = np.cumsum(silent, axis=1) - silent / 2
    pairs = silent.sum(1) * fires.sum(1)
    out = np.full(len(pairs), np.nan)
    ranked = np.sum(fires * below, axis=1)
    return np.divide(ranked, pairs, out=out, where=pairs > 0)

  @property
  def recall(self) -> tuple[float, float]:
    """Of the k largest codes among the k largest predictions, or means.

    Returns:
      Means over the rows on which something fires; NaN without any.
    """
    predicted, mean, rows = self._recalls
    if not rows:
      return float("nan"), float("nan")
    return float(predicted / rows), float(mean / rows)

  def _by_column(self) -> np.ndarray:
    return np.asarray(self._counts, np.int64).reshape(2, -1, BINS)


@functools.partial(jax.jit, donate_argnums=0)
def _count(counts, predicted, actual, centre, scale, count):
  width = actual.shape[1]
  away = (predicted.astype(jnp.float32) - centre) / scale
  # Any number has a bin, and equal numbers the same.
  squashed = away / (1 + jnp.abs(away))
  bins = jnp.clip(((squashed + 1) * (BINS / 2)).astype(jnp.int32), 0, BINS - 1)
  slots = ((actual > 0) * width + jnp.arange(width)) * BINS + bins
  counted = (jnp.arange(len(actual)) < count).astype(jnp.int32)
  return counts.at[slots].add(counted[:, None])


@functools.partial(jax.jit, static_argnames="top")
def _recalls(predicted, actual, mean, top):
  """Sums over rows of the recall of both, and rows on which codes fire."""
  largest, wanted = jax.lax.top_k(actual.astype(jnp.float32), top)
  fires = largest > 0
  number = fires.sum(1)

  def recall(scores):
    chosen = jax.lax.top_k(scores.astype(jnp.float32), top)[1]
    hit = (wanted[:, :, None] == chosen[:, None, :]).any(2) & fires
    return jnp.sum(hit.sum(1) / jnp.maximum(number, 1))

  return recall(predicted), recall(mean[None]), (number > 0).sum()
