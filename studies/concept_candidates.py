"""Stages one and two of `studies.concepts`: projections, usage and scores."""

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_jax import data, models, progress, statistics
from gemma_jax.concepts import (
  coherence,
  lexemes,
  lexicon,
  npmi,
  projection,
  scoring,
  usage,
)
from studies import arrays

log = logging.getLogger("gemma_jax")

PER_SIGN = ("tail", "content", "kind", "category", "coherence", "npmi")
PER_SIGN += ("total", "q", "score", *(f"p_{name}" for name in scoring.PARTS))


@dataclasses.dataclass(frozen=True)
class Layer:
  """One layer's directions in the vocabulary, and random ones.

  Attributes:
    units: int32 [F'], the neurons that were projected.
    vectors: of them.
    null: of random directions.
  """

  units: np.ndarray
  vectors: projection.Projection
  null: projection.Projection


@dataclasses.dataclass(frozen=True)
class Table:
  """Vectors of all layers, rows in pairs: 2i is +v of the i-th, 2i + 1 is -v.

  Attributes:
    layer: int32 [n], of each vector.
    unit: int32 [n].
    std: float64 [n], of the logits.
    kurtosis: float64 [n].
    skew: float64 [n].
    kurtosis_z: float64 [n], against the layer's random directions.
    kurtosis_q: float64 [n].
    tokens: int32 [2n, m], words of each sign.
    columns: `PER_SIGN` -> [2n].
  """

  layer: np.ndarray
  unit: np.ndarray
  std: np.ndarray
  kurtosis: np.ndarray
  skew: np.ndarray
  kurtosis_z: np.ndarray
  kurtosis_q: np.ndarray
  tokens: np.ndarray
  columns: dict[str, np.ndarray]


def raw_null(
  model: models.Model, layer: int, count: int, seed: int
) -> np.ndarray:
  """Random directions [count, D] in the place of a layer's value vectors."""
  down = np.asarray(model.params["blocks"]["down"][layer], np.float32)
  return scoring.null_directions(down, count, seed + layer)


def project(
  model: models.Model,
  words: lexemes.Lexemes,
  config: Mapping[str, Any],
  seed: int,
  folder: pathlib.Path,
  layers: Sequence[int],
) -> dict[int, Layer]:
  """Projects the value vectors of layers, each into a file of its own."""
  missing = [layer for layer in layers if not _path(folder, layer).exists()]
  if missing:
    width = model.config.mlp_width
    most = min(config["max_vectors"] or width, width)
    table = projection.readout(model, np.flatnonzero(words.usable))
    total = len(missing) * (most + config["null"])
    with progress.bar(total, "project", unit="vectors") as bar:
      for layer in missing:
        rng = np.random.default_rng([seed, layer])
        units = np.sort(rng.permutation(width)[:most]).astype(np.int32)
        vectors = np.asarray(projection.value_vectors(model, layer))[units]
        null = raw_null(model, layer, config["null"], seed)
        null = null * np.asarray(projection.output_gain(model, layer))
        found = [
          projection.project_directions(
            model, table, rows, top_k=config["top_k"], progress=bar.update
          )
          for rows in (vectors, null)
        ]
        _write(_path(folder, layer), Layer(units, *found))
  return {layer: _read(_path(folder, layer)) for layer in layers}


def use(
  model: models.Model,
  windows: data.Windows,
  config: Mapping[str, Any],
  path: pathlib.Path,
) -> usage.Usage:
  """How the model uses its neurons on a text, from a file if there is one."""
  if not path.exists():
    with progress.bar(windows.num_tokens, "read", unit="tokens") as bar:
      found = usage.measure(
        model,
        windows.tokens,
        windows.mask,
        contexts=config["contexts"],
        batch_size=config["batch_size"],
        progress=bar.update,
      )
    arrays.save(path, dataclasses.asdict(found))
  kept = arrays.load(path)
  return usage.Usage(**{**kept, "tokens": int(kept["tokens"])})


def reference(
  model: models.Model,
  words: lexemes.Lexemes,
  fitted: lexicon.Lexicon,
  windows: data.Windows,
  layers: Mapping[int, Layer],
  count: int,
) -> scoring.Reference:
  """What the words of directions are compared with."""
  table = np.asarray(model.params["embed"], np.float32)
  unit = coherence.embeddings(table, words.usable)
  strata = coherence.strata(words.usable, words.script)
  wanted = np.unique(
    np.concatenate(
      [
        scoring.words(side, words, count=count).families.ravel()
        for layer in layers.values()
        for side in (layer.vectors, layer.null)
      ]
    )
  )
  present = np.unique(words.family[windows.tokens[windows.mask]])
  wanted = np.intersect1d(wanted[wanted >= 0], present)
  counts = npmi.count(windows.tokens, words.family, wanted)
  null = coherence.fit(unit, strata)
  return scoring.Reference(words, fitted, unit, strata, null, counts)


