"""How alike models are: text for the terminal, pictures, tables, a page."""

import itertools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from gemma_jax import tables
from gemma_jax.report import plots
from gemma_jax.report.page import write_page

LEVELS = ("behaviour", "activations", "features")
VERDICTS = {
  "equivalent": {"color": plots.BLUE, "marker": "o"},
  "convergent": {"color": plots.ORANGE, "marker": "s"},
  "not shown": {"color": "#777777", "marker": "D", "markerfacecolor": "white"},
}
COLUMNS = {
  "pair": "pair",
  "measure": "measure",
  "value": "value [95 %]",
  "null": "null",
  "floor": "floor",
  "share": "share [95 %]",
  "p_corrected": "corrected p",
  "verdict": "verdict",
}
CAPTIONS = {
  "forest": "How far each pair of models is on the way from the floor, one "
  "model's weights re-randomised (0), to a model compared with itself (1), on "
  "all prompts. The further right, the more alike. Bars are 95 % intervals; "
  "an arrow says that a bar goes on beyond the axis.",
  "capabilities": "The same on the prompts of each capability. Look for a "
  "colour whose bars lie apart: that pair is more alike in one capability "
  "than in another.",
  "nulls": "Grey: the best score over all pairs of layers when items are "
  "paired at random. Blue: the best score observed. Right of the dashed "
  "threshold it is higher than chance explains.",
}
SPAN = (-0.25, 1.1)  # of the axis of shares
GREY, WORDS = "#aaaaaa", {"fontsize": 10, "color": plots.INK}
MOST_NULLS, MOST_MAPS = 12, 24  # in a figure, in the page


def _levels(results, *, whole=True, shared=False) -> dict[str, list[Mapping]]:
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


def _pair(row: Mapping[str, Any]) -> str:
  return f"{row['a']} and {row['b']}"


def _clip(name: str, most: int) -> str:
  """A name without its middle: its ends tell it from its siblings."""
  half = (most - 1) // 2
  return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"


def _label(row: Mapping[str, Any], most: int) -> str:
  """The pair on one line where it fits, else on two."""
  if len(_pair(row)) <= most:
    return _pair(row)
  return f"{_clip(row['a'], most)}\nand {_clip(row['b'], most - 4)}"


def _digits(value: float | None, style: str = "#.3g") -> str:
  return format(value, style).rstrip(".") if plots.is_finite(value) else "-"


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
  """A row as the tables show it."""

  def interval(style, *names):
    centre, low, high = (_digits(row[name], style) for name in names)
    return "-" if centre == "-" else f"{centre} [{low}, {high}]"

  return {
    **row,
    "pair": _pair(row),
    "value": interval("#.3g", "value", "low", "high"),
    "null": _digits(row["null"]),
    "floor": _digits(row["floor"]),
    "share": interval(".3f", "share", "share_low", "share_high"),
  }


def summary(results: Mapping[str, Any]) -> str:
  """The study as text, a line for each level and pair.

  Args:
    results: with `rows`, `models` and `refused`. Lines are the primary rows
      on all prompts. Average and sample standard deviation are over the pairs
      that have a share, where these are at least two.
  """
  levels = _levels(results)
  prompts = {row["prompts"] for rows in levels.values() for row in rows} or {0}
  ends = dict.fromkeys((min(prompts), max(prompts)))
  models = list(results["models"])
  lines = [
    "CONVERGENCE BETWEEN MODELS",
    f"Models: {len(models)} ({', '.join(models)})",
    f"Prompts: {' to '.join(map(str, ends))}",
    f"Refused comparisons: {len(results['refused'])}",
    "Share: of the way from the floor (0) to identity (1)",
  ]
  for level, rows in levels.items():
    table = tables.aligned(list(map(_cells, rows)), COLUMNS)
    lines += ["", level.upper(), *(f"  {line}" for line in table.split("\n"))]
    shares = [row["share"] for row in rows if plots.is_finite(row["share"])]
    if len(shares) > 1:
      mean, deviation = np.mean(shares), np.std(shares, ddof=1)
      lines += [
        f"  Average share: {mean:.3f} ± {deviation:.3f}",
        f"  Range: {min(shares):.3f} to {max(shares):.3f}",
      ]
  return "\n".join(lines)


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
    axes.set_title(f"{kind}, {_digits(values[i, j])} at the ring", **WORDS)
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
  panels = _levels(results, shared=True)
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
  panels = _levels(results, whole=False, shared=True)
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


