"""How far a number would move with other prompts or documents."""

import dataclasses
import logging
import warnings
from collections.abc import Callable

import numpy as np
from scipy import stats

from gemma_jax.statistics import samples

log = logging.getLogger("gemma_jax")

# Below so many units a bootstrap interval is too narrow.
FEW = 10
# Values in memory at a time, 32 MiB of them.
CHUNK = 2**22


@dataclasses.dataclass(frozen=True)
class Interval:
  """A number and its interval.

  Attributes:
    value: the statistic of the sample.
    low: lower end.
    high: upper end.
    level: probability of the interval.
    units: how many prompts, or clusters, were drawn from; of the smaller
      sample if there are two. With fewer than `FEW`, the interval is too
      narrow.
  """

  value: float
  low: float
  high: float
  level: float
  units: int


def bootstrap_ci(
  x,
  y=None,
  *,
  design: str = "paired",
  statistic: Callable[..., float] | None = None,
  level: float = 0.95,
  resamples: int = 9_999,
  clusters=None,
  seed: int = 0,
) -> Interval:
  """Bias-corrected and accelerated (BCa) interval of a statistic.

  Efron 1987, "Better bootstrap confidence intervals", JASA 82, as computed by
  `scipy.stats.bootstrap`. With `clusters`, whole documents are drawn, and the
  acceleration is that of leaving out whole documents. BCa is undefined where
  all resamples have the same statistic: there the interval is that point; and
  where they are all on one side of the value, as with a number of different
  values: there it is the percentiles.

  Every unit is left out once, which takes n^2: beyond some 10,000 rows, give
  clusters.

  Args:
    x: one value a row, [n].
    y: a second sample: [n] of the same rows, which are drawn together, if
      paired, or [m] of others if independent.
    design: "paired" or "independent", with `y`.
    statistic: x [rows] (and y [rows]) -> a number, called once a resample. By
      default the mean of x, or the difference of means x - y, vectorised.
    level: probability of the interval.
    resamples: how often the sample is drawn.
    clusters: document of each row, [n], or if independent [n + m] with the
      rows of x first.
    seed: of the drawing.

  Raises:
    ValueError: samples or clusters that do not fit, fewer than two rows or
      clusters in a sample, values or statistics that are not finite.
  """
  samples.choice(design, samples.DESIGNS, "design")
  samples.probability(level, "level")
  samples.count(resamples, "resamples")
  drawn = _drawn(x, y, design, clusters)
  if statistic is None and len(drawn[0][0]) == 2:
    columns, cluster = drawn[0]
    drawn = [((columns[0] - columns[1],), cluster)]
  units = [int(cluster.max()) + 1 for _, cluster in drawn]
  if min(units) < 2:
    raise ValueError("expected at least two clusters in a sample, got one")
  if min(units) < FEW:
    log.warning(
      "bootstrap of %d units: with fewer than %d the interval is too narrow",
      min(units),
      FEW,
    )
  evaluate = _of_rows(drawn, statistic) if statistic else _of_means(drawn)
  index = tuple(np.arange(n) for n in units)
  value = float(evaluate(*index))
  # What SciPy warns of is looked at below.
  with warnings.catch_warnings(), np.errstate(all="ignore"):
    warnings.simplefilter("ignore")
    found = stats.bootstrap(
      index,
      evaluate,
      n_resamples=resamples,
      batch=max(1, CHUNK // max(units)),
      vectorized=statistic is None,
      confidence_level=level,
      method="BCa",
      random_state=np.random.default_rng(seed),
    )
  low, high = _ends(found, value, level)
  return Interval(value, low, high, level, min(units))


def _drawn(x, y, design, clusters) -> list[tuple[tuple, np.ndarray]]:
  """Columns that are drawn together and their clusters, of each sample."""
  if design == "independent":
    columns = [(samples.sample(x, "x"),), (samples.sample(y, "y"),)]
  elif y is None:
    columns = [(samples.sample(x, "x"),)]
  else:
    columns = [samples.pairs(x, y)]
  starts = np.cumsum([len(sample[0]) for sample in columns])
  labels = samples.codes(clusters, starts[-1], "clusters")
  own = np.split(labels, starts[:-1])
  if len(own) == 2 and np.intersect1d(*own).size:
    raise ValueError(
      "expected different clusters in x and in y, got one in both; clusters "
      "of both are pairs: average each and give their differences"
    )
  return [
    (sample, samples.codes(labels, len(labels), "clusters"))
    for sample, labels in zip(columns, own, strict=True)
  ]


def _of_means(drawn) -> Callable:
  """Means of rows, or their difference, from the sums of clusters."""
  sums = [np.bincount(cluster, x) for (x,), cluster in drawn]
  counts = [np.bincount(cluster) for _, cluster in drawn]

  def evaluate(*index, axis=-1):
    means = []
    for top, rows, i in zip(sums, counts, index, strict=True):
      i = i.astype(int)
      means.append(top[i].sum(axis) / rows[i].sum(axis))
    return means[0] if len(means) == 1 else means[0] - means[1]

  return evaluate


def _of_rows(drawn, statistic) -> Callable:
  """The statistic of all rows of the clusters drawn."""
  sorted_rows = [np.argsort(cluster, kind="stable") for _, cluster in drawn]
  counts = [np.bincount(cluster) for _, cluster in drawn]

  def evaluate(*index):
    arguments = []
    for (columns, _), rows, count, i in zip(
      drawn, sorted_rows, counts, index, strict=True
    ):
      i = i.astype(int)
      # Rows of cluster c are those from its start on, in the sorted order.
      starts, ends = np.cumsum(count) - count, np.cumsum(count[i])
      shift = np.repeat(starts[i] - (ends - count[i]), count[i])
      taken = rows[np.arange(ends[-1]) + shift]
      arguments += [column[taken] for column in columns]
    return float(statistic(*arguments))

  return evaluate


def _ends(found, value, level) -> tuple[float, float]:
  resampled = found.bootstrap_distribution
  if not (np.isfinite(value) and np.isfinite(resampled).all()):
    raise ValueError(
      f"expected a finite statistic, got {value}, and of the resamples "
      f"{np.sum(~np.isfinite(resampled))} of {resampled.size} not finite"
    )
  if np.ptp(resampled) <= 1e-12 * np.abs(resampled).max():
    return value, value
  ends = found.confidence_interval
  if not np.isfinite(ends).all():
    ends = np.quantile(resampled, ((1 - level) / 2, (1 + level) / 2))
  return float(ends[0]), float(ends[1])
