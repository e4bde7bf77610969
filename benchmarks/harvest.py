"""Tokens per second of harvesting one layer, and what is lost on the way.

  python benchmarks/harvest.py [--claim=store] [--rounds=5] [--json]

Gemma 3 270M, two sites (`mlp_in`, `mlp_out`) of one layer. Three claims:

forward: against transformers, both in float32 and stopping after the layer,
as users of either would do; their values must agree.
store: text to a store with statistics, against running the same batches and
throwing the sites away.
live: batches from the model straight into the training step of a small
autoencoder, against the same forward passes and steps by themselves: the
share of the time in which the device is at work.

All take turns.
"""

import itertools
import pathlib
import shutil
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import turns
from absl import app, flags

from gemma_jax import data, models
from gemma_jax.activations import capture as capturing
from gemma_jax.activations import harvest
from gemma_jax.activations.live import ModelStream, _forward_into
from gemma_jax.models import DEMO

LAYER = flags.DEFINE_integer("layer", 9, "Layer to harvest.")
BATCH = flags.DEFINE_integer("batch", 8, "Windows in a forward pass.")
CONTEXT = flags.DEFINE_integer("context", 256, "Tokens in a window.")
CLAIMS = ("forward", "store", "live")
CLAIM = flags.DEFINE_multi_enum("claim", CLAIMS, CLAIMS, "Which to measure.")
TOKENS = flags.DEFINE_integer("tokens", 32_768, "Of a round of store, live.")
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


def forward_claim(model, directory, names):
  tokens = turns.real_tokens(model, BATCH.value, CONTEXT.value)
  capture = tuple(names.values())
  valid = np.ones(tokens.shape, bool)

  def ours(tokens):
    found, _ = capturing.capture_sites(
      model.config, model.params, tokens, valid, capture, jnp.dtype("float32"),
      False, False,
    )  # fmt: skip
    return {n: np.asarray(found[site]) for n, site in names.items()}

  runs = {"ours": ours} | {
    f"transformers {kind}": peer(directory, LAYER.value, kind)
    for kind in ("eager", "sdpa")
  }
  gap = turns.largest_gap(runs, tokens)
  peers = turns.rates(runs, tokens, ROUNDS.value)
  rate = peers.pop("ours")
  flops = model.config.flops_per_token(
    LAYER.value + 1, CONTEXT.value, unembed=False
  )
  result = turns.result(
    "harvest: forward",
    rate,
    peers,
    gap=gap,
    tolerance=1e-4,
    gflops_per_second=rate * flops / 1e9,
    device=str(jax.devices()[0]),
  )
  turns.show(result, as_json=JSON.value)
  turns.must_be_equal([result])


def stream_of(model):
  """Windows of the text that every Python carries."""
  return data.WindowStream(
    data.builtin(),
    model.tokenizer.backend_tokenizer,
    context=CONTEXT.value,
    bos_id=model.config.bos_id,
    pad_id=model.config.pad_id,
    special_ids=model.config.eos_ids,
    max_tokens=TOKENS.value,
  )


def store_claim(model, names):
  windows = stream_of(model)
  capture = tuple(names.values())
  batches = list(capturing.rebatch([windows.collect()], BATCH.value))
  root = pathlib.Path(tempfile.mkdtemp())

  def stored():
    shutil.rmtree(root)
    store = harvest(model, windows, capture, root, batch_size=BATCH.value)
    return store.read(0, 64, capture[0]).astype(np.float32)

  def discarded():
    for batch in batches:
      found, _ = capturing.launch(
        model, batch, batch.mask, BATCH.value, capture,
        jnp.dtype("bfloat16"), False, False,
      )  # fmt: skip
      jax.block_until_ready(found)
    first = batches[0]
    depth = LAYER.value + 1
    _, found = model.forward(first.tokens[:1], capture=capture, stop_at=depth)
    return np.asarray(found[capture[0]], np.float32)[first.mask[:1]][:64]

  try:
    same = np.allclose(stored(), discarded(), rtol=1e-2, atol=1e-2)
    seconds = by_turns({"stored": stored, "discarded": discarded})
  finally:
    shutil.rmtree(root)
  rates = {name: TOKENS.value / t for name, t in seconds.items()}
  cost = seconds["stored"] / seconds["discarded"] - 1
  turns.show_rates(
    {
      "name": "harvest: storing against discarding",
      "ours": rates["stored"],
      "peers": {"compute and discard": rates["discarded"]},
      "unit": "tokens/s",
      "ratio": rates["stored"] / rates["discarded"],
      "equal": bool(same),
      "note": f"storing costs {cost:.1%}",
    },
    as_json=JSON.value,
  )


