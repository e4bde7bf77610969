"""Small files in every format's own layout, and what its library makes of them.

A case writes a dictionary into a directory and says, in NumPy and float64, what
the formulas of the format give for an input: nothing here knows our loader.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.numpy

D, E, M, K = 6, 5, 16, 3


def inputs(rows=40, width=D, seed=1):
  """Off centre, so that what is subtracted and scaled shows."""
  rng = np.random.default_rng(seed)
  return (rng.normal(size=(rows, width)) + 0.5).astype(np.float32)


def weights(seed, **shapes):
  rng = np.random.default_rng(seed)
  out = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
  for name in out:
    if "threshold" in name:
      out[name] = rng.uniform(0.2, 1.5, shapes[name]).astype(np.float32)
  return out


def write_json(path: pathlib.Path, fields) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(fields))


def write_safetensors(path: pathlib.Path, tensors) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  safetensors.numpy.save_file(tensors, path)


def relu(z):
  return np.maximum(z, 0)


def top(z, k=K):
  """The k largest of every row, if they are positive."""
  cut = np.sort(z, axis=-1)[:, -k:][:, :1]
  return np.where(z >= cut, relu(z), 0)


def wide(w):
  return {name: np.asarray(x, np.float64) for name, x in w.items()}


@dataclasses.dataclass
class Written:
  """Where it was written, with which `site`, and what it computes.

  `formula` maps x to the latents and the output.
  """

  path: pathlib.Path
  formula: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
  site: Any = None


CASES: dict[str, Callable[[pathlib.Path], Written]] = {}


def case(name):
  def add(fn):
    CASES[name] = fn
    return fn

  return add
