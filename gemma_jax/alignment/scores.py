"""How well a map predicts rows that it has not seen.

Codes are sparse and not negative, so that their mean alone has cosines of .5
to .8 with them. Every number here gives the mean nothing, or stands beside
what the mean gets.
"""

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.alignment import rows, sums
from gemma_jax.alignment.firing import BINS, RunningFiring
from gemma_jax.metrics.intervals import DocumentSums, document_interval

FIRINGS = 30  # least of a column that counts in a median

DEFINITIONS = {
  "r2": (
    "Per column: 1 - sum (y - y_hat)^2 / sum (y - train mean)^2; NaN where the "
    "column never leaves the train mean."
  ),
  "r2_pooled": "The same with both sums over all columns.",
  "fvu": (
    "sum |y - y_hat|^2 / sum |y - mean(y)|^2, the mean over the held-out rows."
  ),
  "pearson": (
    "Per column: correlation of y and y_hat; 0 where y_hat is constant, NaN "
    "where y is."
  ),
  "auroc": (
    "Per column of codes: chance that y_hat is larger on a row that fires "
    f"(y > 0) than on one that does not, ties half. From {BINS} bins, whose "
    "rows count as ties: off by half of a bin's share of the rows at most."
  ),
  "firings": "Per column of codes: rows with y > 0.",
  "top_k_recall": (
    "Mean over rows of the share of the k largest y > 0 that are among the k "
    "largest y_hat; rows where nothing fires are left out."
  ),
  "top_k_recall_mean": "The same of the train mean as y_hat: the floor.",
  "centred_cosine": (
    "Mean over rows of cos(y - train mean, y_hat - train mean), 0 where y_hat "
    "is the train mean."
  ),
  "raw_cosine": "The same without taking the mean off: to compare with others.",
  "median": (
    "`r2_median`, ...: over columns that have a value and, of codes, at least "
    f"{FIRINGS} firings; their number is `columns`."
  ),
}

_BLOCK = 2**22  # numbers in a block of predictions
_ROWS = 4_096  # rows of one float32 sum


