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

from gemma_jax.clustering.bounds import Bounds, rivals
from gemma_jax.clustering.nearest import chunk_size, nearest
from gemma_jax.clustering.rows import Blocks

log = logging.getLogger("gemma_jax")

FOLD = 2**16  # rows that are summed in plain float32
LARGEST = 2**31 - 1  # rows that an int32 counts
BOUNDED_FROM = 2**10  # clusters; with fewer, all scores cost as little
WASTEFUL = 0.7  # share of open rows above which bounds spare nothing
STEPS = 4  # sizes that the open rows of a block are padded to


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


def block_size(clusters: int, mesh: Mesh) -> int:
  """Rows of a block: benchmarks/clustering.py --blocks."""
  if jax.default_backend() != "cpu":
    return 2**15 * mesh.size
  return (2**12 if clusters <= chunk_size() else 2**10) * mesh.size


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


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _keep(mesh, sums, centroids, limits, x, valid, bounds, own):
  """As `_assign`, of the rows that keep their label; the others are open.

  Returns:
    Sums without the open rows, (labels, squared distances) as if all kept
    theirs, and which are open, [B].
  """
  by_row = P(mesh.axis_names)

  def local(sums, centroids, limits, x, valid, bounds, own):
    mine = centroids[own]
    least = jnp.sum((x - 0.5 * mine) * mine, axis=1)
    # Its own bound is among them.
    open_ = valid & (rivals(bounds, limits, least) > 1)
    apart = x - mine
    distances = jnp.where(valid, jnp.sum(apart * apart, axis=1), 0)
    into = jnp.where(valid & ~open_, own, len(centroids))
    return add_rows(sums, apart, into), (own, distances), open_

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(sharded(mesh), P(), P(), by_row, by_row, by_row, by_row),
    out_specs=(sharded(mesh), (by_row, by_row), by_row),
  )(sums, centroids, limits, x, valid, bounds, own)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _settle(mesh, sums, centroids, x, found, rows):
  """Open rows, by number on their device: their nearest centroids."""
  by_row = P(mesh.axis_names)

  def local(sums, centroids, x, found, rows):
    some = x.at[rows].get(mode="clip")
    labels = nearest(some, centroids)
    apart = some - centroids[labels]
    into = jnp.where(rows < len(x), labels, len(centroids))
    new = labels, jnp.sum(apart * apart, axis=1)
    return add_rows(sums, apart, into), tuple(
      old.at[rows].set(values, mode="drop")
      for old, values in zip(found, new, strict=True)
    )

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(sharded(mesh), P(), by_row, (by_row, by_row), by_row),
    out_specs=(sharded(mesh), (by_row, by_row)),
  )(sums, centroids, x, found, rows)


def _numbers(open_: np.ndarray, ways: int) -> np.ndarray | None:
  """Numbers of the open rows on each of `ways` devices, padded; None: none."""
  each = open_.reshape(ways, -1)
  most = int(each.sum(1).max())
  if not most:
    return None
  step = -(-each.shape[1] // STEPS)
  out = np.full((ways, -(-most // step) * step), each.shape[1], np.int32)
  for device, here in enumerate(each):
    (numbers,) = np.nonzero(here)
    out[device, : len(numbers)] = numbers
  return out.ravel()


def assign(
  blocks: Blocks,
  centroids: np.ndarray,
  mesh: Mesh,
  rows: int,
  *,
  labels: np.ndarray | None = None,
  bounds: Bounds | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """One pass.

  Args:
    blocks: the rows.
    centroids: [C, D].
    mesh: over which the rows are split.
    rows: N.
    labels: int32 [N], guesses, with which `bounds` can spare products.
    bounds: of the rows; None: all scores are computed.

  Returns:
    labels int32 [N], squared distances float32 [N], counts int64 [C] and sums
    of the rows less their centroid, float64 [C, D].
  """
  whole = NamedSharding(mesh, P())
  by_row = NamedSharding(mesh, P(mesh.axis_names))
  centroids = jax.device_put(np.asarray(centroids, np.float32), whole)
  limits = None
  if bounds is not None and labels is not None and labels.min() >= 0:
    limits = bounds.of_centroids(centroids)

  def step(sums, start, x, valid):
    nonlocal limits
    if limits is None:
      return _assign(mesh, sums, centroids, x, valid)
    own = labels[start : start + len(x)]
    own = jax.device_put(np.pad(own, (0, len(x) - len(own))), by_row)
    made = bounds.of_block(start, x, blocks.kept)
    sums, found, open_ = _keep(
      mesh, sums, centroids, limits, x, valid, made, own
    )
    open_ = np.asarray(open_)
    if open_.mean() > WASTEFUL:
      limits = None  # for the rest of this pass
    numbers = _numbers(open_, mesh.size)
    if numbers is None:
      return sums, found
    numbers = jax.device_put(numbers, by_row)
    return _settle(mesh, sums, centroids, x, found, numbers)

  found, sums = sum_blocks(blocks, no_sums(mesh, *centroids.shape), step)
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
  bounds: Bounds | None = None,
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
    bounds: of the rows; see `assign`.
  """
  now = start
  while True:
    labels, distances, counts, sums = assign(
      blocks,
      now.centroids,
      mesh,
      len(now.labels),
      labels=now.labels,
      bounds=bounds,
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
