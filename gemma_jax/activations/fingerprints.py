"""Hashes of what decides about the values of a store."""

import hashlib
import os
import pathlib

import jax

from gemma_jax import data
from gemma_jax.data import Windows, WindowStream
from gemma_jax.models import Model


def describe(model: Model) -> dict[str, str]:
  """What a store keeps of the model that made it."""
  fingerprint = of_model(model.directory)
  # Changed weights must not pass for those of the directory.
  changes = "; ".join(("", *model.changes))
  return {
    "model": pathlib.Path(model.directory).name + changes,
    "model_fingerprint": fingerprint + changes,
    "family": model.config.family,
    "compute_dtype": str(model.params["embed"].dtype),
    "backend": jax.default_backend(),
  }


def of_model(directory: str | os.PathLike) -> str:
  """A hash of a checkpoint: configuration, and samples of every weights file.

  64 blocks of 4 KiB spread over each file, so that it takes milliseconds; a
  fine-tuned or requantised model changes everywhere, so it cannot hide.
  """
  directory = pathlib.Path(directory)
  h = hashlib.sha256((directory / "config.json").read_bytes())
  for path in sorted(directory.glob("*.safetensors")):
    size = path.stat().st_size
    h.update(f"{path.name}:{size}".encode())
    with path.open("rb") as f:
      for i in range(64):
        f.seek(max(0, size - 4096) * i // 63)
        h.update(f.read(4096))
  return h.hexdigest()


def of_windows(windows: Windows | WindowStream) -> str:
  """Of the windows themselves, or of all that decides about a stream's."""
  if isinstance(windows, Windows):
    return data.fingerprint(windows)
  return windows.fingerprint
