"""Rows of numbers for people: aligned for a terminal, or in Markdown."""

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


def _cells(rows, columns) -> list[list[str]]:
  titles = columns.values() if isinstance(columns, Mapping) else columns
  return [
    list(titles),
    *([text(row.get(key)) for key in columns] for row in rows),
  ]
