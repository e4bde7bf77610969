"""Do models converge: in what they do, in what they hold, in their features?

Any number of models reads and answers the same prompts, one model in memory at
a time. Pairs are then compared by every measure that is defined for them, and
each measure is placed between unrelated prompts, models of redrawn weights and
the model itself.
"""

import dataclasses
import itertools
import json
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gemma_jax import statistics
from gemma_jax.report import convergence as report
from studies import (
  comparisons,
  jobs,
  pairing,
  prompts,
  readings,
  subjects,
  verdicts,
)
from studies.prompts import Prompt
from studies.subjects import Subject
from trainers import dictionary, fields

log = logging.getLogger("gemma_jax")

FIELDS = {
  "job": str,
  "seed": int,
  "dtype": (str, type(None)),  # of the models; None: the backend's default
  "mesh": fields.Free,
  "models": fields.Free,  # name -> `subjects.FIELDS`
  "reference": str,  # a model: its answers are read where there is no response
  "pairs": (str, list, tuple),  # "reference": with that model; "all"; or pairs
  "dictionaries": fields.Free,  # name -> config of trainers.dictionary
  "prompts": {
    "capabilities": (list, tuple),  # of `prompts.CAPABILITIES`
    "files": (list, tuple),  # JSONL of your own
    "per_capability": int,  # 0: all
    "template": str,  # with {prompt}, for models without chat
  },
  "answers": {"max_new_tokens": int, "batch_size": int},
  "reading": {
    "batch_size": int,
    "tokens": int,  # of each text, whose distributions are compared; 0: all
  },
  "compare": {
    "measures": (list, tuple),  # of `comparisons.DEFINITIONS`
    "alpha": float,
    "margin": float,  # in shares, see `verdicts`
    "draws": int,  # permutations of prompts
    "neighbours": int,  # k of mutual_knn
    "resamples": int,
  },
}
CONTROL_SEED = 90_001  # of the redrawn weights that are the floor


def plan(config: Mapping[str, Any]) -> dict[str, Any]:
  """What would be done, for `--dry_run`."""
  config = jobs.plain(config)
  found, pairs = prepare(config)
  asked = {name: f"@{name}" for name in config["dictionaries"]}
  models = _subjects(config, asked)
  _check(config, models, pairs, found)
  return {
    "prompts": _count(found),
    "models": {name: _about(one) for name, one in models.items()},
    "pairs": [
      {
        "a": a,
        "b": b,
        "measures": pairing.wanted_measures(config, models[a], models[b]),
        "refused": pairing.refused_measures(config, models[a], models[b]),
      }
      for a, b in pairs
    ],
    "dictionaries": {
      name: dictionary.plan(run) for name, run in config["dictionaries"].items()
    },
  }


