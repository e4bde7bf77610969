"""Where the first centroids come from."""

import functools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax import progress
from gemma_jax.clustering.lloyd import nearest
from gemma_jax.clustering.rows import Rows

log = logging.getLogger("gemma_jax")

KINDS = ("k-means++", "k-means||", "random")
SAMPLE = 2**15  # rows that k-means++ chooses from, at least
SAMPLE_EACH = 64  # and for each centroid
CHOSEN = 64  # centroids of one dispatch
ROUNDS = 5  # of k-means||
OVERSAMPLING = 2  # times C rows in each


def plus_plus(
  x: np.ndarray, clusters: int, *, weights: np.ndarray | None = None, seed: int
) -> np.ndarray:
  """Greedy k-means++: rows drawn by squared distance, the best of a few.

  Arthur and Vassilvitskii 2007, "k-means++: the advantages of careful
  seeding", section 2; of 2 (2 + log C) rows drawn, the one that leaves the
  least inertia. These are twice as many as in scikit-learn: they leave less,
  and what takes long is to read the rows, however many they are compared with.

  Args:
    x: [S, D], about its mean.
    clusters: C.
    weights: of the rows, [S]; None: equal.
    seed: of the draws.

  Returns:
    Numbers of the chosen rows, int64 [C]; rows come twice where fewer than C
    differ.
  """
  weights = np.ones(len(x)) if weights is None else np.asarray(weights)
  key = jax.random.key(seed)
  first = np.random.default_rng(seed).choice(len(x), p=weights / weights.sum())
  x, weights = (jnp.asarray(a, jnp.float32) for a in (x, weights))
  closest = jnp.sum((x - x[first]) ** 2, axis=1)
  chosen = [np.array([first])]
  trials = 2 * (2 + int(math.log(clusters)))
  with progress.bar(clusters, "k-means++", unit="centroids") as bar:
    bar.update(1)
    for start in range(1, clusters, CHOSEN):
      count = min(CHOSEN, clusters - start)
      numbers = jnp.arange(start, start + count)
      closest, found = _choose(trials, x, weights, closest, key, numbers)
      chosen.append(np.asarray(found))
      bar.update(count)
  return np.concatenate(chosen).astype(np.int64)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _choose(trials, x, weights, closest, key, numbers):
  """The squared distances with more centroids, and which rows those are."""
  squares = jnp.sum(x * x, axis=1)

  def one(closest, number):
    mass = jnp.cumsum(weights * closest)
    draw = jax.random.uniform(jax.random.fold_in(key, number), (trials,))
    rows = jnp.searchsorted(mass, draw * mass[-1], side="right")
    rows = jnp.minimum(rows, len(x) - 1)
    c = x[rows]
    products = jnp.matmul(x, c.T, precision="highest")
    apart = squares[:, None] - 2 * products + squares[rows]
    left = jnp.minimum(closest[:, None], jnp.maximum(apart, 0))
    best = jnp.argmin(weights @ left)
    # The row itself is at distance 0, whatever rounding says.
    return left[:, best].at[rows[best]].set(0), rows[best]

  return jax.lax.scan(one, closest, numbers)


def parallel(rows: Rows, clusters: int, centre, *, seed: int) -> np.ndarray:
  """k-means||: a few rounds of many rows, then k-means++ of those.

  Bahmani, Moseley, Vattani, Kumar and Vassilvitskii 2012, "Scalable
  k-means++", algorithm 2.

  Args:
    rows: N of them.
    clusters: C.
    centre: [D], subtracted from the rows.
    seed: of the draws.

  Returns:
    [C, D], about the centre.
  """
  rng = np.random.default_rng(seed)
  count = len(rows)
  chosen = np.array([rng.integers(count)])
  x = rows.take(chosen) - centre
  distances = np.full(count, np.inf)
  owner = np.zeros(count, np.int64)
  new, before = x, 0
  for turn in range(ROUNDS + 1):
    _update(rows, centre, new, before, distances, owner)
    if turn == ROUNDS:
      break
    share = OVERSAMPLING * clusters * distances / max(distances.sum(), 1e-30)
    drawn = np.flatnonzero(rng.random(count) < share)
    new, before = rows.take(drawn) - centre, len(x)
    x = np.concatenate([x, new])
  if len(x) < clusters:
    raise ValueError(
      f"k-means|| found {len(x)} rows for {clusters} clusters: few rows "
      "differ. Ask for fewer clusters."
    )
  weights = np.bincount(owner, minlength=len(x))
  return x[plus_plus(x, clusters, weights=weights, seed=seed)]


def _update(rows, centre, new, before, distances, owner, block=2**13) -> None:
  """Squared distances and owners with candidates `before`.. added, in place."""
  if not len(new):
    return
  for start in range(0, len(rows), block):
    part = slice(start, min(start + block, len(rows)))
    x = rows.read(part.start, part.stop) - centre
    index, apart = map(np.asarray, _closest(x.astype(np.float32), new))
    nearer = apart < distances[part]
    distances[part] = np.where(nearer, apart, distances[part])
    owner[part] = np.where(nearer, before + index, owner[part])


@jax.jit
def _closest(x, candidates):
  index = nearest(x, candidates)
  return index, jnp.sum((x - candidates[index]) ** 2, axis=1)


def seed_centroids(
  rows: Rows, clusters: int, kind: str, centre: np.ndarray, *, seed: int
) -> np.ndarray:
  """The first centroids, float32 [C, D], about the centre.

  Args:
    rows: N of them.
    clusters: C.
    kind: one of `KINDS`; "k-means++" chooses from a sample of
      max(2^15, 64 C) rows.
    centre: [D], subtracted from the rows.
    seed: of the draws.

  Raises:
    ValueError: another kind.
  """
  if kind not in KINDS:
    raise ValueError(
      f"init={kind!r}; expected one of {', '.join(KINDS)}, bisecting, or "
      "centroids [C, D]."
    )
  if kind == "k-means||":
    return parallel(rows, clusters, centre, seed=seed)
  rng = np.random.default_rng(seed)
  size = max(SAMPLE, SAMPLE_EACH * clusters)
  if kind == "random":
    size = clusters
  if size < len(rows):
    drawn = np.sort(rng.choice(len(rows), size, replace=False))
    x = rows.take(drawn)
  else:
    x = rows.read(0, len(rows))
  x = (x - centre).astype(np.float32)
  if kind == "random":
    return x
  if len(x) < len(rows):
    log.info("k-means++ on %d of %d rows", len(x), len(rows))
  return x[plus_plus(x, clusters, seed=seed)]
