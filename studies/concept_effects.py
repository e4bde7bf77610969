"""What more is known of validated vectors: doses, groups, and one another."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma_jax import progress
from gemma_jax.concepts import damage, interventions
from studies.concept_validation import PARTS, Bench, Candidate

DEFINITIONS = {
  "matrix": (
    "Mean loss of a column's prompts when a row's vector is set to its mean, "
    "nats per byte of the answer."
  ),
  "dominance": (
    "Mean of the matrix's diagonal less that of the rest; p by dealing "
    "prompts to vectors at random (add-one)."
  ),
  "slope": (
    "Loss of the concept's prompts per unit taken off the coefficient, least "
    "squares through zero."
  ),
  "noise": "Mean loss over seeds, by the noise's length in vectors.",
  "group": (
    "Vectors of one layer and one lexicon are set to their means together, on "
    "the prompts of all of them; `sum` adds what each does alone."
  ),
}


def measure(
  bench: Bench,
  chosen: Sequence[Candidate],
  categories: Sequence[str | None],
) -> dict[str, Any]:
  """All of `DEFINITIONS` that the config asks for, of validated vectors."""
  config = bench.config
  few = list(chosen[: config["matrix"]])
  out = {"matrix": None, "doses": []}
  if len(few) > 1:
    losses = matrix(bench, few, config["matrix_prompts"])
    out["matrix"] = {
      "rows": [one.row for one in few],
      "loss": losses.tolist(),
      **dominance(losses, config["draws"], bench.seed),
    }
  for one in chosen[: config["dose_vectors"]]:
    out["doses"].append({"row": one.row, **doses(bench, one)})
  count = config["matrix_prompts"]
  return {**out, "groups": groups(bench, chosen, categories, count)}


def matrix(bench: Bench, chosen: Sequence[Candidate], count: int) -> np.ndarray:
  """Loss of every concept's prompts under every vector, [vectors, concepts].

  Nats per byte, means over `count` prompts of each concept.
  """
  every = [bench.places(one)[:count] for one in chosen]
  prompts = bench.at(np.concatenate(every))
  before = damage.clean(bench.model, prompts)
  cuts = np.cumsum([len(at) for at in every])[:-1]
  rows = []
  with progress.bar(len(chosen), "matrix", unit="vectors") as bar:
    for one in chosen:
      change = interventions.set_to(
        bench.target(one), bench.mean(one.layer, one.unit)
      )
      found = damage.run(
        bench.model, prompts, before, bench.target(one), [change]
      )
      (lost,) = damage.losses(prompts, before, found)
      rows.append([part.mean() for part in np.split(lost, cuts)])
      bar.update()
  return np.array(rows)


def doses(bench: Bench, candidate: Candidate) -> dict[str, Any]:
  """Effect and control by factor of the coefficient and by size of noise."""
  config = bench.config
  target = bench.target(candidate)
  prompts, before, parts = bench.prompts(candidate, bench.places(candidate))
  scales = {f: interventions.scale(target, f) for f in config["factors"]}
  noises = {
    (r, s): interventions.noise(target, r, s)
    for r in config["noise"]
    for s in range(config["noise_seeds"])
  }
  found = damage.run(
    bench.model,
    prompts,
    before,
    target,
    [*scales.values(), *noises.values()],
  )
  lost = damage.losses(prompts, before, found)

  def means(rows):
    return {
      part: float(
        lost[np.ix_(rows, np.arange(lost.shape[1])[parts[part]])].mean()
      )
      for part in PARTS[:2]
    }

  by_factor = [
    {"factor": f, **means([i])} for i, f in enumerate(config["factors"])
  ]
  by_noise = []
  for i, r in enumerate(config["noise"]):
    first = len(scales) + i * config["noise_seeds"]
    rows = list(range(first, first + config["noise_seeds"]))
    by_noise.append({"noise": r, **means(rows)})
  away = np.array([1 - row["factor"] for row in by_factor])
  effect = np.array([row["concept"] for row in by_factor])
  slope = float(away @ effect / (away @ away))  # no change, no effect
  return {"factors": by_factor, "noise": by_noise, "slope": slope}


def dominance(matrix: np.ndarray, draws: int, seed: int) -> dict[str, float]:
  """Whether vectors hurt their own prompts most; see `DEFINITIONS`."""
  n = len(matrix)
  rng = np.random.default_rng(seed)

  def statistic(order):
    own = matrix[np.arange(n), order].sum(axis=-1)
    return own / n - (matrix.sum() - own) / (n * (n - 1))

  observed = statistic(np.arange(n))
  null = np.array([statistic(rng.permutation(n)) for _ in range(draws)])
  slack = 1e-12 * np.abs(matrix).max()
  p = (np.sum(null >= observed - slack) + 1) / (draws + 1)
  return {"difference": float(observed), "p": float(p)}


def groups(
  bench: Bench,
  chosen: Sequence[Candidate],
  categories: Sequence[str | None],
  count: int,
) -> list[dict[str, Any]]:
  """Vectors of a layer that say the same, ablated together."""
  members: dict[tuple, list[Candidate]] = {}
  for one, category in zip(chosen, categories, strict=True):
    if category is not None:
      members.setdefault((one.layer, category), []).append(one)
  out = []
  for (layer, category), some in members.items():
    units = sorted({one.unit for one in some})
    if len(units) < 2:
      continue
    at = np.concatenate([bench.places(one)[:count] for one in some])
    prompts = bench.at(np.unique(at, axis=0))
    before = damage.clean(bench.model, prompts)

    def lost(units, prompts=prompts, before=before, layer=layer):
      target = interventions.neurons(bench.model, layer, units)
      change = interventions.set_to(target, bench.used.mean[layer, units])
      found = damage.run(bench.model, prompts, before, target, [change])
      return float(damage.losses(prompts, before, found).mean())

    out.append(
      {
        "layer": layer,
        "category": category,
        "neurons": units,
        "together": lost(units),
        "sum": sum(lost([unit]) for unit in units),
        "prompts": len(prompts.tokens),
      }
    )
  return out
