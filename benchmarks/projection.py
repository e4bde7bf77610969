"""Value vectors to the vocabulary: ours against PyTorch, in turns.

  python benchmarks/projection.py [--model=NAME] [--layers=12] [--rounds=3]
  python benchmarks/projection.py --all [--json]

Both project all value vectors of a layer to the whole vocabulary and keep the
50 largest and smallest logits, mean, deviation, skew and kurtosis. PyTorch
does it as one would by hand: logits of 256 vectors at a time, `topk`, and
sums of powers. What each finds must agree. The share is of this machine's
measured rate of square matrix products of the same type; only the product of
vectors and unembedding counts as work. `--all` times ours alone on all
layers.
"""

import json
import os
import resource
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from absl import app, flags

from gemma_jax import concepts, machine, models

MODEL = flags.DEFINE_string("model", models.DEMO, "As `load_model` takes it.")
LAYER = flags.DEFINE_integer("layer", 12, "Whose MLP.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Each in turn.")
ALL = flags.DEFINE_bool("all", False, "All layers, ours alone.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")

TOP, CHUNK = 50, 256


def by_hand(table: torch.Tensor, vectors: torch.Tensor):
  """Top and bottom logits, mean, std, skew, kurtosis, a chunk at a time."""
  parts = []
  for rows in vectors.split(CHUNK):
    logits = rows @ table.T
    top, bottom = logits.topk(TOP)[0], logits.topk(TOP, largest=False)[0]
    mean = logits.mean(1, keepdim=True)
    away = logits - mean
    square = away * away
    variance = square.mean(1)
    skew = (square * away).mean(1) / variance**1.5
    kurtosis = (square * square).mean(1) / variance**2 - 3
    parts.append((top, bottom, mean[:, 0], variance.sqrt(), skew, kurtosis))
  return [torch.cat(column).numpy() for column in zip(*parts, strict=True)]


def ours(model, table, vectors):
  found = concepts.project_directions(model, table, vectors, top_k=TOP)
  return [
    found.top_logits,
    found.bottom_logits,
    found.mean,
    found.std,
    found.skew,
    found.kurtosis,
  ]


def main(_):
  model = models.load_model(MODEL.value, dtype="float32")
  cfg = model.config
  rate = machine.matmul_rate("float32")
  table = concepts.readout(model)
  product = 2.0 * cfg.vocab_size * cfg.width
  if ALL.value:
    began, done = time.perf_counter(), 0
    for layer in range(cfg.num_layers):
      vectors = concepts.value_vectors(model, layer)
      concepts.project_directions(model, table, vectors, top_k=TOP)
      done += len(vectors)
    seconds = time.perf_counter() - began
    out = {
      "name": f"{done} value vectors of {MODEL.value}",
      "seconds": seconds,
      "flops": done * product / seconds,
      "matmul_flops": rate,
      "share": done * product / seconds / rate,
      "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(
      json.dumps(out)
      if JSON.value
      else f"{out['name']}: {seconds:.1f} s, {out['flops'] / 1e9:.0f} GFLOP/s, "
      f"{out['share']:.0%} of the matmul rate ({rate / 1e9:.0f}); at most "
      f"{out['peak_bytes'] / 2**30:.1f} GiB"
    )
    return
  vectors = np.asarray(concepts.value_vectors(model, LAYER.value))
  flat = np.asarray(table.blocks).reshape(-1, cfg.width)[: table.count]
  dense = torch.from_numpy(flat + np.asarray(table.mean))
  rows = torch.from_numpy(vectors.copy())
  systems = {
    "ours": lambda: ours(model, table, vectors),
    "torch": lambda: by_hand(dense, rows),
  }
  found = {name: run() for name, run in systems.items()}  # and compiles
  times = {name: [] for name in systems}
  for _ in range(ROUNDS.value):
    for name, run in systems.items():
      began = time.perf_counter()
      run()
      times[name].append(time.perf_counter() - began)
  equal = all(
    np.allclose(a, b, rtol=2e-3, atol=2e-3 * np.abs(b).max())
    for a, b in zip(found["ours"], found["torch"], strict=True)
  )
  best = {name: min(own) for name, own in times.items()}
  out = {
    "name": f"{len(vectors)} vectors to {cfg.vocab_size} tokens",
    "ours": best["ours"],
    "peers": {"torch": best["torch"]},
    "unit": "s",
    "ratio": best["torch"] / best["ours"],
    "equal": equal,
    "share": {
      name: len(vectors) * product / own / rate for name, own in best.items()
    },
  }
  if JSON.value:
    print(json.dumps(out))
    return
  print(f"{out['name']} (equal: {equal}); matmul {rate / 1e9:.0f} GFLOP/s")
  for name, own in best.items():
    print(f"{name:>6}: {own:.2f} s, {out['share'][name]:.0%} of matmul")
  print(f"ratio {out['ratio']:.2f}")


if __name__ == "__main__":
  app.run(main)
