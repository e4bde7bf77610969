"""Shuffled batches whose whole state is one number."""

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from gemma_jax.activations import layout
from gemma_jax.data.ahead import ahead

if TYPE_CHECKING:
  from gemma_jax.activations.store import ActivationStore

AHEAD = 2  # batches made before they are asked for
# Copies of rows do not care what the bytes mean, and NumPy knows these well.
_BYTES = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def check_batches(batch_size: int, start: int) -> None:
  """Raises ValueError unless there are batches of such a size and number."""
  if batch_size < 1 or start < 0:
    raise ValueError(
      f"batch_size={batch_size} must be at least 1, start={start} at least 0."
    )


class Stream:
  """Endless batches of stores' rows in an order that the seed decides.

  Each epoch of a store deals its chunks, shuffled, into blocks of
  `buffer_rows` rows and shuffles the rows of each block; every row comes once
  per epoch, and epochs follow one another without a gap. Batch b is a pure
  function of (stores, seed, b), so `start=b` resumes exactly. A store that
  fits one block is read once and shuffled perfectly.

  Of several stores, every batch holds the share of each that its weight says,
  in an order shuffled within the batch.

  Args:
    stores: where to read: one, or several with the same sites.
    batch_size: B, rows in a batch.
    seed: of the order.
    weights: share of each store; by default in proportion to their rows.
    sites: which to read, labels too; None means all sites.
    start: number of the first batch to yield.
    buffer_rows: rows of a block, held in memory for each store; twice as many
      while the next block is read.
    sharding: where batches are put, `jax.sharding.NamedSharding` of the rows;
      None leaves them in NumPy.

  Raises:
    ValueError: a batch of no rows, a store shorter than one batch, stores
      whose sites differ, or weights that leave a store less than a row of
      every batch.
    KeyError: a site that a store lacks.
  """

  def __init__(
    self,
    stores: "ActivationStore | Sequence[ActivationStore]",
    batch_size: int,
    seed: int,
    *,
    weights: Sequence[float] | None = None,
    sites: Sequence[str] | None = None,
    start: int = 0,
    buffer_rows: int = 2**18,
    sharding: Any = None,
  ):
    check_batches(batch_size, start)
    stores = list(stores) if isinstance(stores, Sequence) else [stores]
    sites = tuple(stores[0].sites if sites is None else sites)
    for store in stores:
      for site in sites:
        first, here = stores[0].empty(0, site), store.empty(0, site)
        if (first.shape, first.dtype) != (here.shape, here.dtype):
          raise ValueError(
            f"{site} is {first.dtype}{list(first.shape[1:])} in "
            f"{stores[0].path} and {here.dtype}{list(here.shape[1:])} in "
            f"{store.path}. Mix stores of one width and dtype."
          )
      if len(store) < batch_size:
        raise ValueError(
          f"{store.path} has {len(store)} rows, fewer than one batch of "
          f"{batch_size}. Harvest more tokens or make the batch smaller."
        )
    if weights is None:
      weights = [len(store) for store in stores]
    if len(weights) != len(stores) or not all(
      math.isfinite(w) and w * batch_size >= sum(weights) for w in weights
    ):
      raise ValueError(
        f"weights={list(weights)} of {len(stores)} stores: expected one each, "
        f"of at least one row in a batch of {batch_size}."
      )
    self._stores, self._sites = stores, sites
    self._batch, self._seed, self._start = batch_size, seed, start
    # 0.29 of 100 rows are 29; in floating point they round down to 28.
    exact = [Fraction(str(w)) for w in weights]
    self._edges = [sum(exact[:i]) / sum(exact) for i in range(1, len(exact))]
    self._buffer_rows, self._sharding = buffer_rows, sharding

  def __iter__(self) -> Iterator[dict[str, Any]]:
    return ahead(self._batches, AHEAD)

  def _cursors(self, batch: int) -> np.ndarray:
    """Rows of each store that came before a batch, int64 [stores + 1]."""
    rows = batch * self._batch
    before = [math.floor(edge * rows) for edge in self._edges]
    return np.diff([0, *before, rows])

  def _batches(self) -> Iterator[dict[str, Any]]:
    cursors = self._cursors(self._start)
    readers = [
      _Reader(store, self._sites, (self._seed, i), int(at), self._buffer_rows)
      for i, (store, at) in enumerate(zip(self._stores, cursors, strict=True))
    ]
    number = self._start
    while True:
      after = self._cursors(number + 1)
      batch = {s: self._stores[0].empty(self._batch, s) for s in self._sites}
      at = 0
      for reader, count in zip(readers, after - cursors, strict=True):
        reader.fill({s: x[at : at + count] for s, x in batch.items()})
        at += count
      if len(readers) > 1:
        rng = np.random.default_rng((self._seed, len(readers), number))
        order = rng.permutation(self._batch)
        batch = {site: x[order] for site, x in batch.items()}
      yield self._put(batch)
      cursors, number = after, number + 1

  def _put(self, batch):
    if self._sharding is None:
      return batch
    # Not device_put, which wants all devices to be of this process.
    return {
      site: jax.make_array_from_callback(
        x.shape, self._sharding, lambda index, x=x: x[index]
      )
      for site, x in batch.items()
    }


