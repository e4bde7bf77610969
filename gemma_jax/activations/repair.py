"""Finds what is damaged in a store, and takes it out to be harvested again."""

import collections
import contextlib
import json
import os
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import tensorstore as ts

from gemma_jax import progress
from gemma_jax.activations import layout, storage
from gemma_jax.activations.claim import lock
from gemma_jax.activations.layout import MANIFEST, PART
from gemma_jax.activations.reading import Damage, damaged_chunks
from gemma_jax.activations.records import load_statistics
from gemma_jax.activations.storage import Document, Location
from gemma_jax.activations.store import read_manifest

__all__ = ["repair", "verify"]

READS = 8  # at once,
READ_BYTES = 2**29  # and how much of them
ASIDE = ".damaged"  # behind the name of what a person may still want to read
# What TensorStore calls contents that are wrong or gone. Everything else, as
# a server that does not answer, says nothing about them.
DAMAGED = (
  "DATA_LOSS",
  "NOT_FOUND",
  "INVALID_ARGUMENT",
  "FAILED_PRECONDITION",
  "OUT_OF_RANGE",
)
BAD_DISK = "[OS error 5:"  # EIO


def verify(where: str | os.PathLike) -> list[Damage]:
  """Reads everything that is committed and checks it, complete or not.

  Args:
    where: the store: a path, or a URL.

  Returns:
    What cannot be read, chunk by chunk, or is not as it was written; empty
    for a sound store. Holes that a repair made are left out.

  Raises:
    FileNotFoundError: no store there.
    ValueError: a store of another version.
    OSError: the place cannot be reached: nothing is known of what it holds.
  """
  broken = _broken_manifest(where)
  if broken is not None:
    return [broken]
  parts = _parts(where)
  total = sum(
    part.bytes(name, b - a) for part in parts for name, a, b in part.shards()
  )
  with progress.bar(total, "verify", unit="B") as bar:
    return [damage for part in parts for damage in part.damages(bar)]


def repair(where: str | os.PathLike) -> list[Damage]:
  """Takes out what is damaged, so that the same harvest writes it again.

  The rows of a damaged shard become a hole in every array of its part. An
  array's metadata are written anew. From a damaged file of documents on, the
  documents are to be named again. Damaged statistics are dropped; `measure`
  takes them from the rows. A damaged `part.json` gives up its part, and a
  damaged manifest is written anew by the harvests that made the store; both
  are set aside. A sound store is left as it is.

  Args:
    where: the store: a path, or a URL.

  Returns:
    What was damaged, as `verify` does.

  Raises:
    BlockingIOError: a damaged part is being written.
    FileNotFoundError, ValueError, OSError: as `verify`.
  """
  broken = _broken_manifest(where)
  if broken is not None:
    _put_aside(Location(where), MANIFEST)
    return [broken]
  keys = {damage.key for damage in verify(where)}
  found = []
  for part in _parts(where):
    if any(key.startswith(part.prefix) for key in keys):
      release = lock(part.location)
      try:
        # A writer may have been at work since.
        part.load()
        damages = list(part.damages(None, only=keys))
        if damages:
          _take_out(part, damages)
        found += damages
      except storage.Conflict as e:
        raise BlockingIOError(
          f"Another process has taken over {part.location}. Wait for it, then "
          "repair again."
        ) from e
      finally:
        release()
  return found


