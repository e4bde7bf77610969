"""Whether latents that fire alike in two models also do the same in them.

Matching says which latents of two dictionaries fire together. Here something
is done to them: a latent is taken out of both models, and both change where?
Its direction is brought into the other model, and does it say there what the
native one says? The other model's codes are put in place of its own, and what
is lost? Everything stands beside latents of other matches.

Ablation fingerprints and substitution follow a benchmark of dictionaries of
one model (TMLR submission 7897, openreview.net/forum?id=5cy6WtSC8f), transfer
of directions by an affine map Chen et al. 2025 (arXiv 2506.06609).
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gemma_jax import models
from gemma_jax.activations import owner
from gemma_jax.alignment.maps import Map
from gemma_jax.alignment.matching import Matches
from gemma_jax.alignment.paired import Paired
from studies import (
  cross_features,
  cross_fingerprints,
  cross_injection,
  cross_places,
  cross_substitution,
)
from studies.cross_places import Side
from studies.cross_scores import route
from studies.cross_sides import Pair

log = logging.getLogger("gemma_jax")

FIELDS = {
  "pairs": (list, tuple),  # some of the study's
  "latents": int,  # matches that fire most, for fingerprints and injection
  "documents": int,  # whose windows are run
  "context": int,  # tokens of a window, at most
  "batch_size": int,  # windows in one forward pass
  "unit": int,  # places of which a fingerprint has one number
  "start": int,  # position from which a vector is added
  "positions": int,  # at which its effect is measured
  "set": int,  # tokens that a latent says
  "doses": (list, tuple),  # of vectors, in typical activations
  "counts": (list, tuple),  # of matches that are substituted, besides all
  "draws": int,  # permutations of the matching
  "resamples": int,
}
LEAST = 4  # matches, for anything to be said
DEFINITIONS = {
  **cross_fingerprints.DEFINITIONS,
  **cross_injection.DEFINITIONS,
  **cross_substitution.DEFINITIONS,
  "effects.interval": (
    "95 % bootstrap (BCa): of fingerprints and inject over latents, of "
    "substitution over documents."
  ),
}


def measure(
  config: Mapping[str, Any],
  rows,
  pair: Pair,
  chosen: Matches,
  maps: Mapping[Pair, Map],
  load: Callable[[str], models.Model],
) -> list[dict[str, Any]]:
  """Both directions of a pair, for `causal` of results.json.

  Args:
    config: of the study.
    rows: `cross_fit.Rows`.
    pair: one of the study's.
    chosen: its matches, best first.
    maps: from one site to the other, by direction.
    load: (name) -> the model.
  """
  own, seed = config["causal"], config["seed"]
  if len(chosen.r) < LEAST:
    log.warning(
      "%s: %d matches beyond chance; no causal checks", pair.name, len(chosen.r)
    )
    return []
  both = rows.found[pair.models]
  sides = {
    site: _side(rows, both["heldout"], site, load)
    for site in dict.fromkeys(pair)
  }
  latents = dict(zip(pair, (chosen.a, chosen.b), strict=True))
  a, b, kept = cross_places.cut(sides[pair.a], sides[pair.b], own)
  sides = {pair.a: a, pair.b: b}

  def codes(split, site, count):
    found = cross_features.sparse_codes(
      both[split].store, site, rows.trained[site][0], count
    )
    return found[:, latents[site]].toarray()

  trained = [codes("train", s, config["matching"]["rows"]) for s in pair]
  there = {s: codes("heldout", s, len(kept))[kept] for s in pair}
  # Those that fire most in this text, in both.
  often = np.minimum(*((there[s] > 0).sum(0) for s in pair))
  some = np.sort(np.argsort(-often, kind="stable")[: own["latents"]])
  prints = {
    s: cross_fingerprints.fingerprints(sides[s], latents[s][some], own)
    for s in pair
  }
  out = []
  for way, order in ((pair, 1), (pair.turned, -1)):
    source, target = (sides[site] for site in way)
    here = trained[::order]
    active = here[1][:, some]
    typical = active.sum(0) / np.maximum((active > 0).sum(0), 1)
    out.append(
      {
        "route": route(way),
        "latents": len(some),
        "fingerprints": cross_fingerprints.compare_fingerprints(
          prints[way.a], prints[way.b], own, seed
        ),
        "inject": cross_injection.inject(
          target,
          latents[way.b][some],
          cross_injection.transferred(source, latents[way.a][some], maps[way]),
          typical,
          own,
          seed,
        ),
        "substitution": cross_substitution.substitute(
          target,
          latents[way.b],
          cross_substitution.code_sums(*here),
          there[way.a],
          there[way.b],
          own,
          seed,
        ),
      }
    )
  return out


def _side(rows, found: Paired, site: str, load) -> Side:
  name = owner(site)[0]
  windows = rows.subjects[name].windows["heldout"]
  return Side(
    load(name),
    rows.trained[site][0],
    windows.tokens,
    windows.mask,
    found.places(name),
    found.document,
  )
