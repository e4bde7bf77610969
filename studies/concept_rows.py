"""What is said of a vector: its words, its numbers, where it acts."""

import dataclasses
from typing import Any

import numpy as np

from gemma_jax import data
from gemma_jax.concepts import lexemes, scoring, usage
from studies.concept_candidates import Table

DEFINITIONS = {
  "mean": "Of the coefficient over the text.",
  "mass": "Mean of the coefficient's absolute value.",
  "positive": "Share of the mass with positive coefficients.",
  "agreement": (
    "Share of the contexts with the largest coefficients in which one of the "
    "words comes next."
  ),
  "agreement_peak": "The same, of the token at the peak.",
}
BEFORE, AFTER = 12, 4  # tokens of a context around the one that counts
NUMBERS = ("kurtosis", "skew", "kurtosis_z", "kurtosis_q")
OF_SIGN = ("score", "content", "total", "tail", "coherence", "npmi")


@dataclasses.dataclass(frozen=True)
class Describe:
  """Makes JSON of rows of a table.

  Attributes:
    tokenizer: of the model.
    categories: names of the lexicons.
    words: of the vocabulary.
    table: of vectors.
    used: how the model uses them.
    windows: that `used` was measured on.
  """

  tokenizer: Any
  categories: tuple[str, ...]
  words: lexemes.Lexemes
  table: Table
  used: usage.Usage
  windows: data.Windows

  def row(self, row: int) -> dict[str, Any]:
    """Of one sign of a vector: 2i is +, 2i + 1 is -."""
    table, (vector, end) = self.table, divmod(row, 2)
    layer, unit = int(table.layer[vector]), int(table.unit[vector])
    columns = {name: values[row] for name, values in table.columns.items()}
    category = int(columns["category"])
    at = (layer, unit)
    return {
      "row": row,
      "layer": layer,
      "neuron": unit,
      "sign": scoring.SIGNS[end],
      "category": self.categories[category] if category >= 0 else None,
      "kind": lexemes.KINDS[int(columns["kind"])],
      "words": self._names(row),
      "words_other_sign": self._names(row ^ 1),
      **{name: _number(getattr(table, name)[vector]) for name in NUMBERS},
      **{name: _number(columns[name]) for name in OF_SIGN},
      "score_q": _number(columns["q"]),
      "p_parts": {
        name: _number(columns[f"p_{name}"]) for name in scoring.PARTS
      },
      "mean": _number(self.used.mean[at]),
      "mass": _number(self.used.mass[at]),
      "positive": _number(self.used.positive[at]),
      "contexts": self._contexts(row),
      "agreement": self.agreement(row),
      "agreement_peak": self.agreement(row, 0),
    }

  def brief(self, row: int) -> dict[str, Any]:
    """What also a random direction has."""
    vector, end = divmod(row, 2)
    return {
      "row": row,
      "layer": int(self.table.layer[vector]),
      "sign": scoring.SIGNS[end],
      "words": self._names(row),
      "score": _number(self.table.columns["score"][row]),
      "content": _number(self.table.columns["content"][row]),
    }

  def _names(self, row: int) -> list[str]:
    tokens = self.table.tokens[row]
    return self.tokenizer.batch_decode([[t] for t in tokens[tokens >= 0]])

  def agreement(self, row: int, ahead: int = 1) -> float:
    """Share of the top contexts with one of the words near the peak.

    Args:
      row: of the table.
      ahead: 1 looks at the token behind the peak, 0 at the peak itself.
    """
    values, places = self._peaks(row)
    if not len(values):
      return 0.0
    tokens = self.table.tokens[row]
    own = np.unique(self.words.family[tokens[tokens >= 0]])
    window, position = places.T
    length = self.windows.tokens.shape[1]
    at = np.minimum(position + ahead, length - 1)
    inside = position + ahead < length
    near = self.words.family[self.windows.tokens[window, at]]
    return float(np.mean(inside & np.isin(near, own)))

  def _peaks(self, row: int):
    """Coefficients of the row's sign, and window and position of each."""
    vector, end = divmod(row, 2)
    at = (int(self.table.layer[vector]), int(self.table.unit[vector]))
    values = (self.used.high, self.used.low)[end][at]
    places = (self.used.high_at, self.used.low_at)[end][at]
    there = np.isfinite(values) & (values * (1 - 2 * end) > 0)
    return values[there], places[there]

  def _contexts(self, row: int) -> list[dict[str, Any]]:
    """Where the coefficient is largest: text before, there, and after."""
    out = []
    for value, (window, position) in zip(*self._peaks(row), strict=True):
      line = self.windows.tokens[window]
      start = max(0, position - BEFORE)
      pieces = [
        self.tokenizer.decode(line[slice(*cut)].tolist())
        for cut in (
          (start, position),
          (position, position + 1),
          (position + 1, position + 1 + AFTER),
        )
      ]
      out.append({"coefficient": float(value), "text": pieces})
    return out


def _number(x) -> float | None:
  return float(x) if np.isfinite(x) else None
