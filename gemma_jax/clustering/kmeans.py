"""k-means by Lloyd's algorithm, of arrays and of stores."""

import dataclasses
import logging
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from gemma_jax import progress
from gemma_jax.clustering import lloyd
from gemma_jax.clustering.bisecting import bisect
from gemma_jax.clustering.minibatch import minibatch
from gemma_jax.clustering.rows import Blocks, Rows, as_rows, centre
from gemma_jax.clustering.seeding import seed_centroids

log = logging.getLogger("gemma_jax")

ROUNDING = 1e-12  # times the variance of a row: float32 tells no less apart


@dataclasses.dataclass(frozen=True)
class KMeans:
  """C centroids and whose each row is.

  Attributes:
    centroids: float32 [C, D].
    labels: int32 [N], the nearest centroid of each row, the first of equals.
    inertia: sum over rows of the squared distance to it.
    n_iter: updates of the centroids.
    counts: int64 [C], rows of each cluster.
  """

  centroids: np.ndarray
  labels: np.ndarray
  inertia: float
  n_iter: int
  counts: np.ndarray


class Lloyd:
  """Lloyd's algorithm on some rows: where it starts, goes on and ends.

  Args:
    x: rows [N, D], or `Rows` that are read in every pass.
    k: C.
    spherical: by angle: rows and centroids have norm 1.
    tol: it has converged when the squared shifts of the centroids sum to at
      most this times the mean variance of a dim, as in scikit-learn.
    mesh: over all of whose devices the rows are split; None: one device.

  Raises:
    ValueError: k that is no number of clusters of these rows; a zero row,
      when spherical.
    FloatingPointError: a row that is not finite; names it.
  """

  def __init__(
    self,
    x,
    k: int,
    *,
    spherical: bool = False,
    tol: float = 1e-4,
    mesh: Mesh | None = None,
  ):
    self._rows: Rows = as_rows(x)
    if not 1 <= k <= len(self._rows) <= lloyd.LARGEST:
      raise ValueError(
        f"k={k} clusters of {len(self._rows)} rows: expected at least 1 and no "
        f"more than there are rows, of which at most {lloyd.LARGEST}."
      )
    if mesh is None:
      mesh = jax.make_mesh(
        (1,),
        ("data",),
        devices=jax.devices()[:1],
        axis_types=(AxisType.Auto,),
      )
    self._mesh, self._k, self._unit = mesh, k, spherical
    mean, variance = centre(self._rows)
    self._centre = np.zeros_like(mean) if spherical else mean
    variance = 1 / len(mean) if spherical else variance
    self._least_shift = tol * variance
    self._rounding = ROUNDING * len(mean) * variance
    self._blocks = Blocks(
      self._rows,
      lloyd.block_size(mesh),
      centre=self._centre,
      unit=spherical,
      mesh=mesh,
    )

  def _take(self, numbers: np.ndarray) -> np.ndarray:
    return self._placed(self._rows.take(numbers))

  def _placed(self, x: np.ndarray) -> np.ndarray:
    """In the coordinates of the blocks."""
    x = np.asarray(x, np.float64) - self._centre
    if self._unit:
      norm = np.linalg.norm(x, axis=1, keepdims=True)
      x = x / np.maximum(norm, np.finfo(np.float64).tiny)
    return x.astype(np.float32)

  def start(self, init: str | np.ndarray, *, seed: int) -> lloyd.Iteration:
    """Before the first iteration.

    Args:
      init: a kind of `seeding.KINDS`, "bisecting", or centroids [C, D].
      seed: of the draws.

    Raises:
      ValueError: centroids that are not [C, D], or another kind.
      FloatingPointError: centroids that are not finite.
    """
    if isinstance(init, str):
      if init == "bisecting":
        first = bisect(
          self._blocks,
          self._take,
          self._k,
          len(self._rows),
          self._mesh,
          seed=seed,
        )
      else:
        first = seed_centroids(
          self._rows, self._k, init, self._centre, seed=seed
        )
      first = first + self._centre
    else:
      first = np.asarray(init)
      expected = self._k, self._rows.width
      if first.shape != expected:
        raise ValueError(
          f"init is {first.shape}; expected centroids [C, D], {expected}."
        )
      if not np.isfinite(first).all():
        raise FloatingPointError("The centroids of init are not all finite.")
    return lloyd.Iteration(
      0,
      self._placed(first),
      np.full(len(self._rows), -1, np.int32),
      np.inf,
      len(self._rows),
      np.inf,
      np.zeros(self._k, np.int64),
    )

  def iterations(self, start: lloyd.Iteration) -> Iterator[lloyd.Iteration]:
    """Iterations from `start` to convergence; it may never come."""
    for now in lloyd.lloyd(
      self._blocks,
      self._take,
      start,
      self._mesh,
      unit=self._unit,
      rounding=self._rounding,
    ):
      yield now
      if self.converged(now):
        return

  def converged(self, now: lloyd.Iteration) -> bool:
    """Whether `iterations` ends with this one."""
    return not now.moved or now.shift <= self._least_shift

  def minibatches(
    self, start: lloyd.Iteration, size: int, *, seed: int
  ) -> Iterator[lloyd.Iteration]:
    """Mini-batch iterations without end, each of about all rows.

    Args:
      start: to go on from.
      size: rows of a batch.
      seed: of their order.

    Raises:
      ValueError: more rows than there are, or than the mesh divides.
    """
    steps = len(self._rows) // size if size > 0 else 0
    if not steps or size % self._mesh.size:
      raise ValueError(
        f"Mini-batches of {size} from {len(self._rows)} rows: expected at most "
        f"as many, and a multiple of the {self._mesh.size} devices."
      )
    stream = self._rows.batches(size, seed, start.number * steps)
    return minibatch(
      map(self._placed, stream),
      start,
      self._mesh,
      steps=steps,
      seed=seed,
      unit=self._unit,
    )

  def finish(self, last: lloyd.Iteration) -> KMeans:
    """The labels and the inertia of the last centroids.

    Raises:
      ValueError: there are fewer different rows than clusters.
    """
    labels, distances, counts, _ = lloyd.assign(
      self._blocks, last.centroids, self._mesh, len(self._rows)
    )
    if empty := int((counts == 0).sum()):
      if (distances <= self._rounding).all():
        raise ValueError(
          f"{self._k} clusters of rows of which only {self._k - empty} differ. "
          f"Ask for at most {self._k - empty}."
        )
      log.warning("%d of %d clusters are empty", empty, self._k)
    centroids = (last.centroids + self._centre).astype(np.float32)
    return KMeans(
      centroids, labels, lloyd.inertia(distances), last.number, counts
    )


