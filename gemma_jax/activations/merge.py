"""Joins complete stores of the same sites into one."""

import collections
import os
import time
from collections.abc import Sequence
from typing import Any

from gemma_jax import progress
from gemma_jax.activations import layout, storage
from gemma_jax.activations.claim import LEASE_SECONDS, lock
from gemma_jax.activations.layout import MANIFEST, PART
from gemma_jax.activations.storage import Document, Location
from gemma_jax.activations.store import ActivationStore, read_manifest

__all__ = ["merge"]

JOURNAL = "merge.json"  # there while a merge is not finished
ALIKE = ("sites", "dtype", "metadata")
IN_FLIGHT = 4  # files that are read and written at once
# Of a part, and not part of its contents.
LOCKS = (".lock", "writer.json")


def merge(
  target: str | os.PathLike, sources: Sequence[str | os.PathLike]
) -> ActivationStore:
  """Copies the parts of complete stores behind those of another.

  Part by part, and a part counts when all of it is there: an interrupted
  merge leaves the target readable and is gone on with by the same call.

  Args:
    target: a complete store, a path or a URL; made if there is none.
    sources: complete stores of the same sites, dtype and metadata.

  Returns:
    The target. Its `stats.json` is gone, since it told of other rows.

  Raises:
    ValueError: stores that are incomplete or unlike, or rows that are there
      already.
    BlockingIOError: another process is writing the target.
    FileNotFoundError: a source that is no store.
    OSError: the place is full or refuses the write; a file is missing.
  """
  if not sources:
    raise ValueError("merge expects at least one source, got none.")
  root = Location(target)
  opened = [_Source(*read_manifest(where)) for where in sources]
  manifest = Document(root, MANIFEST)
  ours = _Source(root, manifest.value) if manifest.value else None
  _check_alike(ours or opened[0], opened)
  there = ours.parts if ours else []
  journal = Document(root, JOURNAL)
  names = [source.name for source in opened]
  first = _resumed(journal, names)
  first = len(there) if first is None else first
  _check_new(root, there[:first], opened)
  journal.replace({"sources": names, "first": first})

  done = iter(there[first:])
  left = [
    (source, i)
    for source in opened
    for i, part in enumerate(source.parts)
    if not any(_same(part, other) for other in done)
  ]
  total = sum(len(source.keys(i)) for source, i in left)
  with progress.bar(total, "merge", unit="files") as bar:
    for source, i in left:
      _add(source, i, root, manifest, bar)
  root.delete("stats.json")
  journal.remove()
  return ActivationStore.open(target)


class _Source:
  """A complete store to copy from."""

  def __init__(self, root: Location, manifest: dict[str, Any]):
    layout.check_format(root, manifest)
    self.root, self.manifest = root, manifest
    self.name = str(root.path or root.url)
    self.kinds = layout.arrays(manifest["sites"], manifest["dtype"])
    self.parts = []
    for i, value in enumerate(layout.parts(root, manifest)):
      if not layout.is_whole(value):
        raise ValueError(
          f"{root} is incomplete in part {i}. Run its harvest again, which "
          "writes what is missing, then merge."
        )
      tokens = layout.shard_key(layout.TOGETHER, 0, (len(layout.LABELS),))
      self.parts.append(value | {"tokens": self.at(i).read(tokens)})

  def at(self, index: int) -> Location:
    return Location(f"{self.root}/{layout.part_name(index)}")

  def keys(self, index: int) -> list[str]:
    """What a part consists of, but for its `part.json`."""
    part = self.parts[index]
    shards = range(-(-part["committed"] // layout.SHARD_ROWS))
    keys = [f"{name}/zarr.json" for name in self.kinds]
    keys += [
      layout.shard_key(name, shard, row)
      for name, (row, _, _) in self.kinds.items()
      for shard in shards
    ]
    keys += map(layout.documents_key, range(part["document_files"]))
    return keys + [part["state"]] * (part["state"] is not None)


def _same(part, other) -> bool:
  """Whether two parts are the same rows: made alike, of the same tokens."""
  names = ("made_by", "sources", "committed", "documents", "tokens")
  return all(part[name] == other[name] for name in names)


def _check_alike(like: _Source, sources: Sequence[_Source]) -> None:
  ours = {name: like.manifest[name] for name in ALIKE}
  for source in sources:
    theirs = {name: source.manifest[name] for name in ALIKE}
    if ours != theirs:
      raise ValueError(
        f"{source.root} cannot be merged with {like.root}: "
        f"{layout.differences(ours, theirs)}. Merge stores of the same model, "
        "sites and dtype."
      )


def _check_new(root, there, sources: Sequence[_Source]) -> None:
  """Refuses rows that are in the target, or in two sources."""
  known = [(root, part) for part in there]
  for source in sources:
    for i, part in enumerate(source.parts):
      for where, other in known:
        if _same(part, other):
          raise ValueError(
            f"Part {i} of {source.root} is in {where} already: its rows would "
            "count twice. Leave this store out."
          )
    known += [(source.root, part) for part in source.parts]


def _resumed(journal: Document, names: Sequence[str]) -> int | None:
  """How many parts there were before this merge was interrupted, if it was."""
  if journal.value is None:
    return None
  if journal.value["sources"] != names:
    raise ValueError(
      f"{journal.location} has an unfinished merge of "
      f"{', '.join(journal.value['sources'])}. Run that again first, or "
      f"delete {journal.location}/{JOURNAL}, which leaves what it copied."
    )
  return journal.value["first"]


def _add(source: _Source, index: int, root, manifest: Document, bar) -> None:
  """Copies a part behind those of the target."""
  there = manifest.value
  number = there["parts"] if there else 0
  to = Location(f"{root}/{layout.part_name(number)}")
  release = lock(to)
  try:
    manifest.reload()
    if manifest.value != there:
      raise _overtaken(root)
    keys = source.keys(index)
    # What an interrupted merge may have left.
    to.delete(PART)
    for stale in set(to.keys("")) - {*keys, *LOCKS}:
      to.delete(stale)
    try:
      _copy(source.at(index), to, keys, release.renew, bar)
      Document(to, PART).replace(Document(source.at(index), PART).value)
      new = source.manifest | (there or {}) | {"parts": number + 1}
      manifest.replace(new)
    except storage.Conflict as e:
      to.delete(PART)
      raise _overtaken(root) from e
  finally:
    release()


def _copy(source: Location, to: Location, keys, renew, bar) -> None:
  reads, writes = collections.deque(), collections.deque()
  renewed = time.time()

  def land():
    key, future = writes.popleft()
    to.finish(future, f"writing {key}")
    bar.update(1)

  def turn():
    key, future = reads.popleft()
    found = source.finish(future, f"reading {key}")
    if found.state != "value":
      raise OSError(
        f"{source}/{key} is missing. `python -m launch.store verify "
        f"{str(source).split('/parts/')[0]}` tells what else is."
      )
    writes.append((key, to.kv.write(key, found.value)))

  try:
    for key in keys:
      if len(reads) == IN_FLIGHT:
        turn()
      if len(writes) == IN_FLIGHT:
        land()
      reads.append((key, source.kv.read(key)))
      if time.time() > renewed + LEASE_SECONDS / 10:
        renew()
        renewed = time.time()
    while reads:
      turn()
    while writes:
      land()
  finally:
    for _, future in writes:
      future.exception()  # nobody else may write while one is on its way


def _overtaken(root) -> BlockingIOError:
  return BlockingIOError(
    f"Another process has added to {root} meanwhile. Wait for it, then run "
    "the same merge again."
  )
