"""What taking matched latents out does to two models, place by place."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from gemma_jax.dictionaries.dictionary import encode
from studies import cross_places
from studies.cross_places import Side

SIMILAR = 5  # latents of a group that fire about as often
LEAST = 3  # units of a correlation

DEFINITIONS = {
  "fingerprints": (
    "Of a latent: KL(clean || its code set to 0 wherever it fires), summed "
    "over the predictions in each unit of text and divided by its paired "
    "places, nats. Units are the same bytes in both models; KL is as it is, "
    "without a logarithm."
  ),
  "fingerprints.matched": (
    "Mean over matches of the correlation, over units, of both latents' "
    "fingerprints. Units in which neither fires make it high."
  ),
  "fingerprints.null": "The same of latents of different matches, all of them.",
  "fingerprints.p": "Of matched, matches dealt anew at random (add-one).",
  "fingerprints.similar": (
    f"As null, of latents that fire about as often in b (groups of {SIMILAR} "
    "or more, by tokens on which they fire); p_similar as p, within them."
  ),
  "fingerprints.active": (
    "As matched, of each match only over units in which one of the two fires "
    f"at least once, {LEAST} units or more: what neither does, does not count."
  ),
  "fingerprints.silent": (
    "Matches left out: one of the two fires nowhere in this text."
  ),
}


class Fingerprints(NamedTuple):
  """What taking out each of K latents does to each of G units of text.

  Attributes:
    kl: float64 [K, G], sums of KL over the unit's predictions, nats.
    fired: int64 [K, G], tokens of the unit on which the latent fires.
    places: int64 [G], paired places of the unit.
  """

  kl: np.ndarray
  fired: np.ndarray
  places: np.ndarray


def fingerprints(
  side: Side, latents, config: Mapping[str, Any]
) -> Fingerprints:
  """Takes each latent out by itself; see `DEFINITIONS`.

  A unit is `unit` paired places of a document that follow one another, with
  the text since the place before them in the window; the same text on both
  sides that `cut` returns.

  Args:
    side: of either model.
    latents: int [K], of its dictionary.
    config: of `FIELDS`.
  """
  latents = np.asarray(latents)
  unit, places = _units(side.document, config["unit"])
  owner = cross_places.owners(side, unit)
  without = functools.partial(_without, side.dictionary.config)
  params = side.dictionary.params
  replacements = {str(k): Partial(without, params, k) for k in latents}
  found, _, sums = cross_places.divergence(side, replacements, owner, config)
  kl = np.zeros((len(latents), len(places)))
  for row, latent in zip(kl, latents, strict=True):
    row[found] = sums[str(latent)]
  counted = side.mask & (owner >= 0)
  fired = np.zeros(kl.shape, np.int64)
  for x, here, own in zip(
    cross_places.values(side, config), counted, owner, strict=True
  ):
    active = np.asarray(side.dictionary.encode(x))[:, latents] != 0
    np.add.at(fired.T, own[here], active[here])
  return Fingerprints(kl, fired, places)


def compare_fingerprints(
  a: Fingerprints, b: Fingerprints, config: Mapping[str, Any], seed: int
) -> dict[str, Any]:
  """Whether matched latents matter in the same places; see `DEFINITIONS`.

  Args:
    a: of latents of the first model.
    b: of their matches, in the same order.
    config: of `FIELDS`.
    seed: of permutations and resamples.

  Returns:
    "latents", "silent" and "units" are counts; "matched" with "low" and
    "high", "null", "p", "similar", "p_similar"; "active" with "active_low",
    "active_high" and "active_latents".

  Raises:
    ValueError: other units or latents, fewer than `LEAST` units, or fewer
      than two matches that fire.
  """
  if a.kl.shape != b.kl.shape or not np.array_equal(a.places, b.places):
    raise ValueError(
      "expected fingerprints of matched latents on the same text, got "
      f"{a.kl.shape} and {b.kl.shape}; use both sides that cut returns"
    )
  alive = a.fired.any(1) & b.fired.any(1)
  count, units = int(alive.sum()), len(a.places)
  if count < 2 or units < LEAST:
    raise ValueError(
      f"expected at least 2 matches that fire in both models and {LEAST} "
      f"units, got {count} of {len(alive)} and {units}; take more documents "
      "or a smaller unit"
    )
  kl = [one.kl[alive] / one.places for one in (a, b)]
  fired = [one.fired[alive] for one in (a, b)]
  every = _correlations(*kl)
  # By rank in b, cut into groups.
  rank = np.argsort(np.argsort(fired[1].sum(1), kind="stable"))
  groups = max(1, count // SIMILAR)
  active = []
  for i, here in enumerate((fired[0] + fired[1]) > 0):
    if here.sum() >= LEAST:
      own = (values[i : i + 1, here] for values in kl)
      active.append(float(_correlations(*own)[0, 0]))
  ends = cross_places.interval(active, config, seed)
  rng = np.random.default_rng(seed)
  everywhere = _against(every, np.zeros(count, int), config["draws"], rng)
  alike = _against(every, rank * groups // count, config["draws"], rng)
  return {
    "latents": count,
    "silent": len(alive) - count,
    "units": units,
    "matched": float(np.diagonal(every).mean()),
    **cross_places.interval(np.diagonal(every), config, seed),
    "null": everywhere[0],
    "p": everywhere[1],
    "similar": alike[0],
    "p_similar": alike[1],
    "active": float(np.mean(active)) if active else None,
    "active_low": ends["low"],
    "active_high": ends["high"],
    "active_latents": len(active),
  }


def _without(cfg, params, latent, x, y):
  code = encode(cfg, params, x)[..., latent]
  written = code[..., None] * params["W_dec"][latent]
  return (y.astype(jnp.float32) - written).astype(y.dtype)


def _units(document: np.ndarray, size: int):
  """Unit of each place, int [P], and places of each unit, [G].

  Documents are cut into equal parts of at least `size` places, if they can.
  """
  _, own, counts = np.unique(document, return_inverse=True, return_counts=True)
  parts = np.maximum(1, counts // size)
  within = np.arange(len(own)) - (np.cumsum(counts) - counts)[own]
  unit = (np.cumsum(parts) - parts)[own] + within * parts[own] // counts[own]
  return unit, np.bincount(unit)


def _correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Pearson between rows [K, G] and [N, G], 0 of what does not vary."""
  unit = []
  for rows in (a, b):
    rows = rows - rows.mean(axis=1, keepdims=True)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    unit.append(np.divide(rows, length, out=rows * 0, where=length > 0))
  return unit[0] @ unit[1].T


def _against(r: np.ndarray, group: np.ndarray, draws: int, rng):
  """Mean of r off the diagonal within groups, and p of the diagonal."""
  count = len(r)
  apart = (group[:, None] == group) & ~np.eye(count, dtype=bool)
  members, rows = np.argsort(group, kind="stable"), np.arange(count)
  null = np.empty(draws)
  for i in range(draws):
    partner = np.empty(count, int)
    partner[members] = np.lexsort((rng.random(count), group))
    null[i] = r[rows, partner].mean()
  above = np.sum(null >= np.diagonal(r).mean() - 1e-12)
  return float(r[apart].mean()), float((1 + above) / (draws + 1))
