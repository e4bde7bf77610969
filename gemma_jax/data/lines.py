"""JSON lines and plain text where they lie: indexed once, read at random."""

import bisect
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from gemma_jax.data.corpus import Corpus, Part, join
from gemma_jax.data.document import Document, loose
from gemma_jax.data.workers import Workers

# A task of one worker. Fixed, so that the index does not depend on how many
# workers there are.
_RANGE_BYTES = 1 << 26
_TEXTS_PER_TASK = 256

_CHUNK = 1 << 20
_BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class LineFile:
  """A file of JSON lines.

  Attributes:
    path: where it is; plain, not compressed.
    size: bytes.
    label: documents are named `label:line`.
    shown: how messages call it.
    text_field: where the text is; dots go into nested objects.
    source_field: where the stratum is.
    source: the stratum if there is no such field.
  """

  path: str
  size: int
  label: str
  shown: str
  text_field: str
  source_field: str | None
  source: str

  def read(self, offset: int, number: int) -> Document:
    """The document of a line that starts at a byte."""
    with open(self.path, "rb") as file:
      file.seek(offset)
      line = file.readline()
    document = self._document(line, offset, number)
    if document is None:
      raise ValueError(
        f"{self.shown}:{number}: the line that was indexed is gone: the file"
        " has changed since. Load the corpus again"
      )
    return document

  def count(self, start: int, stop: int) -> int:
    """How many lines end in a range of bytes."""
    with open(self.path, "rb") as file:
      file.seek(start)
      total = 0
      for at in range(start, stop, _CHUNK):
        total += file.read(min(_CHUNK, stop - at)).count(b"\n")
    return total

  def index(self, start: int, stop: int, before: int, base: int) -> Part:
    """Indexes the lines that start in a range of bytes.

    Args:
      start: first byte.
      stop: one behind the last byte.
      before: how many lines end before `start`.
      base: goes on top of the offsets, as the place on the shelf.
    """
    places: list[tuple[int, int]] = []

    def documents() -> Iterator[Document]:
      with open(self.path, "rb") as file:
        offset = _line_start(file, start, stop)
        number = before + 1 + (offset != start)
        file.seek(offset)
        while offset < stop and (line := file.readline()):
          if document := self._document(line, offset, number):
            places.append((base + offset, number))
            yield document
          offset += len(line)
          number += 1

    return Part.of(documents(), places)

  def _document(self, line: bytes, offset: int, number: int):
    if not offset and line.startswith(_BOM):
      line, offset = line[len(_BOM) :], len(_BOM)
    where = f"{self.shown}:{number}"
    text = _decode(line, where, offset)
    if not text.strip():
      return None
    try:
      record = json.loads(text)
    except RecursionError as error:
      raise ValueError(f"{where}: nested too deeply for JSON") from error
    except ValueError as error:
      raise ValueError(f"{where}: not JSON: {error}") from error
    text, source = field(record, self.text_field, where), self.source
    if self.source_field is not None:
      source = field(record, self.source_field, where)
    if not text.strip():
      return None
    return loose(text, source, f"{self.label}:{number}")


def field(record: Any, name: str, where: str) -> str:
  """A string of a record; dots go into nested objects.

  Args:
    record: an object of JSON.
    name: e.g. "meta.pile_set_name".
    where: the record's place, for messages.

  Raises:
    ValueError: it is not there, or not a string.
  """
  value = record
  for part in name.split("."):
    if not isinstance(value, dict):
      raise ValueError(
        f"{where}: expected an object with the field {part!r} of {name!r},"
        f" got {type(value).__name__}"
      )
    if part not in value:
      raise ValueError(
        f"{where}: no field {part!r} of {name!r}; there are"
        f" {sorted(value)}: set text_field or source_field to one of them"
      )
    value = value[part]
  if not isinstance(value, str):
    raise ValueError(
      f"{where}: expected a string in {name!r}, got {type(value).__name__}"
    )
  return value


