"""What the target model loses with transferred features in the site's place.

At the paired positions of held-out windows the target's activation is replaced
by what its dictionary's decoder makes of the codes that a map predicts; all
other positions stay. The floor is the site's mean there, the ceiling the
target's own dictionary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma_jax import metrics, models
from gemma_jax.activations import owner
from gemma_jax.alignment import controls
from gemma_jax.alignment.paired import Paired
from gemma_jax.dictionaries import Dictionary
from gemma_jax.metrics import document_interval
from gemma_jax.metrics.ablation import Given
from studies import cross_maps, cross_scores
from studies.cross_maps import Batch, Contender
from studies.cross_sides import Pair, Subject

DEALT = "dealt"  # the ridge map of another document's source
# Of the ladder; every one is a run of the model.
SPLICED = (
  *("token", "ridge", "decoded_ridge", "code_ridge", "translator"),
  *("hypernetwork", "hypernetwork_unseen", "shuffled_across", "redrawn"),
  *("other_seed", "own"),
)
FIRST = ("own", "ridge", "hypernetwork", "translator", "code_ridge")
SECOND = ("ridge", "token", DEALT, "redrawn", "shuffled_across")
DEFINITIONS = {
  "recovered": (
    "(CE of the mean ablation - CE) / (CE of the mean ablation - clean CE), "
    "with a 95 % bootstrap interval over documents; the denominator is gap."
  ),
  "dealt": "The ridge map of the source at a pair of another document.",
  "difference": (
    "recovered of the first less that of the second, with a 95 % bootstrap "
    "interval over documents; clear where that excludes 0."
  ),
}


def window(found: Paired, name: str, config: Mapping[str, Any]) -> np.ndarray:
  """Numbers of the held-out pairs that are spliced.

  Those in the first `positions` of the windows of `documents` documents.
  """
  some = np.unique(found.document)[: config["documents"]]
  early = found.position(name) < config["positions"]
  return np.flatnonzero(np.isin(found.document, some) & early)


def measure(
  config: Mapping[str, Any],
  subject: Subject,
  model: models.Model,
  found: Paired,
  pair: Pair,
  contenders: Sequence[Contender],
  dictionaries: Mapping[str, Sequence[Dictionary]],
  mean: np.ndarray,
  *,
  redrawn: np.ndarray | None = None,
  seed: int = 0,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """CE recovered by every map of a route, and what differs.

  Args:
    config: `splice` of the study.
    subject: the target.
    model: the target's, whole.
    found: held-out pairs.
    pair: source and target.
    contenders: the maps.
    dictionaries: of both sites.
    mean: of the target's activation over training rows, [E].
    redrawn: the source with redrawn weights, [P, D].
    seed: of the dealing.

  Returns:
    Rows of `splice` and of `differences` in results.json.
  """
  name, site = owner(pair.b)
  target = dictionaries[pair.b][0]
  chosen = window(found, name, config)
  source = dictionaries[pair.a][0]
  batch = cross_maps.take(found, pair, source, target, chosen, redrawn)
  contenders = [one for one in contenders if one.name in SPLICED]
  values = {one.name: _written(one, batch, target) for one in contenders}
  partners = controls.shuffled(found.document[chosen], "across", seed=seed)
  values[DEALT] = values["ridge"][partners.order]
  places = found.places(name)[chosen]
  # Only the windows and positions that are spliced, so that windows are short.
  numbers, at = np.unique(places[:, 0], return_inverse=True)
  windows = subject.windows["heldout"]
  part = numbers, slice(config["positions"])
  tokens, document = windows.tokens[part], windows.document[part]
  mask = np.zeros(tokens.shape, bool)
  mask[at, places[:, 1]] = True
  given = {}
  for kind, rows in values.items():
    filled = np.zeros((*tokens.shape, rows.shape[1]), np.float32)
    filled[at, places[:, 1]] = rows
    given[kind] = Given(filled)
  losses = metrics.splice_losses(
    model,
    tokens,
    mask,
    given | {"_mean": metrics.ablations(mean)["mean"]},
    read=site,
    write=site,
    batch_size=config["batch_size"],
    document=document,
  )
  summary = losses.summary(("_mean",))
  roles = {one.name: one.role for one in contenders} | {DEALT: "control"}
  rows = []
  for kind in values:
    one = summary[kind]
    recovered = one["ce_recovered"]["_mean"]
    low, high = recovered["interval"] or (None, None)
    rows.append(
      {
        "route": cross_scores.route(pair),
        "map": kind,
        "role": roles[kind],
        "tokens": one["tokens"],
        "documents": len(losses.documents),
        "delta_ce": one["delta_ce"],
        "kl": one["kl"],
        "recovered": recovered["value"],
        "low": low,
        "high": high,
        "gap": recovered["gap"],
      }
    )
  gap = losses.ce["_mean"] - losses.ce["clean"]
  differences = []
  for first in FIRST:
    for second in SECOND:
      if first == second or not {first, second} <= set(values):
        continue
      top = losses.ce[second] - losses.ce[first]
      low, high = document_interval(top, gap) or (None, None)
      differences.append(
        {
          "route": cross_scores.route(pair),
          "first": first,
          "second": second,
          "difference": float(top.sum() / gap.sum()),
          "low": low,
          "high": high,
          "clear": low is not None and (low > 0 or high < 0),
        }
      )
  return rows, differences


def _written(one: Contender, batch: Batch, target: Dictionary) -> np.ndarray:
  """What the target's decoder makes of the codes that are predicted, [n, E]."""
  z = one.codes(batch) if one.codes else target.encode(one.activations(batch))
  return np.asarray(target.decode(z), np.float32)
