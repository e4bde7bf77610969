"""Maps between models: text for the terminal, pictures, tables, a page."""

import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from gemma_jax import tables
from gemma_jax.report import cross_model_plots as figures
from gemma_jax.report import cross_model_tables as numbers
from gemma_jax.report import plots
from gemma_jax.report.cross_model_tables import Table, part
from gemma_jax.report.page import Context, Latent, visible, write_page

# Pairs and routes have signs of Markdown and HTML in their names.
_MARKS = {ord("|"): r"\|", ord("<"): "&lt;", ord("&"): "&amp;"}
_UNSEEN_ROLES = {"hypernetwork": "network", "ridge": "ceiling"}
CAPTIONS = {
  "codes": "How well each map predicts the target's codes on documents that "
  "no map was fitted on: R² over all latents together, with 95 % intervals. "
  "Look for dots to the right of every grey line: they know more than the "
  "token or its position tells. Controls belong at 0 or left of it. Green is "
  "as far as the target's own dictionaries go.",
  "splice": "Cross-entropy that the target model gets back when what a map "
  "predicts takes the place of its own activations: 0 is their mean, 1 is the "
  "model as it was. Look for what comes near the green ceiling and stays "
  "right of the grey floors.",
  "over_ridge": "Where the networks beat ridge: bars wholly right of the line "
  "do so, bars across it do not.",
  "unseen": "Layers that the hypernetwork never saw: the share of the "
  "activations' variance that stays unexplained, so further left is better "
  "and 1 is the mean. Look whether the hypernetwork is left of what needs no "
  "network: the nearest layers' map, the mean of the neighbours, one ridge "
  "for all. Green is ridge fitted to these layers.",
  "matches": "Correlations of matched latents, as the share at or below each "
  "value. The further the blue line is right of the grey one, of matches made "
  "where tokens do not belong together, the more latents the models share.",
  "inject": "What a direction does to the target model, by dose. Transferred "
  "directions should climb with native ones, away from those of other latents "
  "and from random ones.",
  "substitution": "KL got back when so many latents take their "
  "values from the other model. Matched codes should stay above codes dealt "
  "to other tokens, zeros and means. Lines may leave the axis below.",
}


def summary(results: Mapping[str, Any]) -> str:
  """The study as text: a table for each route, then the verdicts.

  Args:
    results: of `studies.cross_model`. Parts may be missing or empty, and
      numbers None.
  """
  lines = ["ACROSS MODELS"]
  lines.append(f"Models: {', '.join(results.get('models') or ()) or 'none'}")
  found = [
    numbers.brief(results, route)
    for routes in numbers.directions(results).values()
    for route in routes
  ]
  for table in (*found, *numbers.of_all(results)):
    if table.rows:
      text = tables.aligned(table.rows, table.columns)
      lines += ["", table.title, *(f"  {line}" for line in text.split("\n"))]
  lines += ["", "VERDICTS"]
  lines += [f"  {verdict}" for verdict in results.get("verdicts") or ["none"]]
  return "\n".join(lines)


def _markdown(results: Mapping[str, Any], title: str) -> str:
  """Verdicts and all tables."""

  def written(level: str, title: str, table: Table) -> Iterator[str]:
    yield f"{level} {title}\n".translate(_MARKS)
    rows = [
      {name: text.translate(_MARKS) for name, text in row.items()}
      for row in table.rows
    ]
    titles = {k: v.translate(_MARKS) for k, v in table.columns.items()}
    yield tables.markdown(rows, titles)

  out = [f"# {title}\n".translate(_MARKS)]
  verdicts = "".join(f"- {text}\n" for text in results.get("verdicts") or ())
  if verdicts:
    out.append(verdicts.translate(_MARKS))
  for direction, routes in numbers.directions(results).items():
    out.append(f"## {direction}\n".translate(_MARKS))
    for table in numbers.of_direction(results, routes):
      out += written("###", table.title, table)
    for route in routes:
      for table in numbers.of_route(results, route):
        out += written("###", f"{route}: {table.title}", table)
  for table in numbers.of_all(results):
    out += written("##", table.title, table)
  features = part(results, "features")
  if features:
    table = numbers.make("Features", numbers.FEATURES, features)
    out += written("##", table.title, table)
  return "\n".join(out)


def _chunks(rows: Sequence[Mapping[str, Any]], key: str = "route"):
  """What to say of the figure, and as many routes or pairs as it holds."""
  names = list(dict.fromkeys(row[key] for row in rows))
  most = figures.MOST_PANELS
  for start in range(0, len(names), most):
    shown = names[start : start + most]
    these = f"{start + 1} to {start + len(shown)} of {len(names)}"
    which = f" {key.capitalize()}s {these}."
    own = [row for row in rows if row[key] in shown]
    yield which * (len(names) > most), own


