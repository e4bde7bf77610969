"""What codes explain at which cost: pictures and a page."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gemma_jax.metrics.rates import gaussian_bound
from gemma_jax.report import plots
from gemma_jax.report.page import write_page

BUDGETS = {
  "bits": "bits per token",
  "parameters": "parameters",
  "encode_flops": "FLOPs to encode a token",
}
MEASURES = {"fvu": "FVU", "delta_ce": "ΔCE (nats per token)"}


def rates_figure(rows: Sequence[Mapping[str, Any]], eigenvalues) -> Figure:
  """FVU and delta CE against each budget, a style for each kind of code.

  Args:
    rows: of codes, with `kind`, the budgets and the measures.
    eigenvalues: of the covariance, [D], for the line of the Gaussian bound.
  """
  figure, grid = plots.canvas(9.6, rows=len(BUDGETS), columns=len(MEASURES))
  kinds = list(dict.fromkeys(row["kind"] for row in rows))
  for line, budget in zip(grid, BUDGETS, strict=True):
    for axes, measure in zip(line, MEASURES, strict=True):
      for kind in kinds:
        own = sorted(
          (row[budget], row[measure])
          for row in rows
          if row["kind"] == kind
          and row[budget] > 0
          and plots.is_finite(row.get(measure))
        )
        if own:
          axes.plot(
            *zip(*own, strict=True),
            **_style(kinds, kind),
            linestyle="-",
            linewidth=0.9,
            label=kind,
          )
      plots.dress(axes, x=BUDGETS[budget], y=MEASURES[measure])
      axes.set_xscale("log")
      if measure == "fvu":
        axes.set_yscale("log")
      if measure == "fvu" and budget == "bits":
        # The codes fill the panel; the bound goes on below it.
        axes.set_ylim(axes.get_ylim())
        bits = np.geomspace(*axes.get_xlim(), 100)
        axes.plot(
          bits,
          gaussian_bound(eigenvalues, bits),
          color="#aaaaaa",
          linestyle="--",
          linewidth=1,
          label="Gaussian bound",
        )
  handles, labels = grid[0][0].get_legend_handles_labels()
  figure.legend(
    handles,
    labels,
    loc="outside lower center",
    ncols=4,
    fontsize=9,
    labelcolor=plots.INK,
    frameon=False,
  )
  return figure


def _style(kinds: Sequence[str], kind: str) -> dict[str, Any]:
  """Colour and marker; there are more kinds than colours."""
  again, number = divmod(kinds.index(kind), len(plots.COLOURS))
  return {
    "color": plots.COLOURS[number],
    "marker": "osD^"[again % 4],
    "markersize": 3.5,
  }


def interpretability_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
  """AUROC of rules on tokens against bits, with the shuffled control.

  Args:
    rows: of codes; those without `auroc` are left out.
  """
  figure, grid = plots.canvas(3.6)
  (axes,) = grid[0]
  kinds = list(dict.fromkeys(row["kind"] for row in rows))
  for row in rows:
    if not plots.is_finite(row.get("auroc")):
      continue
    axes.errorbar(
      row["bits"],
      row["auroc"],
      row["auroc_mdd"],
      linestyle="none",
      **_style(kinds, row["kind"]),
    )
    axes.plot(row["bits"], row["auroc_shuffled"], "x", color="#aaaaaa")
    axes.annotate(
      row["name"],
      (row["bits"], row["auroc"]),
      textcoords="offset points",
      xytext=(4, 3),
      fontsize=6,
      color=plots.INK,
    )
  axes.set_xscale("log")
  plots.dress(axes, x=BUDGETS["bits"], y="AUROC of short rules (x: shuffled)")
  return figure


def write(
  workdir: pathlib.Path,
  *,
  results: Mapping[str, Any],
  config: Mapping[str, Any],
  eigenvalues,
) -> pathlib.Path:
  """Writes `plots/*.png` and `report.html`.

  Args:
    workdir: of the study.
    results: with `rows`, `versus`, `answers`, `nearest_latents`.
    config: resolved, as plain dicts.
    eigenvalues: of the training rows' covariance, [D].
  """
  folder, rows = workdir / "plots", results["rows"]
  pictures = {
    "What is explained, and what the model loses, at which cost": plots.save(
      rates_figure(rows, eigenvalues), folder / "rates.png"
    ),
  }
  if any("auroc" in row for row in rows):
    pictures["How well rules on tokens say what is active"] = plots.save(
      interpretability_figure(rows), folder / "interpretability.png"
    )
  named = {
    **results,
    "rows": {row["name"]: dict(row) for row in rows},
    "versus": dict(enumerate(results["versus"])),
    "answers": dict(enumerate(results["answers"])),
    "nearest_latents": {
      f"{pair['clusters']} and {pair['dictionary']}": {
        n: v for n, v in pair.items() if isinstance(v, float)
      }
      for pair in results["nearest_latents"]
    },
  }
  return write_page(
    workdir / "report.html",
    title=f"Clusterings and dictionaries of {results['model']}, "
    f"{results['site']}",
    results=named,
    config=dict(config),
    plots=pictures,
    latents=[],
    summary=[
      (f"Answer {i}", text, "") for i, text in enumerate(results["answers"], 1)
    ],
  )
