"""`--dry_run`: shapes, shardings, memory, tokens and FLOPs of a run."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from trainers import dictionary_task
from trainers.dictionary_plan import prepare


def plan(config: Mapping[str, Any]) -> dict[str, Any]:
  """What a run would do and cost, for `--dry_run`; nothing is started."""
  p = prepare(config)
  task = dictionary_task.make(p)
  shapes = jax.eval_shape(task.init, *task.init_shapes)
  opt = jax.eval_shape(task.optimizer.init, shapes[0])
  table, state_bytes = {}, 0
  for path, x in jax.tree_util.tree_leaves_with_path((*shapes, opt)):
    name = jax.tree_util.keystr(path)
    rule = task.rule(name, x.shape)
    shard = NamedSharding(p.mesh, rule).shard_shape(x.shape)
    state_bytes += math.prod(shard) * x.dtype.itemsize
    if name.startswith("[0]"):
      table[name[3:].strip("[']")] = f"{x.dtype}{list(x.shape)} {rule}"
  train, m = config["train"], p.dictionary
  tokens = train["steps"] * train["batch_size"]
  rows = train["batch_size"] // (p.mesh.shape["data"] * p.mesh.shape["fsdp"])
  harvested = config["data"]["train_tokens"] + config["data"]["heldout_tokens"]
  weights = p.model.num_parameters() * jnp.dtype(p.dtype).itemsize
  forward = p.model.flops_per_token(
    p.depth, config["data"]["context"], unembed=False
  )
  # Encoder: forward and weight gradient. Decoder: those and the latents'.
  step = 4 * m.d_in * m.width + 6 * m.width * m.d_out
  widths = {m.read: m.d_in, m.write: m.d_out}
  stored = (
    sum(widths.values()) * jnp.dtype(config["activations"]["dtype"]).itemsize
  )
  return {
    "model": f"{p.model.family}, {p.depth} of {p.model.num_layers} layers run",
    "mesh": dict(p.mesh.shape),
    "parameters": table,
    "prefix_widths": list(m.prefix_widths),
    "memory_per_device": {
      "model": _size(weights / (p.mesh.shape["fsdp"] * p.mesh.shape["tensor"])),
      "training state": _size(state_bytes),
      "one batch of latents": _size(4 * rows * m.width),
    },
    "store": _size(harvested * stored),
    "tokens": {"harvest": harvested, "train": tokens},
    "flops": {
      "harvest": f"{forward * harvested:.3g}",
      "train": f"{float(step) * tokens:.3g}",
    },
  }


def _size(count: float) -> str:
  return f"{count / 2**30:.2f} GiB"