def _drawn(
  results: Mapping[str, Any],
) -> Iterator[tuple[str, str, Figure | None]]:
  """Name, what to add to the caption, and figure, in the page's order."""
  rows, causal = part(results, "rows"), part(results, "causal")
  unseen = [
    row | {"role": _UNSEEN_ROLES.get(row["map"], "linear")}
    for row in part(results, "unseen")
  ]
  dots = figures.dots_figure
  for which, own in _chunks(rows):
    keys = ("r2_pooled", "r2_low", "r2_high")
    yield "codes", which, dots(own, keys, x="R² of codes, over all latents")
  for which, own in _chunks(part(results, "splice")):
    keys = ("recovered", "low", "high")
    yield "splice", which, dots(own, keys, x="CE recovered (mean 0, clean 1)")
  yield "over_ridge", "", figures.over_ridge_figure(rows)
  for which, own in _chunks(unseen):
    yield "unseen", which, dots(own, ("fvu", "low", "high"), x="FVU")
  for which, own in _chunks(part(results, "matches"), "pair"):
    yield "matches", which, figures.matches_figure(own)
  for which, own in _chunks(causal):
    yield "inject", which, figures.inject_figure(own)
  for which, own in _chunks(causal):
    yield "substitution", which, figures.substitution_figure(own)


def _pictures(
  folder: pathlib.Path, results: Mapping[str, Any]
) -> dict[str, pathlib.Path]:
  """Writes all of them; captions and paths."""
  pictures: dict[str, pathlib.Path] = {}
  stems: list[str] = []
  for name, which, figure in _drawn(results):
    if figure:
      stems.append(name)
      number = f"_{stems.count(name)}" * (stems.count(name) > 1)
      path = plots.save(figure, folder / f"{name}{number}.png")
      pictures[CAPTIONS[name] + which] = path
  return pictures


def _latent(index: int, texts: Sequence[Sequence[Sequence]]) -> Latent:
  """A latent of which only the texts are shown, in shades of their maximum."""
  found = []
  for text in filter(None, texts):
    values = [v if plots.is_finite(v) else 0.0 for _, v in text]
    peak = values.index(max(values))
    found.append(Context([str(token) for token, _ in text], values, peak))
  return Latent(index, math.nan, math.nan, math.nan, None, found)


def _features(results: Mapping[str, Any]) -> list[dict[str, Any]]:
  """What the page says above the texts of two matched latents."""
  sites = {one["name"]: (one["a"], one["b"]) for one in part(results, "pairs")}
  return [
    {
      "pair": visible(one["pair"]),
      "sites": sites.get(one["pair"], one["pair"].partition(" | ")[::2]),
      "r": one.get("r"),
      "q": one.get("q"),
    }
    for one in part(results, "features")
  ]


def write(
  workdir: pathlib.Path,
  *,
  results: Mapping[str, Any],
  config: Mapping[str, Any],
) -> pathlib.Path:
  """Writes `plots/*.png`, `table.md` and `report.html`.

  Args:
    workdir: of the study; made if need be.
    results: of `studies.cross_model`. Parts may be missing or empty, and
      numbers None; pictures of what is not there are left out.
    config: resolved, as plain dicts.

  Returns:
    The path of the page.
  """
  pictures = _pictures(workdir / "plots", results)
  workdir.mkdir(parents=True, exist_ok=True)
  title = f"Across models: {', '.join(results.get('models') or ())}"
  text = _markdown(results, title)
  (workdir / "table.md").write_text(text, encoding="utf-8")
  kept = ("models", "definitions", "versions", "seeds")
  return write_page(
    workdir / "report.html",
    title=title,
    results={
      **{name: results.get(name) or {} for name in kept},
      "pairs": {
        one["name"]: {k: v for k, v in one.items() if k != "name"}
        for one in part(results, "pairs")
      },
    },
    config=dict(config),
    plots=pictures,
    latents=[
      _latent(one[f"latent_{side}"], one.get(f"contexts_{side}") or ())
      for one in part(results, "features")
      for side in "ab"
    ],
    summary=[],
    template="cross_model.html",
    extra={
      "verdicts": part(results, "verdicts"),
      "directions": [
        {
          "name": direction,
          "tables": numbers.of_direction(results, routes),
          "routes": [
            (
              route,
              numbers.note(results, route),
              numbers.of_route(results, route),
            )
            for route in routes
          ],
        }
        for direction, routes in numbers.directions(results).items()
      ],
      "tables": numbers.of_all(results),
      "features": _features(results),
      "definitions": results.get("definitions") or {},
    },
  )
