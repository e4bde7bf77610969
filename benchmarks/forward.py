"""Tokens per second of forward passes: ours against transformers.

  python benchmarks/forward.py [--claim=logits|harvest] [--rounds=5] [--json]
  python benchmarks/forward.py --device=gpu [--preset=gemma2-2b] [--json]

On the CPU: Gemma 3 270M, real weights and text, float32. `logits` is the whole
model. In `harvest` ours gives one site and stops after its layer; a peer does
what its users commonly do. That is the whole model with a hook and
`output_hidden_states` for transformers, with and without the head, and
`run_with_cache` with `stop_at_layer` for TransformerLens, where that is
installed. `harvest.py` cuts transformers off after the layer.

On a GPU: random weights in bfloat16, no files, and of the batches that fit,
the quickest. `harvest` is all blocks; `logits` are reduced to each token's
largest, so that nothing large leaves. Our implementations of attention must
agree. transformers takes part where torch has CUDA, in the memory that JAX
leaves it (XLA_PYTHON_CLIENT_MEM_FRACTION). Every batch is compiled: where time
is short, take one claim and one preset at a time.

FLOPs count all T x T scores, those too that an implementation leaves out. MFU
is their share of the measured rate of matrix products.
"""

import functools
import json
import os
import pathlib
import tempfile

import turns

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags

from gemma_jax import machine, models
from gemma_jax.models import attention as attention_lib
from gemma_jax.models import families, random, weights

CLAIMS = ("logits", "harvest")
CLAIM = flags.DEFINE_multi_enum("claim", CLAIMS, CLAIMS, "What to compare.")
DEVICE = flags.DEFINE_enum("device", "cpu", ("cpu", "gpu"), "Where to run.")
BATCH = flags.DEFINE_integer("batch", 4, "Windows in a pass, on the CPU.")
CONTEXT = flags.DEFINE_integer(
  "context", None, "Tokens in a window; default 512, on a GPU 1024."
)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Times that each is run.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object per claim.")
PRESET = flags.DEFINE_multi_enum(
  "preset", ("gemma2-2b", "gemma3-1b"), models.PRESETS, "Shapes, on a GPU."
)
ATTENTIONS = attention_lib.IMPLEMENTATIONS[1:]
ATTENTION = flags.DEFINE_multi_enum(
  "attention", ATTENTIONS, ATTENTIONS, "Which of ours, on a GPU."
)
MEMORY_GB = flags.DEFINE_float(
  "memory_gb", None, "A GPU's memory in GB; default, what JAX may use of it."
)
MAX_BATCH = flags.DEFINE_integer("max_batch", 256, "The largest, on a GPU.")

LAYER = 8
SITE = f"blocks.{LAYER}.mlp_out"
# Largest gap, relative to the largest value.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
# Dense bfloat16 FLOP/s of the data sheets, by JAX's name of the device.
DATA_SHEET = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12}


def transformers_runs(directory, claim):
  """{name: function from tokens to the values}."""
  runs = {}
  for attention in ("eager", "sdpa"):
    model = turns.hugging_face(directory, attention)
    site = turns.keep_output(
      model.model.layers[LAYER].post_feedforward_layernorm
    )

    def logits(tokens, model=model):
      return model(tokens, use_cache=False).logits

    def harvest(tokens, model=model, site=site):
      model(tokens, use_cache=False, output_hidden_states=True)
      return site["x"]

    name = f"transformers {attention}"
    if claim == "logits":
      runs[name] = turns.torch_run(logits)
    else:
      runs[name] = turns.torch_run(harvest)
      no_head = functools.partial(harvest, model=model.model)
      runs[f"{name}, no head"] = turns.torch_run(no_head)
  return runs


def transformer_lens_runs(directory, claim):
  """The same, or {} and why not."""
  try:
    import transformer_lens

    model = transformer_lens.TransformerBridge.boot_transformers(
      str(directory), dtype=torch.float32
    )
  except Exception as e:
    # Not installed, another version, or without this model.
    return {}, f"TransformerLens takes no part: {turns.first_line(e)}"

  def harvest(tokens):
    name = f"blocks.{LAYER}.hook_mlp_out"
    _, cache = model.run_with_cache(
      tokens, names_filter=[name], stop_at_layer=LAYER + 1
    )
    return cache[name]

  run = model if claim == "logits" else harvest
  return {"TransformerLens": turns.torch_run(run)}, "TransformerLens takes part"


def torch_matmul_rate(size=2048):
  """FLOP/s of a square product: how much of a ratio is torch's BLAS."""
  a = torch.randn(size, size)
  each = turns.rates({"": lambda _: a @ a}, np.zeros(1), 10)[""]
  return 2 * size**3 * each


