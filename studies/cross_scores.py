"""How well every map of a route predicts held-out rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma_jax import metrics, progress
from gemma_jax.alignment import scores
from gemma_jax.alignment.paired import Paired
from gemma_jax.alignment.scores import Scores
from gemma_jax.dictionaries import Dictionary
from studies import cross_maps
from studies.cross_maps import Contender
from studies.cross_sides import Pair, short

NUMBERS = (
  "r2_median",
  "r2_pooled",
  "pearson_median",
  "auroc_median",
  "top_k_recall",
  "centred_cosine",
  "raw_cosine",
  "columns",
)
DEFINITIONS = {
  **{
    name: text
    for name, text in scores.DEFINITIONS.items()
    if name not in ("fvu", "median")
  },
  "r2_low": "95 % bootstrap interval over documents of r2_pooled; r2_high too.",
  "fvu": "Of the predicted activation, before any dictionary.",
  "fvu_decoded": "Of the target's decoder on the predicted codes, as they are.",
  "l0": "Predicted codes above 0, mean over rows.",
  "delta_ridge": (
    "r2_pooled less that of the ridge map through the target's encoder, with "
    "a 95 % bootstrap interval over documents."
  ),
  "delta_token": "The same over the lookup by the source's token.",
  "delta_ridge_median": "Median over latents of the difference in r2.",
  "columns": "Latents behind the medians.",
}


def route(pair: Pair) -> str:
  """As in "gemma:5 > smollm2:9"."""
  return f"{short(pair.a)} > {short(pair.b)}"


def measure(
  found: Paired,
  pair: Pair,
  contenders: Sequence[Contender],
  dictionaries: Mapping[str, Sequence[Dictionary]],
  mean: np.ndarray,
  *,
  redrawn: np.ndarray | None = None,
) -> list[dict[str, Any]]:
  """A row of results.json for every map of a route.

  Args:
    found: held-out rows.
    pair: source and target.
    contenders: the maps.
    dictionaries: of both sites.
    mean: of the target's codes over training rows, [N].
    redrawn: the source with redrawn weights, [P, D].
  """
  source, target = (dictionaries[site][0] for site in pair)
  top = min(max(1, round(target.config.k or 32)), target.config.width)
  codes = {c.name: Scores(mean, codes=True, top=top) for c in contenders}
  made = {
    c.name: metrics.RunningFVU()
    for c in contenders
    if c.activations is not None
  }
  decoded = {c.name: metrics.RunningFVU() for c in contenders}
  active = dict.fromkeys(codes, 0)
  total = len(found.store)
  with progress.bar(
    total * len(contenders), f"scores {route(pair)}", unit="tokens"
  ) as bar:
    for start in range(0, total, cross_maps.ROWS):
      part = np.arange(start, min(start + cross_maps.ROWS, total))
      batch = cross_maps.take(found, pair, source, target, part, redrawn)
      for one in contenders:
        guess = None
        if one.activations is not None:
          guess = one.activations(batch)
          made[one.name].update(batch.y, guess)
        z = one.codes(batch) if one.codes else target.encode(guess)
        codes[one.name].update(z, batch.actual, found.document[part])
        decoded[one.name].update(batch.y, target.decode(z))
        active[one.name] += int((z > 0).sum())
        bar.update(len(z))
  rows, computed = [], {name: own.compute() for name, own in codes.items()}
  for one in contenders:
    own, numbers = codes[one.name], computed[one.name]
    low, high = own.interval() or (None, None)
    row = {
      "route": route(pair),
      "kind": pair.kind,
      "source": pair.a,
      "target": pair.b,
      "map": one.name,
      "role": one.role,
      "space": one.space,
      "parameters": int(one.parameters),
      "unseen": one.unseen,
      "fvu": float(made[one.name].compute()) if one.name in made else None,
      "fvu_decoded": float(decoded[one.name].compute()),
      **{name: numbers[name] for name in NUMBERS},
      "r2_low": low,
      "r2_high": high,
      "l0": active[one.name] / total,
      "tokens": total,
    }
    often = numbers["firings"] >= scores.FIRINGS
    for other in ("ridge", "token"):
      than = codes[other]
      delta = row["r2_pooled"] - computed[other]["r2_pooled"]
      ends = scores.delta_interval(own, than) or (None, None)
      row |= {
        f"delta_{other}": delta,
        f"delta_{other}_low": ends[0],
        f"delta_{other}_high": ends[1],
      }
      if often.any():
        each = scores.delta_r2(own, than)[often]
        row[f"delta_{other}_median"] = float(np.nanmedian(each))
    rows.append(row)
  return rows
