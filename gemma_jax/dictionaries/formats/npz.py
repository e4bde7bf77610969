"""NumPy archives (.npz), read as untrusted data.

An archive is a ZIP file of .npy members (numpy.org/doc/stable/reference/
generated/numpy.lib.format.html): a header of dtype and shape, then the data.
`numpy.load` takes memory for whatever a header claims; here every claim is
compared with the sizes in the archive first, and those with its size on disk.
"""

import contextlib
import dataclasses
import math
import pathlib
import warnings
import zipfile
import zlib

import numpy as np

# Weights hardly compress; an archive that claims more than this many times its
# size on disk (and a megabyte) is made to fill the memory.
MAX_EXPANSION = 16
SLACK = 2**20
CHUNK_BYTES = 2**24
AGAIN = "Download or copy it again."


@dataclasses.dataclass(frozen=True)
class Member:
  """An array of an archive, which `np.array` reads.

  Attributes:
    path: of the archive.
    name: of the member.
    shape: of the array.
    dtype: of the array.
    fortran: whether the first axis is the fastest.
    start: bytes before the data.
  """

  path: pathlib.Path
  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  fortran: bool
  start: int

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    out = np.empty(math.prod(self.shape), self.dtype)
    left = memoryview(out.view(np.uint8))
    with (
      _readable(self.path),
      zipfile.ZipFile(self.path) as archive,
      archive.open(self.name) as f,
    ):
      f.read(self.start)
      while left and (chunk := f.read(min(len(left), CHUNK_BYTES))):
        left[: len(chunk)] = chunk
        left = left[len(chunk) :]
    if left:
      raise ValueError(f"{self.path}: {self.name} ends too soon. {AGAIN}")
    out = out.reshape(self.shape, order="F" if self.fortran else "C")
    return out if dtype is None else out.astype(dtype, copy=False)


def open_npz(path: pathlib.Path) -> dict[str, Member]:
  """All arrays of an archive; nothing but headers is read.

  Raises:
    ValueError: no ZIP archive, or a damaged one; members that are no arrays,
      of objects, or that are not as long as their shape and dtype say; or far
      more data than the file can hold.
  """
  members = {}
  with _readable(path), zipfile.ZipFile(path) as archive:
    infos = archive.infolist()
    claimed = sum(info.file_size for info in infos)
    size = path.stat().st_size
    if claimed > MAX_EXPANSION * size + SLACK:
      raise ValueError(
        f"{path} has {size} bytes and claims to unpack to {claimed}; expected "
        f"at most {MAX_EXPANSION} times as many. It is no archive of weights: "
        "do not use it."
      )
    for info in infos:
      name = info.filename.removesuffix(".npy")
      if name == info.filename or name in members:
        raise ValueError(
          f"{path} holds {info.filename!r} twice, or no array; expected .npy "
          f"members. {AGAIN}"
        )
      with archive.open(info) as f:
        shape, fortran, dtype = _header(f)
        start = f.tell()
      if dtype.hasobject:
        raise ValueError(
          f"{path}: {name} holds Python objects, which are not read: a file "
          "could run code that way. Expected an array of floats."
        )
      data = math.prod(shape) * dtype.itemsize
      if min(shape, default=1) < 0 or start + data != info.file_size:
        raise ValueError(
          f"{path}: {name} of shape {list(shape)} and dtype {dtype} needs "
          f"{data} bytes; the archive holds {info.file_size - start}. {AGAIN}"
        )
      members[name] = Member(path, info.filename, shape, dtype, fortran, start)
  return members


def _header(f):
  version = np.lib.format.read_magic(f)
  if version == (1, 0):
    return np.lib.format.read_array_header_1_0(f)
  if version == (2, 0):
    return np.lib.format.read_array_header_2_0(f)
  raise ValueError(f"version {version} of the .npy format is not supported")


@contextlib.contextmanager
def _readable(path):
  """Turns what a damaged archive raises into one error that names it."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("error")  # headers that need guesses
      yield
  except (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    UserWarning,
    ValueError,
  ) as e:
    if str(path) in str(e):
      raise
    raise ValueError(
      f"{path} is not a complete .npz archive ({type(e).__name__}: {e}). "
      f"{AGAIN}"
    ) from e