def _map_names(maps: Sequence[Mapping[str, Any]]) -> list[str]:
  """A file name for each map, without its ending; no two are alike."""
  names: list[str] = []
  for one in maps:
    text = f"map_{one['a']}_{one['b']}_{one['measure']}"
    # File systems end names at 255 bytes, and some ignore case.
    stem = name = re.sub(r"[^A-Za-z0-9.-]", "_", text)[:200]
    number = 1
    while name.lower() in map(str.lower, names):
      number += 1
      name = f"{stem}_{number}"
    names.append(name)
  return names


def _pictures(folder: pathlib.Path, results: Mapping[str, Any]):
  """Writes all of them; captions and paths of those for the page."""
  maps = results["maps"]
  figures = {
    "forest": forest_figure(results),
    "capabilities": capabilities_figure(results),
    "nulls": null_figure(maps),
  }
  pictures = {
    CAPTIONS[name]: plots.save(figure, folder / f"{name}.png")
    for name, figure in figures.items()
    if figure
  }
  left = max(0, len(maps) - MOST_MAPS)
  more = f" {left} more maps are only in the folder." if left else ""
  for number, name in enumerate(_map_names(maps)):
    path = plots.save(heat_map_figure(maps[number]), folder / f"{name}.png")
    if number < MOST_MAPS:
      caption = (
        f"{maps[number]['measure']} between the layers of {maps[number]['a']} "
        f"(upwards) and {maps[number]['b']} (to the right): left as measured; "
        "right calibrated, where 0 is no more than chance explains. The ring "
        f"marks the best pair of layers. plots/{path.name}."
      )
      pictures[caption + more] = path
      more = ""
  return pictures


def _for_page(results: Mapping[str, Any]) -> dict[str, Any]:
  """Names for rows and maps; without what only the files hold."""
  maps, apart = results["maps"], ("a", "b", "level", "capability", "primary")
  compared: dict[str, dict] = {}
  for row in results["rows"]:
    if row["primary"] and row["capability"] == "all":
      compared.setdefault(_pair(row), {})[row["level"]] = {
        k: v for k, v in row.items() if k not in apart
      }
  best = {}
  for one, name in zip(maps, _map_names(maps), strict=True):
    i, j = one["best"]
    best[name] = {
      "best": [one["layers_a"][i], one["layers_b"][j]],
      "threshold": one["threshold"],
      **{kind: one[kind][i][j] for kind in ("scores", "calibrated", "p")},
    }
  return {
    # A place where the page can show the definition of each measure.
    "measures": {row["measure"]: row["level"] for row in results["rows"]},
    **results,
    "rows": compared,
    "maps": best,
    "refused": {
      i: f"{_pair(refusal)}, {refusal['measure']}: {refusal['reason']}"
      for i, refusal in enumerate(results["refused"], 1)
    },
  }


def write(
  workdir: pathlib.Path,
  *,
  results: Mapping[str, Any],
  config: Mapping[str, Any],
) -> pathlib.Path:
  """Writes `plots/*.png`, `rows.csv`, `table.md` and `report.html`.

  Args:
    workdir: of the study; made if need be.
    results: with `rows`, `maps`, `refused`, `margin`, `models` and
      `definitions`. Every row is in `rows.csv`, the primary ones in
      `table.md`, those on all prompts in the page.
    config: resolved, as plain dicts.

  Returns:
    The path of the page.
  """
  pictures = _pictures(workdir / "plots", results)
  workdir.mkdir(parents=True, exist_ok=True)
  tables.write_csv(workdir / "rows.csv", results["rows"])
  primary = [_cells(row) for row in results["rows"] if row["primary"]]
  columns = {"level": "level", "capability": "capability", **COLUMNS}
  text = tables.markdown(primary, columns)
  (workdir / "table.md").write_text(text, encoding="utf-8")
  return write_page(
    workdir / "report.html",
    title=f"Convergence of {', '.join(results['models'])}",
    results=_for_page(results),
    config=dict(config),
    plots=pictures,
    latents=[],
    summary=[
      (
        f"{_pair(row)}, {level}",
        row["verdict"],
        f"share {_cells(row)['share']} of the way from floor to identity, by "
        f"{row['measure']}",
      )
      for level, rows in _levels(results).items()
      for row in rows
    ],
  )
