"""What cannot be read at random becomes plain JSON lines in the cache, once.

Compressed files, Parquet (whose row groups decode as a whole) and streams of
the Hugging Face hub. A spool appears under its final name only when complete,
and its name says what it was made of: a file that changes is spooled afresh.
"""

import contextlib
import errno
import glob
import gzip
import hashlib
import importlib
import itertools
import json
import os
import pathlib
import uuid
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from gemma_jax import cache
from gemma_jax.data.lines import field

# Read at once. For zstd small, since it may unfold 30,000 times.
_CHUNK = 1 << 20
_ZSTD_CHUNK = 1 << 14
_ZSTD_WINDOW = 1 << 31  # Corpora are often packed with --long=31.

_ROWS = 256

Report = Callable[[int], Any]


def identity(path: str | os.PathLike) -> list[Any]:
  """What changes when a file does: JSON."""
  path = pathlib.Path(path).resolve()
  status = path.stat()
  return [str(path), status.st_size, status.st_mtime_ns]


def decompress(path: str, *, report: Report | None = None) -> str:
  """Unpacks a .gz or .zst file.

  Args:
    path: of the file.
    report: called with compressed bytes as they are done.

  Returns:
    The path of the plain file.

  Raises:
    ValueError: it is broken or cut off.
    OSError: the disk is full.
  """
  unpack = _zstd if path.endswith(".zst") else _gzip
  return _spool(
    ["decompressed", *identity(path)],
    lambda out: unpack(path, out, report or _silent),
    path,
  )


