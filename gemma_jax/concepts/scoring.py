"""Is a direction a concept: what its tokens say, against random directions.

No language model judges. Each part of the evidence has a null of its own, and
the parts together are calibrated on random directions that went the same way.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import stats

from gemma_jax import statistics
from gemma_jax.concepts import coherence, lexicon, npmi
from gemma_jax.concepts.lexemes import KINDS, Lexemes, class_shares, distinct
from gemma_jax.concepts.projection import Projection

TOKENS = 10  # words of either end that are looked at
PARTS = ("tail", "coherence", "lexicon", "npmi")
SIGNS = ("+", "-")
DEFINITIONS = {
  "kurtosis": (
    "Excess kurtosis of a direction's logits over the tokens that are words; "
    "p against random directions of the layer (add-one), adjusted by Benjamini "
    "and Hochberg over all vectors."
  ),
  "tail": (
    "Mean of the largest logits of a sign, in standard deviations from the "
    "direction's mean; p against both ends of random directions of the layer."
  ),
  "coherence": (
    "Mean cosine between input embeddings of the words, centred and without "
    "their first principal components; p against words of the same scripts "
    "and frequencies."
  ),
  "lexicon": (
    "Hypergeometric p of the words in the best of our lexicons, times the "
    "number of lexicons."
  ),
  "npmi": (
    "Mean normalised pointwise mutual information of pairs of the words in a "
    "window of ten tokens of the text; p against words as frequent. 1 where "
    "fewer than three pairs are in the text."
  ),
  "evidence": "Fisher's -2 sum ln p of tail, coherence, lexicon and npmi.",
  "score_q": (
    "p of the evidence beside that of random directions (Brown's method), "
    "adjusted by Benjamini and Hochberg over both signs of all vectors."
  ),
  "content": "Share of the words that are content words.",
  "score": "(1 - score_q) x content.",
}


@dataclasses.dataclass(frozen=True)
class Words:
  """Both ends of n directions: rows 2i and 2i + 1 are +v and -v of the i-th.

  Attributes:
    tokens: int32 [2n, m], of distinct families; -1 where there are fewer.
    families: int32 [2n, m].
    tail: float64 [2n], see `DEFINITIONS`.
    content: float64 [2n].
    kind: int8 [2n], the commonest of `KINDS` among them.
  """

  tokens: np.ndarray
  families: np.ndarray
  tail: np.ndarray
  content: np.ndarray
  kind: np.ndarray


@dataclasses.dataclass(frozen=True)
class Reference:
  """What words are compared with, of one model and one text.

  Attributes:
    lexemes: of the tokenizer.
    lexicon: fitted to it.
    unit: float32 [V, D], see `coherence.embeddings`.
    strata: int32 [V].
    null: of the embeddings.
    counts: of the text; None without one.
  """

  lexemes: Lexemes
  lexicon: lexicon.Lexicon
  unit: np.ndarray
  strata: np.ndarray
  null: coherence.Null
  counts: npmi.Counts | None


@dataclasses.dataclass(frozen=True)
class Evidence:
  """Of n rows of `Words`.

  Attributes:
    parts: PARTS -> p, float64 [n].
    values: "coherence", "npmi" (NaN where undefined) -> float64 [n].
    category: int [n], into the lexicon's names, -1 for none.
    total: float64 [n], Fisher's statistic.
  """

  parts: dict[str, np.ndarray]
  values: dict[str, np.ndarray]
  category: np.ndarray
  total: np.ndarray


@dataclasses.dataclass(frozen=True)
class Scores:
  """Of n rows; see `DEFINITIONS`."""

  q: np.ndarray
  score: np.ndarray


def null_directions(vectors: np.ndarray, count: int, seed: int) -> np.ndarray:
  """Gaussian directions with the spread of vectors in each coordinate.

  Args:
    vectors: [F, D], with their gains, which differ by orders of magnitude.
    count: how many, [count, D].
    seed: of the drawing.
  """
  rng = np.random.default_rng(seed)
  drawn = rng.standard_normal((count, vectors.shape[1]))
  return (drawn * np.asarray(vectors, np.float64).std(0)).astype(np.float32)


def above(value: np.ndarray, null: np.ndarray) -> np.ndarray:
  """p of values [n] among null [m], (b + 1) / (m + 1)."""
  null = np.sort(null)
  b = len(null) - np.searchsorted(null, value, side="left")
  return (b + 1) / (len(null) + 1)


def among(null: np.ndarray) -> np.ndarray:
  """p of each of the null's values among the others, [m]."""
  ordered = np.sort(null)
  b = len(null) - np.searchsorted(ordered, null, side="left")
  return b / len(null)


