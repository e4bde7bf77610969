"""Activations at rest: rows of vectors by site, and what stands beside them."""

import functools
import os
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from gemma_jax.activations import layout, storage
from gemma_jax.activations.layout import LABELS, MANIFEST
from gemma_jax.activations.reading import Reading, remedy
from gemma_jax.activations.records import load_statistics
from gemma_jax.activations.statistics import Statistics
from gemma_jax.activations.storage import Document, Location
from gemma_jax.activations.stream import Stream


class _Part:
  """A part's contents and where its rows and documents begin."""

  def __init__(self, root, index, manifest, value, start, document, sources):
    self.prefix = layout.part_name(index)
    self.location = Location(f"{root}/{self.prefix}")
    if value is None:
      raise ValueError(
        f"{root} lacks part {index} of {manifest['parts']}: its harvest has "
        "not begun. Run it; it goes on from what is there."
      )
    if not layout.is_whole(value):
      what = (
        f"has holes at rows {value['holes']}"
        if value["holes"]
        else (
          f"holds the first {value['committed']} rows: its harvest was "
          "interrupted"
        )
      )
      raise ValueError(
        f"{self.location} is incomplete: it {what}. Run the same harvest "
        "again; it writes what is missing."
      )
    self.value = value
    self.start, self.stop = start, start + value["committed"]
    self.first_document = document
    self.sources = value["sources"]
    self.renumber = np.asarray(
      [sources.index(name) for name in self.sources], np.int32
    )
    self.kinds = layout.arrays(manifest["sites"], manifest["dtype"])
    self.arrays = {
      name: ts.open(
        self.location.array(name), context=storage.READING, open=True, read=True
      )
      for name in self.kinds
    }

  def check(self) -> None:
    """Waits for the arrays; raises ValueError where one is not as it was."""
    for name, future in self.arrays.items():
      row, dtype, _ = self.kinds[name]
      try:
        array = future.result()
      except ValueError as e:
        raise ValueError(
          f"{self.location}/{name} is missing or damaged "
          f"({storage.reason(e)}). {remedy(self.location)}"
        ) from e
      found = (
        array.shape,
        array.dtype.name,
        array.chunk_layout.write_chunk.shape[0],
      )
      expected = (self.stop - self.start, *row), dtype, layout.SHARD_ROWS
      if found != expected:
        raise ValueError(
          f"{self.location}/{name}: shape, dtype and rows of a shard are "
          f"{found}, expected {expected}. {remedy(self.location)}"
        )
      self.arrays[name] = array


