"""The page of a clustering: sizes, numbers, clusters with their contexts."""

import csv
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma_jax import tables
from gemma_jax.activations import ActivationStore
from gemma_jax.clustering.evaluate import ClusterStatistics
from gemma_jax.clustering.quantise import Quantiser
from gemma_jax.data import Windows
from gemma_jax.models import Model
from gemma_jax.report import contexts
from gemma_jax.report.page import Latent, write_page
from gemma_jax.report.pareto import pareto

log = logging.getLogger("gemma_jax")

COLUMNS = ("name", "bits", "bits_entropy", "fvu", "delta_ce", "kl")
COLUMNS += ("empty_fraction", "size_gini", "silhouette", "seconds_train")
PROMOTED = 8  # tokens for each side of the vocabulary


def clusters(
  quantiser: Quantiser,
  statistics: ClusterStatistics,
  store: ActivationStore,
  windows: Windows,
  model: Model,
  *,
  count: int,
) -> list[Latent]:
  """Clusters of the first stage, the largest first, with text and vocabulary.

  Vocabulary is of a centroid less the mean of the centroids. In the contexts
  the tokens of the cluster are marked.

  Args:
    quantiser: of the residual stream or any other site.
    statistics: over `store`.
    store: held-out activations.
    windows: that the store was harvested from.
    model: for the tokenizer and the unembedding.
    count: clusters.
  """
  label, words = contexts.labels(store), contexts.to_text(model)
  codes = statistics.codes[:, 0]
  shown = np.argsort(-statistics.counts, kind="stable")[:count]
  shown = shown[statistics.counts[shown] > 0]
  middle = np.asarray(quantiser.coordinates.mean)
  directions = [np.zeros(quantiser.width)] * len(shown)
  if quantiser.kind != "product":
    first = np.asarray(quantiser.centroids[0])[shown]
    directions = np.asarray(quantiser.coordinates.invert(first)) - middle
  raised, lowered = contexts.vocabulary(
    np.asarray(directions).reshape(len(shown), -1), model, PROMOTED
  )
  return [
    Latent(
      index=int(c),
      density=float(statistics.counts[c] / len(store)),
      mean_activation=1.0,
      max_activation=1.0,
      interest=float(statistics.counts[c] / len(store)),
      contexts=[
        contexts.context(
          label,
          windows,
          int(row),
          lambda start, stop, c=c: (codes[start:stop] == c).astype(float),
          words,
        )
        for row in statistics.top_rows[c]
        if row >= 0
      ],
      promoted=raised[i],
      suppressed=lowered[i],
    )
    for i, c in enumerate(shown)
  ]


def write(
  workdir: pathlib.Path,
  *,
  results: Mapping[str, Any],
  config: Mapping[str, Any],
  clusters: list[Latent],
) -> pathlib.Path:
  """Writes `clusters.csv`, `plots/*.png` and `report.html`; logs the table.

  Args:
    workdir: of the run.
    results: contents of results.json, with `members`.
    config: resolved, as plain dicts.
    clusters: see `clusters`.
  """
  members = results["members"]
  scalars = [
    {k: v for k, v in m.items() if not isinstance(v, dict | list | tuple)}
    for m in members
  ]
  with (workdir / "clusters.csv").open("w", newline="") as file:
    names = dict.fromkeys(name for row in scalars for name in row)
    writer = csv.DictWriter(file, list(names))
    writer.writeheader()
    writer.writerows(scalars)
  columns = [c for c in COLUMNS if any(c in row for row in scalars)]
  log.info("\n%s", tables.aligned(scalars, columns))
  picture = pareto(
    members, workdir / "plots/rate.png", key="bits", label="bits per token"
  )
  best = min(members, key=lambda m: m["fvu"])
  return write_page(
    workdir / "report.html",
    title=f"Clusterings of {results['model']}: {results['site']}",
    results={**results, "members": {m["name"]: dict(m) for m in members}},
    config=dict(config),
    plots={"Bits against FVU and delta CE, held-out": picture},
    latents=clusters,
    summary=[
      ("Smallest FVU", best["fvu"], f"held-out; {best['name']}"),
      ("Bits", best["bits"], "per token, of a code of fixed length"),
      (
        "FVU, dealt to other tokens",
        best["fvu_shuffled"],
        "a control that must not be below 1",
      ),
    ],
  )