# --------------------------------------------------------------------- finding
class _Part:
  """What a part says of itself, opened without trust in its metadata."""

  def __init__(self, root, index, manifest, start):
    self.prefix = layout.part_name(index)
    self.location = Location(f"{root}/{self.prefix}")
    self.start = start
    self.kinds = layout.arrays(manifest["sites"], manifest["dtype"])
    self.load()

  def load(self) -> None:
    """Reads `part.json` again; `value` is None where there is none."""
    self.document = self.broken = self.value = None
    try:
      self.document = Document(self.location, PART)
      self.value = self.document.value
    except ValueError as e:
      key, at = self.prefix + PART, self.start
      self.broken = Damage("part", at, at, key, str(e.__cause__ or e))
    rows = self.value["committed"] if self.value else 0
    self.stop = self.start + rows
    # Whoever has the arrays open here may have read damaged metadata.
    context = ts.Context(
      {"cache_pool": {"total_bytes_limit": 0}}, parent=storage.CONTEXT
    )
    self.arrays = {
      name: self.location.finish(
        ts.open(
          self.location.array(name),
          context=context,
          open=True,
          assume_metadata=True,
          **layout.form(*kind, rows),
        ),
        f"opening {name}",
      )
      for name, kind in self.kinds.items()
    }

  def shards(self) -> Iterator[tuple[str, int, int]]:
    """(array, start, stop) of what is committed, in the part's rows."""
    holes = {start for start, _ in self.value["holes"]} if self.value else ()
    for name in self.kinds:
      for a in range(0, self.stop - self.start, layout.SHARD_ROWS):
        if a not in holes:
          yield name, a, min(a + layout.SHARD_ROWS, self.stop - self.start)

  def bytes(self, name: str, rows: int) -> int:
    """Of so many rows of an array, in memory."""
    array = self.arrays[name]
    width = array.shape[1] if array.rank > 1 else 1
    return rows * width * array.dtype.numpy_dtype.itemsize

  def damages(
    self, bar, only: Collection[str] | None = None
  ) -> Iterator[Damage]:
    """Everything that is damaged; of the shards only those with these keys."""
    if self.broken is not None:
      yield self.broken
    if self.value is None:
      return
    yield from self._of_metadata()
    yield from self._of_shards(bar, only)
    yield from self._of_documents()
    yield from self._of_state()

  def _of_shards(self, bar, only) -> Iterator[Damage]:
    flights = collections.deque()

    def land():
      name, a, b, future = flights.popleft()
      if future.exception() is not None:
        start = self.start
        for damage in damaged_chunks(self, name, start + a, start + b):
          self._insist(damage)
          yield damage
      if bar is not None:
        bar.update(self.bytes(name, b - a))

    for name, a, b in self.shards():
      key = layout.shard_key(name, a // layout.SHARD_ROWS, self.kinds[name][0])
      if only is not None and self.prefix + key not in only:
        continue
      while flights and (
        len(flights) == READS
        or sum(self.bytes(n, d - c) for n, c, d, _ in flights)
        + self.bytes(name, b - a)
        > READ_BYTES
      ):
        yield from land()
      flights.append((name, a, b, self.arrays[name][a:b].read()))
    while flights:
      yield from land()

  def _insist(self, damage: Damage) -> None:
    if not damage.reason.startswith(DAMAGED) and BAD_DISK not in damage.reason:
      raise OSError(
        f"{self.location}: {damage.key} cannot be read ({damage.reason}), "
        "which does not tell whether it is damaged. Check that the place is "
        "reachable and that you may read it, then run the same command again."
      )

  def _damage(self, what: str, key: str, reason: str) -> Damage:
    return Damage(what, self.start, self.stop, self.prefix + key, reason)

  def _of_metadata(self) -> Iterator[Damage]:
    rows = {self.value["committed"]}
    if not self.value["complete"]:
      rows.add(layout.MANY_ROWS)
    for name, kind in self.kinds.items():
      key = _metadata_key(name)
      there = self.location.read(key)
      if there is None:
        yield self._damage(name, key, "the array's metadata are missing")
      elif not any(_is_metadata(there, kind, n) for n in rows):
        reason = "the array's metadata are not those of this part's rows"
        yield self._damage(name, key, reason)

  def _of_documents(self) -> Iterator[Damage]:
    count, sound = 0, True
    for i in range(self.value["document_files"]):
      found = self.documents_of(i)
      if isinstance(found, str):
        sound = False
        yield self._damage("documents", layout.documents_key(i), found)
      else:
        count += len(found)
    if sound and count != self.value["documents"]:
      yield self._damage(
        "documents",
        layout.documents_key(max(0, self.value["document_files"] - 1)),
        f"{count} documents, expected {self.value['documents']}",
      )

  def documents_of(self, index: int) -> list[Sequence[str]] | str:
    """The documents that a file names, or what is wrong with it."""
    data = self.location.read(layout.documents_key(index))
    if data is None:
      return "the file is missing"
    try:
      return layout.unpack_documents(data)
    except ValueError as e:
      return str(e)

  def _of_state(self) -> Iterator[Damage]:
    key = self.value["state"]
    if key is None:
      return
    data = self.location.read(key)
    if data is None:
      # A writer removes its last one when it has a new one.
      now = Document(self.location, PART).value
      if now is not None and now["state"] != key:
        return
      yield self._damage("statistics", key, "the file is missing")
      return
    try:
      load_statistics(data, key)
    except OSError as e:
      yield self._damage("statistics", key, str(e))


def _parts(where) -> list[_Part]:
  root, manifest = read_manifest(where)
  parts, start = [], 0
  for index in range(manifest["parts"]):
    parts.append(_Part(root, index, manifest, start))
    start = parts[-1].stop
  return parts


def _broken_manifest(where) -> Damage | None:
  """The damage of a manifest; None where it can be read, or is not there.

  Raises:
    ValueError: a manifest of another version, which is no damage.
  """
  root = Location(where)
  try:
    Document(root, MANIFEST)
  except ValueError as e:
    there = None
    with contextlib.suppress(ValueError):
      there = json.loads(root.read(MANIFEST))
    if isinstance(there, dict) and "checksum" not in there:
      layout.check_format(root, there)
    return Damage("manifest", 0, 0, MANIFEST, str(e.__cause__ or e))
  return None


def _metadata_key(name: str) -> str:
  return f"{name}/zarr.json"


def _metadata(kind, rows: int) -> bytes:
  """The bytes of the `zarr.json` of an array of so many rows."""
  context = ts.Context()  # with a memory of its own
  spec = {"driver": "memory", "path": "array/"}
  ts.open(
    {"driver": "zarr3", "kvstore": spec},
    context=context,
    create=True,
    **layout.form(*kind, rows),
  ).result()
  kv = ts.KvStore.open(spec, context=context).result()
  return kv.read("zarr.json").result().value


def _is_metadata(there: bytes, kind, rows: int) -> bool:
  expected = _metadata(kind, rows)
  # Another version of TensorStore may spell the same thing differently.
  return there == expected or _understood(there) == _understood(expected)


def _understood(metadata: bytes) -> dict[str, Any] | None:
  context, spec = ts.Context(), {"driver": "memory", "path": "array/"}
  kv = ts.KvStore.open(spec, context=context).result()
  kv.write("zarr.json", metadata).result()
  opened = ts.open({"driver": "zarr3", "kvstore": spec}, context=context)
  if opened.exception() is not None:
    return None
  return opened.result().spec().to_json()["metadata"]


# ------------------------------------------------------------------ taking out
def _take_out(part: _Part, damages: Sequence[Damage]) -> None:
  """Mends a part that nobody else may write.

  What is damaged goes before `part.json` says so: wherever this is cut off,
  `verify` still finds what is left to do.
  """
  if part.broken is not None:
    _put_aside(part.location, PART)
    return
  there, changes, after = part.value, {}, []
  holes = {tuple(hole) for hole in there["holes"]}
  for damage in damages:
    key = damage.key.removeprefix(part.prefix)
    if key == _metadata_key(damage.array):
      rows = there["committed"] if there["complete"] else layout.MANY_ROWS
      metadata = _metadata(part.kinds[damage.array], rows)
      part.location.write(key, metadata)
    elif key == there["state"]:
      changes["state"] = None
      after.append(key)
    elif key.startswith("documents/"):
      if "documents" not in changes:
        changes |= _keep_documents(part)
        kept, count = changes["document_files"], there["document_files"]
        after += map(layout.documents_key, range(kept, count))
    else:
      a = (damage.start - part.start) // layout.SHARD_ROWS * layout.SHARD_ROWS
      holes.add((a, min(a + layout.SHARD_ROWS, there["committed"])))
      part.location.delete(key)
  changes["holes"] = [list(hole) for hole in sorted(holes)]
  if holes and "state" in changes:
    # The harvest that fills them runs, and can take the statistics anew.
    changes["complete"] = False
  if changes != {"holes": there["holes"]}:
    part.document.replace(there | changes)
  for key in after:
    part.location.delete(key)


def _keep_documents(part: _Part) -> dict[str, Any]:
  """The files before the first damaged one; the harvest names the rest."""
  count = part.value["document_files"]
  files = []
  for i in range(count):
    found = part.documents_of(i)
    if isinstance(found, str):
      break
    files.append(len(found))
  if len(files) == count:  # all can be read, and they are too few or too many
    files = []
  return {
    "documents": sum(files),
    "document_files": len(files),
    "complete": False,
  }


def _put_aside(location: Location, name: str) -> None:
  location.write(name + ASIDE, location.read(name))
  location.delete(name)
