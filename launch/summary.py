"""What came out of many runs: rows, a table, a picture."""

import csv
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from gemma_jax import tables
from launch import grid

METRICS = (
  "fvu",
  "l0",
  "delta_ce",
  "ce_recovered",
  "dead_fraction",
  "tokens_per_second_train",
)


def row(
  name: str,
  overrides: Mapping[str, Any],
  results: Mapping[str, Any] | None,
  *,
  status: str,
  seconds: float | None,
  error: str | None,
) -> dict[str, Any]:
  """One run: its overrides, how it ended, and every scalar of its results.

  Args:
    name: of the run.
    overrides: values of the grid's keys.
    results: contents of results.json, if there are any; `seconds` in them
      goes before the other.
    status: see `schedule.Outcome`.
    seconds: that its processes took.
    error: of a run that failed.
  """
  scalars = {
    key: value
    for key, value in (results or {}).items()
    if isinstance(value, bool | int | float | str)
  }
  own = {
    "run": name,
    **{f"{grid.PREFIX}{key}": value for key, value in overrides.items()},
    "status": status,
    "seconds": scalars.get("seconds", seconds),
    "error": error,
  }
  return own | {k: v for k, v in scalars.items() if k not in own}


def headline(row: Mapping[str, Any]) -> str:
  """How a run ended, in a line."""
  parts = [
    f"{name} {tables.text(row[name])}" for name in ("fvu", "l0") if name in row
  ]
  if row["seconds"] is not None:
    parts.append(f"{row['seconds']:.0f} s")
  if row["error"]:
    parts.append(row["error"])
  return f"{row['run']}: {row['status']}  " + "  ".join(parts)


def varying(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """Columns of overrides that are not the same everywhere."""
  keys = [key for key in rows[0] if key.startswith(grid.PREFIX)]
  return [key for key in keys if len({str(row[key]) for row in rows}) > 1]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """The overrides that vary and the main metrics, for people."""
  keys = varying(rows)
  columns = grid.labels(keys) or {"run": "run"}
  found = [key for key in METRICS if any(key in row for row in rows)]
  columns |= {key: key for key in (*found, "status", "seconds")}
  return tables.aligned(rows, columns)


def write(
  rows: Sequence[Mapping[str, Any]], workdir: pathlib.Path
) -> list[pathlib.Path]:
  """summary.csv, summary.json, and summary.png if there is what to draw."""
  paths = [workdir / "summary.csv", workdir / "summary.json"]
  columns = list(dict.fromkeys(key for row in rows for key in row))
  with paths[0].open("w", newline="") as file:
    writer = csv.DictWriter(file, columns)
    writer.writeheader()
    writer.writerows(rows)
  paths[1].write_text(json.dumps(list(rows), indent=2))
  # Late: matplotlib takes longer to import than a list takes to print.
  from gemma_jax.report import pareto

  picture = pareto.pareto(points(rows), workdir / "summary.png")
  return paths + [picture] * (picture is not None)


def points(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Rows for `pareto`: named by what varies, in groups of the first of it."""
  keys = varying(rows)
  short = grid.labels(keys)
  out = []
  for row in rows:
    names = [f"{short[key]}={tables.text(row[key])}" for key in keys]
    found = {key: row[key] for key in ("l0", "fvu", "delta_ce") if key in row}
    out.append({"name": ", ".join(names), "group": "".join(names[:1]), **found})
  return out
