"""The header of a GGUF file, read as untrusted data.

The `gguf` library's reader builds Python objects for each of the 786,432
entries of a Gemma vocabulary, and trusts every length that the file states.

Format: ggml-org/ggml, docs/gguf.md (version 3, little-endian).
"""

import math
import pathlib
import struct
from typing import Any, NamedTuple, NoReturn

import numpy as np

# GGUF value types -> NumPy. A bool is one byte.
_NUMBERS = {
  0: "<u1",
  1: "<i1",
  2: "<u2",
  3: "<i2",
  4: "<u4",
  5: "<i4",
  6: "<f4",
  7: "?",
  10: "<u8",
  11: "<i8",
  12: "<f8",
}
_STRING, _ARRAY = 8, 9


class Tensor(NamedTuple):
  shape: tuple[int, ...]  # row-major: the slowest dimension first
  kind: int  # ggml_type
  start: int  # first byte in the file
  size: int  # bytes in the file


class File(NamedTuple):
  path: pathlib.Path
  data: memoryview
  metadata: dict[str, Any]
  tensors: dict[str, Tensor]


class _Cursor:
  """Reads forward through the header."""

  def __init__(self, path: pathlib.Path, data: memoryview):
    self.path, self.data, self.at = path, data, 0

  def fail(self, expected: str, received: str) -> NoReturn:
    raise ValueError(
      f"{self.path} is truncated or not a usable GGUF file: expected "
      f"{expected}, but {received}. Download it again, or convert the model "
      "to GGUF again."
    )

  def need(self, size: int, what: str) -> int:
    """The position of the next `size` bytes, without moving past them."""
    if size > len(self.data) - self.at:
      self.fail(
        f"at least {size} bytes at byte {self.at} for {what}",
        f"the file ends at byte {len(self.data)}",
      )
    return self.at

  def number(self, layout: str, what: str) -> int:
    at = self.need(struct.calcsize(layout), what)
    (value,) = struct.unpack_from(layout, self.data, at)
    self.at += struct.calcsize(layout)
    return value

  def count(self, item_size: int, what: str, layout: str = "<Q") -> int:
    """A number of items that take at least `item_size` bytes each."""
    n = self.number(layout, f"the number of {what}")
    self.need(n * item_size, f"{n} {what}")
    return n

  def string(self, what: str) -> str:
    size = self.number("<Q", f"the length of {what}")
    at = self.need(size, what)
    self.at += size
    try:
      return str(self.data[at : at + size], "utf-8")
    except UnicodeDecodeError as error:
      self.fail(f"{what} at byte {at} to be UTF-8", str(error))

  def numbers(self, kind: int, n: int, what: str) -> np.ndarray:
    dtype = np.dtype(_NUMBERS[kind])
    at = self.need(n * dtype.itemsize, what)
    self.at += n * dtype.itemsize
    return np.frombuffer(self.data, dtype, n, at)

  def value(self, kind: int, what: str) -> Any:
    if kind == _STRING:
      return self.string(what)
    if kind in _NUMBERS:
      return self.numbers(kind, 1, what)[0].item()
    if kind == _ARRAY:
      kind = self.number("<I", f"the item type of {what}")
      if kind == _STRING:
        n = self.count(8, f"strings of {what}")
        return [self.string(what) for _ in range(n)]
      if kind in _NUMBERS:
        return self.numbers(kind, self.number("<Q", what), what)
    self.fail(f"{what} of a type that GGUF 3 has", f"its type is {kind}")


