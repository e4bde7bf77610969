"""Shuffled batches whose whole state is one number."""

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
  from gemma_jax.activations.store import ActivationStore

CHUNK_ROWS = 1_024


class Stream:
  """Endless batches of a store's rows in an order that the seed decides.

  Each epoch deals the store's chunks, shuffled, into buffers of
  `buffer_rows` rows and shuffles the rows of each buffer. Batch b is a pure
  function of (store, seed, b), so `start=b` resumes exactly. A store that
  fits one buffer is read once and shuffled perfectly. The last rows of an
  epoch that fill no batch are left out, others each time.

  Args:
    store: where to read.
    batch_size: rows in a batch.
    seed: of the order.
    sites: which to read; None means all.
    start: number of the first batch to yield.
    buffer_rows: rows held in memory; twice as many while the next is read.

  Raises:
    ValueError: a batch of no rows, or a store shorter than one batch.
  """

  def __init__(
    self,
    store: "ActivationStore",
    batch_size: int,
    seed: int,
    *,
    sites: Sequence[str] | None = None,
    start: int = 0,
    buffer_rows: int = 2**18,
  ):
    if batch_size < 1:
      raise ValueError(f"batch_size={batch_size} must be at least 1.")
    if len(store) < batch_size:
      raise ValueError(
        f"{store.path} has {len(store)} rows, fewer than one batch of "
        f"{batch_size}. Harvest more tokens or make the batch smaller."
      )
    self._store = store
    self._batch = batch_size
    self._seed = seed
    self._sites = tuple(store.sites if sites is None else sites)
    self._start = start
    self._chunks = max(1, buffer_rows // CHUNK_ROWS)
    self.batches_per_epoch = len(store) // batch_size

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    ready: queue.Queue = queue.Queue(maxsize=2)
    stop = threading.Event()

    def offer(item) -> bool:
      while not stop.is_set():
        try:
          ready.put(item, timeout=0.1)
          return True
        except queue.Full:
          continue
      return False

    def work():
      try:
        for batch in self._batches():
          if not offer(batch):
            return
      except BaseException as e:
        offer(e)

    thread = threading.Thread(target=work, daemon=True, name="activations")
    thread.start()
    try:
      while True:
        item = ready.get()
        if isinstance(item, BaseException):
          raise item
        yield item
    finally:
      stop.set()
      thread.join()

  def _batches(self) -> Iterator[dict[str, np.ndarray]]:
    epoch, first = divmod(self._start, self.batches_per_epoch)
    while True:
      yield from self._epoch(epoch, first * self._batch)
      epoch, first = epoch + 1, 0

  def _epoch(self, epoch: int, skip: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of one epoch after its first `skip` rows."""
    buffers = self._deal(epoch)
    sizes = [sum(stop - start for start, stop in chunks) for chunks in buffers]
    index = 0
    while skip >= sizes[index]:
      skip -= sizes[index]
      index += 1
    upcoming = self._read(buffers[index])
    left = {site: [] for site in self._sites}
    held = 0
    while index < len(buffers):
      data = {
        site: [self._store.finish(future, site) for future in futures]
        for site, futures in upcoming.items()
      }
      if index + 1 < len(buffers):
        upcoming = self._read(buffers[index + 1])
      data = {
        site: parts[0] if len(parts) == 1 else np.concatenate(parts)
        for site, parts in data.items()
      }
      rng = np.random.default_rng((self._seed, epoch, 1, index))
      order = rng.permutation(sizes[index])[skip:]
      skip = 0
      at = 0
      while held + len(order) - at >= self._batch:
        take = order[at : at + self._batch - held]
        at += len(take)
        yield {
          site: np.concatenate([*left[site], data[site][take]])
          for site in self._sites
        }
        left, held = {site: [] for site in self._sites}, 0
      for site in self._sites:
        left[site].append(data[site][order[at:]])
      held += len(order) - at
      index += 1

  def _deal(self, epoch: int) -> list[list[tuple[int, int]]]:
    """The epoch's buffers, each a list of row ranges."""
    rows = len(self._store)
    chunks = [
      (start, min(start + CHUNK_ROWS, rows))
      for start in range(0, rows, CHUNK_ROWS)
    ]
    if len(chunks) > self._chunks:
      order = np.random.default_rng((self._seed, epoch, 0))
      chunks = [chunks[i] for i in order.permutation(len(chunks))]
    return [
      chunks[i : i + self._chunks] for i in range(0, len(chunks), self._chunks)
    ]

  def _read(self, chunks):
    """Futures of a buffer's rows; a lone buffer is read only once."""
    if len(self._store) <= self._chunks * CHUNK_ROWS:
      if not hasattr(self, "_whole"):
        self._whole = {
          site: [self._store.read_async(0, len(self._store), site)]
          for site in self._sites
        }
      return self._whole
    return {
      site: [self._store.read_async(a, b, site) for a, b in chunks]
      for site in self._sites
    }
