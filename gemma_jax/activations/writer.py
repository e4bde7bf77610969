"""Writes one part of a store, shard by shard; resumes where it was cut."""

import collections
import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from gemma_jax.activations import layout, storage
from gemma_jax.activations.claim import LEASE_SECONDS, lock
from gemma_jax.activations.layout import LABELS, MANIFEST, SCALE
from gemma_jax.activations.storage import Document, Location

IN_FLIGHT = 2  # shards on their way to the disk while the next is gathered


@dataclasses.dataclass
class _Flight:
  """A shard on its way to the disk, and what is committed with it."""

  shard: int
  rows: int
  buffer: dict[str, np.ndarray]
  futures: list[ts.Future]
  documents: list[Sequence[str]]
  state: bytes | None


class Writer:
  """Writes a part of a store from the first row to the last.

  As a context manager it closes itself, and after an error only lets go of
  the part, so that the next writer can go on.

  Args:
    where: the store: a path, or a URL (`gs://`, `s3://`, `memory://`).
    sites: site -> width.
    dtype: of the activations, "bfloat16", "float32" or "int8" (with a scale
      for each row).
    metadata: JSON-able; what is true of the whole store. A store with other
      metadata is refused.
    made_by: JSON-able; what made this part. Another in its place is refused.
    sources: names of the strata that the label "source" counts.
    part: which part to write.
    parts: how many the store has, when it is made.
    append: write behind the parts that are there, or go on with the one that
      has the same `made_by`; `part` and `parts` are not looked at.
    state: gives what is kept beside the rows at each commit, see `saved`; of
      None the last stays.

  Raises:
    BlockingIOError: another process is writing this part.
    ValueError: what is there was made by something else.
    OSError: the place cannot be written.
  """

  def __init__(
    self,
    where: str | os.PathLike,
    *,
    sites: Mapping[str, int],
    dtype: str,
    metadata: Mapping[str, Any],
    made_by: Mapping[str, Any] | None = None,
    sources: Sequence[str] = ("",),
    part: int = 0,
    parts: int = 1,
    append: bool = False,
    state: Callable[[], bytes | None] | None = None,
  ):
    if dtype not in layout.DTYPES:
      raise ValueError(f"dtype {dtype!r}; expected one of {layout.DTYPES}.")
    if reserved := sorted(set(sites) & layout.RESERVED):
      raise ValueError(f"No site can be called {', '.join(reserved)}.")
    self.root = Location(where)
    self._sites, self._dtype = dict(sites), dtype
    made_by = _plain({"made_by": made_by or {}, "sources": list(sources)})
    self._manifest = Document(self.root, MANIFEST)
    part = self._claim_manifest(_plain(metadata), made_by, part, parts, append)
    self.prefix = layout.part_name(part)
    self.location = Location(f"{self.root}/{self.prefix}")
    self._release = lock(self.location)
    self._renewed = time.monotonic()
    try:
      self._open(made_by)
    except BaseException:
      self._release()
      raise
    self._kinds = layout.arrays(self._sites, dtype)
    self._state = state
    # One is filled while others are written.
    self._spare: list[dict[str, np.ndarray]] = []
    self._buffer: dict[str, np.ndarray] | None = None
    self._shard, self._filled = -1, 0
    self._flights: collections.deque[_Flight] = collections.deque()
    self._documents: list[Sequence[str]] = []
    self._known = self._part.value["documents"]
    self._next = 0
    self._writing = True
    self.report: Mapping[str, Any] | None = None
    self._began = time.perf_counter() - self._part.value["seconds"]

  # ------------------------------------------------------------- opening
  def _claim_manifest(self, metadata, made_by, part, parts, append) -> int:
    """Makes or checks the manifest; returns the number of our part."""
    for _ in range(100):  # others may be doing the same
      there = self._manifest.value
      new = {
        "format": layout.FORMAT,
        "parts": 1 if append else parts,
        "sites": self._sites,
        "dtype": self._dtype,
        "metadata": metadata,
      }
      if there is not None:
        layout.check_format(self.root, there)
        if append:
          new["parts"] = there["parts"]
        if there | {"parts": new["parts"]} == new != there:
          raise ValueError(
            f"{self.root} has {there['parts']} parts, expected "
            f"{new['parts']}. Run as many processes, or pass append=True."
          )
        if there != new:
          raise ValueError(
            f"{self.root} was made by another harvest "
            f"({layout.differences(new, there)}). Delete it, or use another "
            "place."
          )
      if append:
        part = self._find(made_by, 0 if there is None else there["parts"])
        new["parts"] = max(new["parts"], part + 1)
      if new == there:
        return part
      with contextlib.suppress(storage.Conflict):
        self._manifest.replace(new)
        return part
      self._manifest.reload()
    raise storage.Conflict(f"{self.root}/{MANIFEST} does not stay as it is.")

  def _find(self, made_by, count) -> int:
    there = layout.parts(self.root, {"parts": count})
    for i, part in enumerate(there):
      if part is None or _of(part) == made_by:
        return i
    return count

  def _open(self, made_by) -> None:
    self._part = Document(self.location, layout.PART)
    there = self._part.value
    kinds = layout.arrays(self._sites, self._dtype)
    if there is not None:
      if _of(there) != made_by:
        raise ValueError(
          f"{self.location} was made by another harvest "
          f"({layout.differences(made_by, _of(there))}). Delete the store, or "
          "use another place."
        )
      opened = {
        name: ts.open(
          self.location.array(name), context=storage.CONTEXT, open=True
        )
        for name in kinds
      }
    else:
      opened = {
        name: layout.create(self.location, name, *kind)
        for name, kind in kinds.items()
      }
    # Whoever was killed may have left a state that no commit names.
    for key in self.location.keys("state/"):
      if there is None or key != there["state"]:
        self.location.delete(key)
    self._arrays = {
      name: self.location.finish(future, f"opening {name}")
      for name, future in opened.items()
    }
    if there is None:
      self._part.replace(
        made_by
        | {
          "committed": 0,
          "complete": False,
          "holes": [],
          "documents": 0,
          "document_files": 0,
          "state": None,
          "report": None,
          "seconds": 0.0,
        }
      )

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, kind, error, traceback) -> None:
    if kind is None:
      self.close()
      return
    with contextlib.suppress(OSError):
      while self._flights:  # what has arrived is kept
        self._settle()
    self.abandon()

  # ------------------------------------------------------------ what is there
  @property
  def committed(self) -> int:
    """Rows that are safely there, holes counted."""
    return self._part.value["committed"]

  @property
  def complete(self) -> bool:
    """Whether all rows are there."""
    return layout.is_whole(self._part.value)

  @property
  def description(self) -> dict[str, Any]:
    """What the part says of itself."""
    return dict(self._part.value)

  @property
  def documents(self) -> int:
    """Documents whose names are safely there."""
    return self._part.value["documents"]

  @property
  def saved(self) -> bytes | None:
    """What `state` gave at the last commit."""
    name = self._part.value["state"]
    return None if name is None else self.location.read(name)

  def needs(self, start: int, stop: int) -> bool:
    """Whether any of the rows start:stop is still to be written."""
    return layout.lacks(self._part.value, start, stop)

  # ---------------------------------------------------------------- writing
  def append(
    self,
    arrays: Mapping[str, np.ndarray],
    *,
    first_row: int | None = None,
    documents: Sequence[Sequence[str]] = (),
    first_document: int = 0,
  ) -> None:
    """Takes rows; those that are there already are left out.

    Args:
      arrays: every site [n, D] and every label [n].
      first_row: number of the first; None: behind the last that came.
      documents: (id, source, name) of documents that begin in these rows.
      first_document: number of the first of them.

    Raises:
      ValueError: arrays missing, unknown or of other shapes; rows or documents
        left out; a writer that has stopped.
      OSError: the place is full or refuses the write; the writer has stopped.
    """
    self._check_writing()
    n = self._check(arrays)
    if time.monotonic() - self._renewed > LEASE_SECONDS / 10:
      self._renew()
    while self._flights and all(f.done() for f in self._flights[0].futures):
      self._settle()
    first_row = self._next if first_row is None else first_row
    self._next = first_row + n
    fresh = self._known - first_document
    if documents and fresh < 0:
      raise ValueError(
        f"{self.location}: document {first_document} arrived and "
        f"{self._known} is the next. Documents must come in order."
      )
    self._documents += documents[max(0, fresh) :]
    self._known = max(self._known, first_document + len(documents))
    at = 0
    while at < n:
      row = first_row + at
      shard, offset = divmod(row, layout.SHARD_ROWS)
      size = self._size(shard)
      take = min(n - at, layout.SHARD_ROWS - offset)
      if self.needs(row, row + take):
        self._copy(shard, offset, arrays, at, take)
        if self._filled == size:
          self._flush()
      at += take

  def _check(self, arrays) -> int:
    shapes = {name: np.shape(x) for name, x in arrays.items()}
    rows = {shape[:1] for shape in shapes.values()}
    expected = self._sites | dict.fromkeys(LABELS)
    widths = {n: s[1] if len(s) == 2 else None for n, s in shapes.items()}
    if widths != expected or len(rows) != 1:
      raise ValueError(
        f"Expected equally many rows of {', '.join(expected)}, the sites of "
        f"widths {self._sites}; got {shapes}."
      )
    labels, names = arrays["source"], self._part.value["sources"]
    low, high = np.min(labels, initial=0), np.max(labels, initial=0)
    if low < 0 or high >= len(names):
      raise ValueError(
        f"The label source counts through {names}; got {low} to {high}."
      )
    return rows.pop()[0]

  def _check_writing(self) -> None:
    if not self._writing:
      raise ValueError(
        f"{self.location}: this writer has stopped. Make another: it goes on "
        f"from row {self.committed}."
      )

  def _size(self, shard: int) -> int:
    """Rows of a shard; the last of a complete part may be short."""
    if not self._part.value["complete"]:
      return layout.SHARD_ROWS
    left = self.committed - shard * layout.SHARD_ROWS
    return min(layout.SHARD_ROWS, left)

  def _copy(self, shard, offset, arrays, at, take) -> None:
    if (shard != self._shard and self._filled) or (
      offset != (self._filled if shard == self._shard else 0)
    ):
      raise ValueError(
        f"{self.location}: row {shard * layout.SHARD_ROWS + offset} arrived "
        f"before those that precede it. Rows must come in order."
      )
    if self._buffer is None:
      self._buffer = self._spare.pop() if self._spare else self._make_buffer()
    self._shard = shard
    rows = slice(offset, offset + take)
    for name, x in arrays.items():
      x = x[at : at + take]
      if name in LABELS:
        self._buffer[layout.TOGETHER][rows, LABELS.index(name)] = x
        continue
      if self._dtype == "int8":
        x, self._buffer[f"{name}{SCALE}"][rows] = layout.quantise(x)
      self._buffer[name][rows] = x
    self._filled += take

  def _make_buffer(self) -> dict[str, np.ndarray]:
    return {
      name: np.empty((layout.SHARD_ROWS, *row), ts.dtype(dtype).numpy_dtype)
      for name, (row, dtype, _) in self._kinds.items()
    }

  def _flush(self) -> None:
    """Sends the buffer off; waits while too many are on their way."""
    while len(self._flights) >= IN_FLIGHT:
      self._settle()
    start, rows = self._shard * layout.SHARD_ROWS, self._filled
    # A file has the bytes when it is written; `memory://` keeps what it was
    # given, and the buffer is filled again.
    by_reference = self.location.path is not None
    futures = [
      self._arrays[name][start : start + rows].write(
        x[:rows], can_reference_source_data_indefinitely=by_reference
      )
      for name, x in self._buffer.items()
    ]
    # A hole's rows are in the statistics already.
    filling = self._part.value["complete"]
    state = self._state() if self._state and not filling else None
    self._flights.append(
      _Flight(self._shard, rows, self._buffer, futures, self._documents, state)
    )
    self._buffer, self._documents = None, []
    self._filled, self._shard = 0, -1

  def _settle(self) -> None:
    """Waits for the first shard in flight and commits it."""
    flight = self._flights[0]
    start = flight.shard * layout.SHARD_ROWS
    holes = [h for h in self._part.value["holes"] if h[0] != start]
    end = max(self.committed, start + flight.rows)
    try:
      for future in flight.futures:
        self.location.finish(future, f"writing shard {flight.shard}")
      self._commit(flight.documents, flight.state, committed=end, holes=holes)
    except BaseException:
      self.abandon()  # the rows are gone; those behind them must not come
      raise
    self._flights.popleft()
    self._spare.append(flight.buffer)

  def _commit(self, documents, state, **changes) -> None:
    there = self._part.value
    # Who has lost the part must not write over what its new owner wrote.
    self._renew()
    if documents:
      name = layout.documents_key(there["document_files"])
      self.location.write(name, layout.pack_documents(documents))
      changes["documents"] = there["documents"] + len(documents)
      changes["document_files"] = there["document_files"] + 1
    if self._state is None and not there["complete"]:
      changes["state"] = None  # an earlier writer's are not of all rows
    if state is not None:
      changes["state"] = f"state/{changes['committed']:012d}.npz"
      self.location.write(changes["state"], state)
    changes["seconds"] = time.perf_counter() - self._began
    try:
      self._part.replace(there | changes)
    except storage.Conflict as e:
      raise self._lost() from e
    if there["state"] not in (None, self._part.value["state"]):
      self.location.delete(there["state"])

  def _renew(self) -> None:
    try:
      self._release.renew()
    except storage.Conflict as e:
      raise self._lost() from e
    self._renewed = time.monotonic()

  def _lost(self) -> BlockingIOError:
    return BlockingIOError(
      f"Another process has taken over {self.location}. This one stops; what "
      "it had committed is kept."
    )

  # ---------------------------------------------------------------- closing
  def close(self) -> None:
    """Writes what is left and marks the part as complete.

    Raises:
      ValueError: holes are left that no rows came for; the writer has stopped.
      OSError: the place is full or refuses the write.
    """
    if self.complete and not self._writing:
      return
    self._check_writing()
    try:
      if self._filled:
        self._flush()
      while self._flights:
        self._settle()
      if self._part.value["holes"]:
        raise ValueError(
          f"{self.location}: the rows {self._part.value['holes']} did not "
          "come. Run the harvest that made this store."
        )
      there = self._part.value
      unmeasured = self._state is not None and there["state"] is None
      if unmeasured or not there["complete"]:
        for name, array in self._arrays.items():
          if array.shape[0] != self.committed:
            end = [self.committed, *array.shape[1:]]
            self.location.finish(
              array.resize(exclusive_max=end, resize_metadata_only=True),
              f"closing {name}",
            )
        state = self._state() if self._state else None
        self._commit(
          self._documents,
          state,
          committed=self.committed,
          complete=True,
          report=there["report"] if self.report is None else self.report,
        )
        self._documents = []
    except BaseException:
      self.abandon()
      raise
    self._writing = False
    self._release()

  def abandon(self) -> None:
    """Lets go of the part; what is committed stays."""
    for flight in self._flights:
      for future in flight.futures:
        future.exception()  # waits, so that nobody else writes meanwhile
    self._flights.clear()
    self._writing = False
    self._release()


def _plain(value):
  """As JSON gives it back: tuples are lists."""
  return json.loads(json.dumps(value))


def _of(part: Mapping[str, Any]) -> dict[str, Any]:
  return {name: part[name] for name in ("made_by", "sources")}
