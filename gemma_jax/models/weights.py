"""Hugging Face checkpoints to our stacked parameters, and back.

The family's tables say how each tensor is called there and how its dims are
turned; every tensor of the file must be in one, and every row must find its
tensor.
"""

import math
import os
import re

import jax
import numpy as np
from jax.sharding import Mesh

from gemma_jax.models import families, safetensors, sharding, tables
from gemma_jax.models.config import ModelConfig
from gemma_jax.models.forward import num_loaded


def load(
  directory: str | os.PathLike,
  cfg: ModelConfig,
  *,
  dtype,
  mesh: Mesh,
  num_layers: int | None = None,
):
  """Reads a checkpoint into stacked parameters, each device its own slice.

  Args:
    directory: with safetensors, one file or sharded with an index.
    cfg: the model that the checkpoint must be.
    dtype: of the parameters.
    mesh: see `sharding.make_mesh`.
    num_layers: load only the first so many blocks; None means all. Without
      all of them, a head of its own (`unembed`) is not loaded either.

  Returns:
    The parameter tree of `models.forward`.

  Raises:
    ValueError: tensors that are missing, extra, of a wrong shape or no
      floats, all listed.
  """
  loaded = cfg.num_layers if num_layers is None else num_layers
  if not 0 < loaded <= cfg.num_layers:
    raise ValueError(
      f"layers={num_layers} must be 1..{cfg.num_layers} for this model."
    )
  tensors = _match(safetensors.open_directory(directory), cfg, directory)

  def put(name, row, stack):
    shape = tables.shape(row, cfg)
    if stack is not None:
      shape = (stack, *shape)

    def read(index):
      if stack is None:
        views = [tensors(row, None)[index]]
      else:
        members = range(*index[0].indices(stack))
        views = [tensors(row, layer)[index[1:]] for layer in members]
      out = _empty((len(views), *views[0].shape), dtype)
      for view, into in zip(views, out, strict=True):
        safetensors.copy(view, into)
      return out[0] if stack is None else out

    where = sharding.sharding(name, shape, mesh)
    return jax.make_array_from_callback(shape, where, read)

  family = families.of(cfg)
  blocks = {n: put(n, row, loaded) for n, row in family.block(cfg).items()}
  top = {
    name: put(name, row, None)
    for name, row in family.top(cfg).items()
    if name != "unembed" or loaded == cfg.num_layers
  }
  return {**top, "blocks": blocks}


def save(directory: str | os.PathLike, params, cfg: ModelConfig) -> None:
  """Writes `model.safetensors`, as Hugging Face names it.

  Raises:
    ValueError: only a part of the layers is loaded.
  """
  family = families.of(cfg)
  there = {}

  def put(row, layer, x):
    key = row.theirs.format(layer)
    if key not in there:
      there[key] = np.empty(tables.shape_there(row, cfg), x.dtype)
    tables.view(there[key], row, cfg)[...] = x

  loaded = num_loaded(params)
  if loaded != cfg.num_layers:
    raise ValueError(
      f"{loaded} of {cfg.num_layers} layers are loaded; load all of them "
      "before saving."
    )
  for name, row in family.top(cfg).items():
    put(row, None, np.asarray(params[name]))
  for name, row in family.block(cfg).items():
    for layer, x in enumerate(np.asarray(params["blocks"][name])):
      put(row, layer, x)
  path = os.path.join(os.fspath(directory), safetensors.SINGLE)
  safetensors.write_file(path, there)


def _match(found, cfg, directory):
  """A function (row, layer) -> view, or one error that lists all faults."""
  family = families.of(cfg)
  top = family.top(cfg)
  wanted = {
    (row.theirs, l): tables.shape_there(row, cfg)
    for row in family.block(cfg).values()
    for l in range(cfg.num_layers)
  } | {(row.theirs, None): tables.shape_there(row, cfg) for row in top.values()}
  places, seen, extra, wrong = {}, set(), [], []
  for key, x in found.items():
    head = family.HEAD.fullmatch(key)
    if family.IGNORED.fullmatch(key) or (head and cfg.tied):
      continue
    if head:
      name = top["unembed"].theirs
    else:
      name = family.PREFIX.sub(family.CANONICAL, key, count=1)
    number = re.search(r"\.(\d+)\.", name)
    place = name, None
    if number:
      place = name.replace(number[0], ".{}.", 1), int(number[1])
    if place not in wanted or place in seen:
      extra.append(key)
    elif x.shape != wanted[place]:
      wrong.append(f"{key} is {list(x.shape)}, not {list(wanted[place])}")
    elif not jax.numpy.issubdtype(x.dtype, np.floating):
      wrong.append(f"{key} is {x.dtype}, not a float")
    else:
      places[place] = x
    seen.add(place)
  missing = [name.format(l) for name, l in wanted if (name, l) not in seen]
  if missing or extra or wrong:
    raise ValueError(
      f"{directory} does not hold the model that its config.json describes. "
      f"Missing: {_list(missing)}. Not expected: {_list(extra)}. "
      f"Of another shape or type: {_list(wrong)}."
    )
  return lambda row, l: tables.view(places[row.theirs, l], row, cfg)


def _empty(shape, dtype) -> np.ndarray:
  """As np.empty, where JAX's CPU devices can use it without a copy."""
  size = math.prod(shape) * np.dtype(dtype).itemsize
  raw = np.empty(size + 63, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start : start + size].view(dtype).reshape(shape)


def _list(names: list[str], most: int = 20) -> str:
  if not names:
    return "none"
  more = f" and {len(names) - most} more" if len(names) > most else ""
  return ", ".join(names[:most]) + more
