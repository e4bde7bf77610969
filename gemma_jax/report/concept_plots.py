"""Pictures of what concept vectors there are, layer by layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gemma_jax.report import plots
from gemma_jax.report.concept_cards import UNNAMED, validated

GREY = "#999999"


def above(axes: Axes, columns: int) -> None:
  """The legend over the panel, where no number can be under it."""
  plots.key(
    axes,
    loc="lower left",
    bbox_to_anchor=(0, 1),
    borderaxespad=0.2,
    ncols=columns,
  )


def _layers(axes: Axes) -> None:
  axes.xaxis.get_major_locator().set_params(integer=True)


def kurtosis_figure(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
  """Draws how peaked the logits of vectors are, beside random directions.

  Args:
    rows: of `results["kurtosis"]`, a layer each.

  Returns:
    A figure with two panels, quantiles on a log axis that is linear below 1,
    and the share above the null's 99th percentile; None without rows.
  """
  if not rows:
    return None
  layers = [row["layer"] for row in rows]
  figure, grid = plots.canvas(5.2, rows=2)
  (top,), (below,) = grid
  for name, label, style in (
    ("max", "largest", {"color": plots.RED, "marker": "^"}),
    ("p99", "99th percentile", {"color": plots.ORANGE, "marker": "D"}),
    ("p95", "95th percentile", {"color": plots.GREEN, "marker": "s"}),
    ("median", "median", {"color": plots.BLUE, "marker": "o"}),
    ("null_p99", "random, 99th", {"color": plots.INK, "linestyle": "--"}),
    ("null_median", "random, median", {"color": GREY, "linestyle": ":"}),
  ):
    values = np.array([row[name] for row in rows], np.float64)
    top.plot(layers, values, label=label, markersize=3.5, **style)
  plots.dress(top, x="", y="excess kurtosis")
  top.set_yscale("symlog", linthresh=1)
  above(top, columns=3)
  shares = [row["share_above_null_p99"] for row in rows]
  below.bar(layers, np.array(shares, np.float64), color=plots.BLUE)
  below.axhline(0.01, color=plots.INK, linestyle="--", label="by chance, 1 %")
  plots.dress(below, x="layer", y="share above random's 99th")
  below.set_ylim(0, 1)
  plots.key(below)
  for axes in (top, below):
    axes.set_xlim(layers[0] - 0.6, layers[-1] + 0.6)
    _layers(axes)
  return figure


def scores_figure(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
  """Draws how many vectors of each layer come how far.

  Args:
    rows: of `results["by_layer"]`.

  Returns:
    A figure with a bar in a bar in a bar; None without rows.
  """
  if not rows:
    return None
  figure, grid = plots.canvas(3.4)
  axes = grid[0, 0]
  layers = [row["layer"] for row in rows]
  for name, colour, width in (
    ("scored", "#cccccc", 0.9),
    ("tested", plots.ORANGE, 0.6),
    ("validated", plots.BLUE, 0.3),
  ):
    counts = [row[name] for row in rows]
    label = f"{name}, {sum(counts):,}"
    axes.bar(layers, counts, width=width, color=colour, label=label)
  plots.dress(axes, x="layer", y="vectors")
  axes.set_yscale("symlog", linthresh=1)
  axes.set_ylim(bottom=0)
  _layers(axes)
  above(axes, columns=3)
  return figure


def concepts_figure(results: Mapping[str, Any]) -> Figure | None:
  """Draws what the validated vectors of each layer are of.

  Args:
    results: with `validation_results` and `by_layer`.

  Returns:
    A figure with a bar for each layer, of a piece for each lexicon; None if
    no vector was validated.
  """
  rows = validated(results)
  if not rows:
    return None
  found = [row.get("category") or UNNAMED for row in rows]
  layers = sorted(
    {row["layer"] for row in [*results.get("by_layer", ()), *rows]}
  )
  figure, grid = plots.canvas(3.8)
  axes, below = grid[0, 0], np.zeros(len(layers))
  # The commonest at the bottom, where bars can be compared, no name on top.
  names = sorted(set(found), key=lambda n: (n == UNNAMED, -found.count(n), n))
  for number, name in enumerate(names):
    counts = np.array(
      [
        sum(
          row["layer"] == layer and own == name
          for row, own in zip(rows, found, strict=True)
        )
        for layer in layers
      ]
    )
    grey = name == UNNAMED
    axes.bar(
      layers,
      counts,
      bottom=below,
      color="#cccccc" if grey else plots.COLOURS[number % 6],
      hatch="" if grey else ("", "///", "...")[number // 6 % 3],
      edgecolor="white",
      linewidth=0.5,
      label=f"{name}, {found.count(name)}",
    )
    below = below + counts
  plots.dress(axes, x="layer", y="validated vectors")
  axes.set_xlim(layers[0] - 0.6, layers[-1] + 0.6)
  axes.yaxis.get_major_locator().set_params(integer=True)
  _layers(axes)
  above(axes, columns=3)
  return figure
