"""Activations on disk: TensorStore zarr3 arrays and a manifest.

The manifest, replaced by an atomic rename after each complete shard, says how
many rows are there; the length never comes from listing files.
"""

import fcntl
import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from gemma_jax.activations.stream import Stream

MANIFEST = "manifest.json"
FORMAT = 2
CODECS = [{"name": "bytes"}, {"name": "crc32c"}]  # a checksum for each chunk
FIELDS = {
  "format",
  "rows",
  "committed",
  "seconds",
  "sites",
  "dtype",
  "metadata",
}
SHARD_ROWS = 16_384  # one file, written at once
CHUNK_ROWS = 1_024  # the least that is read at once
# What stands beside every vector, int32 [N] each.
LABELS = ("token", "document", "position")


def _spec(directory: pathlib.Path, name: str) -> dict[str, Any]:
  return {
    "driver": "zarr3",
    "kvstore": {"driver": "file", "path": f"{directory / name}/"},
    # A file that is gone is an error and not zeros; so zeros are stored too.
    "fill_missing_data_reads": False,
    "store_data_equal_to_fill_value": True,
  }


def _create(directory, name, shape, dtype):
  rest = list(shape[1:])
  return ts.open(
    _spec(directory, name),
    create=True,
    delete_existing=True,
    dtype=dtype,
    shape=shape,
    chunk_layout=ts.ChunkLayout(
      write_chunk_shape=[SHARD_ROWS, *rest],
      read_chunk_shape=[CHUNK_ROWS, *rest],
    ),
    codec=ts.CodecSpec({"driver": "zarr3", "codecs": CODECS}),
  )


def _write_manifest(directory: pathlib.Path, manifest: Mapping) -> None:
  partial = directory / f".{MANIFEST}.{os.getpid()}"
  with partial.open("w") as f:
    json.dump(manifest, f, indent=2)
    f.flush()
    os.fsync(f.fileno())
  partial.rename(directory / MANIFEST)


def read_manifest(directory: pathlib.Path) -> dict[str, Any]:
  """What a store says of itself, checked.

  Raises:
    FileNotFoundError: no store there.
    ValueError: damaged, or of another format.
  """
  path = directory / MANIFEST
  if not path.exists():
    raise FileNotFoundError(
      f"{directory} is no activation store: it has no {MANIFEST}. Pass the "
      "directory that a harvest wrote."
    )
  try:
    manifest = json.loads(path.read_text())
    if manifest["format"] != FORMAT:
      raise ValueError(f"format {manifest['format']}, expected {FORMAT}")
    missing = sorted(FIELDS - set(manifest))
    if missing:
      raise ValueError(f"it lacks {', '.join(missing)}")
    return manifest
  except (ValueError, KeyError, TypeError) as e:
    raise ValueError(
      f"{path} is damaged or of another version ({e}). Delete {directory} "
      "and harvest again."
    ) from e


def _reason(error: ValueError) -> str:
  """TensorStore's message without the specification that it appends."""
  return str(error).split(" [tensorstore_spec=")[0]


