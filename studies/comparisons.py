"""Every measure that is defined for two models, prompt by prompt."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_jax import statistics
from gemma_jax.metrics import similarity
from gemma_jax.metrics.similarity import guard
from studies import next_tokens

LEVELS = {
  "behaviour": (*guard.TOKENS, *guard.TEXTS),
  "activations": (*guard.COORDINATES, *guard.ROWS),
  "features": (*guard.LATENTS, *guard.CODES),
}
# Of each level the first that is defined decides.
PRIMARY = {
  "behaviour": ("jsd", "cross_likelihood"),
  "activations": ("linear_cka",),
  "features": ("jaccard", "code_cka"),
}
# Numbers of all prompts together, which a part of them has by itself.
JOINT = ("linear_cka", "rsa", "code_cka")
DISTANCES = ("kl", "jsd", "hellinger", "cross_likelihood")
LEAST = 6  # prompts with which a measure between prompts is taken

DEFINITIONS = {
  "kl": "KL(a || b) of next-token distributions, nats, mean over tokens.",
  "jsd": "Jensen-Shannon divergence of next tokens, bits, mean over tokens.",
  "hellinger": "Hellinger distance of next tokens, mean over tokens.",
  "top1_agreement": "Share of tokens at which both prefer the same next one.",
  "topk_overlap": "Jaccard index of the 10 likeliest next tokens.",
  "rbo": "Rank-biased overlap of the likeliest next tokens, p = .9.",
  "cross_likelihood": (
    "How much likelier each finds its own answer than the other's, bits per "
    "byte, mean of both ways."
  ),
  "chrf": "chrF2 of the two answers.",
  "rouge_l": "ROUGE-L of the two answers.",
  "edit_ratio": "1 less the edits between the two answers over their length.",
  "cosine": (
    "Cosine of resid_post, pooled over a text's tokens, less its mean over "
    "prompts; mean over layers."
  ),
  "linear_cka": (
    "Debiased linear CKA of resid_post, pooled over each text's tokens; mean "
    "over pairs of layers of equal relative depth."
  ),
  "mutual_knn": (
    "Share of nearest prompts in common, by cosine about the mean; mean over "
    "pairs of layers of equal relative depth."
  ),
  "rsa": "Spearman of distances between prompts, as linear_cka.",
  "jaccard": "Jaccard index of active latents, mean over tokens and layers.",
  "ruzicka": "Sum of smaller over sum of larger latents, as jaccard.",
  "code_cosine": "Cosine of codes, as jaccard.",
  "code_cka": "Debiased linear CKA of codes, pooled over each text's tokens.",
}


@dataclasses.dataclass(frozen=True)
class Side:
  """One model of a pair.

  Attributes:
    subject: what it is.
    head: of `subjects.head`, or None where no distribution is compared.
    reading: of `readings.read` with `capture`.
    answers: [N] texts.
    bits: name of a model -> [N], bits per byte of its answers to this one.
    bits_other: the same, of its answers to other prompts of the capability.
  """

  subject: Any
  head: dict | None
  reading: Mapping[str, Any]
  answers: Sequence[str]
  bits: Mapping[str, np.ndarray]
  bits_other: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Scores:
  """A measure of two models.

  Attributes:
    values: [N], what each prompt contributes; its mean is the value.
    null: [N], the same of unrelated prompts, or None where `chance` is given.
    chance: of prompts permuted within their capability: (mean, p), or None.
  """

  values: np.ndarray
  null: np.ndarray | None = None
  chance: tuple[float, float] | None = None


def compare(
  a: Side,
  b: Side,
  wanted: Sequence[str],
  *,
  other: np.ndarray | None,
  neighbours: int,
  tokens: int = 0,
  maps: Mapping[str, similarity.LayerCalibration] | None = None,
  exchange: Callable[[Callable], tuple[float, float]] | None = None,
) -> dict[str, Scores]:
  """The wanted measures, of all prompts.

  Args:
    a: one model.
    b: the other.
    wanted: of `DEFINITIONS`.
    other: of `prompts.others`, for the null; None for none.
    neighbours: k of mutual_knn.
    tokens: of each text, of which distributions are compared; 0: all.
    maps: of `layer_maps`, from which the chance of measures between prompts
      is taken; None for none.
    exchange: of `exchange`, which takes the chance of the others; None for
      none.
  """
  out = {}
  if names := [name for name in wanted if name in guard.TOKENS]:
    own = next_tokens.distributions(a, b, names, tokens=tokens)
    null = {}
    if other is not None:
      null = next_tokens.distributions(a, b, names, tokens=tokens, other=other)
    out |= {name: Scores(own[name], null.get(name)) for name in names}
  for name in wanted:
    if name == "cross_likelihood":
      out[name] = _cross_likelihood(a, b, other is not None)
    elif name in guard.TEXTS:
      measure = getattr(similarity, name)
      out[name] = Scores(
        *_texts(measure, a.answers, b.answers, other),
      )
    elif name == "cosine":
      out[name] = _cosine(a, b, other)
    elif name in guard.LATENTS:
      out[name] = _latents(a, b, name, other)
    elif name == "mutual_knn":
      x, y = a.reading["pooled"], b.reading["pooled"]
      overlaps = functools.partial(_overlaps, k=neighbours)
      out[name] = Scores(
        _over_depth(overlaps, x, y), chance=_chance(maps, name, x, y)
      )
    elif name in JOINT:
      x, y = a.reading["pooled"], b.reading["pooled"]
      chance = _chance(maps, name, x, y)
      if chance is None and exchange:
        chance = exchange(_of_order(a, b, name))
      units = np.arange(len(a.answers))
      out[name] = Scores(joint(a, b, name, units), chance=chance)
  return out


def exchange(
  of_order: Callable[[np.ndarray], float],
  *,
  blocks: Sequence[str],
  draws: int,
  seed: int,
) -> tuple[float, float]:
  """Mean and p of a number after prompts of a capability changed places.

  Args:
    of_order: order [N] of one model's prompts -> the number, more is nearer.
    blocks: capability of each prompt.
    draws: permutations.
    seed: of them.
  """
  units = np.arange(len(blocks))
  found = similarity.calibrate(
    units,
    units,
    lambda _, order: of_order(order),
    draws=draws,
    blocks=blocks,
    seed=seed,
  )
  return float(found.null.mean()), found.p


def depth_pairs(count_a: int, count_b: int) -> list[tuple[int, int]]:
  """Layers of equal relative depth, one for each of the shallower model."""
  least = min(count_a, count_b)
  steps = np.linspace(0, 1, least) if least > 1 else np.ones(1)
  return [
    (round(step * (count_a - 1)), round(step * (count_b - 1))) for step in steps
  ]


def level(measure: str) -> str:
  """The level of a measure."""
  return next(name for name, own in LEVELS.items() if measure in own)


def primary(wanted: Sequence[str]) -> set[str]:
  """The measure of each level that decides."""
  first = (
    next((m for m in order if m in wanted), None) for order in PRIMARY.values()
  )
  return {measure for measure in first if measure}


def joint(a: Side, b: Side, name: str, units: np.ndarray) -> np.ndarray:
  """What each of some prompts contributes to a number of them all.

  Args:
    a: one model.
    b: the other.
    name: of `JOINT`.
    units: numbers of the prompts, [n].

  Returns:
    [n], pseudo-values of the jackknife.
  """
  if name == "code_cka":
    pairs = zip(pooled_codes(a), pooled_codes(b), strict=True)
    found = [_pseudo_cka(x[units], y[units]) for x, y in pairs]
    return np.mean(found, axis=0)
  x, y = (side.reading["pooled"][:, units] for side in (a, b))
  return _over_depth(_pseudo_cka if name == "linear_cka" else _pseudo_rsa, x, y)


def _over_depth(measure: Callable, x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Mean over layers of equal depth of x [L, N, D] and y [L', N, E]."""
  pairs = depth_pairs(len(x), len(y))
  return np.mean([measure(x[i], y[j]) for i, j in pairs], axis=0)


