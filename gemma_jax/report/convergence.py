"""How alike models are: text for the terminal, pictures, tables, a page."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma_jax import tables
from gemma_jax.report import convergence_plots as figures
from gemma_jax.report import plots
from gemma_jax.report.page import write_page

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
MOST_MAPS = 24  # in the page


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
  """A row as the tables show it."""

  def interval(style, *names):
    centre, low, high = (figures.digits(row[name], style) for name in names)
    return "-" if centre == "-" else f"{centre} [{low}, {high}]"

  return {
    **row,
    "pair": figures.pair_of(row),
    "value": interval("#.3g", "value", "low", "high"),
    "null": figures.digits(row["null"]),
    "floor": figures.digits(row["floor"]),
    "share": interval(".3f", "share", "share_low", "share_high"),
  }


def summary(results: Mapping[str, Any]) -> str:
  """The study as text, a line for each level and pair.

  Args:
    results: with `rows`, `models` and `refused`. Lines are the primary rows
      on all prompts. Average and sample standard deviation are over the pairs
      that have a share, where these are at least two.
  """
  levels = figures.levels_of(results)
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
  made = {
    "forest": figures.forest_figure(results),
    "capabilities": figures.capabilities_figure(results),
    "nulls": figures.null_figure(maps),
  }
  pictures = {
    CAPTIONS[name]: plots.save(figure, folder / f"{name}.png")
    for name, figure in made.items()
    if figure
  }
  left = max(0, len(maps) - MOST_MAPS)
  more = f" {left} more maps are only in the folder." if left else ""
  for number, name in enumerate(_map_names(maps)):
    path = plots.save(
      figures.heat_map_figure(maps[number]), folder / f"{name}.png"
    )
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
      compared.setdefault(figures.pair_of(row), {})[row["level"]] = {
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
      i: f"{figures.pair_of(one)}, {one['measure']}: {one['reason']}"
      for i, one in enumerate(results["refused"], 1)
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
        f"{figures.pair_of(row)}, {level}",
        row["verdict"],
        f"share {_cells(row)['share']} of the way from floor to identity, by "
        f"{row['measure']}",
      )
      for level, rows in figures.levels_of(results).items()
      for row in rows
    ],
  )