class ActivationStore:
  """Rows of activations, one array per site, N rows each.

  Use `ActivationStore.open(path)`; `len(store)` is N.
  """

  def __init__(self, directory, manifest, arrays):
    self._manifest = manifest
    self._arrays = arrays
    self.path = pathlib.Path(directory)

  @classmethod
  def open(cls, path: str | os.PathLike) -> "ActivationStore":
    """Opens a complete store for reading.

    Raises:
      FileNotFoundError: no store there.
      ValueError: incomplete or damaged; says what to do.
    """
    path = pathlib.Path(path)
    manifest = read_manifest(path)
    rows = manifest["rows"]
    if manifest["committed"] != rows:
      raise ValueError(
        f"{path} holds {manifest['committed']} of {rows} rows: its harvest "
        "was interrupted. Run the same harvest again; it goes on from there."
      )
    arrays = {}
    for name in (*manifest["sites"], *LABELS):
      try:
        array = ts.open(_spec(path, name), read=True, open=True).result()
      except ValueError as e:
        raise ValueError(
          f"{path}/{name} is missing or damaged ({_reason(e)}). Delete the "
          "store and harvest again."
        ) from e
      if array.shape[0] != rows:
        raise ValueError(
          f"{path}/{name} has {array.shape[0]} rows and the manifest says "
          f"{rows}. Delete the store and harvest again."
        )
      arrays[name] = array
    return cls(path, manifest, arrays)

  def __len__(self) -> int:
    return self._manifest["rows"]

  @property
  def metadata(self) -> dict[str, Any]:
    """What made the store: model, text, sites, rates."""
    return self._manifest["metadata"]

  @property
  def tokens_per_second(self) -> float:
    """The rate at which it was harvested, interruptions left out."""
    return len(self) / max(self._manifest["seconds"], 1e-9)

  @property
  def sites(self) -> dict[str, int]:
    """Site -> width of its vectors."""
    return dict(self._manifest["sites"])

  def read(self, start: int, stop: int, site: str) -> np.ndarray:
    """Rows `start` to `stop` of a site (or of a label), [stop - start, D].

    Raises:
      KeyError: no such site; lists those there.
      IndexError: rows outside the store.
      OSError: the data are missing or fail their checksum.
    """
    if not 0 <= start <= stop <= len(self):
      raise IndexError(f"Rows {start}:{stop} of a store of {len(self)} rows.")
    return self.finish(self.read_async(start, stop, site), site)

  def finish(self, future: ts.Future, site: str) -> np.ndarray:
    """Waits for a future of `read_async`; raises OSError as `read` does."""
    try:
      return future.result()
    except ValueError as e:
      raise OSError(
        f"{self.path}: {site!r} cannot be read ({_reason(e)}). Delete the "
        "store and harvest again."
      ) from e

  def read_async(self, start: int, stop: int, site: str) -> ts.Future:
    """As `read`, but returns at once with a future for `finish`."""
    if site not in self._arrays:
      raise KeyError(
        f"{self.path} has no site {site!r}; it has "
        f"{', '.join(self._manifest['sites'])} and {', '.join(LABELS)}."
      )
    return self._arrays[site][start:stop].read()

  def stream(
    self,
    batch_size: int,
    seed: int,
    *,
    sites: Sequence[str] | None = None,
    start: int = 0,
    buffer_rows: int = 2**18,
  ) -> Iterator[dict[str, np.ndarray]]:
    """Endless shuffled batches, `{site: [batch_size, D]}`; see `Stream`."""
    return iter(
      Stream(
        self,
        batch_size,
        seed,
        sites=sites,
        start=start,
        buffer_rows=buffer_rows,
      )
    )