def by_turns(runs):
  """{name: median seconds} over the rounds."""
  took = {name: [] for name in runs}
  for _ in range(ROUNDS.value):
    for name, run in runs.items():
      began = time.perf_counter()
      run()
      took[name].append(time.perf_counter() - began)
  return {name: float(np.median(t)) for name, t in took.items()}


def rows_of_the_model(model, windows, site, batch) -> bool:
  """Whether each row of a batch is one that the model makes of the text."""
  found = []
  for part in capturing.rebatch([windows.collect()], BATCH.value):
    _, sites = model.forward(
      part.tokens, capture=(site,), stop_at=LAYER.value + 1
    )
    found.append(np.asarray(sites[site])[part.mask])
  known = np.concatenate(found)
  batch = np.asarray(batch[:64], np.float32)
  nearest = [np.linalg.norm(known - row, axis=1).min() for row in batch]
  return bool(np.all(nearest < 0.02 * np.linalg.norm(batch, axis=1)))


def live_claim(model, names):
  """Batches of 1,024 rows into an autoencoder of 2,048 latents."""
  read, write = names["mlp_in"], names["mlp_out"]
  width, rows = model.config.width, 1_024
  keys = jax.random.split(jax.random.key(0))
  scale = width**-0.5
  start = {
    "encode": scale * jax.random.normal(keys[0], (width, 2_048)),
    "decode": scale * jax.random.normal(keys[1], (2_048, width)),
  }

  @jax.jit
  def step(params, batch):
    def loss(params):
      x, y = (batch[s].astype(jnp.float32) for s in (read, write))
      z = jax.nn.relu(x @ params["encode"])
      return jnp.mean((y - z @ params["decode"]) ** 2)

    slopes = jax.grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 1e-3 * g, params, slopes)

  windows = stream_of(model)
  count = TOKENS.value // rows - 1
  block = TOKENS.value // 4
  stream = ModelStream(
    model,
    windows,
    (read, write),
    rows,
    0,
    windows_per_pass=BATCH.value,
    buffer_rows=block,
  )
  batches = iter(stream)
  state = step(start, next(batches))  # the first block is filled
  half = stream._empty()
  tokens = turns.real_tokens(model, BATCH.value, CONTEXT.value)
  mask = np.ones(tokens.shape, bool)
  held = jax.block_until_ready(next(batches))
  same = rows_of_the_model(model, windows, write, held[write])
  passes = -(-count * rows // (BATCH.value * (CONTEXT.value - 1)))

  def together():
    nonlocal state
    for batch in itertools.islice(batches, count):
      state = step(state, batch)
    jax.block_until_ready(state)

  def forwards():
    nonlocal half
    for index in range(passes):
      half, _ = _forward_into(
        model.config, (read, write), half, model.params, tokens, mask,
        np.int32(index % stream._passes),
      )  # fmt: skip
    jax.block_until_ready(half)

  def steps():
    params = start
    for _ in range(count):
      params = step(params, held)
    jax.block_until_ready(params)

  forwards()
  seconds = by_turns(
    {"together": together, "model": forwards, "training": steps}
  )
  batches.close()
  alone = seconds["model"] + seconds["training"]
  tokens_done = count * rows
  turns.show_rates(
    {
      "name": "harvest: live into a training step",
      "ours": tokens_done / seconds["together"],
      "peers": {"model and training alone": tokens_done / alone},
      "unit": "tokens/s",
      "ratio": alone / seconds["together"],
      "equal": same,
      "note": (
        f"busy {alone / seconds['together']:.0%}, with the model "
        f"{seconds['model'] / seconds['together']:.0%}"
      ),
    },
    as_json=JSON.value,
  )


def main(_):
  directory = models.resolve(DEMO)
  names = {n: f"blocks.{LAYER.value}.{n}" for n in ("mlp_in", "mlp_out")}
  model = models.load_model(directory, dtype="float32", layers=LAYER.value + 1)
  if "forward" in CLAIM.value:
    forward_claim(model, directory, names)
  if "store" in CLAIM.value:
    store_claim(model, names)
  if "live" in CLAIM.value:
    live_claim(model, names)


if __name__ == "__main__":
  app.run(main)
