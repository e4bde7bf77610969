"""Which files a config's `path` means, and what they are called."""

import glob
import os
import pathlib
from collections.abc import Sequence

_COMPRESSED = (".gz", ".zst")


def find(
  path: str | os.PathLike | Sequence[str | os.PathLike],
  suffixes: Sequence[str],
  what: str,
) -> tuple[dict[str, pathlib.Path], str]:
  """Finds the files that a path, a pattern or a list of them names.

  Args:
    path: a file, whatever its suffix; a directory, for the files below it with
      one of the suffixes; a glob pattern, "**" for directories of any depth;
      or a list of these.
    suffixes: e.g. ".txt".
    what: the file's kind, for messages.

  Returns:
    ({name: file}, name of all): names are relative to the directory that all
    files share and sorted, so that neither the order of a list nor the place
    of the directory matters.

  Raises:
    FileNotFoundError: nothing to read there.
  """
  several = not isinstance(path, str | os.PathLike)
  paths = [pathlib.Path(p).expanduser() for p in (path if several else [path])]
  found: set[pathlib.Path] = set()
  for one in paths:
    found.update(map(_absolute, _expand(one, suffixes, what)))
  if not found:
    raise FileNotFoundError(f"expected {what} in the list, got an empty list")
  if not several and paths[0].is_dir():
    root = _absolute(paths[0])
    name = root.name
  else:
    root = pathlib.Path(os.path.commonpath([p.parent for p in found]))
    name = root.name
    if len(found) == 1:
      name = _stem(next(iter(found)))
  files = {p.relative_to(root).as_posix(): p for p in found}
  return {label: files[label] for label in sorted(files)}, name


def _expand(
  path: pathlib.Path, suffixes: Sequence[str], what: str
) -> list[pathlib.Path]:
  if path.is_file():
    return [path]
  wanted = " or ".join(f"*{suffix}" for suffix in suffixes)
  if path.is_dir():
    below = path.rglob("*")
    files = [p for p in below if p.name.endswith(tuple(suffixes))]
    if files := [p for p in files if p.is_file()]:
      return files
    raise FileNotFoundError(f"expected {wanted} files under {path}, found none")
  if glob.has_magic(str(path)):
    matches = [pathlib.Path(p) for p in glob.glob(str(path), recursive=True)]
    if files := [p for p in matches if p.is_file()]:
      return files
    raise FileNotFoundError(
      f"expected files that match {path}, found none: look at the pattern"
    )
  raise FileNotFoundError(
    f"expected {what} or a directory of {wanted} at {path}, found nothing"
  )


def _absolute(path: pathlib.Path) -> pathlib.Path:
  # Unlike `Path.absolute` without "..", so that a file has one name.
  return pathlib.Path(os.path.abspath(path))


def _stem(path: pathlib.Path) -> str:
  return path.with_suffix("").stem if path.suffix in _COMPRESSED else path.stem


def is_compressed(path: pathlib.Path) -> bool:
  """Whether a file's name says that it is compressed."""
  return path.suffix in _COMPRESSED
