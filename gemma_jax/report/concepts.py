"""Concept vectors for people: text for the terminal, pictures, a page."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from gemma_jax import tables
from gemma_jax.report import concept_cards as cards
from gemma_jax.report import concept_damage_plots as damage
from gemma_jax.report import concept_plots as found
from gemma_jax.report import plots
from gemma_jax.report.page import format_value, visible, write_page

BEST = 20
COLUMNS = {
  "layer": "layer",
  "neuron": "neuron",
  "sign": "sign",
  "category": "lexicon",
  "score": "score",
  "effect": "effect",
  "control": "control",
  "difference": "effect - control [95 %]",
  "ratio": "ratio",
  "rival": "best control's",
  "q": "q",
  "words": "words",
}
STAGES = {
  "stage": "",
  "vectors": "vectors",
  "random": "random directions",
}
CONCEPTS = {"concept": "lexicon", "vectors": "validated"}
KURTOSIS = {
  "layer": "layer",
  "median": "median",
  "p95": "95th",
  "p99": "99th",
  "max": "largest",
  "null_median": "random median",
  "null_p99": "random 99th",
  "share_above_null_p99": "share above",
}
CAPTIONS = {
  "kurtosis": "How peaked the logits of value vectors are. Lines that climb "
  "far above the dashed one are of vectors that say few words loudly; random "
  "directions as long do not. Below: how many do, of which chance explains "
  "1 %.",
  "scores": "How far the vectors of each layer come: scored above the "
  "threshold, tested by damage, validated. Mind the axis: below 1 linear, "
  "above it a log.",
  "concepts": "What validated vectors are of, by the lexicon that fits "
  "their words best.",
  "damage": "Each marker is a vector that was set to its mean. High is damage "
  "to the concept's prompts, right or left is damage to prompts of other "
  "words. Validated vectors should lie above the lines, random directions "
  "around the middle. Axes are linear near zero and a log further out. The "
  "ratio of the tables is a little lower than what the "
  "lines say: it adds the control's standard error.",
  "controls": "Validated vectors, and what happens to the same prompts when "
  "another neuron of the layer is set to its mean, or as much is taken off "
  "along a random direction. By definition the blue marker is the rightmost; "
  "look at how far.",
  "matrix": "What the prompts of every concept (columns) lose under the damage "
  "of every vector (rows). The diagonal is each vector on its own prompts; "
  "columns that are dark throughout are of prompts that break easily.",
  "doses": "What a vector's prompts lose (solid) and control prompts do "
  "(dashed): left by the factor of its coefficient, from unchanged (1) to "
  "reversed, right by the length of noise that is added to it. Of many "
  "vectors the first six are drawn.",
}
ORDER = (
  "Validated vectors first, the largest ratio on top; then those that damage "
  "did not confirm, the smallest p on top; then the best of those that were "
  "not tested. Last come some of the random directions that went the same "
  "way, spread evenly from the largest ratio to the smallest: this is what "
  "noise looks like."
)
# Everything that Markdown, or HTML within it, could take for its own.
_MARKS = {ord(c): f"&#{ord(c)};" for c in "\\`*_[]<>&|~#"}
# What the page shows as cards and pictures.
_APART = (
  "random",
  "validation_results",
  "candidates",
  "kurtosis",
  "by_layer",
  "matrix",
  "doses",
  "groups",
)


def _few(words: Sequence[str], count: int = 5) -> str:
  return ", ".join(visible(word).strip() for word in words[:count])


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
  """A tested vector as the tables show it."""
  numbers = ("score", "effect", "control", "ratio", "q")
  return {
    **row,
    **{name: format_value(row.get(name)) for name in numbers},
    "category": row.get("category") or cards.UNNAMED,
    "difference": cards.interval(row),
    "rival": format_value(max(cards.rivals(row), default=None)),
    "words": _few(row.get("words") or ()),
  }


def _pipeline(results: Mapping[str, Any]) -> list[dict[str, Any]]:
  """What came how far, of vectors and of random directions."""
  stats, random = results["pipeline_stats"], results["random"]
  rows = results["validation_results"]
  below = sum(row["p"] <= results["alpha"] for row in rows)
  share = random["validated"] / random["tested"] if random["tested"] else None
  of_tested = len(cards.validated(results)) / len(rows) if rows else None
  stages = {
    "projected": (stats["total_candidates"], random["directions"]),
    f"scored >= {results['threshold']:.4g}": (
      stats["scored"],
      random["scored"],
    ),
    "examined": (stats["examined"], None),
    "tested": (stats["tested"], random["tested"]),
    f"p <= {results['alpha']:.4g}": (below, random["p_below_alpha"]),
    "validated": (stats["validated_vectors"], random["validated"]),
    "scored and validated": (
      stats["validated_vectors"],
      random["scored_and_validated"],
    ),
    "validated of tested": (_percent(of_tested), _percent(share)),
    "success rate": (_percent(stats["success_rate"]), None),
  }
  return [
    {"stage": stage, "vectors": own, "random": null}
    for stage, (own, null) in stages.items()
  ]


def _percent(share: float | None) -> str | None:
  return f"{share:.3%}" if plots.is_finite(share) else None


def _distribution(results: Mapping[str, Any]) -> list[dict[str, Any]]:
  counts = results["concept_distribution"]
  return [
    {"concept": name, "vectors": counts[name]}
    for name in sorted(counts, key=lambda name: (-counts[name], name))
  ]


def summary(results: Mapping[str, Any]) -> str:
  """The study as text: how many came how far, and the best of them.

  Args:
    results: of `studies.concepts`. The interval of a vector is of its effect
      less its control. Losses are in nats per byte.
  """
  best = cards.validated(results)[:BEST]
  parts = {
    f"CONCEPT VECTORS OF {visible(results['model'])}": tables.aligned(
      _pipeline(results), STAGES
    ),
    "KURTOSIS BY LAYER": tables.aligned(results["kurtosis"], KURTOSIS),
    "CONCEPTS": tables.aligned(_distribution(results), CONCEPTS),
    "BEST VALIDATED VECTORS, nats a byte": tables.aligned(
      list(map(_cells, best)), COLUMNS
    ),
  }
  lines = []
  for title, table in parts.items():
    body = table if "\n" in table else "none"
    lines += [title, *(f"  {line}" for line in body.split("\n")), ""]
  return "\n".join(lines[:-1])


def _table(results: Mapping[str, Any]) -> str:
  """The same in Markdown, with every vector that was tested."""
  rows = [*cards.validated(results), *cards.unconfirmed(results)]
  cells = [
    {
      **own,
      "passes": format_value(row["passes"]),
      **{k: own[k].translate(_MARKS) for k in ("words", "category")},
    }
    for row, own in zip(rows, map(_cells, rows), strict=True)
  ]
  return "\n".join(
    (
      f"# Concept vectors of {visible(results['model']).translate(_MARKS)}\n",
      tables.markdown(_pipeline(results), STAGES),
      "## Kurtosis by layer\n",
      tables.markdown(results["kurtosis"], KURTOSIS),
      "## Concepts\n",
      tables.markdown(_distribution(results), CONCEPTS),
      "## Tested vectors, nats a byte\n",
      tables.markdown(cells, {"passes": "validated", **COLUMNS}),
    )
  )


def _pictures(folder: pathlib.Path, results: Mapping[str, Any]):
  """Writes all of them; captions and paths."""
  made = {
    "kurtosis": found.kurtosis_figure(results["kurtosis"]),
    "scores": found.scores_figure(results["by_layer"]),
    "concepts": found.concepts_figure(results),
    "damage": damage.damage_figure(results),
    "controls": damage.controls_figure(results),
    "matrix": damage.matrix_figure(results),
    "doses": damage.doses_figure(results),
  }
  return {
    CAPTIONS[name]: plots.save(figure, folder / f"{name}.png")
    for name, figure in made.items()
    if figure
  }


def _headline(results: Mapping[str, Any]) -> list[tuple[str, Any, str]]:
  stats, random = results["pipeline_stats"], results["random"]
  best = cards.validated(results)[:1]
  return [
    (
      "Validated vectors",
      stats["validated_vectors"],
      f"of {stats['tested']:,} tested, {stats['scored']:,} that score "
      f"{results['threshold']:.4g} or more and {stats['total_candidates']:,} "
      "projected",
    ),
    (
      "Random directions validated",
      random["validated"],
      f"of {random['tested']:,} tested, {random['p_below_alpha']:,} with p <= "
      f"{results['alpha']:.4g}; {random['scored_and_validated']:,} also score "
      f"{results['threshold']:.4g} or more",
    ),
    (
      "Success rate",
      _percent(stats["success_rate"]),
      "of all vectors that were projected",
    ),
    *(
      (
        "Largest ratio",
        row["ratio"],
        f"{cards.name_of(row)}, its best control {_cells(row)['rival']}",
      )
      for row in best
    ),
  ]


def _for_page(results: Mapping[str, Any]) -> dict[str, Any]:
  """What the table of all results has room for."""
  matrix = results.get("matrix") or {}
  dominance = matrix.get("dominance") or matrix
  measured = {
    "dominance": dominance.get("difference"),
    "dominance_p": dominance.get("p"),
    "group": {
      f"L{one['layer']} {one['category']}": {
        k: v for k, v in one.items() if k not in ("layer", "category")
      }
      for one in results.get("groups") or ()
    },
  }
  return {
    **{k: v for k, v in results.items() if k not in _APART},
    "random_directions": {
      k: v for k, v in results["random"].items() if k != "rows"
    },
    **{k: v for k, v in measured.items() if v not in (None, {})},
  }


def write(
  workdir: pathlib.Path,
  *,
  results: Mapping[str, Any],
  config: Mapping[str, Any],
) -> pathlib.Path:
  """Writes `plots/*.png`, `table.md` and `report.html`.

  Pictures of what is not there, such as of a matrix of no validated vectors,
  are left out.

  Args:
    workdir: of the study; made if need be.
    results: of `studies.concepts`.
    config: resolved, as plain dicts.

  Returns:
    The path of the page.
  """
  pictures = _pictures(workdir / "plots", results)
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / "table.md").write_text(_table(results), encoding="utf-8")
  return write_page(
    workdir / "report.html",
    title=f"Concept vectors of {results['model']}",
    results=_for_page(results),
    config=dict(config),
    plots=pictures,
    latents=[],
    summary=_headline(results),
    order=ORDER,
    template="concepts.html",
    extra={
      "sections": cards.sections(results),
      "changed": cards.CHANGES,
      "definitions": results["definitions"],
    },
  )
