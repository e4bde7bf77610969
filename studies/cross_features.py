"""Latents of two dictionaries that fire on the same tokens, side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import sparse

from gemma_jax.activations import ActivationStore, owner
from gemma_jax.alignment import matching
from gemma_jax.alignment.correlations import Correlations
from gemma_jax.alignment.paired import Paired
from gemma_jax.dictionaries import Dictionary
from gemma_jax.report import contexts
from studies import cross_maps
from studies.cross_sides import Pair, Subject

DEFINITIONS = {
  "eligible": "Latents of a that fire often enough to be matched at all.",
  "matched": "Pairs that the Hungarian algorithm makes of them.",
  "significant": (
    "Of these, pairs that correlate more than the best partner of a latent "
    "does after tokens are shifted within documents, at a false discovery rate "
    "of 5 % (pooled over latents)."
  ),
  "r_median": "Of the Pearson correlation of matched pairs, training tokens.",
  "null_median": "Of the best correlation of a latent after shifting.",
}


def match(
  config: Mapping[str, Any],
  found: Paired,
  pair: Pair,
  dictionaries: Mapping[str, Sequence[Dictionary]],
  *,
  seed: int,
) -> tuple[dict[str, Any], matching.Matches, np.ndarray]:
  """Matches the latents of a pair of sites on training tokens.

  Args:
    config: `matching` of the study.
    found: training pairs.
    pair: both sites.
    dictionaries: of both.
    seed: of the shifts.

  Returns:
    A row of `matches` in results.json; the significant ones, and their q,
    best correlation first.
  """
  codes = [
    sparse_codes(found.store, site, dictionaries[site][0], config["rows"])
    for site in pair
  ]
  document = found.document[: codes[0].shape[0]]
  least = config["least"]
  correlations = Correlations().update(*codes).compute()
  ways = {
    how: matching.match(correlations, how=how, least=least)
    for how in matching.METHODS
  }
  best = ways["hungarian"]
  null = matching.shift_null(
    *codes, document, draws=config["draws"], least=least, seed=seed
  )
  significance = matching.significance(best, null, pooled=True)
  kept = np.flatnonzero(significance.matched)
  kept = kept[np.argsort(-best.r[kept], kind="stable")]
  chosen = matching.Matches(best.a[kept], best.b[kept], best.r[kept])
  row = {
    "pair": pair.name,
    "kind": pair.kind,
    "eligible": int((correlations.fired_a >= least).sum()),
    "matched": len(best.r),
    "significant": len(kept),
    "r_median": float(np.median(best.r)) if len(best.r) else None,
    "null_median": float(np.median(null[:, best.a])) if len(best.r) else None,
    "r": np.sort(best.r).tolist(),
    "null": np.sort(null[:, best.a].ravel())[:: len(null)].tolist(),
    "methods": {how: len(one.r) for how, one in ways.items()},
    "tokens": int(correlations.count),
  }
  return row, chosen, significance.q[kept]


def sparse_codes(
  store: ActivationStore, site: str, dictionary: Dictionary, rows: int
) -> sparse.csr_array:
  """Codes of a store's first rows, [rows, M]."""
  parts = [
    sparse.csr_array(np.asarray(dictionary.encode(x)))
    for _, (x,) in cross_maps.blocks(store, [site], rows=rows)
  ]
  return sparse.csr_array(sparse.vstack(parts))


def side_by_side(
  config: Mapping[str, Any],
  subjects: Mapping[str, Subject],
  harvested: Mapping[str, Mapping[str, ActivationStore]],
  pair: Pair,
  dictionaries: Mapping[str, Sequence[Dictionary]],
  chosen: matching.Matches,
  q: np.ndarray,
) -> list[dict[str, Any]]:
  """The contexts of both models' matched latents, for the page.

  Some of the best matches, and as many spread over the rest.

  Args:
    config: `features` of the study.
    subjects: by name.
    harvested: their stores, whose held-out side is read.
    pair: both sites.
    dictionaries: of both.
    chosen: of `match`.
    q: likewise.
  """
  count = min(config["count"], len(chosen.r))
  if not count:
    return []
  first = np.arange(count // 2)
  rest = np.linspace(count // 2, len(chosen.r) - 1, count - len(first))
  shown = np.unique(np.concatenate([first, rest.astype(int)]))
  texts = []
  for site, latents in zip(
    pair, (chosen.a[shown], chosen.b[shown]), strict=True
  ):
    texts.append(
      _contexts(
        subjects[owner(site)[0]],
        harvested[owner(site)[0]]["heldout"],
        owner(site)[1],
        dictionaries[site][0],
        latents,
        config["contexts"],
      )
    )
  return [
    {
      "pair": pair.name,
      "latent_a": int(chosen.a[i]),
      "latent_b": int(chosen.b[i]),
      "r": float(chosen.r[i]),
      "q": float(q[i]),
      "contexts_a": texts[0][n],
      "contexts_b": texts[1][n],
    }
    for n, i in enumerate(shown)
  ]


def _contexts(subject, store, site, dictionary, latents, count):
  """For each latent, texts of [token, code] around its largest codes."""
  codes = np.concatenate(
    [
      np.asarray(dictionary.encode(x))[:, latents]
      for _, (x,) in cross_maps.blocks(store, [site])
    ]
  )
  label = contexts.labels(store)
  words = contexts.to_text(subject)
  windows = subject.windows["heldout"]
  out = []
  for column in codes.T:
    texts, seen = [], set()
    for row in np.argsort(-column, kind="stable"):
      if column[row] <= 0 or len(texts) == count:
        break
      if label["document"][row] in seen:
        continue
      seen.add(label["document"][row])
      one = contexts.context(
        label,
        windows,
        int(row),
        lambda start, stop, column=column: column[start:stop],
        words,
      )
      texts.append(
        [list(t) for t in zip(one.tokens, one.activations, strict=True)]
      )
    out.append(texts)
  return out
