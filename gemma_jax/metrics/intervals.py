"""How far a number would move with other documents.

Tokens of one document resemble each other, so documents are what is drawn
again, whole; drawing tokens gives intervals that are far too narrow.
"""

import warnings

import numpy as np
from scipy import stats

# Documents beyond so many share sums: a cluster of whole documents is drawn
# as one. Memory stays bounded, and the interval right.
CLUSTERS = 4_096


def document_interval(
  numerator,
  denominator,
  *,
  level: float = 0.95,
  resamples: int = 1_000,
  seed: int = 0,
) -> tuple[float, float] | None:
  """Bootstrap interval of sum(numerator) / sum(denominator) over documents.

  Bias-corrected and accelerated (BCa; Efron 1987, "Better bootstrap
  confidence intervals", JASA 82), as `scipy.stats.bootstrap` does it, with
  the two sums of a document drawn together. Where BCa is undefined, such as
  with a ratio that is the same in every document, percentiles.

  Args:
    numerator: sums over the tokens of each document, [documents].
    denominator: of the same documents, [documents].
    level: probability of the interval.
    resamples: how often documents are drawn.
    seed: of the drawing.

  Returns:
    (low, high); None for fewer than two documents, and where a resample's
    denominator vanishes.

  Raises:
    ValueError: shapes that differ or are not [documents], or a value that is
      not finite.
  """
  top, bottom = (np.asarray(a, np.float64) for a in (numerator, denominator))
  if top.ndim != 1 or top.shape != bottom.shape:
    raise ValueError(
      f"Numerators {top.shape} and denominators {bottom.shape} must both be "
      "[documents]."
    )
  if not (np.isfinite(top).all() and np.isfinite(bottom).all()):
    raise ValueError(
      "Sums of documents that are not finite: find the tokens behind them."
    )
  if len(top) < 2:
    return None
  # Undefined BCa ends and vanishing denominators: both are looked at below.
  with warnings.catch_warnings(), np.errstate(all="ignore"):
    warnings.simplefilter("ignore")
    found = stats.bootstrap(
      (top, bottom),
      lambda a, b, axis: a.sum(axis) / b.sum(axis),
      n_resamples=resamples,
      batch=max(1, 2**22 // len(top)),
      vectorized=True,
      paired=True,
      confidence_level=level,
      method="BCa",
      random_state=np.random.default_rng(seed),
    )
    ends = tuple(map(float, found.confidence_interval))
  if not np.isfinite(found.bootstrap_distribution).all():
    return None
  if not np.isfinite(ends).all():
    tail = (1 - level) / 2
    ends = np.quantile(found.bootstrap_distribution, (tail, 1 - tail))
  return float(ends[0]), float(ends[1])


class DocumentSums:
  """Float64 sums of rows by the document that they belong to.

  Each of the first `CLUSTERS` documents has sums of its own, in the order of
  their first rows; those that follow join them in turn.
  """

  def __init__(self):
    self._slots: dict[int, int] = {}
    self._sums: dict[str, np.ndarray] = {}

  def __len__(self) -> int:
    return min(len(self._slots), CLUSTERS)

  def add(self, document: np.ndarray, **values: np.ndarray) -> None:
    """Adds rows.

    Args:
      document: whole numbers [n], whose document each row is.
      **values: [n] or [n, D], under the same names every time.
    """
    _, first, inverse = np.unique(
      document, return_index=True, return_inverse=True
    )
    slots = np.empty(len(first), np.int64)
    for i in np.argsort(first):
      new = len(self._slots) % CLUSTERS
      slots[i] = self._slots.setdefault(int(document[first[i]]), new)
    order = np.argsort(inverse, kind="stable")
    starts = np.searchsorted(inverse[order], np.arange(len(first)))
    for name, rows in values.items():
      if name not in self._sums:
        self._sums[name] = np.zeros((CLUSTERS, *rows.shape[1:]))
      parts = np.add.reduceat(rows[order], starts, axis=0)
      np.add.at(self._sums[name], slots, parts)

  def __getitem__(self, name: str) -> np.ndarray:
    """Sums of each document, [documents] or [documents, D]."""
    return self._sums[name][: len(self)]
