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

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from gemma_jax import models, progress
from gemma_jax.alignment import Map
from gemma_jax.concepts import projection
from gemma_jax.dictionaries import Dictionary
from gemma_jax.dictionaries.dictionary import encode
from gemma_jax.metrics import document_interval, splice_losses
from gemma_jax.metrics.ablation import Given
from gemma_jax.metrics.faithfulness import LOGIT_ROWS
from gemma_jax.models import sharding, sites
from gemma_jax.models.forward import run_blocks, unembed

FIELDS = {
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
VECTORS = ("native", "transferred", "random", "other")
CODES = ("matched", "dealt", "mean", "zero")
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
  "inject.effect": (
    "Mean change of the log-probability of the tokens that the native "
    "latent's direction raises most, nats per token, when dose * its typical "
    "activation * the vector is added; mean over positions, then latents."
  ),
  "inject.elsewhere": "The same of as many random other tokens.",
  "inject.kl": "KL(clean || changed), nats per token.",
  "inject.native": "The latent's own decoder row.",
  "inject.transferred": (
    "Its match's decoder row through the map, without the bias, made as long "
    "as the native one; as are the next two."
  ),
  "inject.random": "A direction at random.",
  "inject.other": "The transferred row of another match.",
  "substitution.matched": (
    "Codes of b predicted from those of the matched latents of a, each by a "
    "line fitted on training text, in place of b's own at paired places."
  ),
  "substitution.dealt": (
    "Codes predicted from another match's latent of a, by a line of its own."
  ),
  "substitution.mean": "Codes set to their training means.",
  "substitution.zero": "Codes set to 0.",
  "substitution.kl": "KL(clean || changed), nats per token.",
  "substitution.recovered": (
    "1 - KL / KL of mean, no cross-entropy: 1 is b's own codes; ratio of sums."
  ),
  "effects.interval": (
    "95 % bootstrap (BCa): of fingerprints and inject over latents, of "
    "substitution over documents."
  ),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
  """A model on a text of which P places are paired with another model's.

  Attributes:
    model: with its head.
    dictionary: an SAE of one resid_post of the model.
    tokens: int [W, T].
    mask: bool [W, T], positions that count.
    at: int [P, 2], window and position of each place.
    document: int [P], whose text it is, the same on both sides.
  """

  model: models.Model
  dictionary: Dictionary
  tokens: np.ndarray
  mask: np.ndarray
  at: np.ndarray
  document: np.ndarray

  def __post_init__(self):
    own, cfg = self.dictionary.config, self.model.config
    name = sites.parse(own.read, cfg).name
    if own.is_transcoder or own.layer_norm or name != "resid_post":
      raise ValueError(
        "expected an SAE of one resid_post without layer_norm, got one that "
        f"reads {own.read} and writes {own.write}, layer_norm={own.layer_norm}"
      )
    if own.d_in != cfg.width:
      raise ValueError(
        f"expected a dictionary of the model's width, {cfg.width}, got "
        f"{own.d_in}"
      )
    count = len(self.document)
    if self.mask.shape != self.tokens.shape or self.at.shape != (count, 2):
      raise ValueError(
        "expected tokens and mask [W, T], at [P, 2] and document [P], got "
        f"{self.tokens.shape}, {self.mask.shape}, {self.at.shape} and "
        f"{self.document.shape}"
      )
    if (np.diff(self.document) < 0).any():
      raise ValueError("expected places by document, as pair_windows has them")

  @property
  def site(self) -> str:
    """What the dictionary reads and writes."""
    return self.dictionary.config.read

  def decoder(self, latents) -> np.ndarray:
    """Decoder rows of some latents, float32 [K, E]."""
    return np.asarray(self.dictionary.params["W_dec"])[np.asarray(latents)]


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


class CodeSums(NamedTuple):
  """Sums over n training places of the codes of K matches; these add up.

  Attributes:
    count: n.
    a: float64 [K], codes of a.
    b: float64 [K], codes of b.
    aa: float64 [K], squares.
    ab: float64 [K, K], products of match i's code of a and j's of b.
  """

  count: int
  a: np.ndarray
  b: np.ndarray
  aa: np.ndarray
  ab: np.ndarray


def cut(
  a: Side, b: Side, config: Mapping[str, Any]
) -> tuple[Side, Side, np.ndarray]:
  """The first `documents` of the text, windows cut to `context` tokens.

  Returns:
    Both sides with the windows and places that are left, and which of the
    places these are, bool [P].

  Raises:
    ValueError: sides of other places, or none left.
  """
  if not np.array_equal(a.document, b.document):
    raise ValueError(
      f"expected the same places on both sides, got {len(a.document)} and "
      f"{len(b.document)} of other documents"
    )
  first = np.unique(a.document)[: config["documents"]]
  kept = np.isin(a.document, first)
  for side in (a, b):
    kept &= side.at[:, 1] < config["context"]
  if not kept.any():
    raise ValueError(
      f"expected paired places in the first {config['context']} tokens of "
      f"the windows of {len(first)} documents, got none"
    )
  left = []
  for side in (a, b):
    window, moved = np.unique(side.at[kept, 0], return_inverse=True)
    left.append(
      dataclasses.replace(
        side,
        tokens=side.tokens[window, : config["context"]],
        mask=side.mask[window, : config["context"]],
        at=np.stack([moved, side.at[kept, 1]], axis=1),
        document=side.document[kept],
      )
    )
  return *left, kept


# ---------------------------------------------------------------- fingerprints


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
  owner = _owners(side, unit)
  without = functools.partial(_without, side.dictionary.config)
  params = side.dictionary.params
  replacements = {str(k): Partial(without, params, k) for k in latents}
  found, _, sums = _divergence(side, replacements, owner, config)
  kl = np.zeros((len(latents), len(places)))
  for row, latent in zip(kl, latents, strict=True):
    row[found] = sums[str(latent)]
  counted = side.mask & (owner >= 0)
  fired = np.zeros(kl.shape, np.int64)
  for x, here, own in zip(_values(side, config), counted, owner, strict=True):
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
  ends = _interval(active, config, seed)
  rng = np.random.default_rng(seed)
  everywhere = _against(every, np.zeros(count, int), config["draws"], rng)
  alike = _against(every, rank * groups // count, config["draws"], rng)
  return {
    "latents": count,
    "silent": len(alive) - count,
    "units": units,
    "matched": float(np.diagonal(every).mean()),
    **_interval(np.diagonal(every), config, seed),
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


def _owners(side: Side, label: np.ndarray) -> np.ndarray:
  """Labels of places, spread to the tokens before each, int [W, T].

  -1 behind the last place of a window: the other model may not have that.
  """
  width = side.tokens.shape[1]
  known = np.full((len(side.tokens), width + 1), -1, np.int64)
  known[*side.at.T] = label
  following = np.where(known >= 0, np.arange(width + 1), width)
  following = np.minimum.accumulate(following[:, ::-1], axis=1)[:, ::-1]
  return np.take_along_axis(known, following[:, :width], axis=1)


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


# ------------------------------------------------------------------- injection


def transferred(side: Side, latents, mapping: Map) -> np.ndarray:
  """Decoder rows of a side through a map's linear part, [K, E].

  Raises:
    ValueError: a map of another width, or that makes nothing of a row.
  """
  rows, weights = side.decoder(latents), np.asarray(mapping.weights)
  if rows.shape[1] != weights.shape[0]:
    raise ValueError(
      f"expected a map from the width of the side, {rows.shape[1]}, got one "
      f"from {weights.shape[0]}; is it the other way round?"
    )
  made = rows @ weights
  if not np.linalg.norm(made, axis=1).all():
    raise ValueError(
      f"expected a map that has a direction for every row, got zeros of "
      f"{mapping.name!r}"
    )
  return made


def inject(
  side: Side,
  latents,
  vectors: np.ndarray,
  typical: np.ndarray,
  config: Mapping[str, Any],
  seed: int,
) -> list[dict[str, Any]]:
  """Adds directions to a side's site; see `DEFINITIONS`.

  A vector is added at all counted positions from `start` on, and its effect
  is measured at `positions` of them, the same for all. All windows are one
  batch: take few.

  Args:
    side: of the model that is changed.
    latents: int [K], of its dictionary.
    vectors: [K, E], made by `transferred` of their matches.
    typical: [K], activations, such as the means where they fire.
    config: of `FIELDS`.
    seed: of directions, tokens, positions and resamples.

  Returns:
    For each of `VECTORS` and each dose {"vector", "dose", "effect", "low",
    "high", "elsewhere", "kl"}.

  Raises:
    ValueError: shapes that do not fit, fewer than two latents, or no counted
      position from `start` on.
  """
  model, rng = side.model, np.random.default_rng(seed)
  native = side.decoder(latents)
  count = len(native)
  shapes = vectors.shape, np.shape(typical)
  if shapes != (native.shape, (count,)) or count < 2:
    raise ValueError(
      f"expected 2 latents or more, vectors {native.shape} and typical "
      f"activations [{count}] of them, got {shapes[0]} and {shapes[1]}"
    )
  moved = side.mask & (np.arange(side.mask.shape[1]) >= config["start"])
  chosen = rng.permutation(np.flatnonzero(moved))[: config["positions"]]
  if not len(chosen):
    raise ValueError(
      f"expected counted positions from start={config['start']} on, got none "
      f"in windows of {side.mask.shape[1]}"
    )
  lengths = np.linalg.norm(native, axis=1) * typical
  given = {
    "native": native,
    "transferred": vectors,
    "random": rng.standard_normal(native.shape),
    "other": vectors[_dealt(count, rng)],
  }
  ways = {
    (name, dose): rows
    * (dose * lengths / np.linalg.norm(rows, axis=1))[:, None]
    for name, rows in given.items()
    for dose in config["doses"]
  }
  said = _said(model, native, config["set"], rng)
  with jax.set_mesh(model.mesh):
    _, found = model.forward(
      side.tokens, capture=(side.site,), stop_at=side.site
    )
    layer = np.int32(sites.parse(side.site, model.config).layer)
    moving = functools.partial(
      _final,
      (model.config, model.attention),
      model.params,
      found[side.site],
      sharding.put_batch(moved, model.mesh),
      chosen,
      layer,
    )
    clean = moving(np.zeros(native.shape[1], np.float32))
    sums = np.zeros((len(ways), count, 3))
    with progress.bar(count, "inject", unit="latents") as bar:
      for k, words in enumerate(said):
        changed = [moving(np.float32(rows[k])) for rows in ways.values()]
        for start in range(0, len(chosen), LOGIT_ROWS):
          part = slice(start, start + LOGIT_ROWS)
          before = _log_probs(model.config, model.params, clean[part])
          for total, rows in zip(sums[:, k], changed, strict=True):
            total += np.asarray(
              _effects(model.config, model.params, before, rows[part], words)
            )
        bar.update()
  out = []
  for (name, dose), row in zip(ways, sums / len(chosen), strict=True):
    effect, elsewhere, kl = row.T
    out.append(
      {
        "vector": name,
        "dose": float(dose),
        "effect": float(effect.mean()),
        **_interval(effect, config, seed),
        "elsewhere": float(elsewhere.mean()),
        "kl": float(kl.mean()),
      }
    )
  return out


def _said(model, rows: np.ndarray, size: int, rng) -> np.ndarray:
  """Tokens that rows raise most, and as many others, int [K, 2, size]."""
  table = projection.readout(model)
  top = projection.project_directions(model, table, rows, top_k=size).top_tokens
  every = np.arange(model.config.vocab_size)
  others = [
    rng.choice(np.setdiff1d(every, some), size, replace=False) for some in top
  ]
  return np.stack([top, others], axis=1)


def _dealt(count: int, rng) -> np.ndarray:
  """Another one for each of `count`, each once."""
  order = rng.permutation(count)
  other = np.empty(count, int)
  other[order] = np.roll(order, 1)
  return other


@functools.partial(jax.jit, static_argnums=0)
def _final(static, params, x, moved, chosen, layer, vector):
  """Last resid_post at the chosen of all positions, [N, D]."""
  cfg, attention = static
  x = x + jnp.where(moved[..., None], vector, 0).astype(x.dtype)
  x = run_blocks(cfg, params, x, layer + 1, cfg.num_layers, attention=attention)
  return sharding.replicate(x.reshape(-1, cfg.width)[chosen])


@functools.partial(jax.jit, static_argnums=0)
def _log_probs(cfg, params, rows):
  return jax.nn.log_softmax(unembed(cfg, params, rows), axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def _effects(cfg, params, before, rows, words):
  """Sums over rows: changes of two sets of tokens, and KL, [3]."""
  after = _log_probs(cfg, params, rows)
  sets = jnp.mean(after[:, words] - before[:, words], axis=-1)
  kl = jnp.sum(jnp.exp(before) * (before - after), axis=-1)
  made = jnp.concatenate([sets, kl[:, None]], axis=1)
  return sharding.replicate(jnp.sum(made, axis=0))


# ---------------------------------------------------------------- substitution


def code_sums(codes_a, codes_b) -> CodeSums:
  """Of the codes of K matches at n training places, [n, K] each."""
  a, b = np.asarray(codes_a, np.float64), np.asarray(codes_b, np.float64)
  return CodeSums(len(a), a.sum(0), b.sum(0), np.square(a).sum(0), a.T @ b)


def predict(sums: CodeSums, codes_a: np.ndarray, source) -> np.ndarray:
  """Codes of b from those of a, each by a line of least squares.

  Args:
    sums: of the training places.
    codes_a: [P, K].
    source: int [C], which match's latent of a each of the first C latents of
      b is predicted from.

  Returns:
    [P, C]; the training mean where a latent of a does not vary.
  """
  source = np.asarray(source)
  n, mean_b = sums.count, sums.b[: len(source)] / sums.count
  mean_a = sums.a[source] / n
  square = sums.aa[source] - n * mean_a**2
  product = sums.ab[source, np.arange(len(source))] - n * mean_a * mean_b
  varies = square > 1e-12 * sums.aa[source]
  slope = np.divide(product, square, out=np.zeros(len(source)), where=varies)
  return (codes_a[:, source] - mean_a) * slope + mean_b


def substitute(
  side: Side,
  latents,
  sums: CodeSums,
  codes_a: np.ndarray,
  codes_b: np.ndarray,
  config: Mapping[str, Any],
  seed: int,
) -> list[dict[str, Any]]:
  """Puts other codes in place of a side's own; see `DEFINITIONS`.

  At every paired place x becomes x + sum_k (other - own) * W_dec[k]: what the
  dictionary leaves over stays.

  Args:
    side: of b.
    latents: int [K], of its dictionary, best matches first.
    sums: of training places, of these matches in this order.
    codes_a: [P, K], of a's matched latents at the side's places.
    codes_b: [P, K], of b's.
    config: of `FIELDS`.
    seed: of the dealing and of resamples.

  Returns:
    For each number of matches and each of `CODES` {"count", "codes", "kl",
    "kl_low", "kl_high", "recovered", "low", "high"}; None where there is no
    interval, or where even means cost nothing.

  Raises:
    ValueError: codes of other places or latents, or a number of matches that
      cannot be dealt.
  """
  decoder = side.decoder(latents)
  shape = len(side.at), len(decoder)
  if not codes_a.shape == codes_b.shape == shape or len(sums.a) != shape[1]:
    raise ValueError(
      f"expected codes {shape} of the side's places and latents, got "
      f"{codes_a.shape} and {codes_b.shape}, and sums of {len(sums.a)}; cut "
      "says which places are left"
    )
  counts = sorted({min(c, shape[1]) for c in (*config["counts"], shape[1])})
  if counts[0] < 2:
    raise ValueError(f"expected 2 matches or more to deal, got {counts[0]}")
  x, owner = _values(side, config), _owners(side, side.document)
  rng, rows = np.random.default_rng(seed), []
  for count in counts:
    others = {
      "matched": predict(sums, codes_a, np.arange(count)),
      "dealt": predict(sums, codes_a, _dealt(count, rng)),
      "mean": sums.b[:count] / sums.count,
      "zero": np.zeros(count),
    }
    given = {}
    for name in CODES:
      change = others[name] - codes_b[:, :count]
      values = x.copy()
      values[*side.at.T] += change @ decoder[:count]
      given[name] = Given(values)
    _, tokens, sums_of = _divergence(side, given, owner, config)
    worst = sums_of["mean"]
    for name in CODES:
      kl = sums_of[name]
      ends = _ends(kl, tokens, config, seed)
      rows.append(
        {
          "count": count,
          "codes": name,
          "kl": float(kl.sum() / tokens.sum()),
          "kl_low": ends["low"],
          "kl_high": ends["high"],
          "recovered": (
            float(1 - kl.sum() / worst.sum()) if worst.sum() > 0 else None
          ),
          **_ends(worst - kl, worst, config, seed),
        }
      )
  return rows


# ------------------------------------------------------------------- all three


def _divergence(side: Side, replacements, owner: np.ndarray, config):
  """Owners that are known; of each its tokens, and KL of each replacement."""
  losses = splice_losses(
    side.model,
    side.tokens,
    side.mask,
    replacements,
    read=side.site,
    write=side.site,
    batch_size=config["batch_size"],
    document=owner,
  )
  there = losses.documents >= 0
  kl = {name: sums[there] for name, sums in losses.kl.items()}
  return losses.documents[there], losses.tokens[there], kl


def _values(side: Side, config) -> np.ndarray:
  """The site in all windows, float32 [W, T, E]."""
  size, parts = config["batch_size"], []
  for start in range(0, len(side.tokens), size):
    some = side.tokens[start : start + size]
    padded = np.pad(some, ((0, size - len(some)), (0, 0)))
    _, found = side.model.forward(
      padded, capture=(side.site,), stop_at=side.site
    )
    values = np.asarray(found[side.site], np.float32)
    parts.append(values[: len(some)])
  return np.concatenate(parts)


def _interval(values, config, seed) -> dict[str, float | None]:
  """Of a mean over latents."""
  return _ends(values, np.ones(len(values)), config, seed)


def _ends(top, bottom, config, seed) -> dict[str, float | None]:
  """Interval of a ratio of sums over units that are drawn together."""
  ends = document_interval(
    top, bottom, resamples=config["resamples"], seed=seed
  )
  return dict(zip(("low", "high"), ends or (None, None), strict=True))
