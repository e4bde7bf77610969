"""Where things live that many runs share: weights, stores, compiled code."""

import errno
import os
import pathlib
import shutil

VARIABLE = "GEMMA_JAX_CACHE"


def directory(*parts: str) -> pathlib.Path:
  """The cache directory, or a path in it.

  `$GEMMA_JAX_CACHE` if set (`launch.run --cache=DIR` sets it), otherwise
  `~/.cache/gemma_jax`. Nothing is created.
  """
  root = os.environ.get(VARIABLE) or "~/.cache/gemma_jax"
  return pathlib.Path(root).expanduser().joinpath(*parts)


def require_space(path: str | os.PathLike, size: float, what: str) -> None:
  """Raises before long work if a disk cannot hold what it will write.

  Args:
    path: where it goes; need not exist yet.
    size: bytes.
    what: for the message.

  Raises:
    OSError: ENOSPC, with what is needed and what is free.
  """
  there = pathlib.Path(path).absolute()
  while not there.exists():
    there = there.parent
  free = shutil.disk_usage(there).free
  if free < size:
    raise OSError(
      errno.ENOSPC,
      f"{what} need {size / 2**30:.2f} GiB at {path} and {free / 2**30:.2f} "
      "GiB are free. Make room, or choose another --workdir or --cache",
    )
