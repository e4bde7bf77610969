"""Every dictionary against the best clustering that costs no more."""

from collections.abc import Mapping, Sequence
from typing import Any

from gemma_jax.metrics import SpliceLosses, document_interval
from gemma_jax.metrics.intervals import DocumentSums
from studies.codes import Code

BUDGETS = {"bits": "bits", "parameters": "parameters", "encode_flops": "FLOPs"}
RIVALS = ("kmeans", "spherical", "residual", "product")
UNTOLD = "not told apart"


def versus(
  found: Sequence[Code],
  rows: Sequence[Mapping[str, Any]],
  sums: Mapping[str, DocumentSums],
  losses: SpliceLosses,
) -> list[dict[str, Any]]:
  """A row for every dictionary, budget and measure.

  The rival is the clustering within the budget that explains most.

  Args:
    found: the codes.
    rows: their numbers.
    sums: "error" of each code by document, and "away" of "all".
    losses: with each code in the site's place.
  """
  by_name = {row["name"]: row for row in rows}
  out = []
  for ours in (c for c in found if c.kind == "dictionary"):
    for budget, word in BUDGETS.items():
      within = [
        c
        for c in found
        if c.kind in RIVALS
        and by_name[c.name][budget] <= by_name[ours.name][budget]
      ]
      if not within:
        continue
      rival = min(within, key=lambda c: by_name[c.name]["fvu"])
      out += _duel(by_name, sums, losses, ours.name, rival.name, word)
  return out


def _duel(by_name, sums, losses, ours, rival, budget):
  away = sums["all"]["away"]
  apart = sums[rival]["error"] - sums[ours]["error"]
  intervals = {
    "fvu": document_interval(apart, away),
    "delta_ce": document_interval(
      losses.ce[rival] - losses.ce[ours], losses.tokens
    ),
  }
  out = []
  for measure in ("fvu", "delta_ce", "auroc"):
    pair = [by_name[name].get(measure) for name in (ours, rival)]
    if None in pair:
      continue
    difference = pair[1] - pair[0]
    interval = intervals.get(measure)
    if measure == "auroc":
      mdd = max(by_name[name]["auroc_mdd"] for name in (ours, rival))
      interval = difference - mdd, difference + mdd
    low, high = interval or (None, None)
    better = UNTOLD
    if interval and (low > 0 or high < 0):
      smaller = difference < 0
      better = rival if smaller == (measure != "auroc") else ours
    out.append(
      {
        "dictionary": ours,
        "budget": budget,
        "rival": rival,
        "measure": measure,
        "ours": pair[0],
        "theirs": pair[1],
        "difference": difference,
        "low": low,
        "high": high,
        "better": better,
      }
    )
  return out


def answers(rows) -> list[str]:
  """In words, one line for every dictionary and budget."""
  words = {
    "fvu": "explains more",
    "delta_ce": "is more faithful",
    "auroc": "is easier to interpret",
  }
  out = []
  for row in rows:
    told = row["better"] != UNTOLD
    verdict = (
      f"{row['better']} {words[row['measure']]}"
      if told
      else f"which {words[row['measure']]} cannot be told"
    )
    span = "no interval"
    if row["low"] is not None:
      span = f"{row['low']:.4g} to {row['high']:.4g}"
    out.append(
      f"At no more {row['budget']} than {row['dictionary']}: {verdict}; "
      f"{row['measure']} {row['ours']:.4g} against {row['theirs']:.4g} of "
      f"{row['rival']} (difference {row['difference']:.4g}, {span})."
    )
  return out
