"""Where a store's bytes live: any TensorStore key-value store.

A location is a path, or a URL that TensorStore knows (`file://`, `gs://`,
`s3://`, `memory://`). Small documents are JSON with a checksum, replaced by
one atomic write that fails if somebody else has replaced them meanwhile.
"""

import errno
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import tensorstore as ts

# One for the process: `memory://` lives in it, and readers share its threads.
# No cache: every chunk is read once per epoch.
CONTEXT = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
# Mapped files are checked and copied where they lie in the page cache; read
# into fresh memory, page faults would take most of the time.
READING = ts.Context({"file_io_mode": {"mode": "memmap"}}, CONTEXT)
# The AWS tools' variables for a server that is not Amazon's.
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
SCHEMES = ("file", "gs", "s3", "memory")
# What operating systems and servers say of a place that takes no more.
FULL = (
  "No space left",
  "File too large",
  "quota exceeded",
  "RESOURCE_EXHAUSTED",
)


def reason(error: BaseException) -> str:
  """TensorStore's message without the specification that it appends."""
  text = str(error)
  for start in (" [tensorstore_spec=", " [kvstore=", " [source locations="):
    text = text.split(start)[0]
  return text.replace("\\x00", "/")  # as it joins the parts of a path


def _failure(action: str, where: str, error: BaseException) -> OSError:
  text = reason(error)
  if any(words in text for words in FULL):
    return OSError(
      errno.ENOSPC,
      f"{where} is full: {action} failed ({text}). What was committed is "
      "kept. Make room, then run the same command: it goes on from there",
    )
  return OSError(
    f"{where}: {action} failed ({text}). What was committed is kept. Check "
    "that the place exists, that you may use it and that it is reachable, "
    "then run the same command again."
  )


class Conflict(RuntimeError):
  """Somebody else has replaced a document meanwhile."""


class Location:
  """A directory of a key-value store.

  Args:
    where: a path or a URL.

  Raises:
    ValueError: a URL that TensorStore does not know.
  """

  def __init__(self, where: str | os.PathLike):
    text = os.fspath(where)
    scheme, separator, rest = text.partition("://")
    if not separator:
      scheme, rest = "file", os.path.abspath(pathlib.Path(text).expanduser())
    if scheme not in SCHEMES:
      raise ValueError(
        f"{text}: expected a path, or a URL that starts with "
        f"{', '.join(f'{s}://' for s in SCHEMES)}."
      )
    self.url = text.rstrip("/")
    self.path = pathlib.Path(rest) if scheme == "file" else None
    self._spec = _spec(scheme, rest)
    self._kv = None

  def __str__(self) -> str:
    return self.url

  @property
  def kv(self) -> ts.KvStore:
    """The key-value store, opened at its first use."""
    if self._kv is None:
      opened = ts.KvStore.open(self._spec, context=CONTEXT)
      self._kv = self.finish(opened, "opening it")
    return self._kv

  def array(self, name: str) -> dict[str, Any]:
    """TensorStore's specification of the array `name` in here."""
    return {
      "driver": "zarr3",
      "kvstore": self._spec | {"path": f"{self._spec['path']}{name}/"},
      # A chunk that is gone is an error and not zeros; so zeros are stored.
      "fill_missing_data_reads": False,
      "store_data_equal_to_fill_value": True,
    }

  def finish(self, future, action: str):
    """Waits for a future; a failure is an OSError that says what to do."""
    try:
      return future.result()
    except (ValueError, OSError) as e:
      raise _failure(action, self.url, e) from e

  def read(self, name: str) -> bytes | None:
    """The bytes under a key, None where there are none."""
    found = self.finish(self.kv.read(name), f"reading {name}")
    return found.value if found.state == "value" else None

  def write(self, name: str, value: bytes) -> None:
    """Replaces what is under a key, atomically."""
    self.finish(self.kv.write(name, value), f"writing {name}")

  def delete(self, name: str) -> None:
    """Removes a key; nothing happens if there is none."""
    self.finish(self.kv.write(name, None), f"deleting {name}")

  def keys(self, prefix: str) -> list[str]:
    """Keys that start so, sorted; for copying and sizes only."""
    found = self.kv.list(_starting(prefix))
    return sorted(k.decode() for k in self.finish(found, f"listing {prefix}"))


def _starting(prefix: str) -> ts.KvStore.KeyRange:
  return ts.KvStore.KeyRange(prefix, prefix + chr(0x10FFFF))


def _spec(scheme: str, rest: str) -> dict[str, Any]:
  rest = f"{rest.strip('/') if scheme != 'file' else rest.rstrip('/')}/"
  if scheme in ("file", "memory"):
    return {"driver": scheme, "path": rest}
  bucket, _, path = rest.partition("/")
  if scheme == "gs":
    return {"driver": "gcs", "bucket": bucket, "path": path}
  spec = {"driver": "s3", "bucket": bucket, "path": path}
  for name in ENDPOINTS:
    if endpoint := os.environ.get(name):
      region = os.environ.get("AWS_REGION", "us-east-1")
      return spec | {"endpoint": endpoint, "aws_region": region}
  return spec


class Document:
  """A JSON object under a key, sealed by a checksum, replaced atomically.

  Attributes:
    value: what was last read or written; None where there is nothing.
  """

  def __init__(self, location: Location, name: str):
    self.location, self.name = location, name
    self.value: dict[str, Any] | None = None
    self._generation = None
    self.reload()

  def reload(self) -> "Document":
    """Reads it again.

    Raises:
      ValueError: it is damaged.
    """
    read = self.location.kv.read(self.name)
    found = self.location.finish(read, f"reading {self.name}")
    self._generation = found.stamp.generation
    self.value = None
    if found.state == "value":
      self.value = _unseal(found.value, f"{self.location}/{self.name}")
    return self

  def replace(self, value: Mapping[str, Any]) -> None:
    """Writes it, if nobody else has since it was last read or written.

    Raises:
      Conflict: somebody has.
      OSError: the store refuses the write.
    """
    done = self.location.finish(
      self.location.kv.write(
        self.name, _seal(value), if_equal=self._generation
      ),
      f"writing {self.name}",
    )
    if not done.generation:
      there = Document(self.location, self.name)
      if there._generation == self._generation:  # as in a bucket that is not
        raise OSError(
          f"{self.location}: writing {self.name} was refused. Check that the "
          "place exists and that you may write to it, then run the same "
          "command again."
        )
      raise Conflict(f"{self.location}/{self.name} was written by another.")
    self._generation, self.value = done.generation, dict(value)

  def remove(self) -> None:
    """Deletes it, if it is still as it was last read or written."""
    self.location.finish(
      self.location.kv.write(self.name, None, if_equal=self._generation),
      f"deleting {self.name}",
    )
    self.value = None


def _digest(value: Mapping[str, Any]) -> str:
  text = json.dumps(value, sort_keys=True, allow_nan=False)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _seal(value: Mapping[str, Any]) -> bytes:
  value = json.loads(json.dumps(value, allow_nan=False))
  sealed = value | {"checksum": _digest(value)}
  return json.dumps(sealed, indent=2).encode()


def _unseal(data: bytes, where: str) -> dict[str, Any]:
  try:
    value = json.loads(data)
    checksum = value.pop("checksum")
    if checksum != _digest(value):
      raise ValueError("its checksum does not fit its contents")
    return value
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise ValueError(
      f"{where} is damaged or was written by another version ({e}). `python "
      "-m launch.store repair` on the store sets it aside; the same harvest "
      "then writes it again."
    ) from e
