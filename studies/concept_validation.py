"""Stage three of `studies.concepts`: what depends on a vector, and what not."""

import dataclasses
import itertools
import json
import logging
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_jax import data, models, progress, statistics
from gemma_jax.concepts import (
  damage,
  interventions,
  lexemes,
  mining,
  specificity,
  usage,
)
from gemma_jax.concepts.damage import Clean, Prompts
from gemma_jax.concepts.interventions import Change, Target
from gemma_jax.data import vocabulary
from studies.concept_candidates import Layer, Table, raw_null
from trainers import fields

log = logging.getLogger("gemma_jax")

PRIMARY = "mean"
PARTS = ("concept", "control", "general")
DEFINITIONS = {
  "mean": "Coefficients are set to their mean over stage two's text.",
  "zero": "Coefficients are set to zero.",
  "replace": "A random vector as long is written, with the same coefficient.",
  "norm_only": (
    "The MLP's output keeps its direction and gets the length that `mean` "
    "gives it through the norm behind it."
  ),
  "neuron": (
    "`mean` of another neuron of the layer with the nearest mean of "
    "|coefficient| times length."
  ),
  "random": "As much as `mean` changes, along a random direction instead.",
  "passes": (
    "q <= alpha, an interval above zero, and a larger ratio than every neuron "
    "and random direction of its controls."
  ),
  "kl": "KL(clean || changed) where the answer comes next, nats.",
  "rank": "Of the answer among all tokens, 0 the likeliest; median.",
  "flipped": "Share of prompts at which another token became the likeliest.",
  **specificity.DEFINITIONS,
}


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A signed vector that is tested.

  Attributes:
    row: in its table, of 2n.
    layer: of the neuron.
    unit: the neuron whose coefficient is changed.
    sign: 1 or -1, the end whose words are its own.
    vector: float32 [D], what is written; the neuron's own, or a random one.
    words: ids of the tokens that it says.
  """

  row: int
  layer: int
  unit: int
  sign: int
  vector: np.ndarray
  words: np.ndarray


class Bench:
  """Prompts from a text, and the model that reads them.

  Attributes:
    model: with all of its layers.
    windows: held-out.
    pool: prompts at random places, from which controls are matched.
    pool_clean: of them.
  """

  def __init__(
    self,
    model: models.Model,
    words: lexemes.Lexemes,
    windows: data.Windows,
    used: usage.Usage,
    config: Mapping[str, Any],
    seed: int,
  ):
    self.model, self.words, self.windows = model, words, windows
    self.used, self.config, self.seed = used, config, seed
    pieces = vocabulary.token_bytes(
      model.tokenizer, range(model.tokenizer.backend_tokenizer.get_vocab_size())
    )
    self.num_bytes = np.array([len(piece or b"-") for piece in pieces])
    rng = np.random.default_rng([seed, 0])
    content = words.usable & (words.kind == lexemes.KINDS.index("content"))
    found = mining.places(windows, content)
    if len(found) < config["pool"]:
      raise ValueError(
        f"the held-out text has {len(found)} places before content words, and "
        f"damage.pool asks for {config['pool']}; raise data.heldout_tokens"
      )
    self.pool_at = self._spread(found, config["pool"], rng)
    self.pool = self.at(self.pool_at)
    self.pool_clean = damage.clean(model, self.pool)

  def _spread(self, found, count, rng, groups=None):
    documents = self.windows.document[found[:, 0], found[:, 1]]
    groups = np.zeros(len(found), int) if groups is None else groups
    return mining.spread(found, groups, documents, count, rng)

  def at(self, places: np.ndarray) -> Prompts:
    """The prompts before places [P, 2]."""
    cfg = self.model.config
    return mining.prompts(
      self.windows,
      places,
      self.num_bytes,
      context=self.config["context"],
      bos_id=cfg.bos_id,
      pad_id=cfg.pad_id,
    )

  def places(self, candidate: Candidate) -> np.ndarray:
    """Where a candidate's words come next, spread over words and documents."""
    wanted = np.zeros(len(self.words.usable), bool)
    wanted[candidate.words] = True
    found = mining.places(self.windows, wanted)
    if not len(found):
      return found
    own = self.windows.tokens[found[:, 0], found[:, 1]]
    rng = np.random.default_rng([self.seed, 1, candidate.row])
    return self._spread(
      found, self.config["prompts"], rng, self.words.family[own]
    )

  def prompts(
    self, candidate: Candidate, at: np.ndarray
  ) -> tuple[Prompts, Clean, dict[str, slice]]:
    """Concept, control and general prompts, and which rows are which."""
    concept = self.at(at)
    before = damage.clean(self.model, concept)
    families = np.unique(self.words.family[candidate.words])
    pooled = self.words.family[self.pool.answers[:, 0]]
    free = np.flatnonzero(~np.isin(pooled, families))
    control = free[
      mining.match(before.log_prob, self.pool_clean.log_prob[free])
    ]
    rest = np.setdiff1d(free, control)[: self.config["general"]]
    rows = np.concatenate([control, rest])
    joined = Prompts(
      *(
        np.concatenate(
          [getattr(concept, f.name), getattr(self.pool, f.name)[rows]]
        )
        for f in dataclasses.fields(Prompts)
      )
    )
    cuts = np.cumsum([0, len(at), len(control), len(rest)]).tolist()
    parts = {
      name: slice(*pair)
      for name, pair in zip(PARTS, itertools.pairwise(cuts), strict=True)
    }
    merged = Clean(
      *(
        np.concatenate([np.asarray(own), np.asarray(pool)[rows]])
        for own, pool in zip(before, self.pool_clean, strict=True)
      )
    )
    return joined, merged, parts

  def target(self, candidate: Candidate) -> Target:
    """The neuron's coefficient with the candidate's vector."""
    own = interventions.neurons(self.model, candidate.layer, [candidate.unit])
    return dataclasses.replace(own, vectors=candidate.vector[None])

  def in_place(self, candidate: Candidate) -> Candidate:
    """A random direction as long as the vector of a random neuron, for it.

    The neuron is one that the model uses with the candidate's sign.
    """
    layer = candidate.layer
    rng = np.random.default_rng([self.seed, 2, candidate.row])
    positive = self.used.positive[layer] >= 0.5
    unit = int(rng.choice(np.flatnonzero(positive == (candidate.sign > 0))))
    own = np.asarray(self.model.params["blocks"]["down"][layer, unit])
    length = np.linalg.norm(own) / np.linalg.norm(candidate.vector)
    return dataclasses.replace(
      candidate, unit=unit, vector=candidate.vector * np.float32(length)
    )

  def mean(self, layer: int, unit: int) -> np.ndarray:
    """Of a neuron's coefficient, [1]."""
    return self.used.mean[layer, [unit]]

  def like(self, candidate: Candidate, count: int) -> list[int]:
    """Other neurons of the layer that write about as much."""
    down = np.asarray(self.model.params["blocks"]["down"][candidate.layer])
    mass = self.used.mass[candidate.layer] * np.linalg.norm(down, axis=1)
    away = np.abs(np.log(mass + 1e-30) - np.log(mass[candidate.unit] + 1e-30))
    away[candidate.unit] = np.inf
    return np.argsort(away, kind="stable")[:count].tolist()


