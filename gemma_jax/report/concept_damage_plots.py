"""Pictures of what damage to concept vectors does, and to what.

Words come from any script, and the font of these pictures has few of them:
vectors are labelled by layer and neuron, and by a word that can be drawn.
"""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure

from gemma_jax.report import plots
from gemma_jax.report.concept_cards import (
  name_of,
  rivals,
  unconfirmed,
  validated,
)
from gemma_jax.report.concept_plots import GREY, above
from gemma_jax.report.page import visible

MOST_ROWS, MOST_WORDS, MOST_DOSES = 40, 24, 6
WORDS = {"fontsize": 10, "color": plots.INK}


def _drawable(word: str) -> bool:
  """Whether the font has all of it, in the order in which it is drawn."""
  font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
  return bool(word) and all(
    font.get_char_index(ord(c))
    and unicodedata.bidirectional(c) not in ("R", "AL", "AN")
    for c in word
  )


def label_of(row: Mapping[str, Any], most: int = 12) -> str:
  """A name and the first word that can be drawn."""
  words = (visible(word).strip() for word in row.get("words") or ())
  word = next(filter(_drawable, words), "")
  word = word if len(word) <= most else f"{word[: most - 1]}…"
  return f"{name_of(row)} {word}".strip()


def _magnitude(values) -> float:
  """A power of ten below most values: where an axis begins to be a log."""
  away = np.abs(np.asarray(values, np.float64))
  away = away[np.isfinite(away) & (away > 0)]
  return 10 ** np.floor(np.log10(np.median(away))) if away.size else 1.0


def damage_figure(results: Mapping[str, Any]) -> Figure | None:
  """Draws what a concept's prompts lose over what control prompts do.

  Args:
    results: with `validation_results` and `random`.

  Returns:
    A figure with a marker for each test, and lines where the effect is 1, 2
    and 5 times the control; None without tests.
  """
  random = results["random"]["rows"]
  groups = {
    "random": (random, {"color": GREY, "marker": "x"}),
    "not confirmed": (
      unconfirmed(results),
      {"edgecolors": plots.ORANGE, "facecolors": "none", "marker": "D"},
    ),
    "validated": (validated(results), {"color": plots.BLUE, "marker": "o"}),
  }
  both = [
    (row["control"], row["effect"])
    for row in [*results["validation_results"], *random]
  ]
  if not both:
    return None
  figure, grid = plots.canvas(4.6)
  axes = grid[0, 0]
  least = _magnitude(both)
  furthest = np.nanmax(np.abs(both)) or 1.0
  away = np.linspace(0, 1, 200) ** 3 * 1.5 * furthest
  for ratio, dashes in ((5, "-"), (2, "--"), (1, ":")):
    axes.plot(
      [*-away[::-1], *away],
      [*ratio * away[::-1], *ratio * away],
      color=GREY,
      linewidth=1,
      linestyle=dashes,
      label=f"{ratio} times the control",
      zorder=1,
    )
  for name, (rows, style) in groups.items():
    axes.scatter(
      [row["control"] for row in rows],
      [row["effect"] for row in rows],
      s=22,
      linewidths=1.2,
      label=f"{name}, {len(rows)}",
      **style,
    )
  for unit in ("x", "y"):
    getattr(axes, f"set_{unit}scale")("symlog", linthresh=least)
  axes.set_xlim(-1.5 * furthest, 1.5 * furthest)
  axes.set_ylim(-1.5 * furthest, 1.5 * furthest)
  plots.dress(
    axes,
    x="control prompts lose (nats a byte)",
    y="concept's prompts lose (nats a byte)",
  )
  above(axes, columns=2)
  return figure


def _strips(
  rows: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[str, list, list, dict]]:
  """Of the vectors, the neurons and the random directions: x, y, and style."""
  own = [row["ratio"] for row in rows]
  yield "the vector", own, [*range(len(rows))], {"color": plots.BLUE}
  for kind, label, style in (
    ("neuron", "other neurons", {"color": plots.ORANGE, "marker": "s"}),
    ("random", "random directions", {"color": GREY, "marker": "x"}),
  ):
    at = [(x, y) for y, row in enumerate(rows) for x in rivals(row, [kind])]
    yield label, [x for x, _ in at], [y for _, y in at], style


