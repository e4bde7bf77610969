"""Rows from the disk into memory, and which chunks cannot be read."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import tensorstore as ts

from gemma_jax.activations import layout, storage
from gemma_jax.activations.layout import LABELS, SCALE

if TYPE_CHECKING:
  from gemma_jax.activations.store import ActivationStore


def remedy(where) -> str:
  """What to do about damage, for a message."""
  root = str(where).split("/parts/")[0]
  return (
    f"`python -m launch.store repair {root}` takes out what is damaged; the "
    "same harvest then writes it again."
  )


class Damage(NamedTuple):
  """Rows of an array that cannot be read, or another file of the store.

  Attributes:
    array: a site, its scale, "labels", or what else the file holds.
    start: first row, counted through the store.
    stop: behind the last; `start` where no row is touched.
    key: the file, below the store.
    reason: what TensorStore says.
  """

  array: str
  start: int
  stop: int
  key: str
  reason: str

  def __str__(self) -> str:
    rows = f", rows {self.start} to {self.stop - 1}"
    return (
      f"{self.key}: {self.array}{rows * (self.start < self.stop)}: "
      f"{self.reason}"
    )


class Reading:
  """Rows on their way from a store into memory.

  Args:
    store: where from.
    start: the first row.
    out: where to, [n, ...], see `ActivationStore.empty`.
    name: a site or a label.
  """

  def __init__(self, store: "ActivationStore", start: int, out, name: str):
    self._what = store, start, name
    self._out = out
    self._futures, self._after = [], []
    stop = start + len(out)
    scaled = store.dtype == "int8" and name not in LABELS
    first = int(np.searchsorted(store._stops, start, "right"))
    for part in store._parts[first:]:
      a, b = max(start, part.start), min(stop, part.stop)
      if a >= b:
        break
      into = out[a - start : b - start]
      rows = slice(a - part.start, b - part.start)
      if name in LABELS:
        labels = part.arrays[layout.TOGETHER]
        self._send(labels[rows, LABELS.index(name)], into)
      elif scaled:
        q = np.empty(into.shape, np.int8)
        scale = np.empty(len(into), np.float32)
        self._send(part.arrays[name][rows], q)
        self._send(part.arrays[f"{name}{SCALE}"][rows], scale)
        self._after.append(
          lambda q=q, s=scale, o=into: np.multiply(q, s[:, None], out=o)
        )
      else:
        self._send(part.arrays[name][rows], into)
      if name == "document" and part.first_document:
        self._after.append(lambda o=into, p=part: o.__iadd__(p.first_document))
      if name == "source":
        self._after.append(
          lambda o=into, p=part: o.put(np.arange(len(o)), p.renumber[o])
        )

  def _send(self, source, into) -> None:
    # Straight into the caller's memory: no other copy is made.
    self._futures.append(ts.array(into).write(source[ts.d[0].translate_to[0]]))

  def finish(self) -> np.ndarray:
    """Waits, and returns the rows.

    Raises:
      OSError: the data are missing or fail their checksum; names the chunk.
    """
    failed = None
    for future in self._futures:
      failed = failed or future.exception()
    if failed is not None:
      store, start, name = self._what
      found = list(damages(store, name, start, start + len(self._out)))
      where = "; ".join(map(str, found[:3])) or storage.reason(failed)
      raise OSError(
        f"{store.root} cannot be read: {where}. {remedy(store.root)}"
      ) from failed
    for step in self._after:
      step()
    return self._out


def damages(
  store: "ActivationStore", name: str, start: int, stop: int
) -> Iterator[Damage]:
  """The chunks among these rows of a site or label that cannot be read."""
  names = [layout.TOGETHER if name in LABELS else name]
  if store.dtype == "int8" and name not in LABELS:
    names.append(f"{name}{SCALE}")
  for part in store._parts:
    low, high = max(start, part.start), min(stop, part.stop)
    for array in names:
      yield from damaged_chunks(part, array, low, high)


def damaged_chunks(part, array: str, start: int, stop: int) -> Iterator[Damage]:
  """The chunks of a part's array among these rows that cannot be read."""
  row = part.kinds[array][0]
  at = start
  while at < stop:
    # Chunks count from the beginning of the part.
    chunk = (at - part.start) // layout.CHUNK_ROWS
    a = part.start + chunk * layout.CHUNK_ROWS
    b = min(a + layout.CHUNK_ROWS, part.stop)
    rows = slice(a - part.start, b - part.start)
    error = part.arrays[array][rows].read().exception()
    if error is not None:
      shard = (a - part.start) // layout.SHARD_ROWS
      key = part.prefix + layout.shard_key(array, shard, row)
      yield Damage(array, a, b, key, storage.reason(error))
    at = b
