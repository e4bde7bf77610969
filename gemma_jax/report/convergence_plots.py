"""Pictures of how alike models are: forests, maps of layers, nulls."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from gemma_jax import tables
from gemma_jax.report import plots

LEVELS = ("behaviour", "activations", "features")
VERDICTS = {
  "equivalent": {"color": plots.BLUE, "marker": "o"},
  "convergent": {"color": plots.ORANGE, "marker": "s"},
  "not shown": {"color": "#777777", "marker": "D", "markerfacecolor": "white"},
}
SPAN = (-0.25, 1.1)  # of the axis of shares
GREY, WORDS = "#aaaaaa", {"fontsize": 10, "color": plots.INK}
MOST_NULLS = 12  # in a figure


def levels_of(
  results, *, whole: bool = True, shared: bool = False
) -> dict[str, list[Mapping]]:
  """Levels that have primary rows, on all prompts or on single capabilities.

  With `shared` only rows that have a share.
  """
  found = {
    level: [
      row
      for row in results["rows"]
      if row["primary"]
      and row["level"] == level
      and (row["capability"] == "all") == whole
      and (plots.is_finite(row["share"]) or not shared)
    ]
    for level in LEVELS
  }
  return {level: rows for level, rows in found.items() if rows}


def pair_of(row: Mapping[str, Any]) -> str:
  """Both names."""
  return f"{row['a']} and {row['b']}"


def _clip(name: str, most: int) -> str:
  """A name without its middle: its ends tell it from its siblings."""
  half = (most - 1) // 2
  return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"


def _label(row: Mapping[str, Any], most: int) -> str:
  """The pair on one line where it fits, else on two."""
  if len(pair_of(row)) <= most:
    return pair_of(row)
  return f"{_clip(row['a'], most)}\nand {_clip(row['b'], most - 4)}"


def digits(value: float | None, style: str = "#.3g") -> str:
  """A number in a few digits, "-" for none."""
  return format(value, style).rstrip(".") if plots.is_finite(value) else "-"


def _ticks(layers: Sequence[float]) -> tuple[range, list[str]]:
  """Every layer, or every second, fifth, ... where there are many."""
  step = next(s for s in (1, 2, 5, 10, 20, 50, 100) if len(layers) <= 9 * s)
  at = range(0, len(layers), step)
  return at, [f"{layers[i]:.3g}" for i in at]


def heat_map_figure(one_map: Mapping[str, Any]) -> Figure:
  """Draws the similarity of every layer of one model to every of another.

  Args:
    one_map: with `a`, `b`, `measure`, `layers_a`, `layers_b`, `scores`,
      `calibrated`, `p` [A, B each] and `best`, two indices. What lies outside
      [0, 1] gets the colour of the nearer end.

  Returns:
    A figure with two panels, raw and calibrated, and their colour bar. The
    only line of a panel is the ring around the best pair.
  """
  figure, grid = plots.canvas(3.5, columns=2)
  (i, j), a, b = one_map["best"], one_map["layers_a"], one_map["layers_b"]
  for axes, kind in zip(grid[0], ("scores", "calibrated"), strict=True):
    # None, where there is no score, becomes NaN and stays white.
    values = np.array(one_map[kind], np.float64)
    image = axes.imshow(values, vmin=0, vmax=1, origin="lower", aspect="auto")
    axes.plot(
      j,
      i,
      "o",
      markersize=9,
      markerfacecolor="none",
      markeredgecolor="white",
      path_effects=[withStroke(linewidth=3, foreground=plots.INK)],
    )
    plots.dress(axes, x=f"layer of {_clip(one_map['b'], 24)}", y="")
    axes.grid(False)
    axes.set_xticks(*_ticks(b))
    axes.set_yticks(*_ticks(a))
    axes.set_title(f"{kind}, {digits(values[i, j])} at the ring", **WORDS)
  grid[0, 0].set_ylabel(f"layer of {_clip(one_map['a'], 24)}", **WORDS)
  figure.suptitle(
    f"{one_map['measure']}: best at layers {a[i]:.3g} and {b[j]:.3g}, "
    f"p = {tables.text(one_map['p'][i][j])}",
    **WORDS,
  )
  bar = figure.colorbar(image, ax=list(grid[0]), fraction=0.05, pad=0.02)
  bar.ax.tick_params(colors=plots.INK, labelsize=9, length=3)
  return figure


def _draw_share(axes: Axes, row: Mapping, y: float, style: Mapping) -> None:
  """A share and its interval; an arrow where they leave the axis."""
  share, colour, (left, right) = row["share"], style["color"], SPAN
  low, high = (
    row[end] if plots.is_finite(row[end]) else share
    for end in ("share_low", "share_high")
  )
  axes.plot(np.clip((low, high), *SPAN), (y, y), color=colour, linewidth=1.8)
  if left <= share <= right:
    axes.plot(share, y, linestyle="none", **style)
  if min(low, share) < left:
    axes.plot(left, y, "<", color=colour, markersize=6, clip_on=False)
  if max(high, share) > right:
    axes.plot(right, y, ">", color=colour, markersize=6, clip_on=False)


def _shares(axes: Axes, margin: float, ticks: int, *, x: str, title: str):
  """The axis from floor to identity, with the lines of reference."""
  plots.dress(axes, x=x, y="")
  axes.grid(False)
  axes.set_title(title, loc="left", **WORDS)
  solid = {"color": GREY, "linewidth": 1.2, "zorder": 0.5}
  dashed = solid | {"linestyle": "--"}
  axes.axvline(0, label="0 floor, 1 identity", **solid)
  axes.axvline(1, **solid)
  axes.axvline(margin, label=f"margin of {margin:.3g} from either", **dashed)
  axes.axvline(1 - margin, **dashed)
  axes.set_xlim(*SPAN)
  axes.set_xticks(np.linspace(0, 1, ticks))


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
  """What has a label in these axes, below all of them."""
  figure.legend(
    *axes.get_legend_handles_labels(),
    loc="outside lower center",
    ncols=columns,
    fontsize=9,
    labelcolor=plots.INK,
    frameon=False,
  )


def forest_figure(results: Mapping[str, Any]) -> Figure | None:
  """Draws how far each pair is from floor to identity, on all prompts.

  Args:
    results: with `rows` and `margin`. Rows without a share are left out.

  Returns:
    A figure with a panel for each level, and in it a line for each pair from
    the top; None if there is no share.
  """
  panels = levels_of(results, shared=True)
  if not panels:
    return None
  labels = {k: [_label(r, 40) for r in rows] for k, rows in panels.items()}
  two_lines = any("\n" in text for own in labels.values() for text in own)
  inches = 0.36 if two_lines else 0.24
  ratios = [len(rows) + 0.2 for rows in panels.values()]
  height = 1.1 + 0.4 * len(panels) + inches * sum(ratios)
  figure, grid = plots.canvas(height, rows=len(panels))
  grid[0, 0].get_gridspec().set_height_ratios(ratios)
  for axes, (level, rows) in zip(grid[:, 0], panels.items(), strict=True):
    for y, row in enumerate(rows):
      _draw_share(axes, row, y, VERDICTS[row["verdict"]])
    measures = ", ".join(dict.fromkeys(row["measure"] for row in rows))
    last = axes is grid[-1, 0]
    label = "share of the way from floor to identity" if last else ""
    title = f"{level} ({measures})"
    _shares(axes, results["margin"], 5, x=label, title=title)
    axes.tick_params(labelbottom=last)
    axes.set_yticks(range(len(rows)), labels[level])
    axes.set_ylim(len(rows) - 0.4, -0.6)
  for verdict, style in VERDICTS.items():
    axes.plot([], [], label=verdict, linewidth=1.8, **style)
  _legend(figure, axes, columns=3)
  return figure


def _spread(rows: Sequence[Mapping[str, Any]]) -> float:
  """Greatest distance between the shares of capabilities, on any level."""
  levels: dict[str, list[float]] = {}
  for row in rows:
    levels.setdefault(row["level"], []).append(row["share"])
  return max(max(shares) - min(shares) for shares in levels.values())


def capabilities_figure(results: Mapping[str, Any]) -> Figure | None:
  """Draws the share of each pair by capability.

  Args:
    results: with `rows` and `margin`. Rows without a share are left out.

  Returns:
    A figure with a panel for each level and a colour for each pair; of more
    than six pairs, those whose capabilities lie furthest apart. None if there
    is no share.
  """
  panels = levels_of(results, whole=False, shared=True)
  pairs: dict[tuple[str, str], list] = {}
  for row in itertools.chain(*panels.values()):
    pairs.setdefault((row["a"], row["b"]), []).append(row)
  if not pairs:
    return None
  widest = sorted(pairs, key=lambda pair: -_spread(pairs[pair]))
  shown = [pair for pair in pairs if pair in widest[: len(plots.COLOURS)]]
  names = list(
    dict.fromkeys(row["capability"] for own in pairs.values() for row in own)
  )
  height = 1.3 + 0.22 * len(shown)
  height += len(names) * max(0.32, 0.1 + 0.13 * len(shown))
  figure, grid = plots.canvas(height, columns=len(panels))
  for axes, (level, rows) in zip(grid[0], panels.items(), strict=True):
    for number, pair in enumerate(shown):
      style = {"color": plots.COLOURS[number], "marker": "osD^vP"[number]}
      style["markersize"] = 4.5
      shift = 0.8 * ((number + 0.5) / len(shown) - 0.5)
      for row in rows:
        if (row["a"], row["b"]) == pair:
          y = names.index(row["capability"]) + shift
          _draw_share(axes, row, y, style)
      label = " and ".join(_clip(name, 36) for name in pair)
      axes.plot([], [], label=label, linewidth=1.8, **style)
    for odd in range(1, len(names), 2):
      axes.axhspan(odd - 0.5, odd + 0.5, color="#f4f4f4", zorder=0)
    _shares(axes, results["margin"], 3, x="share", title=level)
    axes.set_yticks(range(len(names)), [_clip(name, 26) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(labelleft=axes is grid[0, 0])
  if len(shown) < len(pairs):
    figure.suptitle(
      f"{len(shown)} of {len(pairs)} pairs: those whose capabilities differ "
      "most",
      **WORDS,
    )
  longest = max(len(a + b) for a, b in shown)
  _legend(figure, axes, columns=2 if longest < 32 else 1)
  return figure


def null_figure(maps: Sequence[Mapping[str, Any]]) -> Figure | None:
  """Draws the best score of each map among those of the null.

  Args:
    maps: each with `a`, `b`, `measure`, `scores`, `best`, `threshold` and
      `null_best` [K]. The first 12 are drawn.

  Returns:
    A figure with a panel for each map: a histogram and two lines, the
    threshold and the observed best score. None if there are no maps.
  """
  if not maps:
    return None
  shown = maps[:MOST_NULLS]
  columns = min(3, len(shown))
  rows = -(-len(shown) // columns)
  figure, grid = plots.canvas(1.0 + 1.75 * rows, rows, columns)
  for axes in grid.flat[len(shown) :]:
    axes.remove()
  for number, one in enumerate(shown):
    axes, (i, j) = grid.flat[number], one["best"]
    null = [value for value in one["null_best"] if plots.is_finite(value)]
    axes.hist(null, bins=20, color=GREY, label="null")
    observed, limit = one["scores"][i][j], one["threshold"]
    axes.axvline(limit, color=plots.INK, ls="--", lw=1.3, label="threshold")
    axes.axvline(observed, color=plots.BLUE, lw=1.8, label="observed")
    lowest = number + columns >= len(shown)
    plots.dress(axes, x="best score of a map" if lowest else "", y="")
    axes.locator_params(nbins=4)
    title = f"{_label(one, 66 // columns)}\n{one['measure']}"
    axes.set_title(title, fontsize=9, color=plots.INK)
  figure.supylabel("draws of the null", **WORDS)
  if len(shown) < len(maps):
    figure.suptitle(f"The first {len(shown)} of {len(maps)} maps", **WORDS)
  _legend(figure, axes, columns=3)
  return figure