class Writer:
  """Writes a store from the first row to the last; resumes where it was cut.

  As a context manager it closes itself, and after an error only lets go of
  the store, so that the next writer can go on.

  Args:
    directory: the store; made if need be.
    rows: N, known beforehand.
    sites: site -> width.
    dtype: of the activations, "bfloat16" or "float32".
    metadata: JSON-able; an interrupted store with other metadata is refused.

  Raises:
    BlockingIOError: another process is writing this store.
    ValueError: what is there was made by something else.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    *,
    rows: int,
    sites: Mapping[str, int],
    dtype: str,
    metadata: Mapping[str, Any],
  ):
    self.directory = pathlib.Path(directory)
    self.directory.mkdir(parents=True, exist_ok=True)
    self._lock = (self.directory / ".lock").open("w")
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      self._lock.close()
      raise BlockingIOError(
        f"Another process is writing {self.directory}. Wait for it, then run "
        "again: its store will be used."
      ) from e
    new = {
      "format": FORMAT,
      "rows": rows,
      "committed": 0,
      "seconds": 0.0,
      "sites": dict(sites),
      "dtype": dtype,
      "metadata": dict(metadata),
    }
    try:
      self._open(json.loads(json.dumps(new)))
    except BaseException:
      self._lock.close()
      raise
    self._buffers: dict[str, list[np.ndarray]] = {n: [] for n in self._arrays}
    self._buffered = 0
    self._in_flight = 0
    self._pending: list[ts.Future] = []
    self._began = time.perf_counter() - self._manifest["seconds"]

  def _open(self, new: dict[str, Any]) -> None:
    rows, dtype, sites = new["rows"], new["dtype"], new["sites"]
    kinds = {s: ((rows, d), dtype) for s, d in sites.items()}
    kinds |= {label: ((rows,), "int32") for label in LABELS}
    if (self.directory / MANIFEST).exists():
      self._manifest = read_manifest(self.directory)
      if self._manifest | {"committed": 0, "seconds": 0.0} != new:
        raise ValueError(
          f"{self.directory} was made by another harvest. Delete it, or use "
          "another cache."
        )
      opened = {
        name: ts.open(_spec(self.directory, name), open=True) for name in kinds
      }
    else:
      self._manifest = new
      opened = {
        name: _create(self.directory, name, shape, kind)
        for name, (shape, kind) in kinds.items()
      }
    self._arrays = {name: future.result() for name, future in opened.items()}
    if not (self.directory / MANIFEST).exists():
      _write_manifest(self.directory, new)

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, kind, error, traceback) -> None:
    if kind is None:
      self.close()
      return
    for future in self._pending:
      future.exception()  # waits, so that nobody else writes meanwhile
    self._lock.close()

  @property
  def committed(self) -> int:
    """Rows that are safely there."""
    return self._manifest["committed"]

  def append(self, arrays: Mapping[str, np.ndarray]) -> None:
    """Adds rows: every site [n, D] and every label [n].

    Raises:
      ValueError: arrays missing or unknown, or of different lengths, or more
        rows than were announced.
    """
    lengths = {name: len(x) for name, x in arrays.items()}
    if set(lengths) != set(self._buffers) or len({*lengths.values()}) != 1:
      raise ValueError(
        f"Expected rows of {', '.join(self._buffers)}, equally many of each; "
        f"got {lengths}."
      )
    new = lengths[LABELS[0]]
    there = self.committed + self._in_flight + self._buffered
    if there + new > self._manifest["rows"]:
      raise ValueError(
        f"{self.directory}: {there + new} rows arrived of "
        f"{self._manifest['rows']} that were announced."
      )
    for name, x in arrays.items():
      self._buffers[name].append(x)
    self._buffered += new
    while self._buffered >= SHARD_ROWS:
      self._flush(SHARD_ROWS)

  def close(self) -> None:
    """Writes what is left and releases the store.

    Raises:
      ValueError: fewer rows arrived than were announced.
    """
    with self._lock:
      if self._buffered:
        self._flush(self._buffered)
      self._settle()
    if self.committed != self._manifest["rows"]:
      raise ValueError(
        f"{self.directory}: {self.committed} rows arrived of "
        f"{self._manifest['rows']} that were announced."
      )

  def _flush(self, rows: int) -> None:
    # At most one shard in flight: the next is gathered while it is written.
    self._settle()
    start = self.committed
    for name, parts in self._buffers.items():
      whole = np.concatenate(parts)
      self._pending.append(
        self._arrays[name][start : start + rows].write(whole[:rows])
      )
      self._buffers[name] = [whole[rows:]]
    self._buffered -= rows
    self._in_flight = rows

  def _settle(self) -> None:
    if not self._pending:
      return
    for future in self._pending:
      future.result()
    self._pending = []
    self._manifest["committed"] += self._in_flight
    self._in_flight = 0
    self._manifest["seconds"] = time.perf_counter() - self._began
    _write_manifest(self.directory, self._manifest)
