"""The page that a person opens after a run: one HTML file, no network."""

import base64
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import numpy as np

# Shown on the page, so that nobody has to read code to know why these latents.
INTEREST = (
  "Interest is the product of five numbers between 0 and 1: the share of top "
  "contexts whose peak token recurs in a context of another document, the "
  "share of top contexts that come from different documents, "
  "1 / (1 + density / 0.01), 1 − mean / max activation, and the share of "
  "living latents that explain no more energy; it is divided by k for the "
  "k-th latent with the same commonest peak token, and dead latents have none."
)

# A sentence or two: more hides the peak, less hides why the latent fired.
_BEFORE, _AFTER = 32, 16
_CONTEXTS = 8
# Control characters get their Unicode pictures. Direction overrides get a
# replacement: one in a document would reorder the text of the page around it.
# So do controls that have no picture, of which some terminals obey a few.
_VISIBLE = {
  **{code: 0x2400 + code for code in range(0x20)},
  **dict.fromkeys(
    [*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD
  ),
  0x7F: 0x2421,
  ord("\n"): "⏎",
  ord("\t"): "⇥",
  ord("▁"): " ",
}


@dataclass
class Context:
  """A stretch of a document around a token on which a latent fired.

  Attributes:
    tokens: text of each token.
    activations: the latent's activation at each token.
    peak: index of the token with the activation that the context is shown for.
    source: name of the corpus.
    document: what identifies the document in its corpus.
  """

  tokens: list[str]
  activations: list[float]
  peak: int
  source: str = ""
  document: str = ""

  def __post_init__(self):
    if len(self.tokens) != len(self.activations):
      raise ValueError(
        "Context expects one activation for each token, received "
        f"{len(self.tokens)} tokens and {len(self.activations)} activations; "
        "cut both to the same window."
      )
    if not 0 <= self.peak < len(self.tokens):
      raise ValueError(
        f"Context expects 0 <= peak < {len(self.tokens)} (its tokens), "
        f"received {self.peak}; count peak from the start of the window."
      )


@dataclass
class Latent:
  """What the page shows about one latent of a dictionary.

  Attributes:
    index: position in the dictionary.
    density: fraction of held-out tokens on which it fired.
    mean_activation: mean over the tokens on which it fired.
    max_activation: maximum over held-out tokens; full colour on the page.
    interest: score from `select_interesting`, or None.
    contexts: where it fired most, strongest first.
    promoted: tokens whose logits its decoder row raises most.
    suppressed: tokens whose logits its decoder row lowers most.
    prefix: width of the smallest Matryoshka prefix that holds it, or None.
    notes: more about it, a line each.
  """

  index: int
  density: float
  mean_activation: float
  max_activation: float
  interest: float | None
  contexts: list[Context] = field(default_factory=list)
  promoted: list[str] = field(default_factory=list)
  suppressed: list[str] = field(default_factory=list)
  prefix: int | None = None
  notes: list[str] = field(default_factory=list)


def select_interesting(
  *,
  density,
  mean_activation,
  max_activation,
  energy,
  top_tokens,
  top_documents,
  n: int = 20,
) -> tuple[np.ndarray, np.ndarray]:
  """Picks the latents that are most worth a researcher's first look.

  The score is the sentence in `INTEREST`. Its factors ask, in order: do the
  top contexts agree; are they more than one text; does the latent keep silent
  on most tokens; does it have strong cases; does it matter to the
  reconstruction. The last one is a rank, so that one massive activation does
  not outweigh everything else; the division keeps twenty latents for the same
  comma from filling the page.

  Args:
    density: [M] fraction of held-out tokens on which each latent fired.
    mean_activation: [M] mean over the tokens on which it fired.
    max_activation: [M] maximum over held-out tokens.
    energy: [M] sum over tokens of (activation * decoder norm)².
    top_tokens: [M, n_ctx] id of the peak token of each top context, strongest
      first, -1 where there are fewer.
    top_documents: [M, n_ctx] id of the document of each top context.
    n: how many latents to pick.

  Returns:
    Indices of the picked latents, best first, and their scores. There are
    fewer than `n` where fewer are alive. Ties go to the larger energy, then
    to the smaller index.

  Raises:
    ValueError: if the shapes do not belong together.
  """
  density, mean, peak, energy = (
    np.asarray(array, np.float64)
    for array in (density, mean_activation, max_activation, energy)
  )
  top_tokens, top_documents = np.asarray(top_tokens), np.asarray(top_documents)
  shapes = [a.shape for a in (density, mean, peak, energy)]
  if (
    density.ndim != 1
    or len(set(shapes)) > 1
    or top_tokens.ndim != 2
    or len(top_tokens) != len(density)
    or top_tokens.shape != top_documents.shape
  ):
    raise ValueError(
      "select_interesting expects four arrays [M] and top_tokens, "
      f"top_documents [M, n_ctx], received {shapes}, {top_tokens.shape} and "
      f"{top_documents.shape}; compute all of them for the same M latents."
    )
  alive = np.flatnonzero((density > 0) & (peak > 0) & np.isfinite(peak))
  density, mean, peak, energy, tokens, documents = (
    array[alive]
    for array in (density, mean, peak, energy, top_tokens, top_documents)
  )
  energy = np.nan_to_num(energy)

  # One column at a time: [M, n_ctx, n_ctx] would not fit for a wide dictionary.
  contexts = max(tokens.shape[1], 1)
  recurs, novel = np.zeros(len(alive)), np.zeros(len(alive))
  common, commonest = np.zeros(len(alive), int), np.full(len(alive), -1)
  for c in range(tokens.shape[1]):
    token, document = tokens[:, c : c + 1], documents[:, c : c + 1]
    there = token[:, 0] >= 0
    same = tokens == token
    recurs += there & (same & (documents != document)).any(1)
    earlier = (documents[:, :c] == document) & (tokens[:, :c] >= 0)
    novel += there & ~earlier.any(1)
    count = np.where(there, same.sum(1), 0)
    commonest = np.where(count > common, token[:, 0], commonest)
    common = np.maximum(count, common)

  rank = np.searchsorted(np.sort(energy), energy, side="right")
  score = (
    (recurs / contexts)
    * (novel / contexts)
    / (1 + density / 0.01)
    * np.clip(np.nan_to_num(1 - mean / peak), 0, 1)
    * (rank / max(len(alive), 1))
  )
  # The best latent of each token keeps its score, the second gets half, ...
  by_token = np.lexsort((alive, -energy, -score, commonest))
  starts = np.flatnonzero(np.diff(commonest[by_token], prepend=-2))
  sizes = np.diff(starts, append=len(alive))
  score[by_token] /= np.arange(len(alive)) - np.repeat(starts, sizes) + 1
  best = np.lexsort((alive, -energy, -score))[:n]
  return alive[best], score[best]


def _plain(value):
  """A Python scalar for the zero-dimensional arrays that results hold."""
  if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
    return value.item()
  return value.tolist() if hasattr(value, "tolist") else value


def format_value(value) -> str:
  """Four significant digits, and an en dash for what is missing."""
  value = _plain(value)
  if value is None:
    return "–"
  if isinstance(value, bool):
    return "yes" if value else "no"
  if isinstance(value, int):
    return f"{value:,}" if abs(value) >= 10_000 else str(value)
  if isinstance(value, float):
    if math.isnan(value):
      return "–"
    if math.isinf(value):
      return "∞" if value > 0 else "−∞"
    short = f"{value:.4g}"
    # %g turns to exponents at 1e4, which people read as a small number.
    return f"{float(short):,.0f}" if 1e4 <= abs(float(short)) < 1e9 else short
  if isinstance(value, (list, tuple)):
    shown = ", ".join(format_value(item) for item in value[:12])
    return f"{shown}, … ({len(value)} in all)" if len(value) > 12 else shown
  return str(value)


def _exact(value) -> str:
  """A config's value as one would type it: rounding would hide a change."""
  value = _plain(value)
  if value is None:
    return "–"
  return value if isinstance(value, str) else json.dumps(value, default=str)


def _percent(value) -> str:
  value = _plain(value)
  if value is None or not math.isfinite(value):
    return "–"
  return f"{100 * value:.3g} %"


def _leaves(tree, prefix: str = "") -> Iterator[tuple[str, object]]:
  """Dotted keys and values; lists of mappings are numbered."""
  if isinstance(tree, (list, tuple)) and any(
    isinstance(item, Mapping) for item in tree
  ):
    tree = dict(enumerate(tree))
  if isinstance(tree, Mapping) and (tree or not prefix):
    for key, value in tree.items():
      yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
  else:
    yield prefix, tree


def _definition(key: str, definitions: Mapping) -> str:
  """The text for `a.b.c`: under that key, under `c`, or under `a.b`, `a`."""
  parts = key.split(".")
  parents = [".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1)]
  for name in (key, parts[-1], *parents):
    if name in definitions:
      return str(definitions[name])
  return ""


def visible(text) -> str:
  """Text whose control characters can be seen and move nothing around it."""
  return str(text).translate(_VISIBLE)


def _view(context: Context, full: float) -> dict:
  """The tokens around the peak, with a heat between 0 and 1 for each."""
  start = max(0, context.peak - _BEFORE)
  stop = min(len(context.tokens), context.peak + _AFTER + 1)
  cells = []
  for position in range(start, stop):
    activation = float(context.activations[position])
    fired = math.isfinite(activation) and activation != 0
    heat = min(max(activation / full, 0.0), 1.0) if fired and full > 0 else 0.0
    text = visible(context.tokens[position])
    # A coloured leading space would be torn off at the end of a line.
    word = text.lstrip(" ") or text
    cells.append(
      {
        "lead": text.removesuffix(word) if cells else "",
        "text": word,
        "heat": f"{heat:.3f}",
        "value": format_value(activation),
        "fired": fired,
        "peak": position == context.peak,
      }
    )
  return {
    "cells": cells,
    "cut_before": start > 0,
    "cut_after": stop < len(context.tokens),
    "value": format_value(context.activations[context.peak]),
    "where": " · ".join(
      visible(name) for name in (context.source, context.document) if name
    ),
  }


def _card(latent: Latent) -> dict:
  contexts = latent.contexts[:_CONTEXTS]
  full = _plain(latent.max_activation)
  if full is None or not math.isfinite(full) or full <= 0:
    full = max(
      (a for c in contexts for a in c.activations if math.isfinite(a)),
      default=0.0,
    )
  views = [_view(context, float(full)) for context in contexts]
  peak = contexts[0].tokens[contexts[0].peak] if contexts else ""
  return {
    "latent": latent,
    "contexts": views,
    "peak": visible(peak).strip(),
    "notes": [visible(note) for note in latent.notes],
    "promoted": [visible(token) for token in latent.promoted],
    "suppressed": [visible(token) for token in latent.suppressed],
  }


def _embed(path: str | Path) -> str:
  path = Path(path)
  data = path.read_bytes()
  if not data.startswith(b"\x89PNG\r\n\x1a\n"):
    raise ValueError(
      f"write_page expects plots as PNG files, received {path}, which is not "
      "one; write it with gemma_jax.report.plots."
    )
  return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def _sha256(script) -> str:
  digest = hashlib.sha256(script.encode()).digest()
  return base64.b64encode(digest).decode("ascii")


def write_page(
  path: str | Path,
  *,
  title: str,
  results: Mapping,
  config: Mapping,
  plots: Mapping[str, str | Path],
  latents: Sequence[Latent],
  summary: Sequence[tuple[str, object, str]],
  noun: str = "Latent",
  order: str = INTEREST,
  template: str = "page.html",
  extra: Mapping | None = None,
) -> Path:
  """Writes everything about a run into one HTML file that opens offline.

  Texts may come from anywhere: all of them are escaped, and the page's own
  content security policy forbids the network and scripts, except one whose
  hash the template gives. The same input gives the same bytes.

  Args:
    path: where to write; folders are made.
    title: heading of the page.
    results: the final numbers, nested as they like. `definitions` (key to
      text) explains them in the table: by dotted key, by last part, or by the
      nearest parent. `versions`, `seeds` and `seed` go to the footer.
    config: the resolved config, shown exactly.
    plots: caption to path of a PNG, embedded in this order.
    latents: what to show, best first, with up to eight contexts each.
    summary: (label, value, explanation) of each headline number; name the
      baseline or the denominator in the explanation.
    noun: what `latents` are.
    order: why these ones, in this order.
    template: of this folder; another one extends `page.html`.
    extra: what only that one shows, by the names that it uses.

  Returns:
    The path.

  Raises:
    ValueError: if a plot is not a PNG.
  """
  definitions = results.get("definitions") or {}
  apart = ("definitions", "versions", "seeds", "seed")
  seeds = results.get("seeds", results.get("seed"))
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters |= {
    "value": format_value,
    "percent": _percent,
    "visible": visible,
    "sha256": _sha256,
  }
  text = environment.get_template(template).render(
    title=title,
    summary=summary,
    plots=[(caption, _embed(plot)) for caption, plot in plots.items()],
    cards=[_card(latent) for latent in latents],
    noun=noun,
    order=order,
    results=[
      (key, format_value(value), _definition(key, definitions))
      for key, value in _leaves(
        {k: v for k, v in results.items() if k not in apart}
      )
    ],
    config=[(key, _exact(value)) for key, value in _leaves(config)],
    versions=[
      (k, _exact(v)) for k, v in _leaves(results.get("versions") or {})
    ],
    seeds=[
      (key, _exact(value))
      for key, value in _leaves(
        seeds if isinstance(seeds, Mapping) else {"seed": seeds}
      )
    ],
    **(extra or {}),
  )
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # Half of a surrogate pair, as byte-level tokens can hold, has no UTF-8.
  path.write_text(text, encoding="utf-8", errors="replace", newline="\n")
  return path
