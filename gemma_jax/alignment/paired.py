"""Activations of two models at the places where both have read the same."""

import dataclasses
import hashlib
import json
import pathlib
from typing import NamedTuple

import numpy as np

from gemma_jax import cache, progress
from gemma_jax.activations import ActivationStore, Writer, is_complete
from gemma_jax.alignment.pairing import Pairs, pair_windows
from gemma_jax.data import Windows, fingerprint

ROWS = 8_192  # read and written at once


class Side(NamedTuple):
  """One model on a text.

  Attributes:
    name: of the model, which its sites are called by: "name:site".
    store: harvested from `windows`, every counted position.
    windows: of the text.
  """

  name: str
  store: ActivationStore
  windows: Windows


@dataclasses.dataclass(frozen=True, eq=False)
class Paired:
  """P places of a text at which both models' activations are known.

  Attributes:
    store: [P, D] of "name:site" for both; labels are those of the first.
    pairs: windows and positions on both sides.
    tokens: name -> int32 [P], the token that ends there.
  """

  store: ActivationStore
  pairs: Pairs
  tokens: dict[str, np.ndarray]

  @property
  def document(self) -> np.ndarray:
    """int64 [P]."""
    return self.pairs.document

  def position(self, name: str) -> np.ndarray:
    """int64 [P], in the model's window."""
    return self.places(name)[:, 1]

  def places(self, name: str) -> np.ndarray:
    """Window and position of every place on the side of a model, [P, 2]."""
    return self.pairs.a if name == next(iter(self.tokens)) else self.pairs.b


def pair_stores(a: Side, b: Side, *, skip: int = 4) -> Paired:
  """Pairs rows of two stores by end byte, and keeps them as a store.

  Kept in the cache, where the same sides find them again.

  Args:
    a: one side.
    b: the other; the same as `a` for maps among one model's layers.
    skip: see `pair_windows`.

  Raises:
    ValueError: stores of other tokens than their windows', of two dtypes,
      or two models of one name; and as `pair_windows`.
    OSError: the disk is full.
  """
  sides = {side.name: side for side in (a, b)}
  if len(sides) == 1 and a.store.path != b.store.path:
    raise ValueError(f"expected two names for two models, got {a.name!r} twice")
  if a.store.dtype != b.store.dtype:
    raise ValueError(
      f"expected stores of one dtype, got {a.store.dtype} and {b.store.dtype}; "
      "harvest both alike"
    )
  pairs = pair_windows(a.windows, b.windows, skip=skip)
  places = dict(zip((a.name, b.name), (pairs.a, pairs.b), strict=True))
  tokens = {
    name: sides[name].windows.tokens[*at.T] for name, at in places.items()
  }
  where = _path(sides, skip)
  if not is_complete(where):
    rows = {name: rows_of(sides[name])[*at.T] for name, at in places.items()}
    _write(sides, pairs, rows, where)
  return Paired(ActivationStore.open(where), pairs, tokens)


def _path(sides: dict[str, Side], skip: int) -> pathlib.Path:
  made_by = {
    "skip": skip,
    "sides": [
      [name, str(side.store.path), fingerprint(side.windows)]
      for name, side in sides.items()
    ],
  }
  text = json.dumps(made_by).encode()
  return cache.directory("pairs", hashlib.sha256(text).hexdigest()[:24])


def rows_of(side: Side) -> np.ndarray:
  """Which row of the store a counted position is, int64 [W, T].

  Raises:
    ValueError: a store of other tokens than the windows'.
  """
  windows, store = side.windows, side.store
  wanted = windows.tokens[windows.mask]
  if len(wanted) != len(store) or not np.array_equal(
    store.read(0, len(store), "token"), wanted
  ):
    raise ValueError(
      f"expected a store of the {len(wanted)} counted tokens of {side.name}'s "
      f"windows, got {len(store)} others in {store.path}; harvest these "
      "windows, with keep=1"
    )
  return (np.cumsum(windows.mask) - 1).reshape(windows.mask.shape)


def _write(sides, pairs: Pairs, rows, where) -> None:
  first = next(iter(sides.values()))
  sites = {
    f"{name}:{site}": width
    for name, side in sides.items()
    for site, width in side.store.sites.items()
  }
  labels = {
    "document": pairs.document,
    "position": pairs.a[:, 1],
    "source": np.zeros(len(pairs.a), np.int64),
    **{
      name: getattr(first.windows, attribute)[*pairs.a.T]
      for name, attribute in (
        ("token", "tokens"),
        ("begin", "begin"),
        ("end", "end"),
      )
    },
  }
  metadata = {name: dict(side.store.metadata) for name, side in sides.items()}
  size = sum(sites.values()) * len(pairs.a) * 4
  cache.require_space(where, size, "The paired activations")
  with (
    Writer(
      where, sites=sites, dtype=first.store.dtype, metadata=metadata
    ) as writer,
    progress.bar(len(pairs.a), "pairs", unit="tokens") as bar,
  ):
    for start in range(0, len(pairs.a), ROWS):
      part = slice(start, start + ROWS)
      arrays = {name: values[part] for name, values in labels.items()}
      for name, side in sides.items():
        for site in side.store.sites:
          arrays[f"{name}:{site}"] = side.store.take(rows[name][part], site)
      writer.append(
        arrays,
        first_row=start,
        documents=() if start else first.windows.documents,
      )
      bar.update(len(arrays["token"]))
