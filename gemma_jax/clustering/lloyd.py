"""Lloyd's iteration over blocks: nearest centroids, then their means.

No array of N x C ever exists: a block's scores do, and only until its labels
are known. Sums are of rows less their old centroid, so that they stay small,
and compensated across blocks.
"""

import functools
import logging
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma_jax.clustering.rows import Blocks

log = logging.getLogger("gemma_jax")

FOLD = 2**16  # rows that are summed in plain float32
LARGEST = 2**31 - 1  # rows that an int32 counts


class Iteration(NamedTuple):
  """Where Lloyd's algorithm stands.

  Attributes:
    number: iterations done.
    centroids: float32 [C, D], about the centre of the blocks.
    labels: int32 [N], nearest of the centroids before the last update.
    inertia: sum of squared distances to those.
    moved: rows whose label changed in the last iteration.
    shift: squared distance that the centroids moved, summed.
    counts: int64 [C], rows of each cluster.
  """

  number: int
  centroids: np.ndarray
  labels: np.ndarray
  inertia: float
  moved: int
  shift: float
  counts: np.ndarray


def chunk_size(clusters: int) -> int:
  """Centroids whose scores exist at once: few enough for a CPU's caches.

  As `block_size`, by benchmarks/clustering.py --blocks.
  """
  if jax.default_backend() != "cpu":
    return 2**12
  return 2**7 if clusters <= 2**9 else 2**9


def block_size(mesh: Mesh) -> int:
  """Rows of a block."""
  return (2**10 if jax.default_backend() == "cpu" else 2**15) * mesh.size


def scores(x: jax.Array, centroids: jax.Array) -> jax.Array:
  """x.c - |c|^2 / 2, the larger the nearer: [B, D], [C, D] -> [B, C]."""
  half = 0.5 * jnp.sum(centroids * centroids, axis=1, keepdims=True)
  # One product with a column more is less to write than a product and a sum.
  # GPUs would otherwise round the factors to TF32.
  return jnp.matmul(
    jnp.concatenate([x, jnp.ones_like(x[:, :1])], axis=1),
    jnp.concatenate([centroids, -half], axis=1).T,
    precision="highest",
  )


def first_at_least(s: jax.Array, least: jax.Array) -> jax.Array:
  """The first column of each row [B, C] that is at least [B], int32.

  Numbers of columns are float32 while they are compared: XLA reduces those
  several times faster on CPUs, where its argmax takes longer than the product.
  """
  last = s.shape[1] - 1
  before = jnp.arange(last, -1, -1, dtype=jnp.float32)
  most = jnp.max(jnp.where(s >= least[:, None], before, 0), axis=1)
  return last - most.astype(jnp.int32)


def first_largest(s: jax.Array) -> jax.Array:
  """The first largest column of each row [B, C], int32."""
  return first_at_least(s, jnp.max(s, axis=1))


def nearest(x: jax.Array, centroids: jax.Array) -> jax.Array:
  """The nearest centroid of each row, the first of equals.

  Args:
    x: [B, D], about the same centre as the centroids.
    centroids: [C, D].

  Returns:
    int32 [B].
  """
  best = label = None
  chunk = chunk_size(len(centroids))
  for start in range(0, len(centroids), chunk):
    s = scores(x, centroids[start : start + chunk])
    largest = jnp.max(s, axis=1)
    own = start + first_at_least(s, largest)
    if best is None:
      best, label = largest, own
    else:
      label = jnp.where(largest > best, own, label)
      best = jnp.maximum(largest, best)
  return label


class Sums(NamedTuple):
  """Sums of rows by cluster; of all but the last rows `high` + `low`.

  Attributes:
    counts: int32 [devices, C].
    part: float32 [devices, C, D], of the last rows.
    high: float32 [C, D].
    low: float32 [C, D], what rounding took from `high`.
  """

  counts: jax.Array
  part: jax.Array
  high: jax.Array
  low: jax.Array


def no_sums(mesh: Mesh, clusters: int, width: int) -> Sums:
  """Of no rows yet."""
  own = NamedSharding(mesh, P(mesh.axis_names))
  whole = NamedSharding(mesh, P())
  zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
  return Sums(
    jnp.zeros((mesh.size, clusters), jnp.int32, device=own),
    zeros((mesh.size, clusters, width), device=own),
    zeros((clusters, width), device=whole),
    zeros((clusters, width), device=whole),
  )


def add_rows(sums: Sums, rows: jax.Array, into: jax.Array) -> Sums:
  """Adds rows [B, D] to clusters [B] on one device; C and beyond is dropped."""
  return sums._replace(
    counts=sums.counts.at[0, into].add(1, mode="drop"),
    part=sums.part.at[0, into].add(rows, mode="drop"),
  )


@functools.partial(jax.jit, donate_argnums=0)
def _fold(sums: Sums) -> Sums:
  """Knuth's two-sum: what rounding takes from `high` goes to `low`."""
  part = sums.part.sum(0)
  high = sums.high + part
  back = high - sums.high
  error = (sums.high - (high - back)) + (part - back)
  return Sums(sums.counts, jnp.zeros_like(sums.part), high, sums.low + error)


