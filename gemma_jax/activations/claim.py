"""One writer for each part: a lock, or a lease where there are no locks."""

import contextlib
import fcntl
import os
import time
import uuid

from gemma_jax.activations import storage
from gemma_jax.activations.storage import Document, Location

# Where no lock of the operating system ends with its process, a writer that
# has committed nothing for so long is taken for dead.
LEASE_SECONDS = 600.0


class _Held:
  """Released by a call; a lease is renewed while it is held."""

  def __init__(self, release, renew=lambda: None):
    self._release, self.renew = release, renew

  def __call__(self) -> None:
    release, self._release = self._release, lambda: None
    release()


def lock(location: Location) -> _Held:
  """Makes this process the only writer of a part.

  Raises:
    BlockingIOError: another is.
  """
  if location.path is not None:
    return _flock(location)
  lease, owner = Document(location, "writer.json"), uuid.uuid4().hex

  def renew():
    until = time.time() + LEASE_SECONDS
    lease.replace({"owner": owner, "until": until, "pid": os.getpid()})

  def release():
    with contextlib.suppress(OSError):
      lease.remove()

  there = lease.value
  if there is not None and there["until"] > time.time():
    raise _busy(
      location,
      f" (its claim ends by itself in at most "
      f"{there['until'] - time.time():.0f} s)",
    )
  try:
    renew()
  except storage.Conflict as e:
    raise _busy(location) from e
  return _Held(release, renew)


def _flock(location: Location) -> _Held:
  path = location.path
  try:
    path.mkdir(parents=True, exist_ok=True)
    file = (path / ".lock").open("w")
  except OSError as e:
    raise type(e)(
      e.errno,
      f"A store cannot be written there ({e.strerror}). Choose another place",
      str(path),
    ) from e
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as e:
    file.close()
    raise _busy(location) from e
  return _Held(file.close)


def _busy(location: Location, more: str = "") -> BlockingIOError:
  return BlockingIOError(
    f"Another process is writing {location}{more}. Wait for it, then run "
    "again: its store will be used."
  )