def parquet(
  path: str,
  text_field: str,
  source_field: str | None,
  *,
  report: Report | None = None,
) -> str:
  """Turns the fields of a Parquet file into lines of `text` and `source`.

  Args:
    path: of the file.
    text_field: a column, or with dots a field of a nested one.
    source_field: the same for the stratum, or None.
    report: called with bytes of the file as they are done.

  Returns:
    The path of the plain file.

  Raises:
    ImportError: pyarrow is missing.
    ValueError: not a Parquet file, no such column, or not strings.
    OSError: the disk is full.
  """
  names = [name for name in (text_field, source_field) if name is not None]
  pyarrow = _optional("pyarrow", "Parquet files")
  _optional("pyarrow.parquet", "Parquet files")

  def rows() -> Iterator[dict]:
    with pyarrow.parquet.ParquetFile(path) as file:
      # Of the schema's leaves: those are what can be read alone.
      leaves = [file.schema.column(i).path for i in range(len(file.schema))]
      for name in names:
        if not any(f"{leaf}.".startswith(f"{name}.") for leaf in leaves):
          raise ValueError(
            f"{path}: no column {name!r}; there are {sorted(leaves)}: set"
            " text_field or source_field to one of them"
          )
      for group in range(file.num_row_groups):
        for batch in file.iter_batches(
          batch_size=_ROWS, row_groups=[group], columns=names
        ):
          yield from batch.to_pylist()
        if report is not None:
          report(os.path.getsize(path) // file.num_row_groups)

  def write(out: BinaryIO) -> None:
    try:
      _write_rows(out, rows(), text_field, source_field, path)
    except (pyarrow.ArrowException, OSError) as error:
      # Those of the disk have a number, those of the format have none.
      if getattr(error, "errno", None) is not None:
        raise
      raise ValueError(f"{path}: not readable as Parquet: {error}") from error

  return _spool(["parquet", *identity(path), *names], write, path)


def hub(
  name: str,
  *,
  subset: str | None,
  split: str,
  data_files: Any,
  text_field: str,
  source_field: str | None,
  documents: int | None,
  report: Report | None = None,
) -> str:
  """Streams a data set of the Hugging Face hub into lines.

  Code that a data set brings is never run.

  Args:
    name: e.g. "allenai/c4"; with `data_files` a format, e.g. "json".
    subset: the data set's configuration, e.g. "en".
    split: e.g. "train".
    data_files: a path, a list of paths or a dict of splits to them.
    text_field: where the text is; dots go into nested objects.
    source_field: the same for the stratum, or None.
    documents: take at most so many.
    report: called with documents as they are done.

  Returns:
    The path of the plain file. It is a snapshot: what changes on the hub does
    not change it.

  Raises:
    ImportError: the library `datasets` is missing.
    ConnectionError: the hub cannot be reached.
    ValueError: there is no such data set, subset, split or field.
    OSError: the disk is full.
  """
  datasets = _optional("datasets", "data sets of the Hugging Face hub")
  count = 0

  def rows() -> Iterator[dict]:
    nonlocal count
    stream = datasets.load_dataset(
      name, subset, split=split, data_files=data_files, streaming=True
    )
    for row in itertools.islice(stream, documents):
      yield row
      count += 1
      if report is not None:
        report(1)

  def write(out: BinaryIO) -> None:
    done = _Failed()
    try:
      _write_rows(out, done.watch(rows()), text_field, source_field, name)
    except Exception as error:
      if error is not done.error:
        raise  # Ours, or the disk's.
      what = f"the data set {name!r} (subset {subset!r}, split {split!r})"
      after = f" after {count} documents" if count else ""
      why = f"{type(error).__name__}: {error}"
      if isinstance(error, ConnectionError | TimeoutError):
        raise ConnectionError(
          f"{what} cannot be reached{after}: {why}. Look at the network and"
          " at the name, or download its files and use kind 'jsonl' or"
          " 'parquet'"
        ) from error
      raise ValueError(
        f"{what} cannot be read{after}: {why}. Look at the name, the subset,"
        " the split and data_files on the hub; a private one needs `hf auth"
        " login`"
      ) from error

  key = ["hub", name, subset, split, data_files, text_field, source_field]
  local = [identity(file) for file in _local_files(name, data_files)]
  return _spool([*key, documents, local], write, name)


class _Failed:
  """Remembers the error that an iterator raised, as its own."""

  def __init__(self):
    self.error = None

  def watch(self, rows: Iterator[dict]) -> Iterator[dict]:
    try:
      yield from rows
    except Exception as error:
      self.error = error
      raise


def _local_files(name: str, data_files: Any) -> list[pathlib.Path]:
  """The files of this machine that a data set is made of."""
  if isinstance(data_files, dict):
    data_files = list(data_files.values())
  found, queue = [], [name, data_files]
  while queue:
    entry = queue.pop()
    if isinstance(entry, list | tuple):
      queue.extend(entry)
    elif entry and pathlib.Path(entry).is_file():
      found.append(pathlib.Path(entry))
    elif entry and pathlib.Path(entry).is_dir():
      below = pathlib.Path(entry).rglob("*")
      found.extend(path for path in below if path.is_file())
    elif entry and glob.has_magic(entry):
      queue.extend(glob.glob(entry, recursive=True))
  return sorted(found)


def _write_rows(
  out: BinaryIO,
  rows: Iterator[dict],
  text_field: str,
  source_field: str | None,
  shown: str,
) -> None:
  for number, row in enumerate(rows, start=1):
    where = f"{shown}:{number}"
    record = {"text": field(row, text_field, where)}
    if source_field is not None:
      record["source"] = field(row, source_field, where)
    line = json.dumps(record, ensure_ascii=False)
    out.write(line.encode("utf-8", "replace") + b"\n")


def _gzip(path: str, out: BinaryIO, report: Report) -> None:
  with open(path, "rb") as raw, gzip.GzipFile(fileobj=raw) as file:
    before = 0
    try:
      while data := file.read(_CHUNK):
        out.write(data)
        report(raw.tell() - before)
        before = raw.tell()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
      raise ValueError(_broken(path, str(error))) from error


def _zstd(path: str, out: BinaryIO, report: Report) -> None:
  zstandard = _optional("zstandard", ".zst files")
  unpacker = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
  frame = unpacker.decompressobj()
  with open(path, "rb") as raw:
    try:
      while data := raw.read(_ZSTD_CHUNK):
        report(len(data))
        while data:
          # A file may be many frames, each of which ends for itself.
          if frame.eof:
            frame = unpacker.decompressobj()
          out.write(frame.decompress(data))
          data = frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as error:
      raise ValueError(_broken(path, str(error))) from error
  if not frame.eof:
    raise ValueError(_broken(path, "it ends in the middle"))


def _broken(path: str, why: str) -> str:
  return f"{path}: cannot be decompressed ({why}): download or pack it again"


def _spool(key: Any, write: Callable[[BinaryIO], None], what: str) -> str:
  text = json.dumps(key, sort_keys=True, default=str)
  name = hashlib.sha256(text.encode()).hexdigest()[:32]
  path = cache.directory("corpora", f"{name}.jsonl")
  if path.exists():
    return str(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # Several processes may make the same; the last to finish wins.
  partial = path.with_name(f".{name}.{uuid.uuid4().hex}")
  try:
    with open(partial, "xb") as file:
      write(file)
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)
  except OSError as error:
    if error.errno != errno.ENOSPC:
      raise
    raise OSError(
      errno.ENOSPC,
      f"no space left at {path.parent} for the text of {what}. Make room, or"
      f" choose another --cache (${cache.VARIABLE})",
    ) from error
  finally:
    with contextlib.suppress(FileNotFoundError):
      partial.unlink()
  return str(path)


def _optional(module: str, what: str) -> Any:
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise ImportError(
      f"{what} need the package {module.split('.')[0]}, which is missing:"
      " pip install 'gemma_jax[data]'"
    ) from error


def _silent(_: int) -> None:
  pass