def sharded(mesh: Mesh) -> Sums:
  """How `Sums` lie on the devices, for `jax.shard_map`."""
  own = P(mesh.axis_names)
  return Sums(own, own, P(), P())


def sum_blocks(blocks, sums: Sums, step) -> tuple[list, Sums]:
  """A pass: `step` of every block, and sums folded every `FOLD` rows.

  Args:
    blocks: of `Blocks`.
    sums: to add to; donated.
    step: (sums, number of the first row, x, valid) -> (sums, anything).

  Returns:
    What the steps gave besides, and the sums.
  """
  found, since = [], 0
  for start, x, valid in blocks:
    sums, other = step(sums, start, x, valid)
    found.append(other)
    since += len(x)
    if since >= FOLD:
      sums, since = _fold(sums), 0
  return found, _fold(sums)


def read_sums(sums: Sums) -> tuple[np.ndarray, np.ndarray]:
  """Counts int64 [C] and sums float64 [C, D], folded."""
  counts, _, high, low = jax.device_get(sums)
  return counts.sum(0, dtype=np.int64), high.astype(np.float64) + low


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _assign(mesh, sums, centroids, x, valid):
  """Sums of rows less their centroid; (labels, squared distances) [B]."""
  by_row = P(mesh.axis_names)

  def local(sums, centroids, x, valid):
    labels = nearest(x, centroids)
    apart = x - centroids[labels]
    distances = jnp.where(valid, jnp.sum(apart * apart, axis=1), 0)
    into = jnp.where(valid, labels, len(centroids))
    return add_rows(sums, apart, into), (labels, distances)

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(sharded(mesh), P(), by_row, by_row),
    out_specs=(sharded(mesh), (by_row, by_row)),
  )(sums, centroids, x, valid)


def assign(
  blocks: Blocks, centroids: np.ndarray, mesh: Mesh, rows: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """One pass.

  Returns:
    labels int32 [N], squared distances float32 [N], counts int64 [C] and sums
    of the rows less their centroid, float64 [C, D].
  """
  whole = NamedSharding(mesh, P())
  centroids = jax.device_put(np.asarray(centroids, np.float32), whole)

  def step(sums, start, x, valid):
    return _assign(mesh, sums, centroids, x, valid)

  found, sums = sum_blocks(blocks, no_sums(mesh, *centroids.shape), step)
  # Only now is anything waited for.
  labels, distances = (
    np.concatenate([np.asarray(part) for part in side])[:rows]
    for side in zip(*found, strict=True)
  )
  return labels, distances, *read_sums(sums)


def inertia(distances: np.ndarray) -> float:
  """Sum of squared distances, in float64."""
  return float(np.sum(distances, dtype=np.float64))


def lloyd(
  blocks: Blocks,
  take,
  start: Iteration,
  mesh: Mesh,
  *,
  unit: bool = False,
  rounding: float = 0.0,
) -> Iterator[Iteration]:
  """Iterations without end.

  An empty cluster goes to the row that is farthest from its centroid, as in
  scikit-learn; the log names how many did.

  Args:
    blocks: the rows.
    take: (numbers) -> those rows, float32 [n, D], as the blocks have them.
    start: centroids and labels to go on from.
    mesh: over which the rows are split.
    unit: whether centroids are scaled to norm 1.
    rounding: squared distances up to this are none.
  """
  now = start
  while True:
    labels, distances, counts, sums = assign(
      blocks, now.centroids, mesh, len(now.labels)
    )
    sums += counts[:, None] * now.centroids.astype(np.float64)
    _repair(counts, sums, labels, distances, take, rounding)
    means = sums / np.maximum(counts, 1)[:, None]
    # Opposite directions can leave no mean: then the old one stays.
    size = np.linalg.norm(means, axis=1) if unit else np.ones(len(means))
    good = ((counts > 0) & (size > 0))[:, None]
    means /= np.maximum(size, np.finfo(np.float64).tiny)[:, None]
    centroids = np.where(good, means, now.centroids)
    centroids = centroids.astype(np.float32)
    now = Iteration(
      now.number + 1,
      centroids,
      labels,
      inertia(distances),
      int(np.count_nonzero(labels != now.labels)),
      float(np.sum((centroids - now.centroids).astype(np.float64) ** 2)),
      counts,
    )
    yield now


def _repair(counts, sums, labels, distances, take, rounding) -> None:
  """Gives every empty cluster the farthest row, in place."""
  (empty,) = np.nonzero(counts == 0)
  if not len(empty):
    return
  far = np.argsort(-distances, kind="stable")[: len(empty)]
  far = far[distances[far] > rounding]
  log.info(
    "%d of %d clusters are empty; %d go to the rows farthest from their "
    "centroids",
    len(empty),
    len(counts),
    len(far),
  )
  moved = take(far).astype(np.float64)
  for cluster, row, x in zip(empty, far, moved, strict=False):
    old = labels[row]
    sums[old] -= x
    counts[old] -= 1
    sums[cluster] = x
    counts[cluster] = 1