def layer_maps(
  x: np.ndarray,
  y: np.ndarray,
  *,
  neighbours: int,
  draws: int,
  alpha: float,
  blocks: Sequence[str],
) -> dict[str, similarity.LayerCalibration]:
  """Every layer of one model with every layer of the other, calibrated.

  Prompts are permuted within their capability: that texts of one capability
  are alike is no convergence.

  Args:
    x: [L, N, D] of one model.
    y: [L', N, E] of the other.
    neighbours: k of mutual_knn.
    draws: permutations.
    alpha: of the calibration.
    blocks: capability of each prompt.
  """
  common = {"draws": draws, "alpha": alpha, "blocks": np.asarray(blocks)}
  grams = [[_gram(rows) for rows in rows_of] for rows_of in (x, y)]
  near = [[_near(rows, neighbours) for rows in rows_of] for rows_of in (x, y)]
  return {
    "linear_cka": similarity.calibrate_layers(
      *grams,
      similarity.kernel_cka,
      permute=similarity.permute_kernel,
      **common,
    ),
    "mutual_knn": similarity.calibrate_layers(
      *near,
      similarity.neighbour_overlap,
      permute=similarity.permute_neighbours,
      **common,
    ),
  }


def pooled_codes(side: Side) -> list[np.ndarray]:
  """Means of each dictionary's codes over the texts' tokens, [N, M] each."""
  count = side.reading["count"]
  ends = np.cumsum(count)
  out = []
  for code in side.reading["codes"]:
    sums = np.zeros((len(count), code.shape[1]))
    for i, (start, end) in enumerate(zip(ends - count, ends, strict=True)):
      sums[i] = code[start:end].sum(axis=0)
    out.append(sums / count[:, None])
  return out