def read(path: pathlib.Path, gguf) -> File:
  if not path.stat().st_size:  # an empty file cannot be mapped
    raise ValueError(
      f"Expected a GGUF file at {path}, but it is empty. Download it again."
    )
  data = memoryview(np.memmap(path, np.uint8, mode="r"))
  cursor = _Cursor(path, data)
  magic = bytes(data[:4])
  if magic != b"GGUF":
    cursor.fail("b'GGUF' in the first four bytes", f"they are {magic!r}")
  cursor.at = 4
  version = cursor.number("<I", "the version")
  if version != 3:
    cursor.fail("version 3, little-endian", f"the version is {version:#x}")
  # 13 and 24 bytes: an entry and a tensor whose name is empty, one-byte value,
  # no dimension.
  n_tensors = cursor.number("<Q", "the number of tensors")
  n_entries = cursor.count(13, "metadata entries")
  cursor.need(n_tensors * 24, f"{n_tensors} tensors")
  metadata = {}
  for _ in range(n_entries):
    key = cursor.string("a metadata key")
    if key in metadata:
      cursor.fail("every metadata key once", f"{key!r} is there twice")
    kind = cursor.number("<I", f"the type of {key!r}")
    metadata[key] = cursor.value(kind, repr(key))
  return File(path, data, metadata, _tensors(cursor, metadata, n_tensors, gguf))


def _tensors(cursor, metadata, n_tensors, gguf) -> dict[str, Tensor]:
  alignment = metadata.get("general.alignment", 32)
  if type(alignment) is not int or alignment < 8 or alignment % 8:
    cursor.fail("an alignment that is a multiple of 8", f"it is {alignment!r}")
  stated = {}
  for _ in range(n_tensors):
    name = cursor.string("a tensor's name")
    if name in stated:
      cursor.fail("every tensor once", f"{name!r} is there twice")
    n_dims = cursor.count(8, f"dimensions of {name!r}", "<I")
    dims = cursor.numbers(10, n_dims, f"dimensions of {name!r}").tolist()
    kind = cursor.number("<I", f"the type of {name!r}")
    stated[name] = dims, kind, cursor.number("<Q", f"the offset of {name!r}")
  base = -(-cursor.at // alignment) * alignment
  blocks = {int(k): sizes for k, sizes in gguf.GGML_QUANT_SIZES.items()}
  tensors = {}
  for name, (dims, kind, offset) in stated.items():
    if kind not in blocks:
      cursor.fail(
        f"a type of {name!r} that the installed gguf library knows",
        f"it is {kind}",
      )
    block, block_bytes = blocks[kind]
    if not 1 <= len(dims) <= 4 or 0 in dims or dims[0] % block:
      cursor.fail(
        f"1 to 4 dimensions of {name!r}, the first a multiple of {block}",
        f"they are {dims}",
      )
    size = math.prod(dims) // block * block_bytes
    if offset % alignment:
      cursor.fail(
        f"the offset of {name!r} to be a multiple of {alignment}",
        f"it is {offset}",
      )
    cursor.at = base + offset
    cursor.need(size, f"the tensor {name!r}")
    tensors[name] = Tensor(tuple(dims[::-1]), kind, base + offset, size)
  # Without this, a small file could ask for an output of any size by naming
  # the same bytes many times.
  end, last = base, "the header"
  for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
    if tensor.start < end:
      cursor.fail("tensors that do not overlap", f"{last} and {name!r} do")
    end, last = tensor.start + tensor.size, repr(name)
  return tensors


def field(file: File, key: str, kind: type, default=None) -> Any:
  """A metadata value of a type; integers are positive unless they are ids."""
  value = file.metadata.get(key, default)
  if type(value) is not kind:  # isinstance would let True pass for 1
    received = "it is missing" if value is None else f"it is {value!r}"
    raise ValueError(
      f"{file.path}: expected the metadata entry {key!r} to be of type "
      f"{kind.__name__}, but {received}. Convert the model to GGUF again with "
      "a current llama.cpp."
    )
  if kind is int and not key.startswith("tokenizer.") and value < 1:
    raise ValueError(f"{file.path}: expected {key!r} >= 1, got {value}.")
  if kind is float and not 0 < value < math.inf:
    raise ValueError(f"{file.path}: expected 0 < {key!r} < inf, got {value}.")
  return value
