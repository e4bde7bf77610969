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
from gemma_jax.report import plots
from gemma_jax.report.page import (
  Context,
  Latent,
  select_interesting,
  write_page,
)

BEFORE, AFTER = 32, 16  # tokens shown around a peak


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
  label = {
    name: store.read(0, len(store), name)
    for name in ("token", "document", "position")
  }
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
  to_text = _to_text(model)
  vocabulary = _vocabulary(dictionary, index, model, promoted, to_text)
  found = []
  for i, (m, value) in enumerate(zip(index, score, strict=True)):
    shown = [
      _context(dictionary, store, label, windows, int(m), int(row), to_text)
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


def _to_text(model):
  tokenizer = model.tokenizer
  if tokenizer is None:
    return lambda ids: [f"<{i}>" for i in ids]
  return lambda ids: [
    token or f"<{i}>"
    for i, token in zip(
      ids, tokenizer.convert_ids_to_tokens([int(i) for i in ids]), strict=True
    )
  ]


def _vocabulary(dictionary, index, model, count, to_text):
  """Tokens whose logits each latent's direction raises and lowers most."""
  decoder = np.asarray(dictionary.params["W_dec"])[index]
  if decoder.shape[1] != model.config.width:  # no direction of the residual
    return [[] for _ in index], [[] for _ in index]
  gain = model.config.norm_offset + np.asarray(
    model.params["final_norm"], np.float32
  )
  head = model.params["embed" if model.config.tied else "unembed"]
  logits = np.asarray((decoder * gain) @ head.T, np.float32)
  order = np.argsort(logits, axis=1)
  return (
    [to_text(row[::-1][:count]) for row in order],
    [to_text(row[:count]) for row in order],
  )


def _context(dictionary, store, label, windows, m, row, to_text) -> Context:
  """The tokens around a row, within its window and document."""
  document, position = label["document"], label["position"]

  def together(a, b):  # neighbours in one window and document
    return document[a] == document[b] and position[a] + 1 == position[b]

  start = stop = row
  while start > 0 and row - start < BEFORE and together(start - 1, start):
    start -= 1
  last = len(store) - 1
  while stop < last and stop - row < AFTER and together(stop, stop + 1):
    stop += 1
  x = linear.rows(store, start, stop + 1, dictionary.config.read)
  _, source, name = windows.documents[document[row]]
  return Context(
    tokens=to_text(label["token"][start : stop + 1]),
    activations=np.asarray(dictionary.encode(x))[:, m].tolist(),
    peak=row - start,
    source=source,
    document=name,
  )


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
