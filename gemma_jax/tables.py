"""Rows of numbers for people: aligned for a terminal, or in Markdown."""

import csv
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any


def text(value: Any) -> str:
  """Four digits of a float, "-" for None."""
  if value is None:
    return "-"
  return f"{value:.4g}" if isinstance(value, float) else str(value)


def aligned(
  rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | Sequence[str]
) -> str:
  """Columns to the right; `columns` are keys, or titles by key."""
  cells = _cells(rows, columns)
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return "\n".join(
    "  ".join(f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True))
    for line in cells
  )


def markdown(
  rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | Sequence[str]
) -> str:
  """The same as a table in Markdown."""
  titles, *rest = _cells(rows, columns)
  lines = [titles, ["---"] * len(titles), *rest]
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_csv(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """Numbers and words of rows as CSV; what is nested stays out."""
  plain = [
    {k: v for k, v in row.items() if not isinstance(v, dict | list | tuple)}
    for row in rows
  ]
  # Not every row has every column.
  names = dict.fromkeys(name for row in plain for name in row)
  with path.open("w", newline="") as file:
    writer = csv.DictWriter(file, list(names))
    writer.writeheader()
    writer.writerows(plain)


def _cells(rows, columns) -> list[list[str]]:
  titles = columns.values() if isinstance(columns, Mapping) else columns
  return [
    list(titles),
    *([text(row.get(key)) for key in columns] for row in rows),
  ]