def prepare(config: Mapping[str, Any]) -> tuple[list[Prompt], list[tuple]]:
  """Prompts and pairs of names, checked before any model is looked at.

  Raises:
    FileNotFoundError: a file of prompts, or a dictionary, that is not there.
    ValueError: fields, names, measures, prompts that do not fit; too few
      prompts for `compare.alpha`.
  """
  fields.check(config, FIELDS)
  specs, own = config["models"], config["compare"]
  if len(specs) < 2 or config["reference"] not in specs:
    raise ValueError(
      f"expected at least 2 models and a reference among them, got "
      f"{list(specs)} and {config['reference']!r}"
    )
  for name, spec in specs.items():
    if name.endswith(subjects.FLOOR):
      raise ValueError(
        f"models.{name}: names that end in {subjects.FLOOR} are those of "
        "redrawn models; choose another."
      )
    fields.check({name: spec}, {name: subjects.FIELDS})
    for path in spec["dictionaries"]:
      if path.startswith("@") and path[1:] not in config["dictionaries"]:
        raise ValueError(
          f"models.{name}.dictionaries has {path}; `dictionaries` has "
          f"{list(config['dictionaries']) or 'none'}"
        )
      if not path.startswith("@") and not pathlib.Path(path).exists():
        raise FileNotFoundError(
          f"models.{name}.dictionaries: no dictionary at {path}"
        )
  for run in config["dictionaries"].values():
    dictionary.prepare(run)
  unknown = set(own["measures"]) - set(comparisons.DEFINITIONS)
  if unknown or not 0 < own["margin"] < 0.5 or not 0 < own["alpha"] < 0.5:
    raise ValueError(
      f"compare: expected measures of {', '.join(comparisons.DEFINITIONS)}, "
      f"margin and alpha between 0 and .5; got measures {sorted(unknown)} "
      f"beyond them, margin {own['margin']} and alpha {own['alpha']}"
    )
  if "{prompt}" not in config["prompts"]["template"]:
    raise ValueError(
      f"prompts.template must hold {{prompt}}, got "
      f"{config['prompts']['template']!r}"
    )
  pairs = pairing.of_config(config)
  for a, b in pairs:
    counts = [len(specs[name]["dictionaries"]) for name in (a, b)]
    if 0 not in counts and counts[0] != counts[1]:
      raise ValueError(
        f"{a} has {counts[0]} dictionaries and {b} {counts[1]}; give both one "
        "for each layer that is compared, in order of depth"
      )
  found = prompts.load(
    *(config["prompts"][n] for n in ("capabilities", "files", "per_capability"))
  )
  prompts.others(found)
  tests = len(pairs) * len(comparisons.LEVELS)
  least = max(
    statistics.least_n(own["alpha"] / tests, alternative="greater"),
    comparisons.LEAST,
    own["neighbours"] + 2,
  )
  if len(found) < least:
    raise ValueError(
      f"{len(found)} prompts are too few: with {tests} tests (pairs x levels) "
      f"at alpha {own['alpha']}, no result could be significant below {least} "
      "prompts. Raise prompts.per_capability, add prompts.files, or compare "
      "fewer pairs."
    )
  if own["draws"] < 1 / own["alpha"] - 1:
    raise ValueError(
      f"compare.draws={own['draws']} permutations cannot give a p below "
      f"{1 / (own['draws'] + 1):.3g}; take at least "
      f"{int(np.ceil(1 / own['alpha'] - 1))}"
    )
  return found, pairs


def run(config: Mapping[str, Any], workdir: str | pathlib.Path) -> dict:
  """Reads, answers, compares; writes results, tables, plots and a page.

  Args:
    config: with exactly the fields of `FIELDS`.
    workdir: what models gave is kept there by model; an interrupted study
      goes on with the next one.

  Returns:
    The contents of results.json.
  """
  workdir = pathlib.Path(workdir)
  config = jobs.plain(config)
  found, pairs = prepare(config)
  fields.claim(workdir, config)
  _same_prompts(workdir / "prompts.json", found)
  asked = {name: f"@{name}" for name in config["dictionaries"]}
  _check(config, _subjects(config, asked), pairs, found)
  trained = {
    name: jobs.train(one, workdir / "dictionaries" / name)[0]["path"]
    for name, one in config["dictionaries"].items()
  }
  models = _subjects(config, trained)
  for one in models.values():
    one.load_dictionaries()
  compared = [
    case
    for pair in pairs
    for case in (pair, *pairing.with_redrawn(config, pair))
  ]
  # -------------------------------------------------------------- one by one
  folder = workdir / "models"
  answered = {
    name: readings.cached_answers(
      folder / name / "answers.json",
      lambda one=one: readings.answers(one, one.load(config), found, config),
    )
    for name, one in models.items()
  }
  texts = _texts(found, answered[config["reference"]], config["reference"])
  other = prompts.others(found, config["seed"])
  for name, one in models.items():
    path = folder / name / "reading.npz"
    if not path.exists():
      readings.save(
        path, _read(one, found, texts, answered, other, compared, pairs, config)
      )
  # ---------------------------------------------------------------- in pairs
  rows, maps = [], []
  sides = pairing.Sides(config, models, folder, answered)
  with jax.default_matmul_precision("highest"):
    for pair in pairs:
      log.info("comparing %s and %s", *pair)
      some, own = pairing.compare(config, models, sides, found, other, pair)
      rows += some
      maps += own
  verdicts.decide(rows, config["compare"]["alpha"])
  results = {
    "models": {name: _about(one) for name, one in models.items()},
    "prompts": _count(found),
    "pairs": [list(pair) for pair in pairs],
    "rows": rows,
    "maps": maps,
    "refused": [
      {"a": a, "b": b, "measure": measure, "reason": reason}
      for a, b in pairs
      for measure, reason in pairing.refused_measures(
        config, models[a], models[b]
      ).items()
    ],
    "margin": config["compare"]["margin"],
    "alpha": config["compare"]["alpha"],
    "seeds": {"study": config["seed"], "floor": CONTROL_SEED},
    "definitions": {**comparisons.DEFINITIONS, **verdicts.DEFINITIONS},
    "versions": dictionary.versions(),
  }
  log.info("\n%s", report.summary(results))
  report.write(workdir, results=results, config=config)
  fields.write_json(workdir / "results.json", results)
  return results


