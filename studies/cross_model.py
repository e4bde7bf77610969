"""Dictionaries across models: does one model's code say what another's does?

  text -> both models' rows, paired by end byte -> dictionaries -> maps ->
  held-out scores, splices, matched latents, causal checks -> page

Every map of the ladder, from the mean to networks, predicts the codes of the
target's dictionary from the source, between two models and among one's layers,
in both directions. Floors (mean, position, token), controls (wrong pairs,
redrawn weights) and ceilings (another seed's dictionary, the target's own)
stand in every table.
"""

import functools
import json
import logging
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from gemma_jax import alignment, models
from gemma_jax.activations import owner
from gemma_jax.report import cross_model as report
from studies import (
  cross_effects,
  cross_features,
  cross_fit,
  cross_maps,
  cross_networks,
  cross_scores,
  cross_sides,
  cross_splice,
  cross_verdicts,
  jobs,
)
from studies.cross_fit import Fitted, Rows
from studies.cross_networks import both_ways
from studies.cross_sides import Pair
from trainers import dictionary, fields, hypernetwork, translator

log = logging.getLogger("gemma_jax")

FIELDS = {
  "job": str,
  "seed": int,
  "dtype": (str, type(None)),  # None: float32 on CPUs, else bfloat16
  "mesh": {"data": int, "fsdp": int, "tensor": int},
  "models": fields.Free,  # name -> as for `gemma_jax.load_model`
  "text": {
    "corpus": fields.Free,  # with `excerpts`: see gemma_jax.data.load
    "seed": int,  # of the split
    "heldout_fraction": float,  # of the documents
    "context": int,  # T, with BOS, of every model
  },
  "skip": int,  # positions at the start of a window that are left out
  "activations": {
    "dtype": str,  # in the store
    "batch_size": (int, type(None)),  # windows at once; None: what fits
  },
  "pairs": (list, tuple),  # of two sites such as "gemma:blocks.9.resid_post"
  "network_pairs": (list, tuple),  # that only hypernetworks learn from
  "unseen": (list, tuple),  # some of pairs, which a second one never sees
  # Of `trainers.dictionary`; model, text and sites are filled in. Two seeds.
  "run": fields.Free,
  "given": fields.Free,  # site -> path of an SAE to take instead
  "maps": {
    "rank": int,  # of reduced_rank and cca
    "shrinkage": float,  # of cca's covariances
  },
  "redrawn_tokens": int,  # that the map from redrawn weights is fitted on
  "hypernetwork": hypernetwork.FIELDS,
  "translator": fields.Free,  # see trainers.translator; empty: none
  "matching": {"rows": int, "draws": int, "least": int},
  "features": {"count": int, "contexts": int},  # side by side on the page
  "splice": {"documents": int, "positions": int, "batch_size": int},
  "causal": fields.Free,  # see studies.cross_effects; empty: none
}
AT_LEAST_1 = (
  "maps.rank",
  "redrawn_tokens",
  "matching.rows",
  "matching.draws",
  "matching.least",
  "splice.documents",
  "splice.positions",
  "splice.batch_size",
)
# Of results.json, by pair and direction.
LISTS = (
  "rows",
  "splice",
  "differences",
  "matches",
  "features",
  "causal",
  "unseen",
)


def plan(config: Mapping[str, Any]) -> dict[str, Any]:
  """What would be done, for `--dry_run`."""
  pairs, more, unseen = prepare(config)
  ways = both_ways(pairs)
  return {
    "pairs": [pair.name for pair in pairs],
    "routes": len(ways),
    "dictionaries": len(cross_sides.of_pairs(pairs)) - len(config["given"]),
    "network_pairs": [pair.name for pair in more],
    "unseen": [pair.name for pair in unseen],
  }


def prepare(config: Mapping[str, Any]):
  """Checks a config against its models, before any long work.

  Returns:
    The pairs, those that only networks learn from, and the unseen ones.

  Raises:
    ValueError: unknown fields, sites or sizes that do not fit.
  """
  fields.check(config, FIELDS)
  for path in AT_LEAST_1:
    group, _, name = path.rpartition(".")
    value = (config[group] if group else config)[name]
    if value < 1:
      raise ValueError(f"{path}={value} must be at least 1.")
  if "excerpts" not in config["text"]["corpus"]:
    raise ValueError(
      "text.corpus has no excerpts; without them models of other tokenizers "
      "read other parts of long documents. Give {'documents': 500, "
      "'characters': 1000} or the like."
    )
  mesh = models.make_mesh(config["mesh"])
  hypernetwork.check(config["hypernetwork"], mesh)
  for name, own in (
    ("translator", translator.FIELDS),
    ("causal", cross_effects.FIELDS),
  ):
    if config[name]:
      fields.check({name: config[name]}, {name: own})
  if config["translator"]:
    translator.check(config["translator"], mesh)
  known = {
    name: models.describe(source) for name, source in config["models"].items()
  }
  pairs, more, unseen = cross_sides.check(config, known)
  if strange := set(_listed(config["causal"])) - set(pairs):
    raise ValueError(
      f"causal.pairs has {', '.join(sorted(p.name for p in strange))}, which "
      "is not one of pairs."
    )
  if strange := set(config["given"]) - set(cross_sides.of_pairs(pairs)):
    raise ValueError(
      f"given has {', '.join(sorted(strange))}; expected sites of pairs: "
      f"{', '.join(cross_sides.of_pairs(pairs))}."
    )
  return pairs, more, unseen


