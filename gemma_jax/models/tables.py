"""Weight tables: what a tensor is called here and in a Hugging Face file.

A row gives the dims of a tensor by their letters, here and there, and that
is all that shapes, loading and saving need to know about it.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from gemma_jax.models.config import ModelConfig


class Row(NamedTuple):
  """One of our tensors, and where it is in a checkpoint.

  Attributes:
    dims: our dims, a letter each (`DNH`), without the layer axis.
    theirs: Hugging Face's name; `{}` stands for the layer.
    layout: dims of their tensor, those that are merged written together
      (`NH D`); "3" is the axis along which q, k and v are packed. "" where
      theirs has our dims.
    part: which entry of the "3" axis is ours.
  """

  dims: str
  theirs: str
  layout: str = ""
  part: int = 0


Table = Mapping[str, Row]


def sizes(cfg: ModelConfig) -> dict[str, int]:
  """What each letter stands for."""
  return {
    "D": cfg.width,
    "F": cfg.mlp_width,
    "N": cfg.num_heads,
    "K": cfg.num_kv_heads,
    "H": cfg.head_dim,
    "V": cfg.vocab_size,
    "T": cfg.max_context,
    "3": 3,
  }


def shape(row: Row, cfg: ModelConfig) -> tuple[int, ...]:
  """The shape of our tensor, without the layer axis."""
  size = sizes(cfg)
  return tuple(size[letter] for letter in row.dims)


def shapes(table: Table, cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
  """The shape of each of our tensors, without the layer axis."""
  return {name: shape(row, cfg) for name, row in table.items()}


def count(table: Table, cfg: ModelConfig) -> int:
  """Entries of all tensors of a table."""
  return sum(map(math.prod, shapes(table, cfg).values()))


def shape_there(row: Row, cfg: ModelConfig) -> tuple[int, ...]:
  """The shape of their tensor."""
  size = sizes(cfg)
  groups = row.layout.split() or list(row.dims)
  return tuple(math.prod(size[letter] for letter in g) for g in groups)


def view(x: np.ndarray, row: Row, cfg: ModelConfig) -> np.ndarray:
  """Their tensor, or an empty one to fill, as a view with our dims."""
  letters = (row.layout or row.dims).replace(" ", "")
  size = sizes(cfg)
  x = x.reshape([size[letter] for letter in letters])
  if "3" in letters:
    x = x[(slice(None),) * letters.index("3") + (row.part,)]
    letters = letters.replace("3", "")
  return x.transpose([letters.index(letter) for letter in row.dims])
