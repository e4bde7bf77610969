"""Who finds planted directions best, with noise and Zipf frequencies.

  python benchmarks/planted.py --peers=PYTHON [--json]

128 directions in 64 dims, three active on average, the i-th as often as 1 / i
(at most on half of the rows), and noise. Ours, SAELens and
dictionary_learning train BatchTopK dictionaries on the same rows in the same
order and as many steps, each with the best learning rate of a grid. The score
is MCC: the mean cosine of planted and found directions, matched one to one.
See dictionary.py for PYTHON.
"""

import argparse
import json
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import peers
import scipy.optimize

from gemma_jax import models
from gemma_jax.dictionaries import DictionaryConfig, core, linear
from gemma_jax.dictionaries.presets import preset
from trainers import dictionary_step
from trainers.dictionary_members import Member
from trainers.dictionary_plan import AXES

D, M, ACTIVE = 64, 128, 3.0
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def planted(rows: int, noise: float, seed: int):
  """Directions [M, D] and rows [n, D]."""
  rng = np.random.default_rng(seed)
  truth = rng.normal(size=(M, D))
  truth /= np.linalg.norm(truth, axis=1, keepdims=True)
  chance = 1 / np.arange(1, M + 1)
  chance = np.minimum(chance / chance.sum() * ACTIVE, 0.5)
  acts = (rng.random((rows, M)) < chance) * rng.uniform(0.5, 1.5, (rows, M))
  x = acts @ truth + noise * rng.normal(size=(rows, D))
  return truth, x.astype(np.float32)


def mcc(found: np.ndarray, truth: np.ndarray) -> float:
  norms = np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
  cosines = (found / norms) @ truth.T
  at = scipy.optimize.linear_sum_assignment(-cosines)
  return float(cosines[at].mean())


def ours(args, x, seed) -> dict[float, np.ndarray]:
  """Decoder rows by learning rate: one sweep."""
  cfg = DictionaryConfig(
    d_in=D,
    d_out=D,
    width=M,
    activation="batchtopk",
    k=ACTIVE,
    prefix_widths=(M,),
  )
  # Alive means fired within a hundredth of the rows, as in a real run.
  dead = {"dead_after": 50_000, "aux_candidates": None}
  how = dictionary_step.in_steps(
    preset("default", "batchtopk", dead), args.steps
  )
  norm = core.normalisation(linear.moments([(x, x)]), how)
  head = x[:8192]
  group = tuple(Member(str(r), cfg, r, 0.0, seed) for r in RATES)

  carried = dictionary_step.start(
    [group],
    how,
    dictionary_step.keys([group]),
    norm,
    None,
    (head, head, np.ones(len(head), bool)),
  )
  step = dictionary_step.make(
    [group],
    how,
    models.make_mesh({}, jax.devices()[:1], AXES),
    steps=args.steps,
    at_once=1,
    sparse=False,
  )

  @jax.jit
  def train(carried, batches):
    def body(carried, at):
      i, x = at
      *carried, _, _ = step(*carried, {"x": x, "y": x}, i)
      return tuple(carried), None

    return jax.lax.scan(body, carried, (jnp.arange(args.steps), batches))[0]

  carried = train(carried, x.reshape(args.steps, args.batch, D))
  return dict(zip(RATES, np.asarray(carried[0][0]["W_dec"]), strict=True))


def peer(args, system, rate, seed, folder) -> np.ndarray:
  case = {
    "system": system,
    "activation": "batchtopk",
    "k": int(ACTIVE),
    "d": D,
    "width": M,
    "learning_rate": rate,
    "seed": seed,
  }
  peers.train(args, case, f"{folder}/out.npz", f"{folder}/rows.npy")
  return np.load(f"{folder}/out.npz", allow_pickle=False)["W_dec"]


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--peers", required=True)
  parser.add_argument("--noise", type=float, default=0.05)
  parser.add_argument("--steps", type=int, default=2000)
  parser.add_argument("--batch", type=int, default=512)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--json", action="store_true")
  args = parser.parse_args()
  systems = ("ours", "sae_lens", "dictionary_learning")
  scores = {system: {rate: [] for rate in RATES} for system in systems}
  for seed in range(args.seeds):
    truth, x = planted(args.steps * args.batch, args.noise, seed)
    with tempfile.TemporaryDirectory() as folder:
      np.save(f"{folder}/rows.npy", x)
      for rate, found in ours(args, x, seed).items():
        scores["ours"][rate].append(mcc(found, truth))
      for system in systems[1:]:
        for rate in RATES:
          found = peer(args, system, rate, seed, folder)
          scores[system][rate].append(mcc(found, truth))
  rng = np.random.default_rng(10**6)  # no seed of `planted`
  out = {}
  for system, by_rate in scores.items():
    rate = max(by_rate, key=lambda r: np.mean(by_rate[r]))
    out[system] = {
      "learning_rate": rate,
      "mcc": float(np.mean(by_rate[rate])),
      "mcc_sd": float(np.std(by_rate[rate], ddof=args.seeds > 1)),
    }
  out["random directions"] = {
    "learning_rate": 0.0,
    "mcc": mcc(rng.normal(size=(M, D)), truth),
    "mcc_sd": 0.0,
  }
  name = "planted directions, noise, Zipf"
  if args.json:
    found = {system: own["mcc"] for system, own in out.items()}
    found = peers.compared(name, "MCC", found, smaller=False)
    print(json.dumps({**found, "systems": out}))
    return
  print(name)
  for system, own in out.items():
    print(
      f"  {system:20} rate {own['learning_rate']:.0e}  MCC {own['mcc']:.4f} "
      f"+- {own['mcc_sd']:.4f}"
    )


if __name__ == "__main__":
  main()
