"""Where things live that many runs share: weights, stores, compiled code."""

import os
import pathlib

VARIABLE = "GEMMA_JAX_CACHE"


def directory(*parts: str) -> pathlib.Path:
  """The cache directory, or a path in it.

  `$GEMMA_JAX_CACHE` if set (`launch.run --cache=DIR` sets it), otherwise
  `~/.cache/gemma_jax`. Nothing is created.
  """
  root = os.environ.get(VARIABLE) or "~/.cache/gemma_jax"
  return pathlib.Path(root).expanduser().joinpath(*parts)
