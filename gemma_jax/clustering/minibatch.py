"""Mini-batch k-means: centroids that follow a shuffled stream of rows.

For stores that are too long to be read in every iteration.
"""

import functools
import logging
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma_jax.clustering.lloyd import Iteration, nearest

log = logging.getLogger("gemma_jax")

REASSIGN = 0.01  # of the largest count: clusters below it are moved


@functools.partial(jax.jit, static_argnums=(0, 4), donate_argnums=(1, 2))
def _step(mesh, centroids, seen, x, unit):
  """Sculley 2010, algorithm 1, with a batch's rows of a cluster at once."""
  axes = mesh.axis_names

  def local(centroids, x):
    labels = nearest(x, centroids)
    apart = x - centroids[labels]
    part = jnp.zeros_like(centroids).at[labels].add(apart)
    counts = jnp.zeros(len(centroids), jnp.int32).at[labels].add(1)
    return jax.lax.psum((counts, part, jnp.sum(apart * apart)), axes)

  counts, part, inertia = jax.shard_map(
    local, mesh=mesh, in_specs=(P(), P(axes)), out_specs=P()
  )(centroids, x)
  seen = seen + counts
  new = centroids + part / jnp.maximum(seen, 1)[:, None]
  if unit:
    size = jnp.linalg.norm(new, axis=1, keepdims=True)
    new = jnp.where(size > 0, new / size, centroids)
  return new, seen, inertia, jnp.sum((new - centroids) ** 2)


def minibatch(
  batches: Iterator[np.ndarray],
  start: Iteration,
  mesh: Mesh,
  *,
  steps: int,
  seed: int,
  unit: bool = False,
) -> Iterator[Iteration]:
  """Iterations of `steps` batches each, without end.

  A centroid moves towards the mean of its rows of a batch, by their share in
  all that it has had. After every iteration clusters with less than 1 % of
  the largest count go to rows of the last batch, as in scikit-learn.

  Args:
    batches: float32 [B, D], about the centre of the centroids, shuffled; from
      batch `start.number * steps` on.
    start: centroids and counts to go on from.
    mesh: over which the rows of a batch are split.
    steps: batches of an iteration.
    seed: of the rows that centroids are moved to.
    unit: whether centroids are scaled to norm 1.

  Yields:
    Iterations whose inertia is of the rows of their batches, each against
    the centroids of its time, and `moved` of clusters, not rows.
  """
  by_row = NamedSharding(mesh, P(mesh.axis_names))
  now = start
  while True:
    whole = NamedSharding(mesh, P())
    seen = now.counts.astype(np.int32)
    centroids, seen = jax.device_put((now.centroids, seen), whole)
    inertia, shift = 0.0, 0.0
    for _ in range(steps):
      x = jax.device_put(next(batches), by_row)
      centroids, seen, part, moved = _step(mesh, centroids, seen, x, unit)
      inertia, shift = inertia + part, shift + moved
    centroids, counts = np.array(centroids), np.array(seen, np.int64)
    rng = np.random.default_rng((seed, now.number))
    few = _reassign(centroids, counts, np.asarray(x), rng)
    now = Iteration(
      now.number + 1,
      centroids,
      now.labels,
      float(inertia),
      few,
      float(shift),
      counts,
    )
    yield now


def _reassign(centroids, counts, x, rng) -> int:
  """Moves clusters that get next to nothing, in place; how many."""
  few = np.flatnonzero(counts < REASSIGN * counts.max())[: len(x) // 2]
  if len(few):
    log.info("%d of %d clusters go to other rows", len(few), len(counts))
    centroids[few] = x[rng.choice(len(x), len(few), replace=False)]
    counts[few] = max(1, np.delete(counts, few).min())
  return len(few)
