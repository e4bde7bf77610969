"""Held-out quality of trained dictionaries: ours, SAELens, dictionary_learning.

  pip install -e '.[demo]'
  python benchmarks/dictionary_quality.py --peers=PYTHON --workdir=DIR

Residual stream of Gemma 3 270M after layer 9; the same rows in the same order,
the same steps, M and k for all. Every system gets the learning rates of a grid
and keeps its best (by held-out FVU of the first seed), which favours each
alike; peers warm up over 10 % and decay over the last 20 % of the steps, as
SAEBench's baselines do. See dictionary.py for PYTHON.
"""

import argparse
import json
import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import peers

from configs import gemma3_sae
from gemma_jax import activations, dictionaries
from gemma_jax.dictionaries import core, evaluate, linear
from gemma_jax.dictionaries.presets import preset
from studies import jobs

SITE = "blocks.9.resid_post"
RATES = {
  "ours": (1e-3, 2e-3, 3e-3, 4e-3),
  "dictionary_learning": (3e-4, 1e-3, 3e-3, 1e-2),
  "sae_lens": (3e-4, 1e-3, 3e-3, 1e-2),
}


def ours(args, seeds, rates) -> list[dict]:
  """A sweep over seeds and rates, trained in one pass."""
  config = jobs.changed(
    gemma3_sae.get_config().to_dict(),
    {
      "dictionary.activation": args.activation,
      "dictionary.width": args.width,
      "dictionary.k": float(args.k),
      "data.train_tokens": args.tokens,
      "train.steps": args.steps,
      "train.batch_size": args.batch,
      "train.mesh.data": 1,
      "sweep.learning_rate": list(rates),
      "sweep.seed": list(seeds),
      "eval.splice_tokens": 1024,
    },
  )
  name = f"ours-{'-'.join(map(str, rates))}-{'-'.join(map(str, seeds))}"
  return jobs.train(config, args.workdir / name)


def rows_of(args, store) -> pathlib.Path:
  """The rows of all steps in the order in which ours saw them."""
  path = args.workdir / "rows.npy"
  if not path.exists():
    shape = args.steps * args.batch, store.sites[SITE]
    out = np.lib.format.open_memmap(
      path.with_name("partial.npy"), "w+", np.float32, shape
    )
    stream = store.stream(args.batch, 0, sites=(SITE,), buffer_rows=2**20)
    for i in range(args.steps):
      out[i * args.batch : (i + 1) * args.batch] = next(stream)[SITE]
    stream.close()
    out.flush()
    path.with_name("partial.npy").rename(path)
  return path


def peer(args, system, rate, seed, rows, d) -> dictionaries.Dictionary:
  """What a peer trains, in our hands; without a threshold yet."""
  path = args.workdir / f"{system}-{rate}-{seed}.npz"
  case = {
    "system": system,
    "activation": args.activation,
    "k": args.k,
    "d": d,
    "width": args.width,
    "learning_rate": rate,
    "seed": seed,
  }
  if not path.exists():
    peers.train(args, case, path, rows)
  stored = np.load(path, allow_pickle=False)
  params = {name: jnp.asarray(stored[name]) for name in stored.files}
  cfg = dictionaries.DictionaryConfig(
    d_in=d,
    d_out=d,
    width=args.width,
    activation=args.activation,
    k=float(args.k),
    prefix_widths=(args.width,),
    read=SITE,
    write=SITE,
  )
  return dictionaries.Dictionary(cfg, params)


def calibrated(d, store):
  """With the threshold that gives L0 = k on held-out rows, as ours has it."""
  cfg = d.config
  if cfg.activation != "batchtopk":
    return d
  x = next(store.stream(4096, 2, sites=(SITE,)))[SITE]
  norm = core.Normalisation.identity(cfg.d_in, cfg.d_out)
  plain = preset("default", "batchtopk")
  cut = core.calibrate(cfg, plain, d.params, norm, jnp.asarray(x), cfg.k)
  threshold = jnp.full(cfg.width, cut)
  return dictionaries.Dictionary(cfg, d.params | {"threshold": threshold})


def measured(d, store, ridge, mean) -> dict:
  numbers, *_ = evaluate.evaluate(d, store, ridge, mean)
  return {name: numbers[name] for name in ("fvu", "l0", "dead_fraction")}


def main():
  logging.basicConfig(level=logging.INFO, force=True)
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--peers", required=True)
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--activation", default="batchtopk")
  parser.add_argument("--width", type=int, default=8192)
  parser.add_argument("--k", type=int, default=32)
  parser.add_argument("--tokens", type=int, default=400_000, help="harvested")
  parser.add_argument("--batch", type=int, default=1024)
  parser.add_argument("--steps", type=int, default=400)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--json", action="store_true")
  args = parser.parse_args()
  args.workdir = args.workdir.absolute()
  args.workdir.mkdir(parents=True, exist_ok=True)
  first = ours(args, [0], RATES["ours"])
  stores = {
    name: activations.ActivationStore.open(path)
    for name, path in first[0]["stores"].items()
  }
  rows = rows_of(args, stores["train"])
  moments, ridge = linear.fit(stores["train"], SITE, SITE)
  d = stores["train"].sites[SITE]

  def score(system, rate, seed):
    with jax.default_matmul_precision("highest"):
      found = calibrated(
        peer(args, system, rate, seed, rows, d), stores["heldout"]
      )
      return measured(found, stores["heldout"], ridge, moments.mean_y)

  table = {}
  best = min(first, key=lambda m: m["fvu"])["learning_rate"]
  table["ours"] = best, ours(args, range(args.seeds), [best])
  for system in ("dictionary_learning", "sae_lens"):
    tried = {rate: score(system, rate, 0) for rate in RATES[system]}
    best = min(tried, key=lambda rate: tried[rate]["fvu"])
    rest = [score(system, best, seed) for seed in range(1, args.seeds)]
    table[system] = best, [tried[best], *rest]
  systems = {}
  for system, (rate, runs) in table.items():
    own = {"learning_rate": rate}
    for name in ("fvu", "l0", "dead_fraction"):
      values = [run[name] for run in runs]
      own[name] = float(np.mean(values))
      own[f"{name}_sd"] = float(np.std(values, ddof=len(values) > 1))
    systems[system] = own
  out = peers.compared(
    f"{args.activation}, M = {args.width}, k = {args.k}, {args.steps} steps of "
    f"{args.batch} tokens, {args.seeds} seeds",
    "FVU",
    {system: own["fvu"] for system, own in systems.items()},
    smaller=True,
  )
  if args.json:
    print(json.dumps({**out, "systems": systems}))
    return
  print(out["name"])
  for system, own in systems.items():
    print(
      f"  {system:20} rate {own['learning_rate']:.0e}  "
      f"FVU {own['fvu']:.4f} +- {own['fvu_sd']:.4f}  L0 {own['l0']:.2f}  "
      f"dead {own['dead_fraction']:.2%} +- {own['dead_fraction_sd']:.2%}"
    )


if __name__ == "__main__":
  main()