def _cross_likelihood(a: Side, b: Side, with_null: bool) -> Scores:
  of_a, of_b = a.subject.name, b.subject.name

  def distance(ab, ba):
    return similarity.cross_likelihood(a.bits[of_a], ab, ba, b.bits[of_b])

  null = None
  if with_null:
    null = distance(a.bits_other[of_b], b.bits_other[of_a])
  return Scores(distance(a.bits[of_b], b.bits[of_a]), null)


def _texts(
  measure: Callable[[str, str], float],
  a: Sequence[str],
  b: Sequence[str],
  other: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray | None]:
  own = np.array([measure(x, y) for x, y in zip(a, b, strict=True)])
  if other is None:
    return own, None
  return own, np.array(
    [measure(x, b[j]) for x, j in zip(a, other, strict=True)]
  )


def _cosine(a: Side, b: Side, other: np.ndarray | None) -> Scores:
  x, y = (_unit(side.reading["pooled"].astype(np.float64)) for side in (a, b))
  null = None if other is None else np.sum(x * y[:, other], axis=2).mean(0)
  return Scores(np.sum(x * y, axis=2).mean(0), null)


def _unit(x: np.ndarray) -> np.ndarray:
  x = x - x.mean(axis=1, keepdims=True)
  return x / np.maximum(np.linalg.norm(x, axis=2, keepdims=True), 1e-30)


def _latents(a: Side, b: Side, name: str, other) -> Scores:
  kind = name.removeprefix("code_")
  text, _, order = next_tokens.token_rows(a.reading["count"], other)
  count = np.bincount(text)

  def by_prompt(x, y):
    found = similarity.token_overlaps(x, y, kind=kind)
    # Where neither has an active latent there is nothing to overlap.
    there = ~np.isnan(found)
    tokens = np.bincount(text[there], minlength=len(count))
    sums = np.bincount(text[there], found[there], minlength=len(count))
    return sums / np.maximum(tokens, 1)

  pairs = list(zip(a.reading["codes"], b.reading["codes"], strict=True))
  null = None
  if other is not None:
    null = np.mean([by_prompt(x, y[order]) for x, y in pairs], axis=0)
  return Scores(np.mean([by_prompt(x, y) for x, y in pairs], axis=0), null)


def _gram(rows: np.ndarray) -> np.ndarray:
  rows = rows - rows.mean(0, dtype=np.float64)
  return rows @ rows.T


def _near(rows: np.ndarray, k: int) -> np.ndarray:
  rows = rows - rows.mean(0, dtype=np.float64)
  return similarity.nearest_neighbours(rows, k=k)


def _pseudo_cka(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  k, l = _gram(x), _gram(y)

  def cka(units):
    some = np.ix_(units, units)
    return similarity.kernel_cka(k[some], l[some])

  return statistics.pseudo_values(cka, len(k))


def _pseudo_rsa(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  return statistics.pseudo_values(
    lambda units: similarity.rsa(x[units], y[units]), len(x)
  )


def _overlaps(x: np.ndarray, y: np.ndarray, k: int) -> np.ndarray:
  a, b = _near(x, k), _near(y, k)
  return (a[:, :, None] == b[:, None, :]).any(2).mean(1)


def _chance(maps, name: str, x: np.ndarray, y: np.ndarray):
  """Mean and p of permuted prompts, of the mean over layers of equal depth."""
  if not maps or name not in maps:
    return None
  i, j = np.array(depth_pairs(len(x), len(y))).T
  null = maps[name].null[:, i, j].mean(1)
  higher = np.sum(null >= maps[name].scores[i, j].mean() - 1e-12)
  return float(null.mean()), float((1 + higher) / (1 + len(null)))


def _of_order(a: Side, b: Side, name: str) -> Callable[[np.ndarray], float]:
  """A number of `JOINT` after b's prompts were put in another order."""
  if name == "code_cka":
    pairs = zip(pooled_codes(a), pooled_codes(b), strict=True)
    measure = similarity.kernel_cka
    rows = [(_gram(x), _gram(y)) for x, y in pairs]
    permute = similarity.permute_kernel
  else:
    x, y = a.reading["pooled"], b.reading["pooled"]
    measure = similarity.rsa if name == "rsa" else similarity.linear_cka
    rows = [(x[i], y[j]) for i, j in depth_pairs(len(x), len(y))]
    permute = similarity.permute_rows
  return lambda order: np.mean([measure(x, permute(y, order)) for x, y in rows])
