"""Concept vectors: find them, score them, and prove that they cause something.

Three stages, each kept in the workdir: every value vector of every MLP is
projected to the vocabulary; what its words have in common is scored against
random directions; and those that score are damaged on prompts of their own,
on like prompts, and beside neurons and directions that should not matter.
"""

import dataclasses
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gemma_jax import models, tables
from gemma_jax.concepts import lexemes, lexicon, scoring, usage
from gemma_jax.report import concepts as report
from studies import concept_candidates as candidates
from studies import concept_effects as effects
from studies import concept_rows, jobs
from studies import concept_validation as validation
from trainers import dictionary, fields, stores

log = logging.getLogger("gemma_jax")

FIELDS = {
  "job": str,
  "seed": int,
  "mesh": fields.Free,
  "model": {"name": str, "dtype": (str, type(None))},
  "data": fields.Free,  # as of trainers.dictionary; heldout is for damage
  "lexicons": (list, tuple),  # files of your own, one word a line
  "project": {
    "layers": (list, tuple),  # () for all
    "max_vectors": int,  # of a layer, drawn at random; 0: all
    "top_k": int,
    "null": int,  # random directions of each layer
  },
  "usage": {"contexts": int, "batch_size": int},
  "score": {
    "tokens": int,  # words of either end
    "threshold": float,
    "keep": int,  # candidates in results.json and on the page
  },
  "damage": {
    "max_vectors": int,  # the best of those that score
    "random": int,  # random directions that are put through the same
    "prompts": int,  # of a concept, at most
    "least": int,  # fewer, and the vector is not tested
    "context": int,  # tokens of a prompt
    "pool": int,  # prompts from which controls are matched
    "general": int,
    "controls": int,  # neurons, and random directions
    "alpha": float,
    "draws": int,
    "matrix": int,  # concepts in the matrix, 0: none
    "matrix_prompts": int,
    "dose_vectors": int,
    "factors": (list, tuple),  # of coefficients
    "noise": (list, tuple),  # in lengths of the vector
    "noise_seeds": int,
  },
}


def plan(config: Mapping[str, Any]) -> dict[str, Any]:
  """What would be done, for `--dry_run`."""
  config = jobs.plain(config)
  directory, cfg, layers = prepare(config)
  vectors = len(layers) * min(
    config["project"]["max_vectors"] or cfg.mlp_width, cfg.mlp_width
  )
  return {
    "model": str(directory),
    "layers": layers,
    "vectors": vectors,
    "projection_flops": 2.0 * vectors * cfg.vocab_size * cfg.width,
  }


def prepare(config: Mapping[str, Any]):
  """The model's directory and config, and the layers, checked.

  Raises:
    FileNotFoundError: a model or a lexicon that is not there.
    ValueError: fields, layers or numbers that do not fit.
  """
  fields.check(config, FIELDS)
  own = config["damage"]
  for name, low, high in (
    ("score.threshold", 0, 1),
    ("damage.alpha", 0, 0.5),
  ):
    group, field = name.split(".")
    if not low < config[group][field] < high:
      raise ValueError(
        f"{name} must be between {low} and {high}; got {config[group][field]}"
      )
  if not 2 <= own["least"] <= own["prompts"] < own["pool"]:
    raise ValueError(
      f"expected 2 <= damage.least <= damage.prompts < damage.pool; got "
      f"{own['least']}, {own['prompts']} and {own['pool']}"
    )
  if not 3 <= config["score"]["tokens"] <= config["project"]["top_k"]:
    raise ValueError(
      f"expected 3 <= score.tokens <= project.top_k; got "
      f"{config['score']['tokens']} and {config['project']['top_k']}"
    )
  if config["project"]["null"] < 20:
    raise ValueError(
      f"project.null={config['project']['null']} random directions a layer are "
      "too few to calibrate with; take at least 20"
    )
  lexicon.load(config["lexicons"])
  directory = models.resolve(config["model"]["name"])
  cfg = models.read_config(directory)
  layers = list(config["project"]["layers"]) or list(range(cfg.num_layers))
  wrong = [
    l for l in layers if type(l) is not int or not 0 <= l < cfg.num_layers
  ]
  if wrong:
    raise ValueError(
      f"project.layers: there is no layer {wrong}; expected some of "
      f"0..{cfg.num_layers - 1}"
    )
  return directory, cfg, layers