class _Reader:
  """The rows of one store in their order, from a row number on."""

  def __init__(self, store, sites, seed, cursor, buffer_rows):
    self._store, self._sites, self._seed = store, sites, seed
    self._chunks = max(1, buffer_rows // layout.CHUNK_ROWS)
    cuts = [
      np.arange(part["start"], part["stop"], layout.CHUNK_ROWS)
      for part in store.parts
    ]
    self._starts = np.concatenate(cuts)
    ends = [part["stop"] for part in store.parts]
    self._stops = np.concatenate(
      [np.append(c[1:], e)[: len(c)] for c, e in zip(cuts, ends, strict=True)]
    )
    self._sizes = self._stops - self._starts
    self._whole = len(self._starts) <= self._chunks
    self._spare: list[dict[str, np.ndarray]] = []
    self._walk = self._blocks(cursor)
    self._next = self._begin()
    self._data = None
    self._order = np.empty(0, np.int64)

  def _blocks(self, cursor: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(chunks, order of their rows) of block after block from a row on."""
    epoch, skip = divmod(cursor, len(self._store))
    while True:
      chunks = np.arange(len(self._starts))
      if not self._whole:
        rng = np.random.default_rng((*self._seed, epoch, 0))
        chunks = rng.permutation(chunks)
      for first in range(0, len(chunks), self._chunks):
        block = chunks[first : first + self._chunks]
        size = int(self._sizes[block].sum())
        if skip >= size:
          skip -= size
          continue
        rng = np.random.default_rng((*self._seed, epoch, 1, first))
        yield block, rng.permutation(size)[skip:]
        skip = 0
      epoch += 1

  def _begin(self):
    """Begins to read the next block; a lone block is read only once."""
    block, order = next(self._walk)
    if self._whole and self._spare:
      return self._spare[0], [], order
    size = int(np.sort(self._sizes)[::-1][: self._chunks].sum())
    memory = (
      self._spare.pop()
      if self._spare
      else {s: self._store.empty(size, s) for s in self._sites}
    )
    readings, at = [], 0
    for chunk in block:
      rows = int(self._sizes[chunk])
      for site, x in memory.items():
        readings.append(
          self._store.begin_read(
            int(self._starts[chunk]), x[at : at + rows], site
          )
        )
      at += rows
    return memory, readings, order

  def fill(self, batch: dict[str, np.ndarray]) -> None:
    """Puts the next rows there."""
    size = len(next(iter(batch.values())))
    at = 0
    while at < size:
      if not len(self._order):
        self._advance()
      take = self._order[: size - at]
      self._order = self._order[len(take) :]
      for site, x in batch.items():
        _gather(self._data[site], take, x[at : at + len(take)])
      at += len(take)

  def _advance(self) -> None:
    """Goes to the next block, and begins to read the one after it."""
    if self._data is not None and not self._whole:
      self._spare.append(self._data)
    self._data, readings, self._order = self._next
    for reading in readings:
      reading.finish()
    if self._whole:
      self._spare = [self._data]
    self._next = self._begin()


def _gather(source: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
  kind = _BYTES[source.dtype.itemsize]
  # "clip" lets NumPy write to `out` without a copy in between.
  np.take(source.view(kind), rows, axis=0, out=out.view(kind), mode="clip")