def on_cpu(claim):
  """Prints and returns the result of one claim."""
  load, waiting = os.getloadavg()[0], os.environ["OMP_WAIT_POLICY"]
  directory = models.resolve(models.DEMO)
  model = models.load_model(directory, dtype="float32")
  context = CONTEXT.value or 512
  tokens = turns.real_tokens(model, BATCH.value, context)

  def logits(tokens):
    return model.forward(tokens)[0].block_until_ready()

  def harvest(tokens):
    _, sites = model.forward(tokens, capture=(SITE,), stop_at=SITE)
    return np.asarray(sites[SITE])

  lens, lens_note = transformer_lens_runs(directory, claim)
  runs = {
    "ours": logits if claim == "logits" else harvest,
    **transformers_runs(directory, claim),
    **lens,
  }
  gap = turns.largest_gap(runs, tokens)
  product = machine.matmul_rate("float32")
  theirs = torch_matmul_rate()
  peers = turns.rates(runs, tokens, ROUNDS.value)
  ours = peers.pop("ours")
  whole = claim == "logits"
  layers = model.config.num_layers if whole else LAYER + 1
  flops = model.config.flops_per_token(layers, context, unembed=whole)
  result = turns.result(
    f"forward {claim}",
    ours,
    peers,
    gap=gap,
    tolerance=TOLERANCE["float32"],
    ratios={name: ours / rate for name, rate in peers.items()},
    batch=BATCH.value,
    context=context,
    dtype="float32",
    gflops_per_second=ours * flops / 1e9,
    matmul_gflops_per_second=product / 1e9,
    torch_matmul_gflops_per_second=theirs / 1e9,
    mfu=ours * flops / product,
    device=str(jax.devices()[0]),
    torch_threads=torch.get_num_threads(),
    omp_wait_policy=waiting,
    load=load,
  )
  notes = [
    f"MFU {result['mfu']:.0%} of {product / 1e9:.0f} GFLOP/s; torch's "
    f"own matrix products reach {theirs / 1e9:.0f} GFLOP/s",
    f"{result['torch_threads']} torch threads, waiting {waiting}",
    f"load {load:.1f} on {os.cpu_count()} cores before the start",
    lens_note,
  ]
  turns.show(result, as_json=JSON.value, notes=notes)
  return result


def reduced(cfg, attention, claim, params, tokens):
  """All blocks, and no more than a few numbers of what they compute."""
  run = functools.partial(
    models.forward, cfg, params, tokens, attention=attention
  )
  if claim == "logits":
    # Not their sum, which XLA may take before the product with the embedding.
    return jnp.max(run()[0], axis=-1)
  last = f"blocks.{cfg.num_layers - 1}.resid_post"
  capture = {last: models.reduce.mean()}
  return run(capture=capture, stop_at=cfg.num_layers)[1][last]


def fitting(run, params, context, limit):
  """{batch: compiled program}, doubling the batch while it fits."""
  program = jax.jit(run)
  found, batch = {}, 1
  while batch <= MAX_BATCH.value:
    tokens = jax.ShapeDtypeStruct((batch, context), jnp.int32)
    try:
      compiled = program.lower(params, tokens).compile()
    except jax.errors.JaxRuntimeError as e:
      if "RESOURCE_EXHAUSTED" in str(e):
        break
      raise
    size = compiled.memory_analysis()
    needs = (
      size.temp_size_in_bytes
      + size.argument_size_in_bytes
      + size.output_size_in_bytes
    )
    if needs > limit:
      break
    found[batch] = compiled
    batch *= 2
  if not found:
    raise ValueError(f"One window does not fit into {limit / 1e9:.3g} GB.")
  return found


def random_tokens(cfg, batch, context):
  shape = (batch, context)
  return jax.random.randint(jax.random.key(1), shape, 0, cfg.vocab_size)


def measure(cfg, params, programs, context):
  """{batch: tokens/s} of the last few."""
  found = {}
  for batch in list(programs)[-3:]:
    tokens = random_tokens(cfg, batch, context)

    def run(tokens, program=programs[batch]):
      program(params, tokens).block_until_ready()

    run(tokens)
    found |= turns.rates({batch: run}, tokens, ROUNDS.value)
  return found