def score(
  layers: Mapping[int, Layer], compared: scoring.Reference, count: int
) -> tuple[Table, Table]:
  """The table of vectors, and that of random directions."""
  sides = {"vectors": [], "null": []}
  tails = {"vectors": [], "null": []}
  for layer in layers.values():
    own = scoring.words(layer.vectors, compared.lexemes, count=count)
    null = scoring.words(layer.null, compared.lexemes, count=count)
    sides["vectors"].append(own)
    sides["null"].append(null)
    tails["vectors"].append(scoring.above(own.tail, null.tail))
    tails["null"].append(scoring.among(null.tail))
  found = [_joined(some) for some in sides.values()]
  own, null = scoring.evidence(
    found, [np.concatenate(p) for p in tails.values()], compared
  )
  scores = scoring.calibrate(own.total, found[0].content, null.total)
  others = scoring.transfer(null.total, found[1].content, own.total, scores.q)
  return (
    _table(layers, "vectors", found[0], own, scores),
    _table(layers, "null", found[1], null, others),
  )


def kurtosis_by_layer(layers: Mapping[int, Layer]) -> list[dict[str, float]]:
  """How peaked the logits of vectors are, beside random directions."""
  rows = []
  for number, layer in layers.items():
    own, null = layer.vectors.kurtosis, layer.null.kurtosis
    above = float(np.quantile(null, 0.99))
    median, p95, p99 = np.quantile(own, (0.5, 0.95, 0.99)).tolist()
    rows.append(
      {
        "layer": number,
        "median": median,
        "p95": p95,
        "p99": p99,
        "max": float(own.max()),
        "null_median": float(np.median(null)),
        "null_p99": above,
        "share_above_null_p99": float(np.mean(own > above)),
      }
    )
  return rows


def _path(folder, layer):
  return folder / f"layer_{layer:02d}.npz"


def _write(path, layer: Layer) -> None:
  kept = {"units": layer.units}
  for side in ("vectors", "null"):
    fields = dataclasses.asdict(getattr(layer, side))
    kept |= {f"{side}.{name}": x for name, x in fields.items()}
  arrays.save(path, kept)


def _read(path) -> Layer:
  kept = arrays.load(path)

  def side(name):
    return projection.Projection(
      **{
        field.name: kept[f"{name}.{field.name}"]
        for field in dataclasses.fields(projection.Projection)
      }
    )

  return Layer(kept["units"], side("vectors"), side("null"))


def _joined(some: Sequence[scoring.Words]) -> scoring.Words:
  return scoring.Words(
    *(
      np.concatenate([getattr(one, field.name) for one in some])
      for field in dataclasses.fields(scoring.Words)
    )
  )


def _table(layers, side, found, evidence, scores) -> Table:
  def gather(of: Callable[[Layer], np.ndarray]) -> np.ndarray:
    return np.concatenate([of(layer) for layer in layers.values()])

  def of_null(test):
    return gather(
      lambda layer: test(getattr(layer, side).kurtosis, layer.null.kurtosis)
    )

  projected = [getattr(layer, side) for layer in layers.values()]
  sizes = [len(one.std) for one in projected]
  numbers = np.repeat(list(layers), sizes).astype(np.int32)
  units = (
    gather(lambda layer: layer.units)
    if side == "vectors"
    else np.concatenate([np.arange(size) for size in sizes])
  )
  columns = {
    "tail": found.tail,
    "content": found.content,
    "kind": found.kind,
    "category": evidence.category,
    **evidence.values,
    "total": evidence.total,
    "q": scores.q,
    "score": scores.score,
    **{f"p_{name}": p for name, p in evidence.parts.items()},
  }
  return Table(
    numbers,
    units.astype(np.int32),
    np.concatenate([one.std for one in projected]).astype(np.float64),
    np.concatenate([one.kurtosis for one in projected]).astype(np.float64),
    np.concatenate([one.skew for one in projected]).astype(np.float64),
    of_null(scoring.normal_z),
    statistics.benjamini_hochberg(of_null(scoring.above)),
    found.tokens,
    columns,
  )