def run(config: Mapping[str, Any], workdir: str | pathlib.Path) -> dict:
  """Harvests, trains, fits, validates; writes results, tables, plots, a page.

  Args:
    config: with exactly the fields of `FIELDS`.
    workdir: every training and every finished route goes below it.

  Returns:
    The contents of results.json.
  """
  workdir = pathlib.Path(workdir)
  config = jobs.plain(config)
  pairs, more, unseen = prepare(config)
  if (done := fields.finished(workdir, config)) is not None:
    return done
  # ------------------------------------------------------- text and tokens
  subjects = cross_sides.read(config, pairs + more)
  coverage = cross_sides.coverage(config, subjects, pairs + more)
  for site in cross_sides.of_pairs(pairs):
    if site not in config["given"]:
      dictionary.prepare(cross_sides.run_config(config, subjects, site))
  fields.claim(workdir, config)
  # ---------------------------------------------- activations, dictionaries
  harvested = cross_sides.harvest(config, subjects)
  found = cross_sides.paired(config, subjects, harvested, pairs + more)
  trained, quality = cross_sides.train(config, subjects, pairs, workdir)
  rows = Rows(config, subjects, harvested, found, trained, pairs, more, unseen)
  parts: dict[str, list] = {name: [] for name in LISTS}
  with jax.default_matmul_precision("highest"):
    load = functools.cache(lambda name: subjects[name].load(config))
    fitted = cross_fit.fit(rows, load, workdir)
    for pair in pairs:
      said = kept(
        workdir / "pairs" / f"{re.sub('[^a-z0-9]+', '_', pair.name)}.json",
        functools.partial(_pair, rows, fitted, pair, load),
      )
      for name, values in said.items():
        parts[name] += values
  results = {
    "models": {
      name: {
        "path": config["models"][name],
        "layers": one.config.num_layers,
        "width": one.config.width,
      }
      for name, one in subjects.items()
    },
    "pairs": [
      {
        "name": one.name,
        "a": one.a,
        "b": one.b,
        "kind": one.kind,
        "unseen": one in unseen,
      }
      for one in pairs
    ],
    "coverage": coverage,
    "dictionaries": quality,
    **parts,
    "definitions": {
      **cross_scores.DEFINITIONS,
      **cross_splice.DEFINITIONS,
      **cross_features.DEFINITIONS,
      **cross_networks.DEFINITIONS,
      **cross_effects.DEFINITIONS,
    },
    "seeds": {"seed": config["seed"], "text": config["text"]["seed"]},
    "versions": dictionary.versions(),
  }
  results["verdicts"] = cross_verdicts.verdicts(results)
  log.info("\n%s", report.summary(results))
  page = report.write(workdir, results=results, config=config)
  fields.write_json(workdir / "results.json", results)
  log.info("report: %s", page)
  return results


def _pair(rows: Rows, fitted: Fitted, pair: Pair, load) -> dict[str, list]:
  """All that is said of a pair, both ways, by the names of `LISTS`.

  Args:
    rows: of the study.
    fitted: likewise.
    pair: one of its pairs.
    load: (name) -> the model.
  """
  config, trained = rows.config, rows.trained
  both = rows.found[pair.models]
  out: dict[str, list] = {name: [] for name in LISTS}
  codes = cross_maps.moments(
    both["train"], pair, {site: trained[site][0] for site in pair}
  )
  redrawn = {
    name: cross_sides.redrawn(config, rows.subjects[name], both)
    for name in dict.fromkeys(pair.models)
  }
  for way, m in ((pair, codes), (pair.turned, codes.turned())):
    (name, own), model = owner(way.a), owner(way.b)[0]
    drawn = {
      side: (numbers, np.asarray(store.take(at, own), np.float32))
      for side, (store, numbers, at) in redrawn[name].items()
    }
    contenders = cross_fit.contenders(
      rows, fitted, both["train"], way, m, drawn["train"]
    )
    out["rows"] += cross_scores.measure(
      both["heldout"],
      way,
      contenders,
      trained,
      np.asarray(fitted.statistics[way.b].mean),
      redrawn=drawn["heldout"][1],
    )
    spliced = cross_splice.measure(
      config["splice"],
      rows.subjects[model],
      load(model),
      both["heldout"],
      way,
      contenders,
      trained,
      fitted.moments[way].mean_y,
      redrawn=drawn["heldout"][1],
      seed=config["seed"],
    )
    out["splice"] += spliced[0]
    out["differences"] += spliced[1]
    if pair in rows.unseen:
      out["unseen"] += cross_networks.unseen(
        both["heldout"],
        way,
        [
          one
          for one in both_ways([*rows.pairs, *rows.more])
          if one not in both_ways(rows.unseen)
        ],
        fitted.moments,
        fitted.written[cross_fit.UNSEEN][way],
        rows.subjects,
      )
  row, chosen, q = cross_features.match(
    config["matching"], both["train"], pair, trained, seed=config["seed"]
  )
  out["matches"].append(row)
  if pair in _listed(config["causal"]):
    out["causal"] += cross_effects.measure(
      config,
      rows,
      pair,
      chosen,
      {
        way: alignment.fit_ridge(fitted.moments[way])
        for way in (pair, pair.turned)
      },
      load,
    )
  out["features"] += cross_features.side_by_side(
    config["features"], rows.subjects, rows.harvested, pair, trained, chosen, q
  )
  return out


def _listed(causal: Mapping[str, Any]) -> list[Pair]:
  return [Pair(*one) for one in causal.get("pairs", ())]


def kept(path: pathlib.Path, make: Callable[[], Any]) -> Any:
  """What `make` gives, from the file where it is already: JSON."""
  if path.exists():
    return json.loads(path.read_text())
  made = make()
  path.parent.mkdir(parents=True, exist_ok=True)
  fields.write_json(path, made)
  return made
