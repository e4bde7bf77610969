"""Ours and its peers by turns, on the same tokens."""

import json
import os
import time

import jax
import numpy as np

# Before torch is imported. Its threads wait for one another in busy loops,
# which makes it many times slower wherever anything else runs as well.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import transformers

from gemma_jax import data


def real_tokens(model, batch: int, context: int) -> np.ndarray:
  """int [B, T] of the text that every Python installation carries."""
  windows = data.make_windows(
    data.sample(data.builtin(), seed=0),
    model.tokenizer.backend_tokenizer,
    context=context,
    max_tokens=batch * (context - 1),
    bos_id=model.config.bos_id,
    pad_id=model.config.pad_id,
  )
  return windows.tokens[:batch]


def hugging_face(directory, attention, *, dtype=torch.float32, device="cpu"):
  """The model of transformers."""
  model = transformers.AutoModelForCausalLM.from_pretrained(
    directory, attn_implementation=attention, dtype=dtype
  )
  return model.eval().to(device)


def keep_output(module) -> dict:
  """A dict whose "x" is what the module last returned."""
  found = {}
  module.register_forward_hook(lambda _, args, out: found.update(x=out))
  return found


def torch_run(function, device="cpu"):
  """From NumPy tokens to NumPy values, through a function of torch's."""

  @torch.inference_mode()
  def run(tokens):
    tokens = torch.from_numpy(np.array(tokens)).long().to(device)
    return jax.tree.map(lambda x: x.cpu().numpy(), function(tokens))

  return run


def gap(ours, theirs) -> float:
  """The largest difference over their largest value, NaN where either is.

  Of pytrees, the largest over the leaves. Rows go one by one, because logits
  of a whole batch are gigabytes.
  """
  found = []
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    if np.shape(a) != np.shape(b):
      raise SystemExit(
        f"ours has the shape {np.shape(a)}, the peer's {np.shape(b)}"
      )
    pairs = list(zip(np.atleast_1d(a), np.atleast_1d(b), strict=True))
    most = np.max([np.abs(y).max() for _, y in pairs])
    found.append(np.max([np.abs(x - y).max() for x, y in pairs]) / most)
  return float(np.max(found))


def largest_gap(runs, tokens) -> float:
  """Of the first run's outputs to each other's; all have then warmed up."""
  first, *others = runs.values()
  ours = first(tokens)
  return float(np.max([gap(ours, other(tokens)) for other in others]))


def rates(runs, tokens, rounds: int) -> dict[str, float]:
  """{name: tokens/s}, medians over rounds in which each runs once."""
  seconds = {name: [] for name in runs}
  for _ in range(rounds):
    for name, run in runs.items():
      began = time.perf_counter()
      run(tokens)
      seconds[name].append(time.perf_counter() - began)
  return {n: tokens.size / float(np.median(s)) for n, s in seconds.items()}


def result(name, ours, peers, *, gap, tolerance, **more) -> dict:
  """The object that --json prints; a gap of None was not measured."""
  unknown = gap is None or not np.isfinite(gap)
  return {
    "name": name,
    "ours": ours,
    "peers": peers,
    "unit": "tokens/s",
    "ratio": ours / max(peers.values()) if peers else None,
    "equal": None if gap is None else bool(gap < tolerance),
    "relative_gap": None if unknown else gap,
    **more,
  }


def show(result: dict, *, as_json: bool, notes=()) -> None:
  """Prints a result, as one line of JSON or for people."""
  if as_json:
    print(json.dumps(result), flush=True)
    return
  print(result["name"])
  for name, rate in {"ours": result["ours"], **result["peers"]}.items():
    print(f"  {name:34} {rate:10.0f} tokens/s")
  ratio, gap = result["ratio"], result["relative_gap"]
  facts = [
    "no peer" if ratio is None else f"ratio to the best peer {ratio:.2f}",
    "no relative gap" if gap is None else f"relative gap {gap:.1e}",
    f"{result['gflops_per_second']:.0f} GFLOP/s",
  ]
  print("  " + "; ".join(facts))
  for note in notes:
    print(f"  {note}")
  print(end="", flush=True)


def show_rates(result: dict, *, as_json: bool) -> None:
  """Prints a result whose rates are small numbers."""
  if as_json:
    print(json.dumps(result), flush=True)
    return
  print(result["name"])
  for name, rate in {"ours": result["ours"], **result["peers"]}.items():
    print(f"  {name:34} {rate:10.3f} {result['unit']}")
  print(
    f"  ratio to the best peer {result['ratio']:.2f}; equal: {result['equal']}"
    f"{'; ' if result['note'] else ''}{result['note']}",
    flush=True,
  )


def first_line(error: Exception) -> str:
  """An exception's type and the first line of its message."""
  return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def must_be_equal(results) -> None:
  """Ends the program with an error if any result is not equal."""
  wrong = [r["name"] for r in results if r["equal"] is False]
  if wrong:
    raise SystemExit(
      f"{', '.join(wrong)}: the two do not compute the same thing"
    )
