"""How good a clustering is by its rows alone: silhouettes, ratios, sizes.

Clusters are the labels that occur, as in scikit-learn, and a cluster of one
row scores 0 in both silhouettes. Distances are Euclidean and about the mean
of the rows, so that an offset costs no precision.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse, stats

from gemma_jax import progress
from gemma_jax.clustering import lloyd
from gemma_jax.clustering.rows import Rows, as_rows, centre
from gemma_jax.metrics.intervals import DocumentSums, document_interval

_BLOCK = 2**24  # numbers in a block of rows, or of their distances


@dataclasses.dataclass(frozen=True)
class Score:
  """Silhouettes of S rows, each in [-1, 1]: the larger the better.

  Attributes:
    value: their mean.
    interval: (low, high), 95 % bootstrap over documents; None without
      documents, or with fewer than two.
    rows: int64 [S], numbers of the rows, ascending.
    scores: float64 [S], of each row.
  """

  value: float
  interval: tuple[float, float] | None
  rows: np.ndarray
  scores: np.ndarray


class SizeEntropy(NamedTuple):
  """Entropy of the cluster of a row.

  Attributes:
    bits: of it.
    maximum: log2 C, of C clusters of one size.
  """

  bits: float
  maximum: float


def simplified_silhouette(
  x: np.ndarray | Rows, labels, centroids, *, documents=None
) -> Score:
  """Silhouettes with distances to centroids in place of rows: O(N C D).

  s = (b - a) / max(a, b), with a the distance to the own centroid and b to
  the nearest other one whose cluster occurs (Hruschka, Campello and de Castro
  2006, "Evolving clusters in gene-expression data").

  Args:
    x: rows [N, D], or `Rows`.
    labels: whole numbers [N], below C.
    centroids: [C, D]; they need not be the means.
    documents: whole numbers [N], whose document each row is; None: no
      interval.

  Raises:
    ValueError: shapes that do not fit, labels that are no centroid's, or
      fewer than 2 or more than N - 1 clusters that occur.
    FloatingPointError: a row or centroid that is not finite.
  """
  clusters = _clusters(x, labels, documents)
  occurring, width = clusters.occurring, clusters.rows.width
  centroids = np.asarray(centroids)
  if centroids.ndim != 2 or centroids.shape[1] != width:
    raise ValueError(f"expected centroids [C, {width}], got {centroids.shape}")
  if occurring[0] < 0 or occurring[-1] >= len(centroids):
    raise ValueError(
      f"expected labels from 0 to {len(centroids) - 1}, one for each centroid, "
      f"got {occurring[0]} to {occurring[-1]}; leave out rows without a cluster"
    )
  centroids = centroids[occurring] - clusters.centre
  if not np.isfinite(centroids).all():
    raise FloatingPointError("A centroid of a cluster with rows is not finite.")
  centroids = jnp.asarray(centroids, jnp.float32)
  scores = np.empty(len(clusters.own))
  for at, block in clusters.blocks("simplified silhouette", len(centroids)):
    a, b = _to_centroids(block.astype(np.float32), clusters.own[at], centroids)
    scores[at] = _silhouette(np.asarray(a), np.asarray(b))
  scores[clusters.counts[clusters.own] == 1] = 0
  return _score(scores, np.arange(len(scores)), documents)


def sampled_silhouette(
  x: np.ndarray | Rows,
  labels,
  *,
  samples: int = 2_000,
  against: int | None = None,
  seed: int = 0,
  documents=None,
) -> Score:
  """Exact silhouettes of rows drawn at random: O(samples N D), in float64.

  s = (b - a) / max(a, b), with a the mean distance to the other rows of the
  own cluster and b the least mean distance to the rows of another (Rousseeuw
  1987, "Silhouettes: a graphical aid"). With `samples` >= N it is
  scikit-learn's `silhouette_score`.

  Args:
    x: rows [N, D], or `Rows`.
    labels: whole numbers [N].
    samples: S, rows to score.
    against: rows, drawn at random from all, that they are compared with;
      None: all. With fewer a score is an estimate: b, the least of noisy
      means, comes out too small, clusters that were not drawn are never the
      nearest, and rows of which no other row of their cluster was drawn are
      left out.
    seed: of the draws.
    documents: whole numbers [N], whose document each row is; None: no
      interval.

  Raises:
    ValueError: shapes that do not fit, fewer than 2 or more than N - 1
      clusters that occur, or no row that can be scored.
    FloatingPointError: a row that is not finite.
  """
  clusters = _clusters(x, labels, documents)
  count = len(clusters.own)
  if samples < 1 or (against is not None and against < 1):
    raise ValueError(
      f"expected samples and against of at least 1 row, got {samples} and "
      f"{against}"
    )
  rng = np.random.default_rng(seed)
  drawn = np.sort(rng.choice(count, min(samples, count), replace=False))
  reference = None
  if against is not None and against < count:
    reference = np.sort(rng.choice(count, against, replace=False))
  each = max(1, 2 * _BLOCK // max(len(clusters.counts), clusters.rows.width))
  parts = np.split(drawn, range(each, len(drawn), each))
  scores = np.concatenate([_exact(clusters, p, reference) for p in parts])
  scored = ~np.isnan(scores)
  if not scored.any():
    raise ValueError(
      f"none of the {len(drawn)} rows can be scored against {against}: no "
      "other row of their clusters was drawn; raise against"
    )
  return _score(scores[scored], drawn[scored], documents)


def davies_bouldin(x: np.ndarray | Rows, labels) -> float:
  """Mean over clusters of the likeness to the most alike other: small is good.

  max over j of (s_i + s_j) / |m_i - m_j|, with m the means of the clusters
  and s the mean distance of their rows to them (Davies and Bouldin 1979, "A
  cluster separation measure", with p = 2 and q = 1). Means whatever centroids
  the labels came from, and clusters of equal means are not compared, both as
  in scikit-learn.

  Args:
    x: rows [N, D], or `Rows`.
    labels: whole numbers [N].

  Raises:
    ValueError: shapes that do not fit, or fewer than 2 or more than N - 1
      clusters that occur.
    FloatingPointError: a row that is not finite.
  """
  clusters = _clusters(x, labels)
  means, distances = _about_means(clusters)
  spread = np.bincount(clusters.own, distances) / clusters.counts
  worst = np.empty(len(means))
  each = max(1, _BLOCK // len(means))
  for start in range(0, len(means), each):
    part = np.arange(start, min(start + each, len(means)))
    with jax.enable_x64(True):
      apart = np.array(_apart(means[part], means))
    apart[part - start, part] = np.inf
    apart[apart == 0] = np.inf
    worst[part] = ((spread[part, None] + spread) / apart).max(1)
  return float(worst.mean())


def calinski_harabasz(x: np.ndarray | Rows, labels) -> float:
  """Variance between over variance within clusters: large is good.

  [B / (C - 1)] / [W / (N - C)], with B the squared distances of the clusters'
  means to the mean of all rows, each counted for its rows, and W those of the
  rows to the means of their clusters (Calinski and Harabasz 1974, "A dendrite
  method for cluster analysis"). Means whatever centroids the labels came from,
  and 1 where W is 0, both as in scikit-learn.

  Args:
    x: rows [N, D], or `Rows`.
    labels: whole numbers [N].

  Raises:
    As `davies_bouldin`.
  """
  clusters = _clusters(x, labels)
  means, distances = _about_means(clusters)
  within = np.sum(distances**2)
  between = clusters.counts @ np.sum(means**2, axis=1)
  if within == 0:
    return 1.0
  freedom = (len(distances) - len(means)) / (len(means) - 1)
  return float(between / within * freedom)


def size_gini(counts) -> float:
  """Gini coefficient of the sizes: 0 for equal ones, up to 1 - 1 / C.

  sum_i (2 i - C - 1) n_i / (C N), sizes n ascending (Gini's mean difference
  over twice the mean).

  Args:
    counts: rows of each cluster, [C]; empty clusters count.

  Raises:
    ValueError: not [C], a negative size, or no rows.
  """
  counts = np.sort(_sizes(counts))
  rank = 2 * np.arange(1, len(counts) + 1) - len(counts) - 1
  return float(rank @ counts / (len(counts) * counts.sum()))


def size_entropy(counts) -> SizeEntropy:
  """Entropy of the cluster of a row, in bits, with the largest that C allow.

  What an entropy code spends on a label (Shannon 1948).

  Args:
    counts: rows of each cluster, [C]; empty clusters count for the maximum.

  Raises:
    As `size_gini`.
  """
  counts = _sizes(counts)
  bits = stats.entropy(counts, base=2)
  return SizeEntropy(float(bits), float(np.log2(len(counts))))


def _sizes(counts) -> np.ndarray:
  counts = np.asarray(counts, np.float64)
  if counts.ndim != 1 or not (counts >= 0).all() or not counts.sum() > 0:
    raise ValueError(
      f"expected sizes [C] of clusters, not negative and not all 0, got "
      f"{counts.shape} that sum to {counts.sum()}"
    )
  return counts


@dataclasses.dataclass(frozen=True)
class _Clusters:
  """Rows, and the clusters that occur among them, numbered from 0."""

  rows: Rows
  centre: np.ndarray  # [D], the mean of the rows
  occurring: np.ndarray  # [C], the clusters' labels, ascending
  own: np.ndarray  # [N], the cluster of each row
  counts: np.ndarray  # [C], rows of each cluster

  def blocks(
    self, description: str, columns: int = 1, numbers: np.ndarray | None = None
  ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(numbers [B], rows less the centre, float64 [B, D]) of all, or some.

    B x `columns` results are no more than a block's.
    """
    count = len(self.rows) if numbers is None else len(numbers)
    size = max(1, _BLOCK // max(columns, self.rows.width))
    with progress.bar(count, description, unit="rows") as bar:
      for start in range(0, count, size):
        stop = min(start + size, count)
        if numbers is None:
          at, x = np.arange(start, stop), self.rows.read(start, stop)
        else:
          at = numbers[start:stop]
          x = self.rows.take(at)
        yield at, x - self.centre
        bar.update(stop - start)


def _clusters(x, labels, documents=None) -> _Clusters:
  rows = as_rows(x)
  _check_numbers("labels", labels, len(rows))
  if documents is not None:
    _check_numbers("documents", documents, len(rows))
  occurring, own, counts = np.unique(
    labels, return_inverse=True, return_counts=True
  )
  if not 2 <= len(occurring) < len(rows):
    raise ValueError(
      f"expected 2 to {len(rows) - 1} clusters of {len(rows)} rows, got "
      f"{len(occurring)}; between fewer or more there is nothing to compare"
    )
  # Names the first row that is not finite.
  mean, _ = centre(rows)
  return _Clusters(rows, mean, occurring, own, counts)


def _check_numbers(name, values, count) -> None:
  values = np.asarray(values)
  if values.shape != (count,) or values.dtype.kind not in "iu":
    raise ValueError(
      f"expected {name} as whole numbers [{count}], one for each row, got "
      f"{values.dtype} {values.shape}"
    )


def _score(scores, rows, documents) -> Score:
  interval = None
  if documents is not None:
    sums = DocumentSums()
    document = np.asarray(documents)[rows]
    sums.add(document, scores=scores, rows=np.ones(len(rows)))
    interval = document_interval(sums["scores"], sums["rows"])
  return Score(float(scores.mean()), interval, rows, scores)


def _silhouette(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """(b - a) / max(a, b); 0 where both are."""
  a, b = a.astype(np.float64), b.astype(np.float64)
  larger = np.maximum(a, b)
  return np.divide(b - a, larger, out=np.zeros(len(a)), where=larger > 0)


@jax.jit
def _to_centroids(x, own, centroids):
  """Distances [B] of rows to their own centroid and to the nearest other."""
  scores = lloyd.scores(x, centroids)
  mine = own[:, None] == jnp.arange(len(centroids))
  other = lloyd.first_largest(jnp.where(mine, -jnp.inf, scores))
  # From differences: the scores are only good for telling which is nearest.
  return tuple(
    jnp.linalg.norm(x - centroids[which], axis=1) for which in (own, other)
  )


def _exact(clusters, drawn, reference) -> np.ndarray:
  """Silhouettes [S] of the rows `drawn`; NaN where there is nothing to tell."""
  own = clusters.own[drawn]
  seen, itself = clusters.counts, np.ones(len(drawn), bool)
  if reference is not None:
    seen = np.bincount(clusters.own[reference], minlength=len(seen))
    itself = np.isin(drawn, reference)
  # Float64: in float32 the distances of near rows far from the mean cancel.
  with jax.enable_x64(True):
    queries = jnp.asarray(clusters.rows.take(drawn) - clusters.centre)
    sums = jnp.zeros((len(seen), len(drawn)))
    for at, x in clusters.blocks("silhouette", len(drawn), reference):
      sums = _add_distances(sums, queries, drawn, x, at, clusters.own[at])
    sums = np.array(sums)
  mine = own, np.arange(len(drawn))
  others = seen[own] - itself
  a = sums[mine] / np.maximum(others, 1)
  sums /= np.maximum(seen, 1)[:, None]
  sums[seen == 0] = np.inf
  sums[mine] = np.inf
  b = sums.min(0)
  known = (others > 0) & np.isfinite(b)
  scores = np.where(known, _silhouette(a, np.where(known, b, 0)), np.nan)
  return np.where(clusters.counts[own] == 1, 0, scores)


@functools.partial(jax.jit, donate_argnums=0)
def _add_distances(sums, queries, query_numbers, x, numbers, own):
  """Adds the rows' distances [B, S] to those of their clusters [C, S]."""
  itself = numbers[:, None] == query_numbers
  return sums.at[own].add(jnp.where(itself, 0, _apart(x, queries)))


@jax.jit
def _apart(x, y):
  """Distances [B, S]."""
  squares = jnp.sum(x * x, axis=1)[:, None] + jnp.sum(y * y, axis=1)
  products = jnp.matmul(x, y.T, precision="highest")
  return jnp.sqrt(jnp.maximum(squares - 2 * products, 0))


def _about_means(clusters: _Clusters) -> tuple[np.ndarray, np.ndarray]:
  """Means [C, D] about the centre, and the rows' distances [N] to them."""
  means = np.zeros((len(clusters.counts), clusters.rows.width))
  for at, x in clusters.blocks("means of clusters"):
    present, place = np.unique(clusters.own[at], return_inverse=True)
    one_hot = sparse.csr_array((np.ones(len(at)), (place, np.arange(len(at)))))
    means[present] += one_hot @ x
  means /= clusters.counts[:, None]
  distances = np.empty(len(clusters.own))
  for at, x in clusters.blocks("distances to means"):
    distances[at] = np.linalg.norm(x - means[clusters.own[at]], axis=1)
  return means, distances
