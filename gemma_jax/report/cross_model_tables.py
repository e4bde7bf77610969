"""Tables of the study of maps between models: columns, rows as texts."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gemma_jax.report import plots
from gemma_jax.report.page import format_value

MAPS = {
  "map": "map",
  "role": "role",
  "space": "space",
  "parameters": "parameters",
  "unseen": "never seen",
  "fvu": "FVU",
  "fvu_decoded": "decoded FVU",
  "r2_pooled": "code R² [95 %]",
  "delta_ridge": "R² less ridge's [95 %]",
  "delta_token": "R² less token's [95 %]",
  "r2_median": "median R²",
  "pearson_median": "median r",
  "auroc_median": "median AUROC",
  "top_k_recall": "top-k recall",
  "centred_cosine": "centred cosine",
  "raw_cosine": "raw cosine",
  "l0": "L0",
  "columns": "latents",
  "tokens": "tokens",
}
SPLICE = {
  "map": "map",
  "role": "role",
  "recovered": "CE recovered [95 %]",
  "delta_ce": "ΔCE",
  "kl": "KL",
  "gap": "gap",
  "tokens": "tokens",
  "documents": "documents",
}
_FIRST = ("map", "role", "fvu", "fvu_decoded", "r2_pooled", "delta_ridge")
BRIEF = {name: MAPS[name] for name in _FIRST} | {
  "recovered": SPLICE["recovered"]
}
INJECT = {
  "vector": "vector",
  "dose": "dose",
  "effect": "effect [95 %]",
  "elsewhere": "elsewhere",
  "kl": "KL",
}
SUBSTITUTION = {
  "codes": "codes",
  "count": "latents",
  "recovered": "KL recovered [95 %]",
  "kl": "KL",
}
COVERAGE = {
  "models": "models",
  "side": "side",
  "tokens_a": "tokens of the first",
  "tokens_b": "of the second",
  "bytes": "bytes",
  "one_to_one": "one to one",
  "pairs": "pairs",
  "documents": "documents",
}
DICTIONARIES = {
  "site": "site",
  "seed": "seed",
  "width": "width",
  "fvu": "FVU",
  "l0": "L0",
  "dead_fraction": "dead",
}
UNSEEN = {"route": "route", "map": "map", "fvu": "FVU [95 %]"}
DIFFERENCES = {
  "route": "route",
  "compared": "compared",
  "difference": "difference [95 %]",
  "clear": "clear",
}
MATCHES = {
  "pair": "pair",
  "kind": "kind",
  "eligible": "eligible",
  "matched": "matched",
  "significant": "clear",
  "r_median": "median r",
  "null_median": "null's",
}
FINGERPRINTS = {
  "route": "route",
  "latents": "latents",
  "matched": "matched [95 %]",
  "null": "null",
  "p": "p",
}
FEATURES = {
  "pair": "pair",
  "latent_a": "latent of the first",
  "latent_b": "of the second",
  "r": "r",
  "q": "q",
}
# Both ends of what is shown with them, where a row has them.
_ENDS = {
  "r2_pooled": ("r2_low", "r2_high"),
  "delta_ridge": ("delta_ridge_low", "delta_ridge_high"),
  "delta_token": ("delta_token_low", "delta_token_high"),
  **dict.fromkeys(
    ("recovered", "difference", "effect", "matched", "fvu"), ("low", "high")
  ),
}


class Table(NamedTuple):
  """A title, the columns' titles by key, and rows of texts."""

  title: str
  columns: Mapping[str, str]
  rows: list[dict[str, str]]


