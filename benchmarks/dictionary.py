"""Training steps of dictionaries: ours against SAELens and dictionary_learning.

  python benchmarks/dictionary.py --peers=PYTHON [--json]
  python benchmarks/dictionary.py --members=8
  python benchmarks/dictionary.py --crossover

PYTHON is the interpreter of an environment with the peers:

  python -m venv peers
  peers/bin/pip install torch==2.13.0 sae-lens==6.54.12 \\
    dictionary-learning==0.1.0

Both start from the same weights and see the same rows in the same order; ours
takes the recipe of that peer, so that losses must agree step by step. They
take turns. `--members` times a sweep against one member, `--crossover` the
step that touches active latents only against the dense one.
"""

import argparse
import contextlib
import json
import os
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import peers

from gemma_jax import models
from gemma_jax.dictionaries import DictionaryConfig, core
from gemma_jax.dictionaries.presets import preset
from trainers import dictionary_step
from trainers.dictionary_members import Member
from trainers.dictionary_plan import AXES

SYSTEMS = ("dictionary_learning", "sae_lens")
RATE = 3e-4


def planted(rows: int, d: int, seed: int = 0) -> np.ndarray:
  """Sparse sums of random directions and noise, mean |x|^2 = D."""
  rng = np.random.default_rng(seed)
  truth = rng.standard_normal((4 * d, d), np.float32)
  truth /= np.linalg.norm(truth, axis=1, keepdims=True)
  x = 0.1 * rng.standard_normal((rows, d), np.float32)
  for _ in range(24):
    size = rng.exponential(1, (rows, 1)).astype(np.float32)
    x += size * truth[rng.integers(0, 4 * d, rows)]
  return x * np.sqrt(d / np.mean(np.sum(x * x, axis=1)))


class Ours:
  """Our step for one or several members, fed from memory."""

  def __init__(self, args, x, activation, how, members=1, sparse=True):
    cfg = DictionaryConfig(
      d_in=args.d,
      d_out=args.d,
      width=args.width,
      activation=activation,
      k=float(args.k),
      prefix_widths=(args.width,),
    )
    group = tuple(Member(str(i), cfg, RATE, 0.0, i) for i in range(members))
    norm = core.Normalisation.identity(args.d, args.d)
    head = x[: args.batch]
    self.state = dictionary_step.start(
      [group],
      how,
      dictionary_step.keys([group]),
      norm,
      None,
      (head, head, jnp.ones(args.batch, bool)),
    )
    (params,), *_ = self.state
    self.weights = {n: np.asarray(w[0]) for n, w in params.items()}
    step = dictionary_step.make(
      [group],
      how,
      models.make_mesh({}, jax.devices()[:1], AXES),
      steps=10**6,
      at_once=args.at_once,
      sparse=sparse,
    )
    self.run_step = jax.jit(step, donate_argnums=(0, 1, 2))
    self.x, self.batch, self.done = jnp.asarray(x), args.batch, 0

  def __call__(self, steps: int) -> tuple[float, list[float]]:
    """Seconds and losses of so many more steps."""
    found, began = [], time.perf_counter()
    for _ in range(steps):
      at = self.done * self.batch % len(self.x)
      x = jax.lax.dynamic_slice_in_dim(self.x, at, self.batch)
      *self.state, _, metrics = self.run_step(
        *self.state, {"x": x, "y": x}, jnp.asarray(self.done)
      )
      found.append(metrics)
      self.done += 1
    jax.block_until_ready(self.state)
    seconds = time.perf_counter() - began
    return seconds, [float(m["loss"][0]) for m in found]


class Peer(peers.Server):
  """A peer's step."""

  def __init__(self, args, system, activation, folder):
    case = {
      "system": system,
      "activation": activation,
      "d": args.d,
      "width": args.width,
      "k": args.k,
      "learning_rate": RATE,
      "batch": args.batch,
      "threads": args.threads,
    }
    super().__init__(
      args.peers,
      os.path.join(os.path.dirname(__file__), "dictionary_peer.py"),
      json.dumps(case),
      f"{folder}/weights.npz",
      f"{folder}/rows.npy",
    )

  def __call__(self, steps: int) -> tuple[float, list[float]]:
    found = self.ask(steps)
    return found["seconds"], found["losses"]


def per_token(seconds, args) -> float:
  """Microseconds: the median over rounds."""
  return float(np.median(seconds)) / args.steps / args.batch * 1e6


