"""L0 against what it costs, for many dictionaries in one picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gemma_jax.report import plots

PANELS = {"fvu": "FVU", "delta_ce": "ΔCE (nats per token)"}


def frontier(x: Sequence[float], y: Sequence[float]) -> list[int]:
  """Points that none beats on both axes, by ascending x; smaller is better."""
  best, found = np.inf, []
  for i in sorted(range(len(x)), key=lambda i: (x[i], y[i])):
    if y[i] < best:
      best = y[i]
      found.append(i)
  return found


def pareto_figure(
  points: Sequence[Mapping[str, Any]],
  *,
  key: str = "l0",
  label: str = "L0 (latents per token)",
) -> Figure | None:
  """One panel for every measure that points have; None if there is none.

  Args:
    points: each with `name`, `key`, and `fvu` or `delta_ce` or both. `group`,
      where points have one, is told by the colour.
    key: what stands on the horizontal axis.
    label: of that axis.
  """
  panels = {
    panel: here
    for panel in PANELS
    if (
      here := [
        p
        for p in points
        if plots.is_finite(p.get(key)) and plots.is_finite(p.get(panel))
      ]
    )
  }
  if not panels:
    return None
  figure, grid = plots.canvas(3.6, columns=len(panels))
  groups = list(dict.fromkeys(str(p.get("group", "")) for p in points))
  for axes, (panel, here) in zip(grid[0], panels.items(), strict=True):
    x, y = ([p[name] for p in here] for name in (key, panel))
    edge = frontier(x, y)
    axes.plot(
      [x[i] for i in edge], [y[i] for i in edge], color="#aaaaaa", linewidth=1
    )
    for number, group in enumerate(groups):
      own = [p for p in here if str(p.get("group", "")) == group]
      axes.scatter(
        [p[key] for p in own],
        [p[panel] for p in own],
        s=22,
        color=plots.COLOURS[number % len(plots.COLOURS)],
        label=group,
        zorder=3,
      )
    for p in here:
      axes.annotate(
        p["name"],
        (p[key], p[panel]),
        textcoords="offset points",
        xytext=(4, 3),
        fontsize=6,
        color=plots.INK,
      )
    plots.dress(axes, x=label, y=PANELS[panel])
    if min(x) > 0 and max(x) > 4 * min(x):
      axes.set_xscale("log")
    if len(groups) > 1:
      plots.key(axes)
  return figure


def pareto(points: Sequence[Mapping[str, Any]], path: str | Path, **options):
  """Writes `pareto_figure` as a PNG; its path, or None without a picture."""
  drawn = pareto_figure(points, **options)
  return None if drawn is None else plots.save(drawn, path)