class Scores:
  """The numbers of `DEFINITIONS`, in one pass over held-out rows.

  Sums are float32 within a block of rows, about the train mean, and float64
  across blocks.

  Args:
    mean: of y over the rows that the map was fitted on, [E].
    codes: whether y are codes, never negative; the numbers on firing are for
      these alone.
    top: k of `top_k_recall`.

  Attributes:
    count: rows so far.
    mean: as given, float64 [E].

  Raises:
    ValueError: a mean that is not finite, or no k of 1 to E.
  """

  def __init__(self, mean, *, codes: bool = False, top: int = 32):
    self.mean = np.asarray(mean, np.float64)
    if self.mean.ndim != 1 or not np.isfinite(self.mean).all():
      raise ValueError(
        f"expected a finite mean [E] of the training rows, got {self.mean}"
      )
    self.count = 0
    self._mean = jnp.asarray(self.mean, jnp.float32)
    self._firing = RunningFiring(self.mean, top) if codes else None
    self._sums: dict[str, np.ndarray] = {}
    # Least and largest of each column: rounding leaves constants a variance.
    self._ends: dict[str, tuple] = {}
    self._documents = DocumentSums()

  def update(self, predicted, actual, documents=None) -> "Scores":
    """Adds rows.

    Args:
      predicted: y_hat [n, E].
      actual: y [n, E].
      documents: int [n], whose document each row is; for intervals, with all
        rows or with none.

    Raises:
      ValueError: shapes that do not fit, documents for some rows only, codes
        below 0, or values that are not finite; blocks before the one with
        these stay added.
    """
    shape = np.shape(predicted)
    if shape[1:] != self.mean.shape or np.shape(actual) != shape:
      raise ValueError(
        f"expected predicted and actual [n, {len(self.mean)}], got {shape} and "
        f"{np.shape(actual)}"
      )
    self._check_documents(documents, shape[:1])
    size = max(rows.LEAST, _BLOCK // len(self.mean))
    size = min(_ROWS, 1 << (size.bit_length() - 1))
    for start, count, p, y in rows.blocks(predicted, actual, size):
      total, low, high, by_row = jax.device_get(
        sums.block(p, y, self._mean, count)
      )
      # A value that is not finite is not so in these either.
      if not np.isfinite([total["pp"], total["yy"]]).all():
        rows.refuse(*(np.asarray(a[:count]) for a in (p, y)), start)
      if self._firing is not None:
        if low["y"].min() < 0:
          raise ValueError(
            f"expected codes of 0 and more, got {low['y'].min()} in rows from "
            f"{start} on; score other activations with codes=False"
          )
        self._firing.update(p, y, count)
      for name, part in total.items():
        self._sums[name] = self._sums.get(name, 0.0) + np.float64(part)
      for name in low:
        before = self._ends.get(name, (np.inf, -np.inf))
        self._ends[name] = (
          np.minimum(low[name], before[0]),
          np.maximum(high[name], before[1]),
        )
      if documents is not None:
        self._documents.add(
          np.asarray(documents[start : start + count]),
          **{name: np.float64(part[:count]) for name, part in by_row.items()},
        )
      self.count += count
    return self

  @property
  def r2(self) -> np.ndarray:
    """R^2 of every column about the train mean, float64 [E].

    Raises:
      ValueError: no rows yet.
    """
    self._check_rows()
    return 1 - _ratio(self._sums["error"], self._sums["yy"])

  def compute(self) -> dict:
    """Everything so far: arrays [E] of columns, and numbers.

    Raises:
      ValueError: no rows yet.
    """
    found = {"r2": self.r2, "pearson": self._pearson()}
    enough = np.isfinite(found["r2"])
    if self._firing is not None:
      found |= {"auroc": self._firing.auroc, "firings": self._firing.firings}
      enough &= found["firings"] >= FIRINGS
    medians = {
      f"{name}_median": _median(found[name], enough)
      for name in ("r2", "pearson", "auroc")
      if name in found
    }
    total, error = self._sums, self._sums["error"].sum()
    found |= medians | {
      "r2_pooled": 1 - float(_ratio(error, total["yy"].sum())),
      "fvu": float(_ratio(error, self._variation("y").sum())),
      "centred_cosine": float(_ratio(total["centred"], total["away"])),
      "raw_cosine": float(_ratio(total["raw"], total["there"])),
      "columns": int(enough.sum()),
      "rows": self.count,
    }
    if self._firing is not None:
      recalls = self._firing.recall
      found["top_k_recall"], found["top_k_recall_mean"] = recalls
    return found

  def interval(self, **options) -> tuple[float, float] | None:
    """Bootstrap interval of `r2_pooled` over documents.

    Args:
      **options: of `document_interval`.

    Returns:
      (low, high); None without documents or with a single one.
    """
    if len(self._documents) < 2:
      return None
    documents = self._documents
    ends = document_interval(documents["error"], documents["square"], **options)
    return ends and (1 - ends[1], 1 - ends[0])

  def _pearson(self) -> np.ndarray:
    total, (p, y) = self._sums, (self._variation(name) for name in "py")
    both = total["py"] - total["p"] * total["y"] / self.count
    found = np.where(p > 0, _ratio(both, np.sqrt(p * y)), 0)
    return np.where(y > 0, np.clip(found, -1, 1), np.nan)

  def _variation(self, name: str) -> np.ndarray:
    """Sums of squares about the mean, [E]; 0 of what is constant."""
    square, total = self._sums[2 * name], self._sums[name]
    low, high = self._ends[name]
    found = np.maximum(square - total * total / self.count, 0)
    return np.where(low < high, found, 0)

  def _check_documents(self, documents, shape) -> None:
    if documents is not None and np.shape(documents) != shape:
      raise ValueError(
        f"expected a document for each row, {shape}, got {np.shape(documents)}"
      )
    if self.count and bool(len(self._documents)) == (documents is None):
      raise ValueError(
        "expected documents with all rows or with none, got some batches with "
        "and some without"
      )

  def _check_rows(self) -> None:
    if not self.count:
      raise ValueError("expected rows to score, got none; call update first")


def delta_r2(a: Scores, b: Scores) -> np.ndarray:
  """R^2 of every column by map a, less that by map b, float64 [E].

  Args:
    a: scores of one map.
    b: of another, of the same rows about the same mean, such as of the ridge
      map or of a token lookup.

  Raises:
    ValueError: of other rows, or about another mean.
  """
  _check_same(a, b)
  return a.r2 - b.r2


def delta_interval(a: Scores, b: Scores, **options):
  """Bootstrap interval over documents of the difference in `r2_pooled`.

  Args:
    a: scores of one map.
    b: of another, of the same rows about the same mean, in the same order.
    **options: of `document_interval`.

  Returns:
    (low, high) of a's less b's; None without documents or with a single one.

  Raises:
    ValueError: of other rows, or about another mean.
  """
  _check_same(a, b)
  first, second = a._documents, b._documents
  if min(len(first), len(second)) < 2:
    return None
  # Both have one denominator: of the difference, errors alone are drawn.
  return document_interval(
    second["error"] - first["error"], first["square"], **options
  )


def _check_same(a: Scores, b: Scores) -> None:
  same = a.count == b.count and np.array_equal(a.mean, b.mean)
  if same and a.count:
    same = np.array_equal(a._ends["y"], b._ends["y"])
  if same and len(a._documents) == len(b._documents) > 0:
    squares = (s._documents["square"] for s in (a, b))
    same = np.allclose(*squares, rtol=1e-5)
  if not same:
    raise ValueError(
      f"expected scores of the same rows about the same mean, got {a.count} "
      f"and {b.count} rows that differ; score both maps on one stream"
    )


def _ratio(top, bottom) -> np.ndarray:
  """NaN where the denominator is 0."""
  out = np.full(np.shape(bottom), np.nan)
  return np.divide(top, bottom, out=out, where=bottom > 0)


def _median(values: np.ndarray, where: np.ndarray) -> float:
  kept = values[where & np.isfinite(values)]
  return float(np.median(kept)) if kept.size else float("nan")