def _read(one: Subject, found, texts, answered, other, compared, pairs, config):
  """All that a model reads, in one stay in memory."""
  model = one.load(config)

  def bits(texts, what):
    made = readings.read(one, model, found, texts, config, what=what)
    return made["bits"]

  out = readings.read(
    one, model, found, texts, config, what="the responses", capture=True
  )
  del out["bits"]
  if "cross_likelihood" not in config["compare"]["measures"]:
    return out
  partners = {name for pair in compared if one.name in pair for name in pair}
  for name in sorted({one.name} | partners):
    out[f"bits.{name}"] = bits(_legible(answered[name]), f"{name}'s answers")
  named = {name for pair in pairs if one.name in pair for name in pair}
  for name in sorted(named - {one.name}):
    wrong = _legible([answered[name][j] for j in other])
    out[f"bits_other.{name}"] = bits(wrong, f"{name}'s answers to others")
  return out


def _texts(
  found: Sequence[Prompt], answers: Sequence[str], reference: str
) -> list[str]:
  """What all models read after the prompts."""
  lacking = [
    prompt.id
    for prompt, answer in zip(found, answers, strict=True)
    if not prompt.response.strip() and not answer.strip()
  ]
  if lacking:
    raise ValueError(
      f"{reference} answers nothing to {', '.join(lacking[:10])}, and there is "
      "no response to read instead. "
      "Give these prompts a response."
    )
  return [
    prompt.response or answer
    for prompt, answer in zip(found, answers, strict=True)
  ]


def _legible(texts: Sequence[str]) -> list[str]:
  """An empty answer is an empty line, which has a likelihood."""
  return [text or "\n" for text in texts]


def _subjects(config, trained: Mapping[str, str]) -> dict[str, Subject]:
  """All models and those with redrawn weights, by name."""
  specs = dict(config["models"])
  for name, spec in config["models"].items():
    control = pairing.control(config, name)
    specs.setdefault(
      control,
      {**spec, "noise": 0.0, "bits": None, "redraw": CONTROL_SEED},
    )
  return {
    name: subjects.prepare(name, spec, trained) for name, spec in specs.items()
  }


def _check(config, models: Mapping[str, Subject], pairs, found) -> None:
  """Raises a ValueError for what would fail after models were loaded."""
  for a, b in pairs:
    if not pairing.wanted_measures(config, models[a], models[b]):
      reasons = "; ".join(
        pairing.refused_measures(config, models[a], models[b]).values()
      )
      raise ValueError(f"No measure is defined for {a} and {b}: {reasons}")
  for name in config["models"]:
    subjects.check_lengths(
      models[name],
      found,
      config["prompts"]["template"],
      config["answers"]["max_new_tokens"],
    )


def _same_prompts(path: pathlib.Path, found: Sequence[Prompt]) -> None:
  """Raises a ValueError where a workdir was begun with other prompts."""
  here = [dataclasses.asdict(prompt) for prompt in found]
  if not path.exists():
    fields.write_json(path, here)
    return
  there = json.loads(path.read_text())
  if there != here:
    changed = [
      new["id"]
      for old, new in itertools.zip_longest(there, here, fillvalue={"id": "-"})
      if old != new
    ]
    raise ValueError(
      f"{path.parent} was begun with other prompts: {len(there)} there, "
      f"{len(here)} here, of which differ {', '.join(changed[:10])}. Restore "
      "the files, or use another --workdir."
    )


def _about(one: Subject) -> dict[str, Any]:
  return {
    "path": one.spec["path"],
    "family": one.config.family,
    "layers": one.config.num_layers,
    "width": one.config.width,
    "vocabulary": one.vocabulary,
    "origin": one.guarded.origin,
    "noise": one.spec["noise"],
    "bits": one.spec["bits"],
    "redraw": one.spec["redraw"],
    "chat": one.spec["chat"],
    "dictionaries": list(one.dictionaries),
  }


def _count(found: Sequence[Prompt]) -> dict[str, int]:
  names = [prompt.capability for prompt in found]
  return {name: names.count(name) for name in dict.fromkeys(names)}