def part(results: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
  """A list of the results; empty where it is missing."""
  return list(results.get(name) or ())


def _decimals(value: float) -> str:
  """Three decimals; as few digits of what these would call 0."""
  return f"{value:.3f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"


def make(
  title: str, columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> Table:
  """Numbers as texts, with the intervals that they have."""

  def cell(row, name):
    found = [row.get(key) for key in (name, *_ENDS.get(name, ()))]
    if len(found) == 1 or not all(map(plots.is_finite, found)):
      return format_value(found[0])
    centre, low, high = map(_decimals, found)
    return f"{centre} [{low}, {high}]"

  texts = [{name: cell(row, name) for name in columns} for row in rows]
  return Table(title, columns, texts)


def _of(
  results: Mapping[str, Any], name: str, route: str
) -> list[Mapping[str, Any]]:
  return [row for row in part(results, name) if row["route"] == route]


def _split(route: str) -> tuple[str, str]:
  """`a:5 > b:9` -> `a > b`, `5 > 9`; one without layers as it is."""
  ends = [site.rpartition(":") for site in route.split(" > ")]
  models, _, layers = (" > ".join(names) for names in zip(*ends, strict=True))
  return (models, layers) if all(end[0] for end in ends) else (route, route)


def directions(results: Mapping[str, Any]) -> dict[str, list[str]]:
  """Routes between layers by the direction between models."""
  out: dict[str, list[str]] = {}
  names = ("rows", "splice", "causal", "unseen", "differences")
  every = [row["route"] for name in names for row in part(results, name)]
  for route in dict.fromkeys(every):
    out.setdefault(_split(route)[0], []).append(route)
  return out


def of_direction(
  results: Mapping[str, Any], routes: Sequence[str]
) -> list[Table]:
  """Maps down, layers across: R^2 of codes, and what splices recover."""
  found = []
  for title, name, key in (
    ("Code R², pooled over latents", "rows", "r2_pooled"),
    ("CE recovered", "splice", "recovered"),
  ):
    rows = [row for row in part(results, name) if row["route"] in routes]
    by_map: dict[str, dict[str, Any]] = {}
    for row in rows:
      own = by_map.setdefault(
        row["map"], {"map": row["map"], "role": row.get("role")}
      )
      own[row["route"]] = row.get(key)
    layers = {row["route"]: _split(row["route"])[1] for row in rows}
    columns = {"map": "map", "role": "role", **layers}
    found.append(make(title, columns, list(by_map.values())))
  return [table for table in found if table.rows]


def of_route(results: Mapping[str, Any], route: str) -> list[Table]:
  """What each map of a route predicts, recovers and moves."""
  found = [
    make("Predictions", MAPS, _of(results, "rows", route)),
    make("Splices", SPLICE, _of(results, "splice", route)),
  ]
  for one in _of(results, "causal", route):
    found += [
      make("Injection", INJECT, one.get("inject") or ()),
      make("Substitution", SUBSTITUTION, one.get("substitution") or ()),
    ]
  return [table for table in found if table.rows]


def brief(results: Mapping[str, Any], route: str) -> Table:
  """The most telling columns of a route, a line for each map."""
  # Both have ends of intervals by the same names: texts first.
  predicted = {
    row["map"]: row for row in make("", MAPS, _of(results, "rows", route)).rows
  }
  spliced = {
    row["map"]: row
    for row in make("", SPLICE, _of(results, "splice", route)).rows
  }
  rows = [
    {**spliced.get(name, {}), **predicted.get(name, {})}
    for name in {**predicted, **spliced}
  ]
  return Table(route, BRIEF, rows)


def note(results: Mapping[str, Any], route: str) -> str:
  """Sites of a route, and whether its models are two."""
  rows = _of(results, "rows", route)[:1]
  said = [f"{row.get('source')} to {row.get('target')}" for row in rows]
  said += [f"{row['kind']} models" for row in rows if row.get("kind")]
  return ", ".join(said)


def _coverage(row: Mapping[str, Any]) -> dict[str, Any]:
  shares = ("tokens_a", "tokens_b", "bytes", "one_to_one")
  return {
    **row,
    "models": f"{row['a']} and {row['b']}",
    **{k: f"{row[k]:.1%}" for k in shares if plots.is_finite(row.get(k))},
  }


def of_all(results: Mapping[str, Any]) -> list[Table]:
  """What is compared over routes and pairs; without empty tables."""
  matches, causal = part(results, "matches"), part(results, "causal")
  methods = dict.fromkeys(
    name for one in matches for name in one.get("methods") or ()
  )
  found = [
    make("Coverage", COVERAGE, [*map(_coverage, part(results, "coverage"))]),
    make("Dictionaries", DICTIONARIES, part(results, "dictionaries")),
    make("Layers never seen", UNSEEN, part(results, "unseen")),
    make(
      "Differences of CE recovered",
      DIFFERENCES,
      [
        row | {"compared": f"{row['first']} less {row['second']}"}
        for row in part(results, "differences")
      ],
    ),
    make(
      "Matched latents",
      MATCHES | {name: name for name in methods},
      [{**(one.get("methods") or {}), **one} for one in matches],
    ),
    make(
      "Ablation fingerprints",
      FINGERPRINTS,
      [{**one, **one["fingerprints"]} for one in causal if one["fingerprints"]],
    ),
  ]
  return [table for table in found if table.rows]