def words(
  projection: Projection, lexemes: Lexemes, *, count: int = TOKENS
) -> Words:
  """The words at both ends of directions."""
  ends = []
  for tokens, logits, sign in (
    (projection.top_tokens, projection.top_logits, 1),
    (projection.bottom_tokens, projection.bottom_logits, -1),
  ):
    away = sign * (logits - projection.mean[:, None])[:, :count].mean(1)
    std = projection.std
    tail = np.where(std > 0, away / np.where(std > 0, std, 1), 0)
    ends.append((distinct(tokens, lexemes, count), tail))
  tokens, tail = (
    np.stack(pair, axis=1).reshape(-1, *pair[0].shape[1:])
    for pair in zip(*ends, strict=True)
  )
  shares = class_shares(tokens, lexemes)
  return Words(
    tokens,
    np.where(tokens < 0, -1, lexemes.family[tokens]),
    tail.astype(np.float64),
    shares[:, KINDS.index("content")],
    shares.argmax(1).astype(np.int8),
  )


def evidence(
  found: Sequence[Words], tails: Sequence[np.ndarray], reference: Reference
) -> list[Evidence]:
  """Parts and their sum, of several groups of rows at once.

  Args:
    found: groups of rows, such as those of vectors and of random directions;
      they share the null of embeddings.
    tails: p of each group's tails, from `above` or `among`, by layer.
    reference: what words are compared with.
  """
  tokens = np.concatenate([some.tokens for some in found])
  families = np.concatenate([some.families for some in found])
  near = coherence.score(
    tokens, reference.unit, reference.strata, reference.null
  )
  pure = lexicon.purity(families, reference.lexicon, reference.lexemes)
  category, p_lexicon = lexicon.best(pure)
  value = np.full(len(tokens), np.nan)
  p_npmi = np.ones(len(tokens))
  if reference.counts is not None:
    counted = np.isin(families, reference.counts.families)
    there = np.where(counted, families, -1)
    value = npmi.npmi(reference.counts, there).value
    p_npmi = npmi.null(reference.counts, there)
  parts = {
    "tail": np.concatenate(tails),
    "coherence": near.p,
    "lexicon": p_lexicon,
    "npmi": p_npmi,
  }
  total = -2 * sum(np.log(parts[name]) for name in PARTS)
  cuts = np.cumsum([len(some.tokens) for some in found])[:-1]

  def split(x):
    return np.split(x, cuts)

  return [
    Evidence(
      dict(zip(PARTS, p, strict=True)),
      {"coherence": c, "npmi": v},
      own_category,
      own_total,
    )
    for p, c, v, own_category, own_total in zip(
      zip(*(split(parts[name]) for name in PARTS), strict=True),
      split(near.value),
      split(value),
      split(category),
      split(total),
      strict=True,
    )
  ]


def brown(total: np.ndarray, null: np.ndarray) -> np.ndarray:
  """p of Fisher's statistic [n], beyond what a finite null [m] can resolve.

  Parts depend on one another and are not uniform: the statistic is taken for
  a multiple of chi-squared, with the null's mean and variance (Brown 1975, "A
  method for combining non-independent, one-sided tests of significance").
  """
  mean, variance = null.mean(), null.var(ddof=1)
  if not variance > 0:
    return np.where(total > mean, 0.0, 1.0)
  scale = variance / (2 * mean)
  return stats.chi2.sf(total / scale, mean / scale)


def calibrate(
  total: np.ndarray, content: np.ndarray, null: np.ndarray
) -> Scores:
  """Scores of rows from the evidence of random directions.

  Args:
    total: Fisher's statistic of the rows, [n].
    content: shares, [n].
    null: the statistic of random directions, [m].
  """
  q = statistics.benjamini_hochberg(brown(total, null))
  return Scores(q, (1 - q) * content)


def transfer(
  total: np.ndarray, content: np.ndarray, among_: np.ndarray, q: np.ndarray
) -> Scores:
  """Scores of other rows on the scale of those that were calibrated.

  Random directions are scored so: each gets the q of the vectors with as much
  evidence.

  Args:
    total: of the other rows, [n].
    content: of the other rows, [n].
    among_: statistic of the calibrated rows, [m].
    q: theirs, [m].
  """
  order = np.argsort(among_)
  place = np.searchsorted(among_[order], total, side="right") - 1
  own = np.where(place < 0, 1.0, q[order][np.maximum(place, 0)])
  return Scores(own, (1 - own) * content)


def normal_z(value: np.ndarray, null: np.ndarray) -> np.ndarray:
  """How many of the null's standard deviations values are from its mean."""
  spread = stats.tstd(null)
  return (value - null.mean()) / (spread if spread > 0 else 1)
