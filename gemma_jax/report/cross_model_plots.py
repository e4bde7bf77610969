"""Pictures of maps between models: dots by map, matched latents, doses."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gemma_jax.report import plots

GREY = "#777777"
WORDS = {"fontsize": 10, "color": plots.INK}
PLAIN = {"fontsize": 9, "color": plots.INK, "parse_math": False}
DOTS = {  # by role, in the order from the top
  "linear": {"color": plots.BLUE, "marker": "o"},
  "network": {"color": plots.RED, "marker": "s"},
  "control": {"color": plots.PURPLE, "marker": "x"},
}
LINES = {"floor": GREY, "ceiling": plots.GREEN}  # roles drawn as lines
DASHES = ((0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)), "-")
CURVES = {
  "native": {"color": plots.GREEN, "marker": "o"},
  "transferred": {"color": plots.RED, "marker": "s"},
  "other": {"color": plots.PURPLE, "marker": "D"},
  "random": {"color": GREY, "marker": "x"},
  "matched": {"color": plots.RED, "marker": "s"},
  "dealt": {"color": plots.PURPLE, "marker": "D"},
  "zero": {"color": GREY, "marker": "x"},
  "mean": {"color": plots.BLUE, "marker": "^"},
}
OTHER = {"color": plots.INK, "marker": "v"}
MOST_PANELS = 12  # in a figure
# Of what an axis shows; arrows stand for what is further out.
SPANS = {"r2_pooled": (-0.5, 1), "recovered": (-0.5, 1.2), "fvu": (0, 1.5)}


def _clip(name: str, most: int) -> str:
  """A name without its middle: its ends tell it from its siblings."""
  half = (most - 1) // 2
  return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"


def _titles(names: Sequence[str], most: int) -> list[str]:
  """Routes or pairs on one line each where all fit, else on two."""
  if all(len(name) <= most for name in names):
    return list(names)
  return [
    "\n".join(
      _clip(end, most) for end in re.split(r" (?=[>|] )", name, maxsplit=1)
    )
    for name in names
  ]


def _panels(
  titles: Sequence[str], inches: float
) -> tuple[Figure, np.ndarray, list[Axes]]:
  """A figure, its grid of axes, and those of the titles, so high each."""
  columns = 2 if len(titles) == 4 else min(3, len(titles))
  rows = -(-len(titles) // columns)
  figure, grid = plots.canvas(1.0 + rows * (inches + 0.55), rows, columns)
  for axes in grid.flat[len(titles) :]:
    axes.remove()
  panels = list(grid.flat[: len(titles)])
  short = _titles(titles, 60 // columns - 1)
  for axes, title in zip(panels, short, strict=True):
    plots.dress(axes, x="", y="")
    axes.set_title(title, **PLAIN)
  return figure, grid, panels


def _legend(figure: Figure, columns: int = 3) -> None:
  """What has a label in any of the axes, once, above all of them."""
  handles = {}
  for axes in figure.axes:
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
      handles.setdefault(_clip(label, 100 // columns), handle)
  legend = figure.legend(
    handles.values(),
    handles,
    loc="outside upper center",
    ncols=columns,
    fontsize=9,
    labelcolor=plots.INK,
    frameon=False,
  )
  for text in legend.get_texts():
    text.set_parse_math(False)


def _finite(rows: Sequence[Mapping], *keys: str) -> list[Mapping[str, Any]]:
  """Rows that have all of these numbers."""
  return [r for r in rows if all(plots.is_finite(r.get(k)) for k in keys)]


def _ends(row: Mapping[str, Any], keys: Sequence[str]) -> list[float]:
  """The interval of a row, closed around the value where it has none."""
  value = row[keys[0]]
  return [row[k] if plots.is_finite(row.get(k)) else value for k in keys[1:]]


def _limits(rows, keys, span: tuple[float, float]) -> tuple[float, float]:
  """Those of the numbers and 0, within the span, and a margin."""
  seen = [0.0, *(v for r in rows for v in (r[keys[0]], *_ends(r, keys)))]
  left, right = np.clip((min(seen), max(seen)), *span)
  margin = 0.05 * (right - left) or 0.1
  return left - margin, right + margin


def _draw(axes: Axes, row, keys, y: float, style: Mapping[str, Any]) -> None:
  """A value and its interval; an arrow where they leave the axis."""
  value, ends, (left, right) = row[keys[0]], _ends(row, keys), axes.get_xlim()
  colour = style["color"]
  axes.plot(np.clip(ends, left, right), (y, y), color=colour, linewidth=1.6)
  if left <= value <= right:
    axes.plot(value, y, linestyle="none", markersize=4.5, **style)
  if min(*ends, value) < left:
    axes.plot(left, y, "<", color=colour, markersize=5, clip_on=False)
  if max(*ends, value) > right:
    axes.plot(right, y, ">", color=colour, markersize=5, clip_on=False)


def _rank(row: Mapping[str, Any]) -> int:
  """Where a role stands from the top."""
  return [*DOTS, row["role"]].index(row["role"])


def dots_figure(
  rows: Sequence[Mapping[str, Any]], keys: Sequence[str], *, x: str
) -> Figure | None:
  """Draws a number and its interval for every map, a panel for each route.

  Args:
    rows: with `route`, `map`, `role` and the numbers; those without a value
      are left out.
    keys: of value, low end and high end. The value's is one of `SPANS`.
    x: what the value is.

  Returns:
    A figure whose panels share their lines and limits. Floors and ceilings
    are upright lines, their intervals bands; None if there is no value.
  """
  rows = _finite(rows, keys[0])
  if not rows:
    return None
  routes = list(dict.fromkeys(row["route"] for row in rows))
  dots = sorted((r for r in rows if r["role"] not in LINES), key=_rank)
  names = list(dict.fromkeys(row["map"] for row in dots))
  marks = list(dict.fromkeys(r["map"] for r in rows if r["role"] in LINES))
  figure, grid, panels = _panels(routes, max(0.5, 0.17 * len(names) + 0.1))
  for axes, route in zip(panels, routes, strict=True):
    axes.set_xlim(*_limits(rows, keys, SPANS[keys[0]]))
    axes.grid(False, axis="y")
    for row in (one for one in rows if one["route"] == route):
      role = row["role"]
      if role not in LINES:
        style = DOTS.get(role, OTHER)
        _draw(axes, row, keys, names.index(row["map"]), style)
        axes.plot([], [], linestyle="none", label=role, **style)
        continue
      colour, (low, high) = LINES[role], _ends(row, keys)
      if high > low:
        axes.axvspan(low, high, color=colour, alpha=0.15, linewidth=0)
      axes.axvline(
        row[keys[0]],
        color=colour,
        linestyle=DASHES[marks.index(row["map"]) % len(DASHES)],
        linewidth=1.3,
        label=f"{role}: {row['map']}",
        zorder=1.5,
      )
    labels = [_clip(name, 24) for name in names]
    axes.set_yticks(range(len(names)), labels, parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", labelleft=axes in grid[:, 0], length=0)
    axes.locator_params(axis="x", nbins=4)
  figure.supxlabel(x, **WORDS)
  _legend(figure)
  return figure


def over_ridge_figure(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
  """Draws by how much each network's code R^2 is above that of ridge.

  Args:
    rows: as of the study; those of networks that have `delta_ridge` are
      drawn, open where the network never saw the layers.

  Returns:
    A figure with a line for each route, around a line at zero; None without
    such rows.
  """
  keys = ("delta_ridge", "delta_ridge_low", "delta_ridge_high")
  networks = [row for row in rows if row.get("role") == "network"]
  networks = _finite(networks, keys[0])
  if not networks:
    return None
  routes = list(dict.fromkeys(row["route"] for row in networks))
  names = list(dict.fromkeys(row["map"] for row in networks))
  labels = _titles(routes, 40)
  inches = max(0.12 + 0.13 * len(names), 0.36 if "\n" in "".join(labels) else 0)
  figure, grid = plots.canvas(1.4 + max(0.26, inches) * len(routes))
  axes = grid[0, 0]
  plots.dress(axes, x="code R² less that of ridge", y="")
  axes.set_xlim(*_limits(networks, keys, (-1, 1)))
  axes.grid(False, axis="y")
  axes.locator_params(axis="x", nbins=6)
  axes.axvline(0, color=plots.INK, linewidth=1.2, zorder=1)
  styles = {
    name: {
      "color": plots.COLOURS[(3 + i) % len(plots.COLOURS)],
      "marker": "sDo^vP"[i % 6],
    }
    for i, name in enumerate(names)
  }
  for row in networks:
    number = names.index(row["map"])
    shift = 0.7 * ((number + 0.5) / len(names) - 0.5)
    style = styles[row["map"]]
    if row.get("unseen"):
      style = style | {"markerfacecolor": "white"}
    _draw(axes, row, keys, routes.index(row["route"]) + shift, style)
  for name, style in styles.items():
    axes.plot([], [], label=name, linewidth=1.6, **style)
  if any(row.get("unseen") for row in networks):
    hollow = {"marker": "o", "color": GREY, "markerfacecolor": "white"}
    axes.plot([], [], label="open: layers never seen", ls="none", **hollow)
  for odd in range(1, len(routes), 2):
    axes.axhspan(odd - 0.5, odd + 0.5, color="#f4f4f4", zorder=0)
  axes.set_yticks(range(len(routes)), labels, parse_math=False)
  axes.set_ylim(len(routes) - 0.5, -0.5)
  _legend(figure, 2)
  return figure


def _known(values: Sequence[float | None] | None) -> np.ndarray:
  """Those that are numbers, sorted."""
  return np.sort([v for v in values or () if plots.is_finite(v)])


def matches_figure(matches: Sequence[Mapping[str, Any]]) -> Figure | None:
  """Draws the distribution of matched correlations beside the null's.

  Args:
    matches: with `pair`, `r` and `null`; those without `r` are left out.

  Returns:
    A figure with a panel for each pair and in it two cumulative shares; None
    if no pair has correlations.
  """
  drawn = [one for one in matches if _known(one.get("r")).size]
  if not drawn:
    return None
  figure, grid, panels = _panels([one["pair"] for one in drawn], 1.3)
  for axes, one in zip(panels, drawn, strict=True):
    for name, label, style in (
      ("null", "null", {"color": GREY, "linestyle": "--"}),
      ("r", "matched latents", {"color": plots.BLUE}),
    ):
      values = _known(one.get(name))
      if values.size:
        # From 0, so that a single value is a step as well.
        shares = np.arange(values.size + 1) / values.size
        at = [values[0], *values]
        axes.plot(at, shares, ds="steps-post", lw=1.6, label=label, **style)
    clear, of = one.get("significant"), one.get("eligible")
    if plots.is_finite(clear) and plots.is_finite(of):
      title = axes.get_title()
      axes.set_title(f"{title}\n{clear:,} of {of:,} clear", **PLAIN)
    axes.set_ylim(-0.03, 1.03)
    axes.set_yticks((0, 0.5, 1))
    axes.tick_params(labelleft=axes in grid[:, 0])
    axes.locator_params(axis="x", nbins=4)
    if axes is not panels[0]:
      axes.sharex(panels[0])
  figure.supxlabel("correlation of matched latents", **WORDS)
  figure.supylabel("share at or below", **WORDS)
  _legend(figure)
  return figure


def _curves(axes: Axes, points, by: str, at: str, keys: Sequence[str]) -> None:
  """A line for each value of a key, with upright intervals."""
  for name in dict.fromkeys(point[by] for point in points):
    style = CURVES.get(name, OTHER)
    own = sorted((p for p in points if p[by] == name), key=lambda p: p[at])
    places = [point[at] for point in own]
    low, high = np.transpose([_ends(point, keys) for point in own])
    axes.vlines(places, low, high, color=style["color"], linewidth=1)
    values = [point[keys[0]] for point in own]
    axes.plot(places, values, lw=1.4, markersize=4, label=name, **style)
  axes.axhline(0, color=plots.INK, linewidth=0.8, zorder=0.5)
  axes.locator_params(axis="y", nbins=5)


def _by_route(causal, name: str, *keys: str) -> dict[str, list]:
  """Points of an experiment that have these numbers, where there are any."""
  found = {one["route"]: _finite(one.get(name) or (), *keys) for one in causal}
  return {route: points for route, points in found.items() if points}


def inject_figure(causal: Sequence[Mapping[str, Any]]) -> Figure | None:
  """Draws the effect of directions against their dose.

  Args:
    causal: each with `route` and `inject`; points without an effect are left
      out.

  Returns:
    A figure with a panel for each route and in it a line for each kind of
    direction; None without points.
  """
  drawn = _by_route(causal, "inject", "dose", "effect")
  if not drawn:
    return None
  figure, _, panels = _panels(list(drawn), 1.4)
  for axes, points in zip(panels, drawn.values(), strict=True):
    _curves(axes, points, "vector", "dose", ("effect", "low", "high"))
    axes.locator_params(axis="x", nbins=5)
  figure.supxlabel("dose", **WORDS)
  figure.supylabel("effect", **WORDS)
  _legend(figure, 4)
  return figure


def substitution_figure(causal: Sequence[Mapping[str, Any]]) -> Figure | None:
  """Draws the KL recovered against how many latents are substituted.

  Args:
    causal: each with `route` and `substitution`; points that recovered
      nothing known are left out.

  Returns:
    A figure with a panel for each route and in it a line for each source of
    codes; None without points.
  """
  drawn = _by_route(causal, "substitution", "count", "recovered")
  if not drawn:
    return None
  figure, grid, panels = _panels(list(drawn), 1.4)
  counts = {point["count"] for points in drawn.values() for point in points}
  for axes, points in zip(panels, drawn.values(), strict=True):
    _curves(axes, points, "codes", "count", ("recovered", "low", "high"))
    axes.set_ylim(*SPANS["recovered"])
    axes.tick_params(labelleft=axes in grid[:, 0])
    if min(counts) > 0 and len(counts) > 1:
      axes.set_xscale("log")
  figure.supxlabel("latents substituted", **WORDS)
  figure.supylabel("KL recovered", **WORDS)
  _legend(figure, 4)
  return figure
