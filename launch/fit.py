"""Which of our models fit into the memory of some devices."""

import math
from collections.abc import Mapping

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from gemma_jax import models
from gemma_jax.models import families, sharding

BATCH, CONTEXT = 8, 1024
ESTIMATE = (
  "Memory on each device is its shards of the parameters, and one block's "
  f"activations of {BATCH} x {CONTEXT} tokens: the residual stream and the "
  "larger of attention, with scores and softmax in float32, and MLP. No logits."
)


def which_models(memory: float, devices: int) -> list[dict]:
  """Which presets run in which dtype, and over which mesh.

  Args:
    memory: bytes of each device.
    devices: how many there are.

  Returns:
    For each preset its name, parameters, bytes, and for each dtype whether it
    fits, the mesh with the fewest parts that does (where none does, the one
    that needs the least), and the bytes that this needs on each device.
  """
  rows = []
  for name, cfg in models.PRESETS.items():
    if name.endswith("-tiny"):
      continue
    row = {"model": name, "parameters": cfg.num_parameters(), "bytes": {}}
    for dtype in ("float32", "bfloat16"):
      row["bytes"][dtype] = cfg.num_parameters() * jnp.dtype(dtype).itemsize
      options = [(_needs(cfg, dtype, m), m) for m in _meshes(cfg, devices)]
      fitting = [option for option in options if option[0] <= memory]
      needs, mesh = (
        fitting[0] if fitting else min(options, key=lambda option: option[0])
      )
      row[dtype] = {"fits": bool(fitting), "mesh": mesh, "needs": needs}
    rows.append(row)
  return rows


def parameters_per_device(
  cfg: models.ModelConfig, mesh: Mapping[str, int]
) -> int:
  """Entries of all shards of one device.

  Raises:
    ValueError: the mesh does not divide the model.
  """
  abstract = AbstractMesh(tuple(mesh[a] for a in sharding.AXES), sharding.AXES)
  return sum(
    math.prod(sharding.sharding(name, shape, abstract).shard_shape(shape))
    for name, shape in families.shapes(cfg).items()
  )


def _meshes(cfg, devices: int):
  """Meshes that the sharding rules allow, those with the fewest parts first."""
  found = []
  for fsdp in range(1, devices + 1):
    for tensor in range(1, devices // fsdp + 1):
      if devices % (fsdp * tensor):
        continue
      data = devices // (fsdp * tensor)
      mesh = {"data": data, "fsdp": fsdp, "tensor": tensor}
      try:
        parameters_per_device(cfg, mesh)
      except ValueError:
        continue
      found.append(mesh)
  return sorted(found, key=lambda m: (m["fsdp"] * m["tensor"], m["tensor"]))


def _needs(cfg, dtype, mesh) -> int:
  """See `ESTIMATE`; bytes."""
  size = jnp.dtype(dtype).itemsize
  parameters = size * parameters_per_device(cfg, mesh)
  tokens = math.ceil(BATCH / (mesh["data"] * mesh["fsdp"])) * CONTEXT
  heads = 2 * (cfg.num_heads + cfg.num_kv_heads) * cfg.head_dim * size
  attention = heads + 2 * cfg.num_heads * CONTEXT * 4
  mlp = 3 * cfg.mlp_width * size
  split = max(attention, mlp) / mesh["tensor"]
  return math.ceil(parameters + tokens * (2 * cfg.width * size + split))