class ActivationStore:
  """Rows of activations, one array per site, N rows each.

  Use `ActivationStore.open(where)`; `len(store)` is N.
  """

  def __init__(self, root: Location, manifest: dict[str, Any], parts, sources):
    self.root = root
    self._manifest = manifest
    self.sources: tuple[str, ...] = sources
    self._parts: list[_Part] = parts
    self._stops = np.asarray([part.stop for part in parts])

  @classmethod
  def open(cls, where: str | os.PathLike) -> "ActivationStore":
    """Opens a complete store for reading.

    Args:
      where: a path, or a URL (`gs://`, `s3://`, `memory://`).

    Raises:
      FileNotFoundError: no store there.
      ValueError: incomplete or damaged; says what to do.
      OSError: the place cannot be reached.
    """
    root, manifest = read_manifest(where)
    values = layout.parts(root, manifest)
    sources = sorted({s for value in values if value for s in value["sources"]})
    parts, start, document = [], 0, 0
    for index, value in enumerate(values):
      part = _Part(root, index, manifest, value, start, document, sources)
      start, document = part.stop, document + part.value["documents"]
      parts.append(part)
    for part in parts:
      part.check()
    return cls(root, manifest, parts, tuple(sources))

  def __len__(self) -> int:
    return int(self._stops[-1])

  @property
  def path(self):
    """Where it is: a path on a file system, else a URL."""
    return self.root.path or self.root.url

  @property
  def metadata(self) -> dict[str, Any]:
    """What is true of the whole store: model, sites, dtypes."""
    return self._manifest["metadata"]

  @property
  def parts(self) -> list[dict[str, Any]]:
    """What made each part, and its rows: {"made_by", "start", "stop"}."""
    return [
      {"made_by": p.value["made_by"], "start": p.start, "stop": p.stop}
      for p in self._parts
    ]

  @property
  def sites(self) -> dict[str, int]:
    """Site -> width of its vectors."""
    return dict(self._manifest["sites"])

  @property
  def dtype(self) -> str:
    """Of the vectors at rest; int8 is read as float32."""
    return self._manifest["dtype"]

  @property
  def tokens_per_second(self) -> float:
    """The rate at which it was harvested, interruptions left out."""
    seconds = sum(part.value["seconds"] for part in self._parts)
    return len(self) / max(seconds, 1e-9)

  @functools.cached_property
  def documents(self) -> list[tuple[str, str, str]]:
    """(id, source, name) of each document, in the label's numbers."""
    return list(self._each_document())

  def named(self, numbers: Collection[int]) -> dict[int, tuple[str, str, str]]:
    """(id, source, name) of some documents; memory for these alone."""
    wanted = set(numbers)
    return {
      i: names for i, names in enumerate(self._each_document()) if i in wanted
    }

  def _each_document(self) -> Iterator[tuple[str, str, str]]:
    for part in self._parts:
      for i in range(part.value["document_files"]):
        key = layout.documents_key(i)
        data = part.location.read(key)
        if data is None:
          raise OSError(
            f"{part.location}/{key} is missing. {remedy(self.root)}"
          )
        try:
          found = layout.unpack_documents(data)
        except ValueError as e:
          raise OSError(
            f"{part.location}/{key} holds {e}. {remedy(self.root)}"
          ) from e
        yield from found

  # ------------------------------------------------------------------ reading
  def empty(self, n: int, name: str) -> np.ndarray:
    """Memory for n rows of a site or a label.

    Raises:
      KeyError: no such site; lists those there.
    """
    if name in LABELS:
      return np.empty(n, np.int32)
    if name not in self.sites:
      raise KeyError(
        f"{self.root} has no site {name!r}; it has "
        f"{', '.join(self.sites)} and {', '.join(LABELS)}."
      )
    dtype = "float32" if self.dtype == "int8" else self.dtype
    return np.empty((n, self.sites[name]), ts.dtype(dtype).numpy_dtype)

  def read(self, start: int, stop: int, name: str) -> np.ndarray:
    """Rows `start` to `stop` of a site (or of a label), [stop - start, D].

    Raises:
      KeyError: no such site; lists those there.
      IndexError: rows outside the store.
      OSError: the data are missing or fail their checksum; names the chunk.
    """
    if not 0 <= start <= stop <= len(self):
      raise IndexError(f"Rows {start}:{stop} of a store of {len(self)} rows.")
    out = self.empty(stop - start, name)
    self.begin_read(start, out, name).finish()
    return out

  def begin_read(self, start: int, out: np.ndarray, name: str) -> Reading:
    """Begins to read rows from `start` into `out`; see `Reading.finish`."""
    return Reading(self, start, out, name)

  def rows(self, source: str) -> np.ndarray:
    """Numbers of the rows of a stratum, int64 [n], ascending.

    Raises:
      KeyError: no such source; lists those there.
    """
    if source not in self.sources:
      raise KeyError(
        f"{self.root} has no source {source!r}; it has "
        f"{', '.join(self.sources)}."
      )
    labels = self.read(0, len(self), "source")
    return np.flatnonzero(labels == self.sources.index(source))

  def take(self, rows: np.ndarray, name: str) -> np.ndarray:
    """Any rows of a site (or of a label), [n, D], in the order asked for.

    Chunks are read whole: many rows of one chunk cost as much as one.

    Raises:
      KeyError, IndexError, OSError: as `read`.
    """
    rows = np.asarray(rows, np.int64)
    if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
      raise IndexError(f"Rows outside a store of {len(self)} rows.")
    out = self.empty(len(rows), name)
    order = np.argsort(rows, kind="stable")
    cuts = np.flatnonzero(np.diff(rows[order] // layout.CHUNK_ROWS)) + 1
    for group in np.split(order, cuts) if len(rows) else ():
      low, high = rows[group].min(), rows[group].max()
      out[group] = self.read(int(low), int(high) + 1, name)[rows[group] - low]
    return out

  def stream(
    self,
    batch_size: int,
    seed: int,
    *,
    sites: Sequence[str] | None = None,
    start: int = 0,
    buffer_rows: int = 2**18,
    sharding: Any = None,
  ) -> Iterator[dict[str, Any]]:
    """Endless shuffled batches, `{site: [batch_size, D]}`; see `Stream`."""
    return iter(
      Stream(
        self,
        batch_size,
        seed,
        sites=sites,
        start=start,
        buffer_rows=buffer_rows,
        sharding=sharding,
      )
    )

  # --------------------------------------------------------------- statistics
  def statistics(self, site: str) -> Statistics | None:
    """What the harvest measured, over all parts; None where it did not.

    Raises:
      KeyError: no such site.
      OSError: they are damaged.
    """
    self.empty(0, site)
    total = None
    for part in self._parts:
      state = part.value["state"]
      data = state and part.location.read(state)
      if not data:
        return None
      found = load_statistics(data, f"{part.location}/{state}").get(site)
      if found is None:
        return None
      found = found.moved(part.start, part.first_document, self.sources)
      if total is None:
        total = found
      else:
        total.merge(found)
    return total


def read_manifest(
  where: str | os.PathLike,
) -> tuple[Location, dict[str, Any]]:
  """A store's place and what it says of itself, checked.

  Raises:
    FileNotFoundError: no store there.
    ValueError: damaged, or of another format.
  """
  root = Location(where)
  manifest = Document(root, MANIFEST).value
  if manifest is None:
    raise FileNotFoundError(
      f"{root} is no activation store: it has no {MANIFEST}. Pass what a "
      "harvest wrote."
    )
  layout.check_format(root, manifest)
  return root, manifest


def is_complete(where: str | os.PathLike) -> bool:
  """Whether a store is there with all its rows.

  Raises:
    ValueError: its manifest is damaged.
  """
  try:
    root, manifest = read_manifest(where)
  except FileNotFoundError:
    return False
  return all(map(layout.is_whole, layout.parts(root, manifest)))