@dataclasses.dataclass(frozen=True)
class LineShelf:
  """Files of JSON lines; a place is (byte, line), bytes counted over all."""

  files: tuple[LineFile, ...]

  @functools.cached_property
  def starts(self) -> list[int]:
    """The first byte of every file, counted over all."""
    sizes = [file.size for file in self.files]
    return [0, *np.cumsum(sizes[:-1], dtype=np.int64).tolist()]

  def read(self, where: np.ndarray) -> Document:
    """See `corpus.Shelf`."""
    place, number = (int(part) for part in where)
    at = bisect.bisect_right(self.starts, place) - 1
    return self.files[at].read(place - self.starts[at], number)

  def index(self, workers: Workers) -> Corpus:
    """Reads everything once; the same corpus for any number of workers."""
    ranges = [
      (file, start, min(start + _RANGE_BYTES, file.size), base)
      for file, base in zip(self.files, self.starts, strict=True)
      for start in range(0, max(file.size, 1), _RANGE_BYTES)
    ]
    # Names of documents hold the line, so lines are counted before.
    long = [(f, a, b) for f, a, b, _ in ranges if f.size > _RANGE_BYTES]
    counts = dict(
      zip(
        [(file.path, start) for file, start, _ in long],
        workers.map(
          [functools.partial(f.count, a, b) for f, a, b in long],
          [b - a for _, a, b in long],
          "count lines",
        ),
        strict=True,
      )
    )
    tasks: list[Callable[[], Part]] = []
    before = 0
    for file, start, stop, base in ranges:
      before = before if start else 0
      tasks.append(functools.partial(file.index, start, stop, before, base))
      before += counts.get((file.path, start), 0)
    sizes = [stop - start for _, start, stop, _ in ranges]
    return join(workers.map(tasks, sizes, "index"), self)


@dataclasses.dataclass(frozen=True)
class TextShelf:
  """Text files, one document each; a place is the file's number.

  Attributes:
    paths: of the files.
    labels: the documents' names.
    source: the stratum.
  """

  paths: tuple[str, ...]
  labels: tuple[str, ...]
  source: str

  def read(self, where: np.ndarray) -> Document:
    """See `corpus.Shelf`."""
    path, label = self.paths[where[0]], self.labels[where[0]]
    data = pathlib.Path(path).read_bytes()
    skipped = len(_BOM) if data.startswith(_BOM) else 0
    text = _decode(data[skipped:], path, skipped)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return loose(text, self.source, label)

  def index(self, workers: Workers) -> Corpus:
    """Reads everything once; the same corpus for any number of workers."""
    tasks, sizes = [], []
    for first in range(0, len(self.paths), _TEXTS_PER_TASK):
      some = slice(first, first + _TEXTS_PER_TASK)
      few = TextShelf(self.paths[some], self.labels[some], self.source)
      tasks.append(functools.partial(few._part, first))
      sizes.append(sum(pathlib.Path(p).stat().st_size for p in few.paths))
    return join(workers.map(tasks, sizes, "index"), self)

  def _part(self, first: int) -> Part:
    places: list[tuple[int]] = []

    def documents() -> Iterator[Document]:
      for number in range(len(self.paths)):
        document = self.read((number,))
        if document.text.strip():
          places.append((first + number,))
          yield document

    return Part.of(documents(), places)


def _line_start(file: BinaryIO, start: int, stop: int) -> int:
  """The first byte in [start, stop) that starts a line, else `stop`."""
  if not start:
    return 0
  # In chunks: the middle of a huge line need not fit in memory.
  file.seek(start - 1)
  at = start - 1
  while at < stop and (chunk := file.read(_CHUNK)):
    if (found := chunk.find(b"\n")) >= 0:
      return min(at + found + 1, stop)
    at += len(chunk)
  return stop


def _decode(data: bytes, where: str, offset: int) -> str:
  try:
    return data.decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{where}: expected UTF-8, got 0x{data[error.start]:02x} at byte"
      f" {offset + error.start} ({error.reason}): convert the file first"
    ) from error


def line_files(
  paths: Sequence[str], labels: Sequence[str], shown: Sequence[str], **fields
) -> LineShelf:
  """A shelf of files that share their fields; see `LineFile`."""
  return LineShelf(
    tuple(
      LineFile(path, pathlib.Path(path).stat().st_size, label, name, **fields)
      for path, label, name in zip(paths, labels, shown, strict=True)
    )
  )