def changes(bench: Bench, candidate: Candidate) -> dict[str, Change]:
  """Name -> change, the primary one first."""
  config, target = bench.config, bench.target(candidate)
  mean = bench.mean(candidate.layer, candidate.unit)
  out = {
    PRIMARY: interventions.set_to(target, mean),
    "zero": interventions.scale(target, 0),
    "norm_only": interventions.norm_only(target, mean),
  }
  drawn = [
    interventions.random_directions(target, seed=1_000 * candidate.row + i)
    for i in range(config["controls"])
  ]
  out["replace"] = interventions.replace(target, drawn[0])
  for i, other in enumerate(bench.like(candidate, config["controls"])):
    near = interventions.neurons(bench.model, candidate.layer, [other])
    out[f"neuron_{i}"] = interventions.set_to(
      near, bench.mean(candidate.layer, other)
    )
  for i, vectors in enumerate(drawn):
    out[f"random_{i}"] = interventions.set_to(target, mean, vectors)
  return out


def assess(
  bench: Bench, candidate: Candidate, at: np.ndarray
) -> dict[str, Any]:
  """One candidate's losses under every change, compared."""
  prompts, before, parts = bench.prompts(candidate, at)
  made = changes(bench, candidate)
  found = damage.run(
    bench.model, prompts, before, bench.target(candidate), list(made.values())
  )
  lost = damage.losses(prompts, before, found)
  rows = {}
  for i, name in enumerate(made):
    own = {part: lost[i, where] for part, where in parts.items()}
    rows[name] = {
      "effect": float(own["concept"].mean()),
      "control": float(own["control"].mean()),
      "general": float(own["general"].mean()) if own["general"].size else None,
      "ratio": specificity.specificity_ratio(own["concept"], own["control"]),
      "kl": float(found.kl[i, parts["concept"]].mean()),
      "kl_control": float(found.kl[i, parts["control"]].mean()),
      "rank": float(np.median(found.rank[i, parts["concept"]])),
      "flipped": float(found.flipped[i, parts["concept"]].mean()),
    }
  index = list(made).index(PRIMARY)
  tested = specificity.assess(
    *(lost[index, parts[part]] for part in PARTS[:2]),
    lost[index, parts["general"]] if bench.config["general"] else None,
    draws=bench.config["draws"],
    seed=bench.seed,
  )
  return {
    **dataclasses.asdict(tested),
    "prompts": len(at),
    "clean_log_prob": float(before.log_prob[parts["concept"]].mean()),
    "clean_log_prob_control": float(before.log_prob[parts["control"]].mean()),
    "clean_rank": float(np.median(before.rank[parts["concept"]])),
    "changes": rows,
    "lost": {
      part: np.round(lost[index, where], 6).tolist()
      for part, where in parts.items()
    },
  }


