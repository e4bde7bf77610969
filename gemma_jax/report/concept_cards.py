"""What the page says of single vectors: words, texts, scores, damage."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma_jax.report import plots
from gemma_jax.report.page import format_value

RIVALS = ("neuron", "random")  # changes that should do less
UNNAMED = "unnamed"  # a concept that no lexicon has
RANDOM = 6  # directions that show what noise looks like
CONTEXTS = 8
PARTS = ("tail", "coherence", "lexicon", "npmi")
DAMAGE = (
  "effect",
  "control",
  "general",
  "ratio",
  "auroc",
  "cliffs_delta",
  "d_z",
  "p",
  "q",
)
USE = {
  "mean": "mean coefficient",
  "mass": "mean |coefficient|",
  "positive": "share of it positive",
  "agreement": "top contexts at its own words",
}
CLEAN = {
  "prompts": "prompts",
  "clean_log_prob": "log-probability before, nats",
  "clean_log_prob_control": "of control prompts",
  "clean_rank": "rank before",
}
CHANGES = (
  "effect",
  "control",
  "general",
  "ratio",
  "kl",
  "kl_control",
  "rank",
  "flipped",
)
SECTIONS = {
  "validated": "Validated",
  "not confirmed": "Tested, not confirmed",
  "not tested": "Not tested",
  "random": "Random directions",
}


def name_of(row: Mapping[str, Any]) -> str:
  """What tells one end of a vector, or of a random direction, from others."""
  if row.get("neuron") is None:
    return f"random direction {row['row'] // 2} {'+-'[row['row'] % 2]}"
  return f"L{row['layer']} n{row['neuron']} {row['sign']}"


def validated(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  """Those vectors that passed, the most specific first."""
  found = [row for row in results["validation_results"] if row["passes"]]
  return sorted(found, key=lambda row: -row["ratio"])


def unconfirmed(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  """Tested vectors that did not pass, the smallest p first."""
  rows = [row for row in results["validation_results"] if not row["passes"]]
  return sorted(rows, key=lambda row: (row["p"], -row["ratio"]))


def rivals(
  row: Mapping[str, Any], kinds: Sequence[str] = RIVALS
) -> list[float]:
  """Ratios of the neurons and random directions that a vector is beside."""
  return [
    change["ratio"]
    for name, change in (row.get("changes") or {}).items()
    if name.rpartition("_")[0] in kinds and plots.is_finite(change["ratio"])
  ]


def interval(row: Mapping[str, Any]) -> str:
  """Effect less control, with its interval."""
  centre, low, high = _values(row, ("difference", "low", "high"))
  return f"{centre} [{low}, {high}]"


def sections(results: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Titles and cards, in the order of the page.

  Args:
    results: of `studies.concepts`.
  """
  candidates = {row["row"]: row for row in results["candidates"]}
  doses = {dose["row"]: dose for dose in results.get("doses") or ()}
  tested = {row["row"] for row in results["validation_results"]}
  rows = {
    "validated": validated(results),
    "not confirmed": unconfirmed(results),
    "not tested": [
      row for number, row in candidates.items() if number not in tested
    ],
    "random": _spread(results["random"]["rows"]),
  }
  out = []
  for state, own in rows.items():
    # Random directions have numbers of their own.
    known = {} if state == "random" else doses
    if own:
      out.append(
        {
          "id": state.replace(" ", "-"),
          "title": SECTIONS[state],
          "cards": [_card(row, state, known) for row in own],
        }
      )
  return out


def _spread(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  """A few from the largest ratio to the smallest, which are both there."""
  rows = sorted(rows, key=lambda row: -row["ratio"])
  at = np.linspace(0, len(rows) - 1, min(RANDOM, len(rows)))
  return [rows[i] for i in at.round().astype(int)]


def _values(row: Mapping[str, Any], names) -> list[str]:
  return [format_value(row.get(name)) for name in names]


def _facts(row: Mapping[str, Any], titles: Mapping[str, str]):
  """Titles and values of what is known."""
  return [
    (title, format_value(row[name]))
    for name, title in titles.items()
    if row.get(name) is not None
  ]


def _card(
  row: Mapping[str, Any],
  state: str,
  doses: Mapping[int, Mapping[str, Any]],
) -> dict[str, Any]:
  """What the template shows.

  Args:
    row: of the vector.
    state: what became of it, of `SECTIONS`.
    doses: by row.
  """
  name = name_of(row)
  words, others = row.get("words") or [], row.get("words_other_sign") or []
  category = row.get("category") or (UNNAMED if words else "")
  measured = "changes" in row
  return {
    "id": f"{'r' if state == 'random' else 'v'}{row['row']}",
    "name": name,
    "state": state,
    "category": category,
    "words": words,
    "others": others,
    "headline": _facts(row, {"score": "score"})
    + (_facts(row, {"ratio": "ratio", "q": "q"}) if measured else []),
    "score": _score(row) if "p_parts" in row else [],
    "use": _facts(row, USE),
    "contexts": [
      {"coefficient": format_value(one["coefficient"]), "text": one["text"]}
      for one in (row.get("contexts") or [])[:CONTEXTS]
    ],
    "damage": _damage(row) if measured else [],
    "changes": [
      (change, _values(values, CHANGES))
      for change, values in (row.get("changes") or {}).items()
    ],
    "doses": _doses(doses[row["row"]]) if row["row"] in doses else None,
    "search": " ".join([name, state, category, *words, *others]),
  }


def _score(row: Mapping[str, Any]) -> list[tuple[str, str, str]]:
  """Part, value, and what chance has to say of it."""
  p = row.get("p_parts", {})
  total, q = _values(row, ("total", "score_q"))
  value = row | {"lexicon": row.get("category")}
  z, of_kurtosis = _values(row, ("kurtosis_z", "kurtosis_q"))
  return [
    *(
      (part, format_value(value.get(part)), f"p {format_value(p.get(part))}")
      for part in PARTS
    ),
    ("evidence", total, f"q {q}"),
    ("content", format_value(row.get("content")), ""),
    ("score", format_value(row["score"]), ""),
    (
      "kurtosis",
      format_value(row.get("kurtosis")),
      f"z {z}, q {of_kurtosis}",
    ),
    ("skew", format_value(row.get("skew")), ""),
  ]


def _damage(row: Mapping[str, Any]) -> list[tuple[str, str]]:
  best = max(rivals(row), default=None)
  return [
    *zip(DAMAGE, _values(row, DAMAGE), strict=True),
    ("difference", interval(row)),
    ("ratio of the best control", format_value(best)),
    *_facts(row, CLEAN),
  ]


def _doses(dose: Mapping[str, Any]) -> dict[str, Any]:
  return {
    "slope": format_value(dose.get("slope")),
    "rows": [
      (
        f"{name} {format_value(point[name])}",
        *_values(point, ("concept", "control")),
      )
      for kind, name in (("factors", "factor"), ("noise", "noise"))
      for point in dose.get(kind) or ()
    ],
  }