def cuda_peers(cfg, params, claim, batch, context, device="cuda"):
  """{name: (tokens/s, batch, values for one window)} of transformers."""
  found = {}
  with tempfile.TemporaryDirectory() as directory:
    hf = json.dumps(families.to_hf_config(cfg))
    (pathlib.Path(directory) / "config.json").write_text(hf)
    weights.save(directory, jax.tree.map(np.asarray, params), cfg)
    # Its sdpa refuses soft-capped scores.
    for attention in ("eager", "sdpa")[: 1 if cfg.attn_softcap else 2]:
      model = turns.hugging_face(
        directory, attention, dtype=torch.bfloat16, device=device
      )
      last = turns.keep_output(model.model.layers[-1])

      def values(tokens, model=model, last=last):
        if claim == "logits":
          return model(tokens, use_cache=False).logits.amax(-1).float()
        model.model(tokens, use_cache=False)
        return last["x"].mean((0, 1), dtype=torch.float32)

      run = turns.torch_run(values, device)
      one = run(random_tokens(cfg, 1, context))
      rate, size = None, batch
      while rate is None and size:
        tokens = np.array(random_tokens(cfg, size, context))
        try:
          run(tokens)
          rate = turns.rates({"": run}, tokens, ROUNDS.value)[""]
        except torch.cuda.OutOfMemoryError:
          size //= 2
      found[f"transformers {attention}"] = rate, size, one
  return found


def on_gpu(preset, claim):
  """Prints and returns the result of one claim for one shape."""
  cfg, context = models.PRESETS[preset], CONTEXT.value or 1024
  device = jax.devices()[0]
  memory = (device.memory_stats() or {}).get("bytes_limit")
  if MEMORY_GB.value:
    memory = 1e9 * MEMORY_GB.value
  if memory is None:
    raise SystemExit(f"{device} does not tell its memory: pass --memory_gb")
  product = machine.matmul_rate("bfloat16")
  init = jax.jit(random.init, static_argnums=(0, 2))
  params = init(cfg, jax.random.key(0), jnp.bfloat16)
  tried, values, failed = {}, {}, []
  for attention in ATTENTION.value:
    try:
      attention_lib.choose(cfg, attention, context, jnp.bfloat16)
    except ValueError as e:
      tried[attention] = f"cannot run: {e}"
      continue
    try:
      run = functools.partial(reduced, cfg, attention, claim)
      programs = fitting(run, params, context, 0.8 * memory)
      values[attention] = programs[1](params, random_tokens(cfg, 1, context))
      tried[attention] = measure(cfg, params, programs, context)
    except Exception as e:  # the others' results are worth having
      tried[attention] = f"failed: {turns.first_line(e)}"
      failed.append(attention)
  rates = {
    (attention, batch): rate
    for attention, found in tried.items()
    if isinstance(found, dict)
    for batch, rate in found.items()
  }
  if not rates:
    raise SystemExit(f"{preset} {claim}: nothing ran: {tried}")
  attention, batch = max(rates, key=rates.get)
  ours = rates[attention, batch]
  peers = {}
  if torch.cuda.is_available():
    peers = cuda_peers(cfg, params, claim, batch, context)
  values |= {name: value for name, (_, _, value) in peers.items()}
  first, *others = values.values()
  gaps = [turns.gap(first, value) for value in others]
  flops = ours * cfg.flops_per_token(
    cfg.num_layers, context, unembed=claim == "logits"
  )
  sheet = DATA_SHEET.get(device.device_kind)
  result = turns.result(
    f"forward {claim} {preset}",
    ours,
    {name: rate for name, (rate, _, _) in peers.items() if rate},
    gap=float(np.max(gaps)) if gaps else None,
    tolerance=TOLERANCE["bfloat16"],
    attention=attention,
    batch=batch,
    peer_batch={name: size for name, (_, size, _) in peers.items()},
    context=context,
    dtype="bfloat16",
    tried=tried,
    failed=failed,
    gflops_per_second=flops / 1e9,
    matmul_gflops_per_second=product / 1e9,
    mfu=flops / product,
    mfu_data_sheet=flops / sheet if sheet else None,
    device=device.device_kind,
  )
  notes = [
    f"ours is {attention}, batch {batch}; MFU {flops / product:.0%} of the "
    f"measured {product / 1e12:.3g} TFLOP/s",
    f"MFU {flops / sheet:.0%} of the data sheet's {sheet / 1e12:.0f} TFLOP/s"
    if sheet
    else f"no data sheet for {device.device_kind!r}",
    *(f"{name}: {found}" for name, found in tried.items()),
    *(["torch has no CUDA here: no peers"] * (not peers)),
  ]
  turns.show(result, as_json=JSON.value, notes=notes)
  return result


def main(_):
  if DEVICE.value == "gpu":
    results = [on_gpu(p, c) for p in PRESET.value for c in CLAIM.value]
  else:
    jax.config.update("jax_platforms", "cpu")
    results = [on_cpu(claim) for claim in CLAIM.value]
  failed = [f"{r['name']}: {r['failed']}" for r in results if r.get("failed")]
  if failed:
    raise SystemExit(f"failed: {'; '.join(failed)}")
  turns.must_be_equal(results)


if __name__ == "__main__":
  app.run(main)