def run(config: Mapping[str, Any], workdir: str | pathlib.Path) -> dict:
  """Projects, scores, damages; writes results, tables, plots and a page.

  Args:
    config: with exactly the fields of `FIELDS`.
    workdir: layers and tested vectors are kept there one by one.

  Returns:
    The contents of results.json.

  Raises:
    ValueError: what `prepare` refuses; a threshold that no vector reaches.
  """
  workdir = pathlib.Path(workdir)
  config = jobs.plain(config)
  directory, cfg, layers = prepare(config)
  fields.claim(workdir, config)
  sides = stores.windows(config["data"], directory, cfg)
  windows = {name: side.collect() for name, side in sides.items()}
  model = models.load_model(
    directory,
    dtype=stores.default_dtype(config["model"]["dtype"]),
    mesh=models.make_mesh(config["mesh"]),
  )
  words = lexemes.read(model.tokenizer, cfg.vocab_size)
  fitted = lexicon.fit(lexicon.load(config["lexicons"]), words)
  seed, count = config["seed"], config["score"]["tokens"]
  # --------------------------------------------------------------- 1 project
  projected = candidates.project(
    model, words, config["project"], seed, workdir / "projection", layers
  )
  kurtosis = candidates.kurtosis_by_layer(projected)
  log.info("\n%s", tables.aligned(kurtosis, list(kurtosis[0])))
  # ----------------------------------------------------------------- 2 score
  used = candidates.use(
    model, windows["train"], config["usage"], workdir / "usage.npz"
  )
  compared = candidates.reference(
    model, words, fitted, windows["train"], projected, count
  )
  table, random = candidates.score(projected, compared, count)
  describe = concept_rows.Describe(
    model.tokenizer,
    fitted.names,
    words,
    table,
    used,
    windows["train"],
  )
  threshold = config["score"]["threshold"]
  chosen = _chosen(table, used, threshold, describe)
  if not chosen.size:
    best = describe.row(int(np.argmax(table.columns["score"])))
    raise ValueError(
      f"No vector that the model uses with the sign of its words scores "
      f"score.threshold={threshold}; the best of all is {best['score']:.3f}, "
      f"layer {best['layer']}, neuron {best['neuron']}: "
      f"{', '.join(best['words'])}. Lower the threshold; what was projected "
      "is kept."
    )
  # ---------------------------------------------------------------- 3 damage
  own = config["damage"]
  likely = np.argsort(-random.columns["total"], kind="stable")
  with jax.default_matmul_precision("highest"):
    bench = validation.Bench(model, words, windows["heldout"], used, own, seed)
    found = validation.stage(
      bench,
      projected,
      {"vectors": table, "null": random},
      {"vectors": chosen, "null": likely},
      {"vectors": own["max_vectors"], "null": own["random"]},
      workdir / "damage",
    )
    vectors, null = found["vectors"], found["null"]
    rows = [describe.row(row["row"]) | row for row in vectors["rows"]]
    valid = [i for i, row in enumerate(rows) if row["passes"]]
    valid.sort(key=lambda i: -rows[i]["ratio"])
    more = effects.measure(
      bench,
      [vectors["candidates"][i] for i in valid],
      [rows[i]["category"] for i in valid],
    )
  kept = random.columns["score"] >= threshold
  other = dataclasses.replace(describe, table=random)
  results = {
    "model": config["model"]["name"],
    "pipeline_stats": {
      "total_candidates": len(table.layer),
      "scored": len(chosen),
      "examined": vectors["examined"],
      "tested": len(rows),
      "validated_vectors": len(valid),
      "success_rate": len(valid) / len(table.layer),
    },
    "random": {
      "directions": len(random.layer),
      "scored": int(kept.reshape(-1, 2).any(axis=1).sum()),
      "tested": len(null["rows"]),
      "p_below_alpha": sum(r["p"] <= own["alpha"] for r in null["rows"]),
      "validated": sum(row["passes"] for row in null["rows"]),
      "scored_and_validated": sum(
        row["passes"] and bool(kept[row["row"]]) for row in null["rows"]
      ),
      "rows": [other.brief(row["row"]) | row for row in null["rows"]],
    },
    "concept_distribution": _distribution([rows[i] for i in valid]),
    "validation_results": rows,
    **more,
    "kurtosis": kurtosis,
    "candidates": [
      describe.row(row) for row in chosen[: config["score"]["keep"]].tolist()
    ],
    "by_layer": _by_layer(table, chosen, rows),
    "lexicons": {
      name: {
        "families": int(member.sum()),
        "split": list(fitted.split[name]),
      }
      for name, member in zip(fitted.names, fitted.member, strict=True)
    },
    "threshold": threshold,
    "alpha": own["alpha"],
    "tokens_usage": used.tokens,
    "tokens_heldout": windows["heldout"].num_tokens,
    "seeds": {"study": seed, "data": config["data"]["seed"]},
    "definitions": {
      **scoring.DEFINITIONS,
      **concept_rows.DEFINITIONS,
      **validation.DEFINITIONS,
      **effects.DEFINITIONS,
    },
    "versions": dictionary.versions(),
  }
  log.info("\n%s", report.summary(results))
  report.write(workdir, results=results, config=config)
  fields.write_json(workdir / "results.json", results)
  return results


def _distribution(rows) -> dict[str, int]:
  """How many of each lexicon; None is a concept that we have no word for."""
  names = [row["category"] or "unnamed" for row in rows]
  return {n: names.count(n) for n in sorted(set(names))}


def _by_layer(table, chosen, rows) -> list[dict[str, int]]:
  return [
    {
      "layer": layer,
      "vectors": int(np.sum(table.layer == layer)),
      "scored": int(np.sum(table.layer[chosen // 2] == layer)),
      "tested": sum(row["layer"] == layer for row in rows),
      "validated": sum(row["layer"] == layer and row["passes"] for row in rows),
    }
    for layer in np.unique(table.layer).tolist()
  ]


def _chosen(
  table: candidates.Table,
  used: usage.Usage,
  threshold: float,
  describe: concept_rows.Describe,
) -> np.ndarray:
  """Rows that score enough in the sign that is used, the likeliest first.

  Those whose words follow where the neuron is most active come first, and
  then those that write most: of text that no test is made on.
  """
  positive = used.positive[table.layer, table.unit] >= 0.5
  signs = np.stack([positive, ~positive], axis=1).ravel()
  kept = np.flatnonzero((table.columns["score"] >= threshold) & signs)
  agreement = np.array([describe.agreement(row) for row in kept.tolist()])
  mass = used.mass[table.layer, table.unit][kept // 2]
  written = mass * table.std[kept // 2] * table.columns["tail"][kept]
  return kept[np.lexsort((-written, -agreement))]
