"""Hugging Face checkpoints to our stacked parameters, and back.

One table says how each tensor is called there and how its dims are turned;
every tensor of the file must be in it, and every row must find its tensor.
"""

import dataclasses
import os
import re

import jax
import numpy as np
from jax.sharding import Mesh

from gemma_jax.models import gemma, safetensors, sharding
from gemma_jax.models.config import ModelConfig

# The text tower's prefix in its several homes.
PREFIX = r"(?:language_model\.model\.|model\.language_model\.|model\.)"
IGNORED = re.compile(
  r"lm_head\.weight|.*\.rotary_emb\..*|"
  r"(?:model\.)?(?:vision_tower|multi_modal_projector)\..*"
)


@dataclasses.dataclass(frozen=True)
class Row:
  """One of our tensors: its name in a layer there, and its axes there.

  Attributes:
    theirs: name after `layers.{l}.`, or after the prefix for a top tensor.
    axes: the order of our dims in theirs, after splitting N H (or K H);
      () where both are the same.
  """

  theirs: str
  axes: tuple[int, ...] = ()


BLOCK = {
  "pre_attn_norm": Row("input_layernorm.weight"),
  "q": Row("self_attn.q_proj.weight", (1, 2, 0)),  # NH D
  "k": Row("self_attn.k_proj.weight", (1, 2, 0)),  # KH D
  "v": Row("self_attn.v_proj.weight", (1, 2, 0)),  # KH D
  "o": Row("self_attn.o_proj.weight", (2, 0, 1)),  # D NH
  "q_norm": Row("self_attn.q_norm.weight"),
  "k_norm": Row("self_attn.k_norm.weight"),
  "post_attn_norm": Row("post_attention_layernorm.weight"),
  "pre_mlp_norm": Row("pre_feedforward_layernorm.weight"),
  "gate": Row("mlp.gate_proj.weight", (1, 0)),  # F D
  "up": Row("mlp.up_proj.weight", (1, 0)),  # F D
  "down": Row("mlp.down_proj.weight", (1, 0)),  # D F
  "post_mlp_norm": Row("post_feedforward_layernorm.weight"),
}
TOP = {"embed": Row("embed_tokens.weight"), "final_norm": Row("norm.weight")}


def _shape_there(row: Row, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Our shape in their order, before N H are merged."""
  return tuple(shape[a] for a in row.axes) if row.axes else shape


def _merged(row: Row, shape: tuple[int, ...]) -> tuple[int, ...]:
  there = _shape_there(row, shape)
  if row.axes == (1, 2, 0):
    return (there[0] * there[1], there[2])
  if row.axes == (2, 0, 1):
    return (there[0], there[1] * there[2])
  return there


def top_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Shapes of the parameters outside the blocks, by name."""
  return {"embed": (cfg.vocab_size, cfg.width), "final_norm": (cfg.width,)}


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
    num_layers: load only the first so many blocks; None means all.

  Returns:
    The parameter tree of `models.forward`.

  Raises:
    ValueError: missing, extra or wrongly shaped tensors, all listed.
  """
  loaded = cfg.num_layers if num_layers is None else num_layers
  if not 0 < loaded <= cfg.num_layers:
    raise ValueError(
      f"layers={num_layers} must be 1..{cfg.num_layers} for this model."
    )
  tensors = safetensors.open_directory(directory)
  views = _match(tensors, cfg, directory)

  def put(name, rows, row, shape):
    stacked = (len(rows), *shape) if name in BLOCK else shape
    where = sharding.sharding(name, stacked, mesh)

    def read(index):
      if name in TOP:
        return np.asarray(rows[0][index], dtype)
      layers = range(*index[0].indices(len(rows)))
      slices = [_ours(rows[l], row, shape)[index[1:]] for l in layers]
      out = np.empty((len(layers), *slices[0].shape), dtype)
      for l, part in enumerate(slices):
        out[l] = part
      return out

    return jax.make_array_from_callback(stacked, where, read)

  blocks = {
    name: put(
      name,
      [views[name, l] for l in range(loaded)],
      BLOCK[name],
      shape,
    )
    for name, shape in gemma.block_shapes(cfg).items()
  }
  top = {
    name: put(name, [views[name, None]], TOP[name], shape)
    for name, shape in top_shapes(cfg).items()
  }
  return {**top, "blocks": blocks}


def save(directory: str | os.PathLike, params, cfg: ModelConfig) -> None:
  """Writes `model.safetensors`, as Hugging Face names it.

  Raises:
    ValueError: only a part of the layers is loaded.
  """
  there = {}
  for name, row in TOP.items():
    there[f"model.{row.theirs}"] = np.asarray(params[name])
  for name, stack in params["blocks"].items():
    if stack.shape[0] != cfg.num_layers:
      raise ValueError(
        f"{stack.shape[0]} of {cfg.num_layers} layers are loaded; load all of "
        "them before saving."
      )
    row = BLOCK[name]
    for l, x in enumerate(np.asarray(stack)):
      turned = np.transpose(x, row.axes) if row.axes else x
      key = f"model.layers.{l}.{row.theirs}"
      there[key] = turned.reshape(_merged(row, x.shape))
  path = os.path.join(os.fspath(directory), safetensors.SINGLE)
  safetensors.write_file(path, there)


def _ours(x: np.ndarray, row: Row, shape) -> np.ndarray:
  """Their tensor as a view with our dims; no copy."""
  if not row.axes:
    return x
  return x.reshape(_shape_there(row, shape)).transpose(np.argsort(row.axes))


def _match(tensors, cfg, directory):
  """{(our name, layer or None): view}, or one error that lists all faults."""
  by_name = {row.theirs: name for name, row in BLOCK.items()}
  top_by_name = {row.theirs: name for name, row in TOP.items()}
  layer_key = re.compile(PREFIX + r"layers\.(\d+)\.(.+)")
  top_key = re.compile(PREFIX + r"(.+)")
  shapes = gemma.block_shapes(cfg)
  wanted = {
    (name, l): _merged(BLOCK[name], shape)
    for name, shape in shapes.items()
    for l in range(cfg.num_layers)
  } | {(name, None): shape for name, shape in top_shapes(cfg).items()}
  views, seen, extra, wrong = {}, set(), [], []
  for key, x in tensors.items():
    if IGNORED.fullmatch(key):
      continue
    if match := layer_key.fullmatch(key):
      place = by_name.get(match[2]), int(match[1])
    else:
      match = top_key.fullmatch(key)
      place = (top_by_name.get(match[1]) if match else None), None
    if place not in wanted or place in seen:
      extra.append(key)
    elif x.shape != wanted[place]:
      wrong.append(f"{key} is {list(x.shape)}, not {list(wanted[place])}")
    else:
      views[place] = x
    seen.add(place)
  missing = [_their_name(*p) for p in wanted if p not in seen]
  if missing or extra or wrong:
    raise ValueError(
      f"{directory} does not hold the model that its config.json describes. "
      f"Missing: {_list(missing)}. Not expected: {_list(extra)}. "
      f"Of another shape: {_list(wrong)}."
    )
  return views


def _their_name(name: str, layer: int | None) -> str:
  if layer is None:
    return f"model.{TOP[name].theirs}"
  return f"model.layers.{layer}.{BLOCK[name].theirs}"


def _list(names: list[str], most: int = 20) -> str:
  if not names:
    return "none"
  more = f" and {len(names) - most} more" if len(names) > most else ""
  return ", ".join(names[:most]) + more
