"""Arrays in .npz files, whole or not at all."""

import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np


def save(path: pathlib.Path, arrays: Mapping[str, Any]) -> None:
  """Writes a file, and the directories that it is in."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}")
  with partial.open("wb") as file:
    np.savez(file, **arrays)
  partial.rename(path)


def load(path: pathlib.Path) -> dict[str, np.ndarray]:
  """What `save` wrote.

  Raises:
    ValueError: a damaged file; says to delete it.
  """
  try:
    with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
      return {name: file[name] for name in file.files}
  except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as e:
    raise ValueError(
      f"{path} is damaged ({e}). Delete it and run the same command again."
    ) from e
