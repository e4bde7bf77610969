"""Ours and its peers by turns, on the same tokens."""

import json
import time

import jax
import numpy as np

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
  """The object that --json prints."""
  return {
    "name": name,
    "ours": ours,
    "peers": peers,
    "unit": "tokens/s",
    "ratio": ours / max(peers.values()) if peers else None,
    "equal": None if gap is None else bool(gap < tolerance),
    "relative_gap": gap,
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
    "nothing to compare with" if gap is None else f"relative gap {gap:.1e}",
    f"{result['gflops_per_second']:.0f} GFLOP/s",
  ]
  print("  " + "; ".join(facts))
  for note in notes:
    print(f"  {note}")
  print(end="", flush=True)


def must_be_equal(results) -> None:
  """Ends the program with an error if any result is not equal."""
  wrong = [r["name"] for r in results if r["equal"] is False]
  if wrong:
    raise SystemExit(
      f"{', '.join(wrong)}: the two do not compute the same thing"
    )