def against(args, system, activation) -> dict:
  """Ours with a system's recipe and the system itself, by turns."""
  x = planted(args.batch * args.batches, args.d)
  # Their own scaling of inputs happens before their step.
  how = preset(
    system,
    activation,
    {"normalise": "none", "warmup": 0.0, "learning_rate": RATE},
  )
  ours = Ours(args, x, activation, how)
  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
    np.savez(f"{folder}/weights.npz", **ours.weights)
    np.save(f"{folder}/rows.npy", x)
    theirs = Peer(args, system, activation, folder)
    stack.callback(theirs.close)
    (_, a), (_, b) = ours(args.warm), theirs(args.warm)
    mine, other = [], []
    for _ in range(args.rounds):
      for run, seconds, losses in ((ours, mine, a), (theirs, other, b)):
        took, found = run(args.steps)
        seconds.append(took)
        losses += found
  gap = float(np.max(np.abs(np.array(a) - b) / np.abs(b)))
  mine, other = per_token(mine, args), per_token(other, args)
  return {
    "name": f"{activation} step, recipe of {system}",
    "ours": 1e6 / mine,
    "peers": {system: 1e6 / other},
    "unit": "tokens/s",
    "ratio": other / mine,
    "equal": gap < args.tolerance,
    "relative_gap": gap,
    "steps": len(a),
    "microseconds_per_token": {"ours": mine, system: other},
  }


def own(args, *runs) -> list[float]:
  """Microseconds a token of several of our own steps, by turns."""
  for run in runs:
    run(args.warm)
  seconds = [[] for _ in runs]
  for _ in range(args.rounds):
    for run, found in zip(runs, seconds, strict=True):
      found.append(run(args.steps)[0])
  return [per_token(found, args) for found in seconds]


def sweep(args) -> dict:
  """A sweep of members on one stream against one member."""
  x = planted(args.batch * args.batches, args.d)
  how = preset(
    "default", "batchtopk", {"init": "random", "learning_rate": RATE}
  )
  one, all_ = own(
    args,
    Ours(args, x, "batchtopk", how),
    Ours(args, x, "batchtopk", how, args.members),
  )
  return {
    "name": f"{args.members} members, {args.at_once} at once",
    "ours": 1e6 / all_,
    "peers": {f"one member, {args.members} times": 1e6 / one / args.members},
    "unit": "tokens/s",
    "ratio": one * args.members / all_,
    "equal": True,
    "microseconds_per_token": {"one": one, "all": all_},
  }


def crossover(args) -> list[dict]:
  """Active latents only against all, for narrower and narrower dictionaries."""
  out, width = [], args.width
  x = planted(args.batch * args.batches, args.d)
  for activation in ("topk", "batchtopk"):
    for share in (1, 2, 4, 8, 16, 32):
      args.width = width // share
      if args.width < 2 * args.k:
        break
      how = preset(
        "default", activation, {"init": "random", "learning_rate": RATE}
      )
      sparse, dense = own(
        args,
        Ours(args, x, activation, how),
        Ours(args, x, activation, how, sparse=False),
      )
      out.append(
        {
          "name": f"{activation}, M / k = {args.width // args.k}",
          "ours": 1e6 / sparse,
          "peers": {"dense": 1e6 / dense},
          "unit": "tokens/s",
          "ratio": dense / sparse,
          "equal": True,
          "microseconds_per_token": {"sparse": sparse, "dense": dense},
        }
      )
  args.width = width
  return out


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--peers", help="python of an environment with them")
  parser.add_argument("--members", type=int, help="time a sweep of so many")
  parser.add_argument("--at_once", type=int, default=1)
  parser.add_argument("--crossover", action="store_true")
  parser.add_argument("--d", type=int, default=640)
  parser.add_argument("--width", type=int, default=8192)
  parser.add_argument("--k", type=int, default=32)
  parser.add_argument("--batch", type=int, default=2048)
  parser.add_argument("--batches", type=int, default=4, help="in memory")
  parser.add_argument("--steps", type=int, default=3, help="in a turn")
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--warm", type=int, default=2)
  parser.add_argument("--threads", type=int, default=os.cpu_count())
  parser.add_argument("--tolerance", type=float, default=1e-3)
  parser.add_argument("--json", action="store_true")
  args = parser.parse_args()
  results = []
  if args.peers:
    for activation in ("topk", "batchtopk"):
      results += [against(args, system, activation) for system in SYSTEMS]
  if args.members:
    results.append(sweep(args))
  if args.crossover:
    results += crossover(args)
  if not results:
    parser.error("give --peers, --members or --crossover")
  for result in results:
    if args.json:
      print(json.dumps(result), flush=True)
      continue
    print(result["name"])
    for name, micro in result["microseconds_per_token"].items():
      print(f"  {name:24} {micro:8.1f} us/token {1e6 / micro:10.0f} tokens/s")
    gap = result.get("relative_gap")
    facts = f"  ratio {result['ratio']:.2f}"
    if gap is not None:
      facts += f"; losses of {result['steps']} steps differ by {gap:.1e}"
    print(facts, flush=True)
  wrong = [r["name"] for r in results if not r["equal"]]
  if wrong:
    raise SystemExit(f"{', '.join(wrong)}: not the same losses")


if __name__ == "__main__":
  main()