def test(
  bench: Bench,
  candidates: Sequence[Candidate],
  folder: pathlib.Path,
  what: str,
) -> list[dict[str, Any]]:
  """Tests candidates one by one, each kept in a file of its own."""
  folder.mkdir(parents=True, exist_ok=True)
  out = []
  with progress.bar(len(candidates), what, unit="vectors") as bar:
    for one in candidates:
      path = folder / f"{one.row}.json"
      if not path.exists():
        fields.write_json(path, assess(bench, one, bench.places(one)))
      out.append(json.loads(path.read_text()))
      better = sum(row["p"] <= bench.config["alpha"] for row in out)
      bar.set_postfix({"p <= alpha": f"{better}/{len(out)}"})
      bar.update()
  return out


def passes(rows: Sequence[dict], q: np.ndarray, alpha: float) -> list[bool]:
  """Which tests count as validation; see `DEFINITIONS`."""
  out = []
  for row, own in zip(rows, q.tolist(), strict=True):
    rivals = [
      change["ratio"]
      for name, change in row["changes"].items()
      if name.startswith(("neuron_", "random_"))
    ]
    out.append(
      own <= alpha and row["low"] > 0 and row["ratio"] > max(rivals, default=0)
    )
  return out


def of_rows(
  table: Table,
  words: lexemes.Lexemes,
  rows: np.ndarray,
  vectors: Mapping[int, np.ndarray],
  tops: Mapping[int, tuple[np.ndarray, np.ndarray]],
) -> Iterator[Candidate]:
  """Rows of a table as candidates, one by one: few of many are looked at.

  Args:
    table: of vectors, or of random directions.
    words: of the vocabulary.
    rows: of 2n, which sign of which vector.
    vectors: layer -> what its rows write, by `table.unit`.
    tops: layer -> top and bottom tokens of its rows, by place in the layer.
  """
  first = {l: int(np.argmax(table.layer == l)) for l in vectors}
  for row in rows.tolist():
    vector, end = divmod(row, 2)
    layer, unit = int(table.layer[vector]), int(table.unit[vector])
    tokens = tops[layer][end][vector - first[layer]]
    families = words.family[table.tokens[row][table.tokens[row] >= 0]]
    own = tokens[np.isin(words.family[tokens], families)]
    yield Candidate(
      row,
      layer,
      unit,
      1 - 2 * end,
      np.asarray(vectors[layer][unit], np.float32),
      own,
    )


def stage(
  bench: Bench,
  projected: Mapping[int, Layer],
  tables: Mapping[str, Table],
  chosen: Mapping[str, np.ndarray],
  most: Mapping[str, int],
  folder: pathlib.Path,
) -> dict[str, dict[str, Any]]:
  """Tests vectors, and random directions in the same way.

  Args:
    bench: with the text.
    projected: of every layer.
    tables: "vectors" and "null", which are the random directions.
    chosen: rows of each, best first.
    most: how many of each are tested.
    folder: of the files of each.

  Returns:
    For both, how many rows were "examined", the "candidates" that were tested,
    and their "rows", each with its `row`, its q and whether it `passes`.
  """
  out = {}
  for side, table in tables.items():
    vectors, tops = {}, {}
    for number, layer in projected.items():
      own = getattr(layer, side)
      tops[number] = own.top_tokens, own.bottom_tokens
      vectors[number] = np.asarray(
        bench.model.params["blocks"]["down"][number], np.float32
      )
      if side == "null":
        vectors[number] = raw_null(
          bench.model, number, len(own.std), bench.seed
        )
    found, examined = [], 0
    for one in of_rows(table, bench.words, chosen[side], vectors, tops):
      if len(found) == most[side]:
        break
      examined += 1
      if len(bench.places(one)) >= bench.config["least"]:
        found.append(one if side == "vectors" else bench.in_place(one))
    rows = test(bench, found, folder / side, f"damage {side}")
    q = statistics.benjamini_hochberg([row["p"] for row in rows])
    passed = passes(rows, q, bench.config["alpha"])
    out[side] = {
      "examined": examined,
      "candidates": found,
      "rows": [
        {"row": one.row, **row, "q": float(own), "passes": bool(ok)}
        for one, row, own, ok in zip(found, rows, q, passed, strict=True)
      ],
    }
  return out
