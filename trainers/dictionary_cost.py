"""`--dry_run`: shapes, shardings, memory, tokens and FLOPs of a run."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from gemma_jax.models import sites
from trainers import dictionary_task
from trainers.dictionary_plan import prepare


def plan(config: Mapping[str, Any]) -> dict[str, Any]:
  """What a run would do and cost, for `--dry_run`; nothing is started."""
  p = prepare(config)
  task = dictionary_task.make(p)
  params, opt_state, extra = jax.eval_shape(task.init, *task.init_shapes)
  mesh, table, state_bytes = p.train_mesh, {}, 0
  leaves = jax.tree_util.tree_leaves_with_path((params, opt_state, extra))
  for path, x in leaves:
    name = jax.tree_util.keystr(path)
    split = task.rule(name, x.shape)
    shard = NamedSharding(mesh, split).shard_shape(x.shape)
    state_bytes += math.prod(shard) * x.dtype.itemsize
    if name.startswith("[0]"):
      group, name = path[1].idx, path[2].key
      several = f"{name} of group {group}" if group else name
      table[several] = f"{x.dtype}{list(x.shape)} {split}"
  train, sparse = p.config["train"], p.sparse
  tokens = train["steps"] * p.batch_size
  rows = p.batch_size // mesh.shape["data"]
  harvested = config["data"]["train_tokens"] + config["data"]["heldout_tokens"]
  # One model after the other.
  weights = max(m.num_parameters() for m in p.models.values())
  weights *= jnp.dtype(p.dtype).itemsize
  forward = sum(
    model.flops_per_token(
      p.depth(name), p.config["data"]["context"], unembed=False
    )
    for name, model in p.models.items()
  )
  step = sum(_step_flops(member.config, sparse) for member in p.members)
  stored = jnp.dtype(config["activations"]["dtype"]).itemsize
  row = stored * sum(
    sites.width(site, model)
    for name, model in p.models.items()
    for site in p.captured(name)
  )
  widest = max(member.config.width for member in p.members)
  return {
    "model": "; ".join(
      f"{model.family}, {p.depth(name)} of {model.num_layers} layers run"
      for name, model in p.models.items()
    ),
    "sites": {"read": list(p.read), "write": list(p.write)},
    "dictionaries": [
      {"name": member.name, **dataclasses.asdict(member.config)}
      | {"learning_rate": member.learning_rate, "seed": member.seed}
      for member in p.members
    ],
    "recipe": dataclasses.asdict(p.recipe),
    "batch_size": p.batch_size,
    "training": dictionary_task.describe(p),
    "mesh": {"model": dict(p.mesh.shape), "train": dict(mesh.shape)},
    "parameters": table,
    "memory_per_device": {
      "model": _size(weights / (p.mesh.shape["fsdp"] * p.mesh.shape["tensor"])),
      "training state": _size(state_bytes),
      "one batch of latents": _size(4 * rows * widest / mesh.shape["latent"]),
    },
    "store": _size(harvested * row),
    "tokens": {"harvest": harvested, "train": tokens},
    "flops": {
      "harvest": f"{forward * harvested:.3g}",
      "train": f"{float(step) * tokens:.3g}",
    },
  }


def _step_flops(cfg, sparse) -> int:
  """Of one token: the encoder, and then active latents or all of them."""
  encoder = 2 * cfg.d_in * cfg.width
  # Gradient of the encoder; decoder, its gradient and that of the latents.
  rest = 2 * cfg.d_in + 6 * cfg.d_out
  return encoder + int(rest * (cfg.k if sparse else cfg.width))


def _size(count: float) -> str:
  return f"{count / 2**30:.2f} GiB"
