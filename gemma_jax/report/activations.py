"""Pictures of the statistics of a store's sites."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from gemma_jax.report.plots import (
  BLUE,
  GREEN,
  INK,
  ORANGE,
  PURPLE,
  RED,
  _short,
  canvas,
  dress,
  key,
  save,
)

_COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, INK)
_DASHES = ("-", (0, (6, 2)), (0, (2, 1)), (0, (7, 2, 2, 2)), "-", (0, (1, 1)))
_EIGHTH = 4  # bins of 1/32 octave in one that is drawn


def _style(number: int) -> dict:
  return {"color": _COLOURS[number % 6], "linestyle": _DASHES[number % 6]}


def _floats(values) -> np.ndarray:
  """Numbers with NaN where there is None."""
  return np.array(values, np.float64)


def _brief(value: float) -> str:
  """72213.4 -> 72.2k."""
  return _short(float(f"{value:.3g}"))


def _handles(sites: Sequence[str], notes: Sequence[str] = ()) -> list[Line2D]:
  notes = notes or [""] * len(sites)
  return [
    Line2D([], [], linewidth=1.8, label=": ".join(filter(None, text)), **style)
    for text, style in zip(
      zip(sites, notes, strict=True),
      map(_style, range(len(sites))),
      strict=True,
    )
  ]


def _names(axes, handles: Sequence[Line2D], columns: int = 1) -> None:
  """A legend above the axes, one line for each site."""
  key(
    axes,
    handles=handles,
    loc="lower left",
    bbox_to_anchor=(0.0, 1.0),
    ncols=columns,
    borderaxespad=0.2,
    handlelength=3,
  )


def norm_by_position_figure(statistics: Mapping[str, Mapping]) -> Figure:
  """Draws the mean L2 norm at every position, and one deviation around it.

  Args:
    statistics: site to the summary of its `Statistics`.

  Returns:
    A figure with one line and one band for each site; positions without rows
    are left out.
  """
  figure, grid = canvas(3.6)
  axes = grid[0, 0]
  first, last = 1, 1
  for number, summary in enumerate(statistics.values()):
    table = summary["norm_by_position"]
    mean, deviation = _floats(table["mean"]), _floats(table["std"])
    (at,) = np.nonzero(np.isfinite(mean))
    if not len(at):
      continue
    mean, deviation = mean[at], deviation[at]
    first, last = min(first, at[0]), max(last, at[-1])
    axes.fill_between(
      at,
      # A log axis has no place for what lies below zero.
      np.maximum(mean - deviation, mean / 10),
      mean + deviation,
      color=_COLOURS[number % 6],
      alpha=0.15,
      linewidth=0,
    )
    marker = "o" if len(at) < 3 else ""
    axes.plot(at, mean, linewidth=1.6, marker=marker, **_style(number))
  dress(axes, x="position in the window (log scale)", y="L2 norm")
  # The first positions, where norms differ most, get room.
  ticks = [10**k for k in range(7) if 10**k <= last]
  if first:
    axes.set_xscale("log")
    axes.set_xlim(first * 0.95, last * 1.05)
  else:
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(-0.1, last * 1.05)
    ticks = [0, *ticks]
  axes.set_yscale("log")
  axes.set_xticks(ticks, [_short(tick) for tick in ticks])
  _plain_log(axes)
  _names(axes, _handles(list(statistics)), columns=2)
  return figure


def _plain_log(axes) -> None:
  """Writes 200 and not 2 x 10^2, which is harder to read at this size."""
  low, high = axes.get_ylim()
  axes.yaxis.set_major_formatter(FuncFormatter(_short))
  few = high < 30 * low
  axes.yaxis.set_minor_formatter(
    FuncFormatter(_short) if few else NullFormatter()
  )


def norms_figure(statistics: Mapping[str, Mapping]) -> Figure:
  """Draws the distribution of the L2 norm, its quantiles and the outliers.

  Args:
    statistics: site to the summary of its `Statistics`.

  Returns:
    A figure with two panels over one axis: the histogram, in bins of an eighth
    of an octave, and for each site a row with the span from 1 % to 99 %, the
    span from 25 % to 75 %, the median, and the kept outliers as dots.
  """
  sites = list(statistics)
  figure, grid = canvas(3.4 + 0.28 * len(sites), 2)
  figure.axes[0].sharex(figure.axes[1])
  top, below = grid[:, 0]
  top.get_gridspec().set_height_ratios([3, 0.5 + 0.45 * len(sites)])
  notes = []
  for number, summary in enumerate(statistics.values()):
    histogram, style = summary["norm_histogram"], _style(number)
    counts, width = np.array(histogram["counts"]), histogram["width"]
    colour = style["color"]
    notes.append("no rows")
    if not len(counts):
      continue
    # Whole eighths from a common zero, so that sites have the same edges.
    before = round(histogram["first"] / width) % _EIGHTH
    counts = np.pad(counts, (before, -(before + len(counts)) % _EIGHTH))
    edges = histogram["first"] + width * (
      _EIGHTH * np.arange(len(counts) // _EIGHTH + 1) - before
    )
    share = counts.reshape(-1, _EIGHTH).sum(1) / counts.sum()
    top.stairs(share, 2.0**edges, linewidth=1.6, **style)
    q = {float(k): v for k, v in summary["norm_quantiles"].items()}
    below.plot([q[0.01], q[0.99]], [number] * 2, color=colour, linewidth=1.2)
    below.plot([q[0.25], q[0.75]], [number] * 2, color=colour, linewidth=5)
    below.plot([q[0.5]], [number], "|", color="white", markersize=7)
    ends = summary["outliers"]
    dots = [o["norm"] for end in ("largest", "smallest") for o in ends[end]]
    dots = [norm for norm in dots if norm > 0]
    below.plot(
      dots, [number] * len(dots), "o", color=colour, markersize=3, alpha=0.7
    )
    largest = ends["largest"][0]
    notes[-1] = (
      f"median {_brief(q[0.5])}, largest {_brief(largest['norm'])} "
      f"(row {largest['row']:,}, z = {largest['z']:.3g})"
    )
  dress(top, x="", y="share of tokens")
  top.set_xscale("log")
  top.set_ylim(bottom=0)
  top.tick_params(labelbottom=False)
  dress(below, x="L2 norm (activation units, log scale)", y="")
  below.set_yticks(range(len(sites)), [""] * len(sites))
  below.set_ylim(len(sites) - 0.4, -0.6)
  _names(top, _handles(sites, notes))
  return figure


def _ranked(axes, statistics, value, y: str) -> None:
  """Draws a number of each dim, largest first; the key names the largest."""
  for number, summary in enumerate(statistics.values()):
    numbers = value({k: _floats(v) for k, v in summary["dims"].items()})
    order = np.argsort(-np.nan_to_num(numbers, nan=-np.inf), kind="stable")
    order = order[np.isfinite(numbers[order])]
    if len(order):
      axes.plot(
        np.arange(1, len(order) + 1),
        numbers[order],
        linewidth=1.6,
        label=f"dim {order[0]}: {_brief(numbers[order[0]])}",
        **_style(number),
      )
  dress(axes, x="", y=y)
  axes.set_xscale("log")
  axes.xaxis.set_major_formatter(FuncFormatter(_short))
  if axes.lines:
    key(
      axes,
      loc="lower right",
      bbox_to_anchor=(1.0, 1.0),
      ncols=4,
      handlelength=1.6,
      columnspacing=1.2,
      borderaxespad=0.1,
    )


def dimensions_figure(statistics: Mapping[str, Mapping]) -> Figure:
  """Draws how unequal the dimensions of each site are.

  Args:
    statistics: site to the summary of its `Statistics`.

  Returns:
    A figure with three panels: standard deviation, |mean| over it, and excess
    kurtosis, each sorted by itself, largest dimension first. Constant
    dimensions are left out.
  """
  figure, grid = canvas(6.6, 3)
  deviation, ratio, kurtosis = grid[:, 0]

  def spread(dims):
    return np.where(dims["variance"] > 0, np.sqrt(dims["variance"]), np.nan)

  _ranked(deviation, statistics, spread, "standard deviation")
  _ranked(
    ratio,
    statistics,
    lambda dims: np.abs(dims["mean"]) / spread(dims),
    "|mean| / deviation",
  )
  _ranked(
    kurtosis, statistics, lambda dims: dims["kurtosis"], "excess kurtosis"
  )
  for axes in (deviation, ratio):
    axes.set_yscale("log")
    _plain_log(axes)
  kurtosis.set_yscale("symlog", linthresh=1)
  kurtosis.set_ylim(bottom=-2.2)  # no distribution is below -2
  kurtosis.yaxis.set_major_formatter(FuncFormatter(_short))
  kurtosis.set_xlabel(
    "rank of the dimension, largest first (log scale)", color=INK, fontsize=10
  )
  figure.legend(
    handles=_handles(list(statistics)),
    loc="outside upper left",
    ncols=2,
    fontsize=9,
    labelcolor=INK,
    frameon=False,
    handlelength=3,
  )
  return figure


def drift_figure(statistics: Mapping[str, Mapping]) -> Figure:
  """Draws how far each chunk of rows lies from all rows before it.

  Args:
    statistics: site to the summary of its `Statistics`.

  Returns:
    A figure with two panels: the shift of the mean, with what independent
    rows would show as a dotted line, and the norm's ratio. A text where no
    site has two chunks.
  """
  if not any(len(s["drift"]["rows"]) > 1 for s in statistics.values()):
    figure, grid = canvas(1.6)
    grid[0, 0].set_axis_off()
    grid[0, 0].text(
      0.5, 0.5, "one chunk of rows: no drift to see", ha="center", color=INK
    )
    return figure
  figure, grid = canvas(4.6, 2)
  shift, ratio = grid[:, 0]
  chance = None
  notes = []
  for number, summary in enumerate(statistics.values()):
    drift, style = summary["drift"], _style(number)
    at = np.array(drift["first_row"], float)
    for axes, name in ((shift, "shift"), (ratio, "norm_ratio")):
      axes.plot(
        at[1:],
        _floats(drift[name])[1:],
        linewidth=1.4,
        marker="o",
        markersize=3.5,
        **style,
      )
    if chance is None and len(at) > 1:
      (chance,) = shift.plot(
        at[1:],
        _floats(drift["chance"])[1:],
        color=INK,
        linestyle=":",
        linewidth=1.2,
        label="what independent rows would show",
      )
    largest = drift["largest"]
    notes.append(
      f"at most {largest['shift']:.3g} from row {largest['first_row']:,}"
      if largest
      else "one chunk"
    )
  dress(shift, x="", y="shift of the mean\n(standard deviations)")
  shift.set_ylim(bottom=0)
  dress(ratio, x="first row of the chunk", y="mean norm / before")
  ratio.axhline(1, color=INK, linewidth=1, linestyle=":")
  low, high = ratio.get_ylim()
  # A percent is no drift: it shall not fill the panel.
  ratio.set_ylim(min(low, 0.95), max(high, 1.05))
  for axes in (shift, ratio):
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
  _names(shift, [*_handles(list(statistics), notes), chance])
  return figure


def spectrum_figure(statistics: Mapping[str, Mapping]) -> Figure:
  """Draws the eigenvalues of each site's covariance, largest first.

  Args:
    statistics: site to the summary of its `Statistics`; those without
      eigenvalues are left out.

  Returns:
    A figure with one line for each site, of shares of the total variance;
    shares below 1e-8, which are rounding, are not drawn.
  """
  figure, grid = canvas(3.9)
  axes = grid[0, 0]
  notes = []
  for number, summary in enumerate(statistics.values()):
    values = _floats(summary["eigenvalues"] or [])
    notes.append("no covariance")
    if not values.sum() > 0:
      continue
    share = values / values.sum()
    drawn = share > 1e-8
    axes.plot(
      np.arange(1, len(share) + 1)[drawn],
      share[drawn],
      linewidth=1.6,
      **_style(number),
    )
    notes[-1] = (
      f"participation ratio {summary['participation_ratio']:.3g} of "
      f"{summary['width']:,}"
    )
  dress(
    axes, x="eigenvalue, largest first (log scale)", y="share of the variance"
  )
  axes.set_xscale("log")
  axes.set_yscale("log")
  axes.xaxis.set_major_formatter(FuncFormatter(_short))
  _names(axes, _handles(list(statistics), notes))
  return figure


def write(
  statistics: Mapping[str, Mapping], directory: str | Path
) -> list[Path]:
  """Writes every picture that these statistics have numbers for, as PNG.

  Args:
    statistics: site to the summary of its `Statistics`; one to four sites
      are easy to read.
    directory: where to; made if need be.

  Returns:
    The paths: norm_by_position, norms, dimensions, drift, and spectrum where
    some site has its covariance.

  Raises:
    ValueError: no sites.
  """
  if not statistics:
    raise ValueError("Statistics of no site; pass {site: summary}.")
  figures = {
    "norm_by_position": norm_by_position_figure,
    "norms": norms_figure,
    "dimensions": dimensions_figure,
    "drift": drift_figure,
  }
  if any(summary["eigenvalues"] for summary in statistics.values()):
    figures["spectrum"] = spectrum_figure
  return [
    save(draw(statistics), Path(directory) / f"{name}.png")
    for name, draw in figures.items()
  ]
