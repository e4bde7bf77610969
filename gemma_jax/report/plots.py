"""Pictures of a training run and of the dictionary that came out of it.

Each picture has a `*_figure` function that draws and a function of the same
name that draws and writes a PNG. Figures are built from `Figure` objects and
never through pyplot, so that drawing inside a training process leaves no
global state behind and needs no display.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

# Okabe and Ito's colour-blind safe palette, "Color Universal Design" (2008).
BLUE, ORANGE, GREEN, RED, PURPLE = (
  "#0072b2",
  "#e69f00",
  "#009e73",
  "#d55e00",
  "#cc79a7",
)
INK, FAINT = "#333333", "#e4e4e4"
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, INK)
# 6.4 in at 130 dpi is 832 px: type of 9 pt is still 12 px tall at 640 px.
WIDTH, DPI = 6.4, 130

_PANELS = {
  "loss": "loss",
  "fvu": "FVU",
  "l0": "L0 (latents per token)",
  "dead_fraction": "dead latents (fraction)",
  "learning_rate": "learning rate",
}


def canvas(height: float, rows: int = 1, columns: int = 1):
  """A figure of this height in inches and its axes [rows, columns]."""
  figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
  FigureCanvasAgg(figure)
  figure.set_facecolor("white")
  return figure, figure.subplots(rows, columns, squeeze=False)


def dress(axes: Axes, *, x: str, y: str) -> None:
  """Labels, ticks and lines as in every picture here."""
  axes.set_xlabel(x, color=INK, fontsize=10)
  axes.set_ylabel(y, color=INK, fontsize=10)
  axes.tick_params(which="both", colors=INK, labelsize=9, length=3)
  axes.grid(True, color=FAINT, linewidth=0.8)
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)
  axes.spines[["left", "bottom"]].set_color("#aaaaaa")


def key(axes: Axes, **options) -> None:
  """A legend without a frame."""
  axes.legend(fontsize=9, labelcolor=INK, frameon=False, **options)


def save(figure: Figure, path: str | Path) -> Path:
  """Writes a PNG, the same bytes for the same numbers."""
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # Matplotlib stamps its version into the file; without it the same numbers
  # give the same bytes.
  figure.savefig(path, format="png", metadata={"Software": None})
  return path


def _short(value: float, _position=None) -> str:
  """1200000 -> 1.2M: token counts have to fit under a tick."""
  for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
    if abs(value) >= unit:
      return f"{value / unit:.4g}{letter}"
  return f"{value:.4g}"


def is_finite(value) -> bool:
  """Whether there is a value, and a finite one."""
  return value is not None and bool(np.isfinite(value))


def training_curves_figure(metrics: Sequence[Mapping]) -> Figure:
  """Draws loss, FVU, L0, dead latents and learning rate over training.

  Args:
    metrics: rows of `metrics.jsonl`. A panel is drawn for each of `loss`,
      `fvu`, `l0`, `dead_fraction` and `learning_rate` that some row holds;
      rows without a finite value are left out of that panel. The x axis is
      `tokens` where every row has it, else `step`, else the row number.

  Returns:
    A figure with one panel for each quantity.
  """
  if metrics and all(is_finite(row.get("tokens")) for row in metrics):
    x, x_label = [row["tokens"] for row in metrics], "tokens seen"
  elif metrics and all(is_finite(row.get("step")) for row in metrics):
    x, x_label = [row["step"] for row in metrics], "step"
  else:
    x, x_label = list(range(len(metrics))), "row of metrics.jsonl"

  curves = {}
  for key in _PANELS:
    points = [
      (at, row[key])
      for at, row in zip(x, metrics, strict=True)
      if is_finite(row.get(key))
    ]
    if points:
      curves[key] = np.asarray(points, np.float64)
  if not curves:
    figure, grid = canvas(1.6)
    grid[0, 0].set_axis_off()
    grid[0, 0].text(0.5, 0.5, "no metrics were logged", ha="center", color=INK)
    return figure

  columns = min(2, len(curves))
  rows = -(-len(curves) // columns)
  figure, grid = canvas(0.4 + 2.0 * rows, rows, columns)
  for axes in grid.flat[len(curves) :]:
    axes.remove()
  for axes, (key, points) in zip(grid.flat, curves.items(), strict=False):
    y = points[:, 1]
    # One dot, not an invisible line, when a run logged a single row.
    marker = "o" if len(points) == 1 else ""
    axes.plot(*points.T, color=BLUE, linewidth=1.4, marker=marker, markersize=4)
    dress(axes, x=x_label, y=_PANELS[key])
    if np.ptp(y) < 0.01 * abs(y.mean()):
      # A quantity held constant: do not blow rounding up to a curve.
      axes.set_ylim(*sorted((0.9 * y.mean(), 1.1 * y.mean())))
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    axes.locator_params(axis="x", nbins=5)
    if key in ("loss", "fvu", "l0") and y.min() > 0 and y.max() > 20 * y.min():
      axes.set_yscale("log")
    elif key == "dead_fraction":
      axes.set_ylim(0, max(0.01, 1.05 * y.max()))
      axes.yaxis.set_major_formatter(PercentFormatter(1.0))
      axes.set_ylabel("dead latents", color=INK, fontsize=10)
    elif key == "learning_rate":
      axes.set_ylim(bottom=0)
      axes.ticklabel_format(axis="y", scilimits=(-2, 3))
      axes.yaxis.get_offset_text().set_fontsize(9)
  return figure


def training_curves(metrics: Sequence[Mapping], path: str | Path) -> Path:
  """Writes `training_curves_figure` as a PNG and returns its path."""
  return save(training_curves_figure(metrics), path)


def fvu_prefixes_figure(
  widths: Sequence[int],
  fvu: Sequence[float],
  baselines: Mapping[str, float] | None = None,
) -> Figure:
  """Draws FVU against the width of a Matryoshka dictionary's prefix.

  Args:
    widths: number of latents in each prefix.
    fvu: fraction of variance unexplained by each prefix, 0 is perfect.
    baselines: name to FVU of what the dictionary has to beat, drawn as
      horizontal lines; a value that is None or not finite is left out.

  Returns:
    A figure whose first line holds the prefixes, the others the baselines.

  Raises:
    ValueError: if `widths` and `fvu` differ in length or are empty.
  """
  if len(widths) != len(fvu) or not len(widths):
    raise ValueError(
      "fvu_prefixes expects one FVU for each of at least one width, received "
      f"{len(widths)} widths and {len(fvu)} FVUs; pass lists of equal length."
    )
  baselines = {k: v for k, v in (baselines or {}).items() if is_finite(v)}
  figure, grid = canvas(3.5)
  axes = grid[0, 0]
  axes.plot(
    widths,
    fvu,
    color=BLUE,
    linewidth=1.8,
    marker="o",
    markersize=5,
    label="dictionary prefix",
    zorder=3,
  )
  for width, value in zip(widths, fvu, strict=True):
    if is_finite(value) and len(widths) <= 8:
      axes.annotate(
        f"{value:.3g}",
        (width, value),
        xytext=(0, 7),
        textcoords="offset points",
        ha="center",
        fontsize=9,
        color=BLUE,
        # A baseline may pass through the number.
        path_effects=[withStroke(linewidth=3, foreground="white")],
        zorder=4,
      )
  dashes = ((0, (6, 3)), (0, (2, 2)), (0, (7, 2, 2, 2)), (0, (1, 1.5)))
  colours = (INK, RED, GREEN, PURPLE)
  for number, (name, value) in enumerate(baselines.items()):
    axes.axhline(
      value,
      color=colours[number % 4],
      linestyle=dashes[number % 4],
      linewidth=1.4,
      label=f"{name}: {value:.3g}",
    )
  dress(axes, x="prefix width (latents, log scale)", y="FVU")
  axes.set_xscale("log", base=2)
  axes.set_xticks(list(widths), [f"{width:,}" for width in widths])
  axes.xaxis.set_minor_formatter(NullFormatter())
  axes.set_xlim(min(widths) / 1.35, max(widths) * 1.35)
  seen = [v for v in (*fvu, *baselines.values()) if is_finite(v)]
  if seen and max(seen) > 3 and min(seen) > 0:
    # A baseline that is far worse than the mean would flatten the curve.
    axes.set_yscale("log")
  elif seen:
    axes.set_ylim(min(0.0, 1.1 * min(seen)), 1.12 * max(seen) or 1.0)
  key(axes, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2)
  return figure


def fvu_prefixes(
  widths: Sequence[int],
  fvu: Sequence[float],
  path: str | Path,
  baselines: Mapping[str, float] | None = None,
) -> Path:
  """Writes `fvu_prefixes_figure` as a PNG and returns its path."""
  return save(fvu_prefixes_figure(widths, fvu, baselines), path)


def latent_density_figure(density, *, tokens: int) -> Figure:
  """Draws how often latents fire, with the dead ones in their own bar.

  Args:
    density: [M] fraction of tokens on which each latent fired; 0 is dead.
    tokens: number of tokens that the fractions were counted on. A rate below
      1/tokens cannot be told from 0; that limit is marked.

  Returns:
    A figure whose first patch is the bar of dead latents and whose others are
    the histogram of log10 of the living ones.

  Raises:
    ValueError: if `tokens` is not positive or a density is outside [0, 1].
  """
  density = np.asarray(density, np.float64).ravel()
  if tokens < 1:
    raise ValueError(
      f"latent_density expects tokens >= 1, received {tokens}; pass the number "
      "of tokens that the densities were counted on."
    )
  if not np.all((density >= 0) & (density <= 1)):
    raise ValueError(
      "latent_density expects fractions of tokens in [0, 1], received values "
      f"from {density.min()} to {density.max()}; divide counts by tokens."
    )
  alive = np.log10(density[density > 0])
  dead = int((density == 0).sum())
  limit = -np.log10(tokens)
  low = min(limit, alive.min(initial=0.0)) - 0.05
  bins = max(8, int(np.ceil(-low * 8)))
  counts, edges = np.histogram(alive, bins=bins, range=(low, 0.0))

  figure, grid = canvas(3.3)
  axes = grid[0, 0]
  gap = max(0.25, -0.06 * low)
  at = low - 1.5 * gap
  (bar,) = axes.bar([at], [dead], width=gap, color=RED)
  axes.bar(
    edges[:-1],
    counts,
    width=np.diff(edges),
    align="edge",
    color=BLUE,
    edgecolor="white",
    linewidth=0.4,
  )
  tallest = max(int(counts.max(initial=0)), 1)
  if dead > 8 * tallest:
    axes.set_yscale("log")
    axes.set_ylim(0.7, dead * 3)
  else:
    axes.set_ylim(0, 1.15 * max(tallest, dead))
  share = dead / max(density.size, 1)
  axes.annotate(
    f"{dead:,}\n({share:.2g})"
    if 0 < share < 0.01
    else f"{dead:,}\n({share:.0%})",
    (at, bar.get_height() if dead else axes.get_ylim()[0]),
    xytext=(0, 3),
    textcoords="offset points",
    ha="center",
    fontsize=9,
    color=RED,
  )
  axes.axvline(
    limit,
    color=INK,
    linestyle=(0, (4, 3)),
    linewidth=1.2,
    label=f"resolution limit, 1 of {tokens:,} tokens",
  )
  dress(axes, x="firing frequency (fraction of tokens)", y="latents")
  decades = list(range(0, int(np.floor(low)), -1))
  decades = [d for d in decades if d >= low]
  axes.set_xticks(
    [at, *decades], ["dead", *(f"$10^{{{decade}}}$" for decade in decades)]
  )
  axes.set_xlim(at - gap, 0.05 * gap)
  axes.grid(False, axis="x")
  key(axes, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)
  return figure


def latent_density(density, path: str | Path, *, tokens: int) -> Path:
  """Writes `latent_density_figure` as a PNG and returns its path."""
  return save(latent_density_figure(density, tokens=tokens), path)


def norm_histogram_figure(norms: Mapping[str, object]) -> Figure:
  """Draws the L2 norms of several sets of vectors over one another.

  The legend gives median and maximum, because a handful of massive
  activations is invisible in any bar and still decides a squared error.

  Args:
    norms: name to [N] L2 norms, such as those of `input`, `target`,
      `reconstruction` and `error`. Zeros and values that are not finite cannot
      be drawn on a log axis and are counted in the legend; values more than
      four decades from the pooled median are counted as off the scale.

  Returns:
    A figure with one outline for each set; heights are fractions of its N.
  """
  norms = {
    name: np.asarray(values, np.float64).ravel()
    for name, values in norms.items()
  }
  good = {k: v[np.isfinite(v) & (v > 0)] for k, v in norms.items()}
  pool = np.concatenate([*good.values(), np.zeros(0)])
  middle = np.median(pool) if pool.size else 1.0
  near = pool[np.abs(np.log10(pool / middle)) <= 4]
  low, high = (near.min(), near.max()) if near.size else (0.1, 10.0)
  edges = np.geomspace(low / 1.05, high * 1.05, 61)

  figure, grid = canvas(3.7)
  axes = grid[0, 0]
  dashes = ("-", "-", (0, (5, 2)), (0, (2, 1.5)), "-", (0, (7, 2, 2, 2)))
  for number, (name, values) in enumerate(good.items()):
    every = norms[name]
    notes = []
    if values.size:
      notes += [f"median {np.median(values):.3g}", f"max {values.max():.4g}"]
    outside = int(((values < edges[0]) | (values > edges[-1])).sum())
    for count, what in (
      (int((every == 0).sum()), "zero"),
      (int((~np.isfinite(every)).sum()), "not finite"),
      (outside, "off scale"),
    ):
      if count:
        notes.append(f"{count:,} {what}")
    counts, _ = np.histogram(values, bins=edges)
    axes.stairs(
      counts / max(every.size, 1),
      edges,
      color=COLOURS[number % 6],
      linestyle=dashes[number % 6],
      linewidth=1.6,
      label=f"{name}: {', '.join(notes) or 'no values'}",
    )
  dress(axes, x="L2 norm (activation units, log scale)", y="share of tokens")
  axes.set_xscale("log")
  axes.set_ylim(bottom=0)
  key(axes, loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.2)
  return figure


def norm_histogram(norms: Mapping[str, object], path: str | Path) -> Path:
  """Writes `norm_histogram_figure` as a PNG and returns its path."""
  return save(norm_histogram_figure(norms), path)
