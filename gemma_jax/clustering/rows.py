"""Rows to cluster: an array, or a site of a store in some coordinates."""

import itertools
from collections.abc import Callable, Iterator
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma_jax import machine
from gemma_jax.activations import ActivationStore, Normalisation
from gemma_jax.data.ahead import ahead

SHARE = 0.4  # of the free memory that blocks may be kept in
AHEAD = 2  # blocks read before they are asked for


class Rows(Protocol):
  """N rows of D numbers that need not be in memory."""

  width: int

  def __len__(self) -> int: ...
  def read(self, start: int, stop: int) -> np.ndarray: ...
  def take(self, numbers: np.ndarray) -> np.ndarray: ...
  def batches(
    self, size: int, seed: int, start: int
  ) -> Iterator[np.ndarray]: ...


class ArrayRows:
  """An array [N, D] as rows.

  Raises:
    ValueError: it is not [N, D], or has no rows.
  """

  def __init__(self, x):
    x = np.asarray(x)
    if x.ndim != 2 or not x.size:
      raise ValueError(f"Expected rows [N, D], got an array {x.shape}.")
    self._x = np.ascontiguousarray(x, np.float32)
    self.width = x.shape[1]

  def __len__(self) -> int:
    return len(self._x)

  def read(self, start: int, stop: int) -> np.ndarray:
    """Rows `start` to `stop`, float32 [n, D]."""
    return self._x[start:stop]

  def take(self, numbers: np.ndarray) -> np.ndarray:
    """Any rows, float32 [n, D]."""
    return self._x[numbers]

  def batches(self, size: int, seed: int, start: int) -> Iterator[np.ndarray]:
    """Endless shuffled batches [size, D] from number `start` on."""
    each = len(self) // size
    for epoch in itertools.count(start // each):
      order = np.random.default_rng((seed, epoch)).permutation(len(self))
      for batch in range(start % each, each):
        yield self._x[order[batch * size : (batch + 1) * size]]
      start = 0


class StoredRows:
  """A site of a store as rows.

  Args:
    store: activations.
    site: of it.
    normalisation: the coordinates to cluster in; None: raw.
  """

  def __init__(
    self,
    store: ActivationStore,
    site: str,
    normalisation: Normalisation | None = None,
  ):
    self._store, self._site = store, site
    self._normalisation = normalisation
    self.width = store.empty(0, site).shape[1]

  def __len__(self) -> int:
    return len(self._store)

  def _place(self, x: np.ndarray) -> np.ndarray:
    if self._normalisation is not None:
      x = self._normalisation.apply(x)
    return np.asarray(x, np.float32)

  def read(self, start: int, stop: int) -> np.ndarray:
    """Rows `start` to `stop`, float32 [n, D]."""
    return self._place(self._store.read(start, stop, self._site))

  def take(self, numbers: np.ndarray) -> np.ndarray:
    """Any rows, float32 [n, D]."""
    return self._place(self._store.take(numbers, self._site))

  def batches(self, size: int, seed: int, start: int) -> Iterator[np.ndarray]:
    """Endless shuffled batches [size, D] from number `start` on."""
    for batch in self._store.stream(
      size, seed, sites=(self._site,), start=start
    ):
      yield self._place(batch[self._site])


class MappedRows:
  """Rows as a function has them.

  Args:
    rows: what is mapped.
    function: float32 [n, D] -> [n, E].
    width: E.
  """

  def __init__(self, rows: Rows, function: Callable, width: int):
    self._rows, self._function = rows, function
    self.width = width

  def __len__(self) -> int:
    return len(self._rows)

  def read(self, start: int, stop: int) -> np.ndarray:
    """Rows `start` to `stop`, float32 [n, E]."""
    return np.asarray(self._function(self._rows.read(start, stop)))

  def take(self, numbers: np.ndarray) -> np.ndarray:
    """Any rows, float32 [n, E]."""
    return np.asarray(self._function(self._rows.take(numbers)))

  def batches(self, size: int, seed: int, start: int) -> Iterator[np.ndarray]:
    """Endless shuffled batches [size, E] from number `start` on."""
    for x in self._rows.batches(size, seed, start):
      yield np.asarray(self._function(x))


def as_rows(x) -> Rows:
  """`x` itself, or an array as rows."""
  return x if hasattr(x, "read") else ArrayRows(x)


class Blocks:
  """Rows on the devices, in blocks of one shape, about a centre.

  They stay there where they fit, and are read again in every pass where they
  do not.

  Args:
    rows: N of them.
    size: B, rows in a block, at most; rounded to what the mesh divides.
    centre: [D], subtracted from every row: far from the origin, distances
      would cancel.
    unit: whether rows are scaled to norm 1.
    mesh: over all of whose devices the rows of a block are split.

  Raises:
    ValueError: a zero row that would be scaled; names it.
  """

  def __init__(
    self,
    rows: Rows,
    size: int,
    *,
    centre: np.ndarray,
    unit: bool = False,
    mesh: Mesh,
  ):
    self._rows, self._unit, self.width = rows, unit, rows.width
    self._centre = np.asarray(centre, np.float32)
    ways = mesh.size
    self.size = -(-min(size, len(rows)) // ways) * ways
    self._sharding = NamedSharding(mesh, P(mesh.axis_names))
    free = SHARE * machine.device_memory()[1] * ways
    self._kept: list | None = [] if 4 * rows.width * len(rows) < free else None

  def __len__(self) -> int:
    return -(-len(self._rows) // self.size)

  def __iter__(self) -> Iterator[tuple[int, jax.Array, jax.Array]]:
    """(number of the first row, x [B, D], whether each is a row [B])."""
    if self._kept is None:
      yield from ahead(self._read, AHEAD)
    elif self._kept:
      yield from self._kept
    else:
      found = []
      for block in ahead(self._read, AHEAD):
        found.append(block)
        yield block
      self._kept = found

  def _read(self):
    for start in range(0, len(self._rows), self.size):
      stop = min(start + self.size, len(self._rows))
      x = self._rows.read(start, stop) - self._centre
      if self._unit:
        norm = np.linalg.norm(x, axis=1, keepdims=True)
        if not norm.all():
          zero = start + np.flatnonzero(norm[:, 0] == 0)
          raise ValueError(
            f"Row {zero[0]} is zero and has no direction ({len(zero)} such "
            f"rows of {len(x)}). Leave them out, or do not cluster by angle."
          )
        x = x / norm
      x = np.pad(x, ((0, self.size - len(x)), (0, 0)))
      valid = np.arange(self.size) < stop - start
      yield start, *jax.device_put((x, valid), self._sharding)


def centre(rows: Rows, block: int = 2**14) -> tuple[np.ndarray, float]:
  """Mean [D] and mean variance of a dim, in float64.

  Raises:
    FloatingPointError: a row that is not finite; names it.
  """
  total, squares, shift = 0.0, 0.0, None
  for start in range(0, len(rows), block):
    x = rows.read(start, min(start + block, len(rows)))
    if not np.isfinite(x).all():
      bad = start + int(np.flatnonzero(~np.isfinite(x).all(1))[0])
      raise FloatingPointError(
        f"Row {bad} is not finite. Find what made it, or leave it out."
      )
    shift = x[:1].astype(np.float64) if shift is None else shift
    x = x - shift
    total = total + x.sum(0)
    squares = squares + np.einsum("nd,nd->d", x, x)
  mean = total / len(rows)
  variance = squares / len(rows) - mean**2
  return shift[0] + mean, float(variance.mean())