def kmeans(
  x: np.ndarray | Rows,
  k: int,
  *,
  seed: int = 0,
  init: str | np.ndarray = "k-means++",
  max_iter: int = 100,
  tol: float = 1e-4,
  spherical: bool = False,
  mesh: Mesh | None = None,
) -> KMeans:
  """k-means by Lloyd's algorithm.

  From the same centroids it gives the labels and inertia of scikit-learn's
  `KMeans`. All rows are used, and float32 distances are about the mean of the
  rows: an offset costs no precision.

  Args:
    x: rows [N, D], or `Rows`.
    k: C.
    seed: of the first centroids.
    init: "k-means++" (of a sample; see `seeding`), "k-means||", "bisecting",
      which is far cheaper for thousands of clusters, "random", or centroids
      [C, D].
    max_iter: updates of the centroids, at most.
    tol: see `Lloyd`.
    spherical: by angle: rows and centroids have norm 1, and the inertia is of
      such rows (Dhillon and Modha 2001).
    mesh: over all of whose devices the rows are split; None: one device.

  Raises:
    ValueError: more clusters than rows or than different rows; centroids of
      another shape; a zero row, when spherical.
    FloatingPointError: rows or centroids that are not finite.
  """
  if max_iter < 1 or not tol >= 0:
    raise ValueError(
      f"max_iter={max_iter} must be at least 1, tol={tol} at least 0."
    )
  method = Lloyd(x, k, spherical=spherical, tol=tol, mesh=mesh)
  start = method.start(init, seed=seed)
  with progress.bar(max_iter, f"k-means, C = {k}", unit="iterations") as bar:
    for now in method.iterations(start):
      bar.update(1)
      bar.set_postfix(
        inertia=f"{now.inertia:.5g}",
        moved=f"{now.moved / len(now.labels):.2%}",
        refresh=False,
      )
      if now.number == max_iter:
        break
  return method.finish(now)
