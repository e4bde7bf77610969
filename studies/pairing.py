"""Two models of a study of convergence: which measures, which rows."""

import dataclasses
import functools
import itertools
from typing import Any

import numpy as np

from gemma_jax.metrics.similarity import guard
from studies import comparisons, readings, subjects, verdicts
from studies.comparisons import Side
from studies.subjects import Subject

ALL = "all"  # the capability of rows over all prompts


class Sides:
  """What models gave, with the heads of the last few that were asked for."""

  MOST = 4  # a pair, and both with redrawn weights

  def __init__(self, config, models, folder, answered):
    self._given = config, models, folder, answered
    self._kept: dict[str, Side] = {}

  def __call__(self, name: str, *, head: bool) -> Side:
    config, models, folder, answered = self._given
    side = self._kept.pop(name, None)
    if side is None:
      found = readings.load(folder / name / "reading.npz")
      bits, others = (
        {
          key.removeprefix(start): x
          for key, x in found.items()
          if key.startswith(start)
        }
        for start in ("bits.", "bits_other.")
      )
      side = Side(models[name], None, found, answered[name], bits, others)
    if head and side.head is None:
      side = dataclasses.replace(side, head=models[name].load_head(config))
    while len(self._kept) >= self.MOST:
      del self._kept[next(iter(self._kept))]
    self._kept[name] = side
    return side


def compare(config, models, sides: Sides, found, other, pair):
  """Rows of results.json and maps of layers of one pair.

  Args:
    config: of the study.
    models: name -> `subjects.Subject`.
    sides: what they gave.
    found: the prompts.
    other: of `prompts.others`.
    pair: two names.
  """
  own = config["compare"]
  a, b = pair
  wanted = wanted_measures(config, models[a], models[b])
  head = any(measure in guard.TOKENS for measure in wanted)
  blocks = np.array([prompt.capability for prompt in found])
  # Both models, and each with what is left of the other.
  cases = [
    (sides(x, head=head), sides(y, head=head))
    for x, y in (pair, *with_redrawn(config, pair))
  ]
  maps = comparisons.layer_maps(
    *(side.reading["pooled"] for side in cases[0]),
    neighbours=own["neighbours"],
    draws=own["draws"],
    alpha=own["alpha"],
    blocks=blocks,
  )
  exchange = functools.partial(
    comparisons.exchange,
    blocks=blocks,
    draws=own["draws"],
    seed=config["seed"],
  )
  real, *floors = (
    comparisons.compare(
      *case,
      wanted,
      neighbours=own["neighbours"],
      tokens=config["reading"]["tokens"],
      other=None if i else other,
      maps=None if i else maps,
      exchange=None if i else exchange,
    )
    for i, case in enumerate(cases)
  )
  rows = []
  for measure in wanted:
    identity = 0.0 if measure in comparisons.DISTANCES else 1.0
    one = real[measure]
    null = one.null
    if null is None and one.chance:
      null = np.full(len(found), one.chance[0])
    options = [case[measure].values for case in floors]
    options += [] if null is None else [null]
    sign = 1 if identity else -1
    near = int(np.argmax([sign * values.mean() for values in options]))
    for capability in (ALL, *dict.fromkeys(blocks.tolist())):
      units = np.flatnonzero((blocks == capability) | (capability == ALL))
      if len(units) < comparisons.LEAST:
        continue
      values, floor = one.values[units], options[near][units]
      if measure in comparisons.JOINT and capability != ALL:
        values = comparisons.joint(*cases[0], measure, units)
        if near < len(floors):
          floor = comparisons.joint(*cases[1 + near], measure, units)
      rows.append(
        {
          "a": a,
          "b": b,
          "level": comparisons.level(measure),
          "measure": measure,
          "capability": capability,
          "primary": measure in comparisons.primary(wanted),
          **verdicts.row(
            values,
            identity=identity,
            floor=floor,
            null=None if one.null is None else one.null[units],
            chance=one.chance if capability == ALL else None,
            margin=own["margin"],
            resamples=own["resamples"],
            seed=config["seed"],
          ),
        }
      )
  return rows, [_map(a, b, name, one) for name, one in maps.items()]


def _map(a: str, b: str, measure: str, found) -> dict[str, Any]:
  return {
    "a": a,
    "b": b,
    "measure": measure,
    "layers_a": list(range(found.scores.shape[0])),
    "layers_b": list(range(found.scores.shape[1])),
    "scores": found.scores.tolist(),
    "calibrated": found.calibrated.tolist(),
    "p": found.p.tolist(),
    "threshold": found.threshold,
    "best": list(found.best),
    "null_best": found.null.max(axis=(1, 2)).tolist(),
  }


def control(config, name: str) -> str:
  """The model of redrawn weights for a model: one for all of a checkpoint."""

  def key(spec):
    return spec["path"], spec["chat"], tuple(spec["dictionaries"])

  specs = config["models"]
  names = [config["reference"], *sorted(specs)]
  first = next(n for n in names if key(specs[n]) == key(specs[name]))
  return first + subjects.FLOOR


def with_redrawn(config, pair) -> list[tuple[str, str]]:
  """Each of a pair with what is left of the other."""
  a, b = pair
  return [(a, control(config, b)), (control(config, a), b)]


def of_config(config) -> list[tuple[str, str]]:
  """The pairs that a config asks for.

  Raises:
    ValueError: names of no models, or no pairs.
  """
  names, asked = list(config["models"]), config["pairs"]
  if asked == "reference":
    own = config["reference"]
    return [(own, name) for name in names if name != own]
  if asked == "all":
    return list(itertools.combinations(names, 2))
  if isinstance(asked, str) or not asked:
    raise ValueError(
      f"pairs must be 'reference', 'all' or pairs of names, got {asked!r}"
    )
  for pair in asked:
    wrong = isinstance(pair, str) or len(pair) != 2 or pair[0] == pair[1]
    if wrong or set(pair) - set(names):
      raise ValueError(
        f"pairs: expected two different names of {names}, got {pair!r}"
      )
  return [tuple(pair) for pair in asked]


def wanted_measures(config, a: Subject, b: Subject) -> list[str]:
  """Those of the config that are defined for the pair."""
  defined = guard.defined(a.guarded, b.guarded)
  return [m for m in config["compare"]["measures"] if m in defined]


def refused_measures(config, a: Subject, b: Subject) -> dict[str, str]:
  """Those of the config that are not, and why."""
  return {
    measure: reason
    for measure, reason in guard.refusals(a.guarded, b.guarded).items()
    if measure in config["compare"]["measures"]
  }
