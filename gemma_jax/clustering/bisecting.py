"""Many centroids for little: clusters are split in two, all at once.

A row is only ever compared with the two halves of its own cluster, so a pass
costs N D whatever C is; k-means++ needs N D for every centroid.
"""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gemma_jax import progress
from gemma_jax.clustering.lloyd import (
  add_rows,
  no_sums,
  read_sums,
  sharded,
  sum_blocks,
)
from gemma_jax.clustering.rows import Blocks

log = logging.getLogger("gemma_jax")

PASSES = 6  # of 2-means in a split


def bisect(
  blocks: Blocks, take, clusters: int, rows: int, mesh: Mesh, *, seed: int
) -> np.ndarray:
  """Centroids by bisecting k-means, [C, D], about the centre of the blocks.

  The cluster with the largest inertia is split by 2-means, again and again
  (Steinbach, Karypis and Kumar 2000, "A comparison of document clustering
  techniques", section 3). Clusters with at least half of the largest inertia
  are split in the same passes: their turn comes before that of any half.

  Args:
    blocks: the rows.
    take: (numbers) -> those rows, [n, D], as the blocks have them.
    clusters: C.
    rows: N.
    mesh: over which the rows are split.
    seed: of the rows that the first cuts are made through.

  Raises:
    ValueError: fewer rows differ than there are clusters.
  """
  rng = np.random.default_rng(seed)
  labels = np.zeros(rows, np.int32)
  centroids, counts, inertia = _sums(blocks, mesh, labels, 1)
  whole = np.zeros(1, bool)  # no cut parts their rows
  with progress.bar(clusters, "bisecting", unit="centroids") as bar:
    bar.update(1)
    while (now := len(centroids)) < clusters:
      able = np.flatnonzero((counts > 1) & (inertia >= inertia.max() / 2))
      able = able[np.argsort(-inertia[able], kind="stable")][: clusters - now]
      if not inertia.max() > 0 or not len(able):
        raise ValueError(
          f"{clusters} clusters of rows of which only {now} differ. Ask for at "
          f"most {now}."
        )
      labels = _split(blocks, mesh, take, labels, centroids, able, rng)
      # What seems to be inertia may be rounding: then a half stays empty.
      there = np.bincount(labels, minlength=now + len(able)) > 0
      labels = (np.cumsum(there, dtype=np.int32) - 1)[labels]
      failed = ~(there[able] & there[now:])
      whole = np.append(whole, failed)
      whole[able] = failed
      whole = whole[there]
      centroids, counts, inertia = _sums(blocks, mesh, labels, len(whole))
      inertia[whole] = 0
      bar.update(len(whole) - now)
  return centroids.astype(np.float32)


def _split(blocks, mesh, take, labels, centroids, able, rng):
  """Labels after a split of the clusters `able`; new ones are the last."""
  now = len(centroids)
  # A random row of each cluster: the first cut is across the way to it.
  order = rng.permutation(len(labels))
  first = order[np.unique(labels[order], return_index=True)[1]]
  middle = centroids.astype(np.float32)
  way = np.zeros_like(middle)
  way[able] = take(first[able]) - middle[able]
  # Where that row is the mean itself, across any.
  none = able[~way[able].any(axis=1)]
  way[none] = rng.standard_normal(way[none].shape)
  child = np.full(now, -1, np.int32)
  child[able] = now + np.arange(len(able), dtype=np.int32)
  for _ in range(PASSES):
    new = _cut(blocks, labels, middle, way, child)
    halves, counts, _ = _sums(blocks, mesh, new, now + len(able))
    whole = (counts[able] > 0) & (counts[child[able]] > 0)
    a, b = halves[able[whole]], halves[child[able[whole]]]
    middle[able[whole]] = (a + b) / 2
    way[able[whole]] = b - a
  return new


def _cut(blocks, labels, middle, way, child):
  """Labels with the rows beyond the middle of their cluster in its child."""
  middle, way, child = map(jnp.asarray, (middle, way, child))
  found = [
    _sides(x, _padded(labels, start, len(x)), middle, way, child)
    for start, x, _ in blocks
  ]
  return np.concatenate([np.asarray(f) for f in found])[: len(labels)]


@jax.jit
def _sides(x, labels, middle, way, child):
  beyond = jnp.sum((x - middle[labels]) * way[labels], axis=1) > 0
  new = child[labels]
  return jnp.where(beyond & (new >= 0), new, labels)


def _sums(blocks, mesh, labels, clusters):
  """Means float64 [C, D], counts and inertia of given clusters."""
  width = blocks.width + 1  # the last column sums squares

  def step(sums, start, x, valid):
    return _add(mesh, sums, x, valid, _padded(labels, start, len(x))), None

  _, sums = sum_blocks(blocks, no_sums(mesh, clusters, width), step)
  counts, sums = read_sums(sums)
  means = sums[:, :-1] / np.maximum(counts, 1)[:, None]
  inertia = sums[:, -1] - counts * np.einsum("cd,cd->c", means, means)
  return means, counts, np.maximum(inertia, 0)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _add(mesh, sums, x, valid, labels):
  by_row = P(mesh.axis_names)

  def local(sums, x, valid, labels):
    squares = jnp.sum(x * x, axis=1, keepdims=True)
    into = jnp.where(valid, labels, sums.high.shape[0])
    return add_rows(sums, jnp.concatenate([x, squares], axis=1), into)

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(sharded(mesh), by_row, by_row, by_row),
    out_specs=sharded(mesh),
  )(sums, x, valid, labels)


def _padded(labels, start, size):
  part = labels[start : start + size]
  return np.pad(part, (0, size - len(part)))
