"""The page of one dictionary: pictures, numbers, its telling latents."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma_jax.activations import ActivationStore
from gemma_jax.data import Windows
from gemma_jax.dictionaries import Dictionary, linear
from gemma_jax.dictionaries.evaluate import LatentStatistics
from gemma_jax.models import Model
from gemma_jax.report import contexts as contexts_
from gemma_jax.report import plots
from gemma_jax.report.page import Latent, select_interesting, write_page


def latents(
  dictionary: Dictionary,
  statistics: LatentStatistics,
  store: ActivationStore,
  windows: Windows,
  model: Model,
  *,
  count: int = 20,
  contexts: int = 8,
  promoted: int = 8,
) -> list[Latent]:
  """The latents most worth a look, with text and vocabulary.

  Args:
    dictionary: folded.
    statistics: over `store`.
    store: held-out activations.
    windows: that the store was harvested from.
    model: for the tokenizer and the unembedding.
    count: latents.
    contexts: texts for each.
    promoted: tokens for each side of the vocabulary.
  """
  rows = statistics.top_rows
  label = contexts_.labels(store)
  known = np.maximum(rows, 0)
  index, score = select_interesting(
    density=statistics.density,
    mean_activation=statistics.mean_activation,
    max_activation=statistics.max_activation,
    energy=statistics.energy,
    top_tokens=np.where(rows >= 0, label["token"][known], -1),
    top_documents=np.where(rows >= 0, label["document"][known], -1),
    n=count,
  )
  if not len(index):
    return []
  to_text = contexts_.to_text(model)
  decoder = np.asarray(dictionary.params["W_dec"])[index]
  vocabulary = contexts_.vocabulary(decoder, model, promoted)
  found = []
  for i, (m, value) in enumerate(zip(index, score, strict=True)):

    def activations(start, stop, m=int(m)):
      x = linear.rows(store, start, stop, dictionary.config.read)
      return np.asarray(dictionary.encode(x))[:, m]

    shown = [
      contexts_.context(label, windows, int(row), activations, to_text)
      for row in rows[m][rows[m] >= 0][:contexts]
    ]
    found.append(
      Latent(
        index=int(m),
        density=float(statistics.density[m]),
        mean_activation=float(statistics.mean_activation[m]),
        max_activation=float(statistics.max_activation[m]),
        interest=float(value),
        contexts=shown,
        promoted=vocabulary[0][i],
        suppressed=vocabulary[1][i],
        prefix=next(w for w in dictionary.config.prefix_widths if m < w),
      )
    )
  return found


def write(
  workdir: pathlib.Path,
  *,
  results: Mapping[str, Any],
  config: Mapping[str, Any],
  metrics: list[dict[str, Any]],
  statistics: LatentStatistics,
  norms: Mapping[str, np.ndarray],
  shown: list[Latent],
) -> pathlib.Path:
  """Writes `plots/*.png` and `report.html` into a workdir.

  Args:
    workdir: of the run.
    results: contents of results.json.
    config: resolved, as plain dicts.
    metrics: rows of metrics.jsonl.
    statistics: of the latents.
    norms: see `dictionaries.evaluate`.
    shown: see `latents`.
  """
  folder = workdir / "plots"
  widths = [int(width) for width in results["fvu_prefixes"]]
  fvus = list(results["fvu_prefixes"].values())
  baselines = {
    "mean predictor": results["fvu_mean"],
    "ridge from the same input": results["fvu_linear"],
  }
  pictures = {
    "Held-out FVU of every Matryoshka prefix": plots.fvu_prefixes(
      widths, fvus, folder / "fvu_prefixes.png", baselines=baselines
    ),
    "Training": plots.training_curves(metrics, folder / "training.png"),
    "How often latents fire, held-out": plots.latent_density(
      statistics.density,
      folder / "latent_density.png",
      tokens=statistics.tokens,
    ),
    "Norms of the vectors, held-out": plots.norm_histogram(
      dict(norms), folder / "norms.png"
    ),
  }
  summary = [
    (
      "FVU",
      results["fvu"],
      f"held-out; ridge {results['fvu_linear']:.4g}, mean predictor "
      f"{results['fvu_mean']:.4g}",
    ),
    ("L0", results["l0"], "active latents per held-out token"),
    (
      "Dead latents",
      f"{results['dead_fraction']:.2%}",
      f"fire on none of {results['tokens_heldout']:,} held-out tokens",
    ),
    *(
      [
        (
          "CE recovered",
          results["ce_recovered"],
          f"of the {results['ce_gap']:.4g} nats that zeroing the site costs; "
          f"delta CE {results['delta_ce']:.4g}",
        )
      ]
      if "ce_gap" in results
      else []  # of a crosscoder
    ),
    (
      "Tokens",
      f"{results['tokens_train']:,}",
      f"trained on, at {results['tokens_per_second_train']:,.0f} per second",
    ),
  ]
  read, write_site = results["sites"]
  kind = "SAE" if read == write_site else "Transcoder"
  kind = "Crosscoder" if "+" in read else kind
  return write_page(
    workdir / "report.html",
    title=f"{kind} of {results['model']}: {read} → {write_site}",
    results=dict(results),
    config=dict(config),
    plots=pictures,
    latents=shown,
    summary=summary,
  )
