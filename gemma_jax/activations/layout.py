"""What lies where in a store, and in which form.

  manifest.json                    sites, dtype, how many parts, what made them
  parts/00000/part.json            rows that are safely there, what made them
  parts/00000/<array>/             zarr3, shards of chunks, each with a crc32c
  parts/00000/documents/*.jsonl.gz id, source and name, first seen in a shard
  parts/00000/state/*.npz          statistics of the rows that are there

A part has one writer; every host has a part of its own. Rows count through
the parts in their order.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from gemma_jax.activations import storage
from gemma_jax.activations.storage import Document, Location

FORMAT = 3
MANIFEST = "manifest.json"
PART = "part.json"
SHARD_ROWS = 16_384  # one file, written at once
CHUNK_ROWS = 1_024  # the least that is read at once
MANY_ROWS = 2**40  # until a part is complete, its length is not known
DTYPES = ("bfloat16", "float32", "int8")
# What stands beside every vector, int32 [N] each: the token's id; the number
# of its document; its position in the window; the number of its source; and
# its bytes in the document's UTF-8 text, begin:end.
LABELS = ("token", "document", "position", "source", "begin", "end")
TOGETHER = "labels"  # the array that holds them, [N, 6]: one file, not six
# Names in a part that no site can have.
RESERVED = {TOGETHER, *LABELS, "documents", "state"}
SCALE = ".scale"  # beside an int8 site: float32 [N]

CHECKED = {"name": "crc32c"}
PLAIN = [{"name": "bytes"}, CHECKED]
# Labels repeat or count upwards. Vectors hardly compress.
PACKED = [
  {"name": "bytes"},
  {
    "name": "blosc",
    "configuration": {
      "cname": "zstd",
      "clevel": 1,
      "shuffle": "shuffle",
      "typesize": 4 * len(LABELS),
      "blocksize": 0,
    },
  },
  CHECKED,
]


def part_name(index: int) -> str:
  """The directory of a part, with its slash."""
  return f"parts/{index:05d}/"


def parts(
  root: Location, manifest: Mapping[str, Any]
) -> list[dict[str, Any] | None]:
  """What each part says of itself; None where it has not begun."""
  return [
    Document(Location(f"{root}/{part_name(i)}"), PART).value
    for i in range(manifest["parts"])
  ]


def is_whole(part: Mapping[str, Any] | None) -> bool:
  """Whether a part has begun, has ended and has no holes."""
  return bool(part and part["complete"] and not part["holes"])


def lacks(part: Mapping[str, Any], start: int, stop: int) -> bool:
  """Whether any of a part's rows start:stop is still to be written."""
  if stop > part["committed"] and not part["complete"]:
    return start < stop
  return any(start < b and a < stop for a, b in part["holes"])


def arrays(
  sites: Mapping[str, int], dtype: str
) -> dict[str, tuple[tuple[int, ...], str, list]]:
  """name -> (shape of a row, dtype, codecs) of every array of a part."""
  out = {site: ((width,), dtype, PLAIN) for site, width in sites.items()}
  if dtype == "int8":
    out |= {f"{site}{SCALE}": ((), "float32", PLAIN) for site in sites}
  return out | {TOGETHER: ((len(LABELS),), "int32", PACKED)}


def create(
  location: Location, name: str, row: Sequence[int], dtype: str, codecs: list
) -> ts.Future:
  """Begins an array of unknown length, in the place of any there."""
  return ts.open(
    location.array(name),
    context=storage.CONTEXT,
    create=True,
    delete_existing=True,
    **form(row, dtype, codecs, MANY_ROWS),
  )


def form(
  row: Sequence[int], dtype: str, codecs: list, rows: int
) -> dict[str, Any]:
  """What `ts.open` must know of an array that it cannot ask."""
  return {
    "dtype": dtype,
    "shape": [rows, *row],
    "chunk_layout": ts.ChunkLayout(
      write_chunk_shape=[SHARD_ROWS, *row],
      read_chunk_shape=[CHUNK_ROWS, *row],
    ),
    "codec": ts.CodecSpec({"driver": "zarr3", "codecs": codecs}),
  }


def shard_key(name: str, shard: int, row: Sequence[int]) -> str:
  """The key of a shard's file, below its part."""
  return f"{name}/c/{'/'.join([str(shard), *('0' for _ in row)])}"


def documents_key(index: int) -> str:
  """The key of a file of documents, below its part."""
  return f"documents/{index:06d}.jsonl.gz"


def pack_documents(documents: Iterable[Sequence[str]]) -> bytes:
  """(id, source, name) of each document, gzipped JSON lines."""
  lines = "".join(json.dumps(list(d)) + "\n" for d in documents)
  # Without a time stamp, so that equal contents are equal bytes.
  return gzip.compress(lines.encode(), 1, mtime=0)


def unpack_documents(data: bytes) -> list[tuple[str, str, str]]:
  """What `pack_documents` packed.

  Raises:
    ValueError: damaged.
  """
  try:
    lines = gzip.decompress(data).decode().splitlines()
    return [tuple(json.loads(line)) for line in lines]
  except (OSError, EOFError, ValueError, zlib.error) as e:
    raise ValueError(f"documents that are damaged ({e})") from e


def quantise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Rows [n, D] as int8, and the float32 scales [n] that give them back."""
  x = np.asarray(x, np.float32)
  scale = np.abs(x).max(-1, initial=0) / 127
  q = np.rint(x / np.where(scale > 0, scale, 1)[:, None])
  return q.astype(np.int8), scale.astype(np.float32)


def differences(
  ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = ""
) -> str:
  """What two descriptions disagree on, for a message."""
  found = []
  for key in sorted({*ours, *theirs}):
    here, there = ours.get(key), theirs.get(key)
    if here == there:
      continue
    if isinstance(here, Mapping) and isinstance(there, Mapping):
      found.append(differences(here, there, f"{prefix}{key}."))
    else:
      found.append(f"{prefix}{key}: {there!r} there, {here!r} here")
  return "; ".join(found)


def check_format(root: Location, manifest: Mapping[str, Any]) -> None:
  """Raises ValueError for a store of another version."""
  if manifest.get("format") != FORMAT:
    raise ValueError(
      f"{root} has format {manifest.get('format')}, expected {FORMAT}. Delete "
      "it and harvest again."
    )
