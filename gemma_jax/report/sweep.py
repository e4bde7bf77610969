"""What came out of a sweep: a table, a picture, a page."""

import logging
import pathlib
from collections.abc import Mapping
from typing import Any

from gemma_jax import tables
from gemma_jax.report import plots
from gemma_jax.report.page import write_page
from gemma_jax.report.pareto import pareto

log = logging.getLogger("gemma_jax")

COLUMNS = ("l0", "fvu", "fvu_linear", "delta_ce", "ce_recovered", "kl")
COLUMNS += ("dead_fraction",)


def write(
  workdir: pathlib.Path,
  *,
  results: Mapping[str, Any],
  config: Mapping[str, Any],
  metrics: list[dict[str, Any]],
) -> pathlib.Path:
  """Writes `sweep.csv`, `plots/*.png` and `report.html`; logs the table.

  Args:
    workdir: of the run.
    results: contents of results.json, with `members`.
    config: resolved, as plain dicts.
    metrics: rows of metrics.jsonl; empty where nothing was trained.
  """
  members = results["members"]
  tables.write_csv(workdir / "sweep.csv", members)
  columns = ["name", *(c for c in COLUMNS if any(c in m for m in members))]
  log.info("\n%s", tables.aligned(members, columns))
  folder = workdir / "plots"
  pictures = {
    "L0 against FVU and delta CE, held-out": pareto(
      members, folder / "pareto.png"
    ),
  }
  if metrics:
    pictures["Training, mean over the members"] = plots.training_curves(
      metrics, folder / "training.png"
    )
  best = min(members, key=lambda m: m["fvu"])
  summary = [("Smallest FVU", best["fvu"], f"held-out; {best['name']}")]
  if "tokens_train" in results:
    rate = results["tokens_per_second_train"]
    summary.append(
      (
        "Tokens",
        f"{results['tokens_train']:,}",
        f"trained on, at {rate:,.0f} per second for all members",
      )
    )
  return write_page(
    workdir / "report.html",
    title=f"{len(members)} dictionaries of {results['model']}",
    results={**results, "members": {m["name"]: dict(m) for m in members}},
    config=dict(config),
    plots={name: path for name, path in pictures.items() if path},
    latents=[],
    summary=summary,
  )
