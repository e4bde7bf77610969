"""The page of a clustering: sizes, numbers, clusters with their contexts."""

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
MOST_NAMED = 8  # tokens and sources of a cluster
ORDER = (
  "The largest clusters first, with the held-out contexts nearest to the "
  "centroid; promoted are tokens whose logits the centroid, less the mean of "
  "all centroids, raises most."
)


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
  sources = store.read(0, len(store), "source")
  codes = statistics.codes[:, 0]
  shown = np.argsort(-statistics.counts, kind="stable")[:count]
  shown = shown[statistics.counts[shown] > 0]
  raised, lowered = contexts.vocabulary(
    _directions(quantiser, shown), model, PROMOTED
  )
  found = []
  for i, c in enumerate(map(int, shown)):
    inside = codes == c
    near = statistics.top_rows[c]
    found.append(
      Latent(
        index=c,
        density=float(inside.mean()),
        mean_activation=1.0,
        max_activation=1.0,
        interest=None,
        contexts=[
          contexts.context(
            label,
            windows,
            int(row),
            lambda start, stop, at=inside: at[start:stop].astype(float),
            words,
          )
          for row in near[near >= 0]
        ],
        promoted=raised[i],
        suppressed=lowered[i],
        notes=[
          "Tokens: " + _shares(label["token"][inside], words),
          "Sources: "
          + _shares(
            sources[inside], lambda ids: [store.sources[n] for n in ids]
          ),
        ],
      )
    )
  return found


def _directions(quantiser: Quantiser, shown: np.ndarray) -> np.ndarray:
  """Centroids of the first stage less their mean, raw [n, D]."""
  first = np.asarray(quantiser.centroids[0])
  if quantiser.kind == "product":
    return first[shown]  # of some dims only: no direction of the model
  raw = np.asarray(quantiser.coordinates.invert(first))
  return (raw - raw.mean(0))[shown]


def _shares(ids: np.ndarray, words) -> str:
  """The commonest of some labels and their shares, in words."""
  values, counts = np.unique(ids, return_counts=True)
  top = np.argsort(-counts, kind="stable")[:MOST_NAMED]
  return ", ".join(
    f"{word!r} {share:.0%}"
    for word, share in zip(
      words(values[top]), counts[top] / len(ids), strict=True
    )
  )


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
  tables.write_csv(workdir / "clusters.csv", members)
  columns = [c for c in COLUMNS if any(c in m for m in members)]
  log.info("\n%s", tables.aligned(members, columns))
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
    noun="Cluster",
    order=ORDER,
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
