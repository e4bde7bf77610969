"""Safetensors files, read slice by slice and treated as untrusted data.

The format (github.com/huggingface/safetensors): 8 bytes of little-endian
header length, a JSON header of dtypes, shapes and byte ranges, then the data.
"""

import json
import math
import mmap
import os
import pathlib
from collections.abc import Iterable, Mapping

import ml_dtypes
import numpy as np

DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100 * 2**20
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Bytes of a file that are in memory at a time while a tensor is copied.
CHUNK_BYTES = 32 * 2**20


def open_file(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Lazy views of all tensors of one file: nothing is read until sliced.

  Raises:
    ValueError: a dtype that is not in DTYPES; or the file is truncated or its
      header does not describe it: as the format demands, tensors neither
      overlap nor leave bytes between them.
  """
  path = pathlib.Path(path)
  size = path.stat().st_size
  bad = f"{path} is not a complete safetensors file: "
  again = " Download or copy it again."
  with path.open("rb") as f:
    length = int.from_bytes(f.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER):
      raise ValueError(
        f"{bad}the header claims {length} bytes and the file has {size}.{again}"
      )
    try:
      header = json.loads(f.read(length))
    except (ValueError, RecursionError) as e:
      raise ValueError(f"{bad}the header is no JSON ({e}).{again}") from e
  if not isinstance(header, dict):
    raise ValueError(
      f"{bad}the header is a {type(header).__name__}, not an object.{again}"
    )
  header.pop("__metadata__", None)
  data = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
  start, room = 8 + length, size - 8 - length
  tensors, ranges, others = {}, [], []
  for name, entry in header.items():
    try:
      kind, shape = entry["dtype"], tuple(entry["shape"])
      if isinstance(kind, str) and kind not in DTYPES:
        others.append(f"{name} is {kind}")
        continue
      dtype = DTYPES[kind]
      first, last = entry["data_offsets"]
      if not all(type(n) is int for n in (*shape, first, last)):
        raise TypeError("sizes and offsets must be integers")
      if any(n < 0 for n in shape):
        raise ValueError("a negative size")
      expected = math.prod(shape) * dtype.itemsize
      fits = 0 <= first <= last and last - first == expected
    except (KeyError, TypeError, ValueError) as e:
      raise ValueError(
        f"{bad}tensor {name!r} has entry {entry} ({type(e).__name__}: {e})."
        f"{again}"
      ) from e
    if not fits or last > room:
      raise ValueError(
        f"{bad}tensor {name!r} of shape {shape} and dtype {dtype} needs "
        f"{expected} bytes at {first}..{last}; the file holds {room} bytes of "
        f"data.{again}"
      )
    raw = data[start + first : start + last]
    tensors[name] = raw.view(dtype).reshape(shape)
    ranges.append((first, last, name))
  if others:
    raise ValueError(
      f"{path} holds dtypes that are not supported: {', '.join(others[:4])}"
      f"{' and others' * (len(others) > 4)}. Expected {', '.join(DTYPES)}. "
      "Load a checkpoint of the model that is not quantised."
    )
  end = 0
  for first, last, name in sorted(ranges):
    if first != end:
      raise ValueError(
        f"{bad}tensor {name!r} starts at byte {first} of the data, and the one "
        f"before it ends at {end}.{again}"
      )
    end = last
  if end != room:
    raise ValueError(f"{bad}its tensors end at byte {end} of {room}.{again}")
  return tensors


def copy(source: np.ndarray, out: np.ndarray) -> None:
  """Fills `out` from a lazy view, without keeping the file's pages.

  Args:
    source: a view of what `open_file` gave, sliced and turned as need be.
    out: of the same shape and any dtype.
  """
  if not source.size:
    return
  # In the order of the file, whatever way the view is turned.
  axis = int(np.argmax(source.strides)) if source.ndim else 0
  source, out = np.atleast_1d(source), np.atleast_1d(out)
  source, out = (np.moveaxis(a, axis, 0) for a in (source, out))
  rows = max(1, CHUNK_BYTES // source[0].nbytes)
  for start in range(0, len(source), rows):
    out[start : start + rows] = source[start : start + rows]
    mapped = getattr(source, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
      mapped.madvise(mmap.MADV_DONTNEED)


def open_directory(directory: str | os.PathLike) -> dict[str, np.ndarray]:
  """Lazy views of all tensors of a checkpoint, in one file or several.

  Raises:
    FileNotFoundError: no weights there, or a shard of the index is missing.
    ValueError: see `open_file`; the index is broken; or a shard lacks what
      the index promises.
  """
  directory = pathlib.Path(directory)
  index = directory / INDEX
  if not index.exists():
    single = directory / SINGLE
    if not single.exists():
      raise FileNotFoundError(
        f"{directory} holds neither {SINGLE} nor {INDEX}. Point at a Hugging "
        "Face checkpoint directory, or download the weights into it."
      )
    return open_file(single)
  try:
    where = dict(json.loads(index.read_text())["weight_map"])
    if not all(isinstance(name, str) for name in where.values()):
      raise TypeError("a shard's name is no string")
  except (ValueError, KeyError, TypeError, RecursionError) as e:
    raise ValueError(
      f"{index} is no JSON object with a weight_map of tensors to files "
      f"({type(e).__name__}: {e}). Download it again."
    ) from e
  files = sorted(set(where.values()))
  # A shard is named by a file that is data: it must stay in the directory.
  outside = [name for name in files if pathlib.Path(name).name != name]
  absent = [name for name in files if not (directory / name).is_file()]
  if outside or absent:
    names = sorted({*outside, *absent})
    raise FileNotFoundError(
      f"{index} names shards that are not in {directory}: "
      f"{', '.join(map(repr, names))}. Download them."
    )
  shards = {name: open_file(directory / name) for name in files}
  lost = sorted(t for t, name in where.items() if t not in shards[name])
  if lost:
    raise ValueError(
      f"{index} promises tensors that their files lack: {', '.join(lost)}."
    )
  return {tensor: shards[name][tensor] for tensor, name in where.items()}


def write_file(
  path: str | os.PathLike,
  tensors: Mapping[str, np.ndarray] | Iterable[tuple[str, np.ndarray]],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes tensors to one file, by way of a temporary name beside it."""
  path = pathlib.Path(path)
  tensors = dict(tensors)
  header, offset = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
  for name, x in tensors.items():
    header[name] = {
      "dtype": NAMES[x.dtype],
      "shape": list(x.shape),
      "data_offsets": [offset, offset + x.nbytes],
    }
    offset += x.nbytes
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  partial = path.with_name(f".{path.name}.{os.getpid()}")
  with partial.open("wb") as f:
    f.write(len(text).to_bytes(8, "little") + text)
    for x in tensors.values():
      f.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
  partial.rename(path)