def controls_figure(results: Mapping[str, Any]) -> Figure | None:
  """Draws the ratio of validated vectors beside those of their controls.

  Args:
    results: with `validation_results`.

  Returns:
    A figure with a line for each vector, the most specific on top, of which
    the first 40 are shown; None if no vector was validated.
  """
  every = validated(results)
  rows = every[:MOST_ROWS]
  if not rows:
    return None
  figure, grid = plots.canvas(1.2 + 0.2 * len(rows))
  axes = grid[0, 0]
  for label, x, y, style in _strips(rows):
    axes.scatter(x, y, s=20, linewidths=1.2, label=label, **style)
  axes.axvline(0, color=GREY, linewidth=1, zorder=0.5)
  more = f"; the first {len(rows)} of {len(every)}" * (len(every) > len(rows))
  plots.dress(axes, x=f"effect over control (ratio){more}", y="")
  axes.set_xscale("symlog", linthresh=1)
  axes.set_yticks(range(len(rows)), [*map(label_of, rows)], parse_math=False)
  axes.set_ylim(len(rows) - 0.4, -0.6)
  above(axes, columns=3)
  return figure


def matrix_figure(results: Mapping[str, Any]) -> Figure | None:
  """Draws whose prompts lose most under the damage of each vector.

  Args:
    results: with `matrix` and `validation_results`.

  Returns:
    A figure with a heat map, rows vectors and columns their prompts, in the
    same order; None without a matrix.
  """
  matrix = results.get("matrix") or {}
  if not matrix.get("loss"):
    return None
  loss = np.array(matrix["loss"], np.float64)
  count = len(loss)
  figure, grid = plots.canvas(1.3 + max(1.6, 0.2 * min(count, MOST_WORDS)))
  axes = grid[0, 0]
  # One prompt that loses everything would leave the rest without a colour.
  most = float(np.nanquantile(np.abs(loss), 0.98)) or 1.0
  image = axes.imshow(loss, cmap="PuOr_r", vmin=-most, vmax=most, aspect="auto")
  plots.dress(axes, x="prompts of", y="")
  axes.grid(False)
  step = -(-count // MOST_WORDS)
  by_row = {row["row"]: label_of(row) for row in validated(results)}
  rows = matrix.get("rows") or list(by_row)
  at = range(0, count, step)
  labels = [f"{by_row.get(rows[i], '')}  {i + 1}" for i in at]
  axes.set_yticks(at, labels, parse_math=False)
  axes.set_xticks(at, [str(i + 1) for i in at])
  dominance = matrix.get("dominance") or matrix
  if plots.is_finite(dominance.get("difference")):
    axes.set_title(
      f"own prompts lose {dominance['difference']:.3g} nats a byte more, "
      f"p = {dominance['p']:.3g}",
      loc="left",
      **WORDS,
    )
  bar = figure.colorbar(image, ax=axes, extend="both", fraction=0.05, pad=0.02)
  bar.set_label("nats a byte", **WORDS)
  bar.ax.tick_params(colors=plots.INK, labelsize=9, length=3)
  return figure


def doses_figure(results: Mapping[str, Any]) -> Figure | None:
  """Draws the damage against how much of a vector is changed.

  Args:
    results: with `doses` and `validation_results`.

  Returns:
    A figure with two panels, by the factor of the coefficient and by the
    length of noise, and in each two lines for each of the first six vectors;
    None without doses.
  """
  doses = list(results.get("doses") or ())[:MOST_DOSES]
  if not doses:
    return None
  by_row = {row["row"]: row for row in results["validation_results"]}
  figure, grid = plots.canvas(3.4 + 0.2 * len(doses), columns=2)
  for axes, kind, x, x_label in (
    (grid[0, 0], "factors", "factor", "factor of the coefficient"),
    (grid[0, 1], "noise", "noise", "noise (lengths of the vector)"),
  ):
    for number, dose in enumerate(doses):
      points = sorted(dose[kind], key=lambda point: point[x])
      for part, dashes in (("concept", "-"), ("control", "--")):
        axes.plot(
          [point[x] for point in points],
          np.array([point[part] for point in points], np.float64),
          color=plots.COLOURS[number],
          marker="osD^vP"[number],
          markersize=3.5,
          linestyle=dashes,
          label=label_of(by_row[dose["row"]]) if part == "concept" else "",
        )
    plots.dress(axes, x=x_label, y="")
  grid[0, 1].sharey(grid[0, 0])
  grid[0, 0].set_ylabel("loss (nats a byte)", **WORDS)
  grid[0, 0].invert_xaxis()  # from no change to the largest
  grid[0, 1].plot([], [], color=plots.INK, label="its concept's prompts")
  grid[0, 1].plot([], [], "--", color=plots.INK, label="control prompts")
  legend = figure.legend(
    *grid[0, 1].get_legend_handles_labels(),
    loc="outside lower center",
    ncols=2,
    fontsize=9,
    labelcolor=plots.INK,
    frameon=False,
  )
  for text in legend.get_texts():
    text.set_parse_math(False)
  return figure
