"""Tokens per second of harvesting one layer: ours against transformers.

  python benchmarks/harvest.py [--layer=9] [--rounds=5] [--json]

The same weights, windows and two sites (`mlp_in`, `mlp_out`) in float32; both
stop after the layer, as users of either would do. The two take turns, and
their values must agree.
"""

import jax
import jax.numpy as jnp
import numpy as np
import turns
from absl import app, flags

from gemma_jax import models
from gemma_jax.activations.harvest import _sites
from gemma_jax.models import DEMO

LAYER = flags.DEFINE_integer("layer", 9, "Layer to harvest.")
BATCH = flags.DEFINE_integer("batch", 8, "Windows in a forward pass.")
CONTEXT = flags.DEFINE_integer("context", 256, "Tokens in a window.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Times that each is run.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")


def peer(directory, layer, attention):
  """A function from tokens to the two sites, by forward hooks."""
  model = turns.hugging_face(directory, attention)
  inner = model.model
  inner.layers = inner.layers[: layer + 1]
  inner.config.num_hidden_layers = layer + 1
  block = inner.layers[layer]
  found = {
    "mlp_in": turns.keep_output(block.pre_feedforward_layernorm),
    "mlp_out": turns.keep_output(block.post_feedforward_layernorm),
  }

  def run(tokens):
    inner(tokens, use_cache=False)
    return {name: kept["x"] for name, kept in found.items()}

  return turns.torch_run(run)


def main(_):
  directory = models.resolve(DEMO)
  layer = LAYER.value
  names = {n: f"blocks.{layer}.{n}" for n in ("mlp_in", "mlp_out")}
  model = models.load_model(directory, dtype="float32", layers=layer + 1)
  tokens = turns.real_tokens(model, BATCH.value, CONTEXT.value)
  capture = tuple(names.values())

  def ours(tokens):
    found = _sites(
      model.config, model.params, tokens, capture, jnp.dtype("float32")
    )
    return {n: np.asarray(found[site]) for n, site in names.items()}

  runs = {"ours": ours} | {
    f"transformers {kind}": peer(directory, layer, kind)
    for kind in ("eager", "sdpa")
  }
  gap = turns.largest_gap(runs, tokens)
  peers = turns.rates(runs, tokens, ROUNDS.value)
  rate = peers.pop("ours")
  flops = model.config.flops_per_token(layer + 1, CONTEXT.value, unembed=False)
  result = turns.result(
    "harvest",
    rate,
    peers,
    gap=gap,
    tolerance=1e-4,
    gflops_per_second=rate * flops / 1e9,
    device=str(jax.devices()[0]),
  )
  turns.show(result, as_json=JSON.value)
  turns.must_be_equal([result])


if __name__ == "__main__":
  app.run(main)
