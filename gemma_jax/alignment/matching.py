"""Which latents of two dictionaries are the same: those that fire alike.

The best of many correlations is large by chance, most of all for latents that
fire rarely: these are never matched, and a match is compared with the best
that the same latent gets once the tokens of the other side are shifted.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize, sparse

from gemma_jax import progress
from gemma_jax.alignment.correlations import Correlations, PairwiseCorrelation
from gemma_jax.statistics import benjamini_hochberg

METHODS = ("hungarian", "mutual", "sinkhorn", "greedy")


@dataclasses.dataclass(frozen=True, eq=False)
class Matches:
  """K pairs of latents, ascending in a; no latent is in two.

  Attributes:
    a: int64 [K], latents of a.
    b: int64 [K], their partners.
    r: float64 [K], Pearson correlations, all above 0.
  """

  a: np.ndarray
  b: np.ndarray
  r: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Significance:
  """Matches beside chance.

  Attributes:
    p: float64 [K], share of draws in which the latent's own best correlation
      is as high, never 0.
    p_pooled: float64 [K], the same of the draws of all K latents together.
    q: float64 [K], adjusted for the K matches.
    matched: bool [K], q <= alpha.
  """

  p: np.ndarray
  p_pooled: np.ndarray
  q: np.ndarray
  matched: np.ndarray


def match(
  correlations: PairwiseCorrelation,
  *,
  how: str = "hungarian",
  least: int = 30,
) -> Matches:
  """Pairs latents that fire alike, each with one at most.

  Only pairs count that correlate above 0, whose latents each fired on `least`
  tokens and together on a third of that: with one of thousands of independent
  latents that fire a few times, a latent often correlates by more than .5.

  "hungarian": the pairs of the largest sum of correlations, exact, of 4,096
  latents in seconds. "mutual": pairs that are the best of each other, the
  fewest and surest. "greedy": the best pair, then the best of what is left,
  and so on. "sinkhorn": mutual best of `transport`.

  Args:
    correlations: of M and N latents.
    how: one of `METHODS`.
    least: tokens.

  Raises:
    ValueError: another method, or `least` below 1.
  """
  if how not in METHODS:
    raise ValueError(f"expected how to be one of {METHODS}, got {how!r}")
  scores = _scores(correlations, least)
  # Without the latents that have no partner there is less to search.
  a, b = np.flatnonzero(scores.any(1)), np.flatnonzero(scores.any(0))
  some = scores[np.ix_(a, b)]
  if not some.size:
    return Matches(a, b, np.empty(0))
  if how == "hungarian":
    i, j = optimize.linear_sum_assignment(some, maximize=True)
  elif how == "greedy":
    i, j = _greedy(some)
  else:
    i, j = _mutual(some if how == "mutual" else transport(some))
  there = some[i, j] > 0
  i, j = i[there], j[there]
  return Matches(a[i], b[j], some[i, j])


def transport(
  scores, *, epsilon: float = 0.02, iterations: int = 200
) -> np.ndarray:
  """Entropic optimal transport between latents that all weigh alike.

  The plan with rows of 1 / M and columns of 1 / N that maximises the sum of
  plan * scores plus epsilon times its entropy, by Sinkhorn's iterations on
  logarithms (Cuturi 2013, "Sinkhorn distances"; Peyre and Cuturi 2019,
  "Computational optimal transport", section 4.4).

  Args:
    scores: [M, N], more is more alike.
    epsilon: in units of the scores; the less, the closer to an assignment and
      the more iterations are needed.
    iterations: of rows and columns each.

  Returns:
    float32 [M, N]; columns sum to 1 / N, rows to 1 / M once converged.
  """
  kernel = jnp.asarray(scores, jnp.float32) / epsilon
  return np.exp(_sinkhorn(kernel, iterations))


def shift_null(
  codes_a,
  codes_b,
  documents,
  *,
  draws: int = 99,
  least: int = 30,
  seed: int = 0,
) -> np.ndarray:
  """Each latent's best correlation with any latent after tokens were shifted.

  In every draw the tokens of b move within each document by a random number
  of places, around its end: how often a latent fires in a document, and in
  what runs, stays as it is, so that what documents are about is in the null.
  Shifts are uniform over a group, none at all included, as p need it (Hemerik
  and Goeman 2018, "Exact testing with random permutations"). Documents of few
  tokens leave b almost in place, and little to find.

  Args:
    codes_a: [n, M], dense or SciPy sparse.
    codes_b: [n, N] of the same tokens.
    documents: [n], numbers or names; the tokens of one in their order.
    draws: of shifts; see `significance` for how many are enough.
    least: as in `match`: pairs that could not be matched do not count.
    seed: of the shifts.

  Returns:
    float64 [draws, M], 0 where no latent is above 0.

  Raises:
    ValueError: codes as in `Correlations`, not one document a token, no
      document of two tokens, or no draws.
  """
  documents = np.asarray(documents)
  if documents.shape != np.shape(codes_b)[:1] or draws < 1:
    raise ValueError(
      f"expected the document of each of {np.shape(codes_b)[0]} tokens and at "
      f"least one draw, got {documents.shape} and {draws}"
    )
  _, own, sizes = np.unique(documents, return_inverse=True, return_counts=True)
  if sizes.max(initial=0) < 2:
    raise ValueError(
      f"expected documents of several tokens, got {len(sizes)} of one each: "
      "nothing can be shifted. Give blocks of tokens"
    )
  if sparse.issparse(codes_b):
    codes_b = sparse.csr_array(codes_b)
  members = np.argsort(own, kind="stable")
  own = own[members]
  first = (np.cumsum(sizes) - sizes)[own]
  place, size = np.arange(len(own)) - first, sizes[own]
  order = np.empty(len(own), np.int64)
  null = np.empty((draws, np.shape(codes_a)[1]))
  rng = np.random.default_rng(seed)
  with progress.bar(draws, "shifts", unit="draws") as bar:
    for i in range(draws):
      shift = rng.integers(0, sizes)[own]
      order[members] = members[first + (place + shift) % size]
      moved = Correlations().update(codes_a, codes_b[order]).compute()
      null[i] = _scores(moved, least).max(axis=1)
      bar.update(1)
  return null


def significance(
  matches: Matches, null_r, *, alpha: float = 0.05, pooled: bool = False
) -> Significance:
  """Which matches are better than the best that chance gives a latent.

  A match is the best of many, so it is compared with the latent's best of all
  partners in each draw. By default with the latent's own draws: what chance
  gives at best depends on how often and how evenly a latent fires, so that
  those of all K latents together are too easy for rare and too hard for
  frequent ones. But own p are at least 1 / (draws + 1): K matches are told
  from chance only where K / (alpha (draws + 1)) of them or more are. With
  fewer draws pooled p can do that, which hold for latents that fire alike.

  q are Benjamini and Hochberg's: of the matches with q <= alpha, a share of
  alpha is false, at most, on average.

  Args:
    matches: K pairs.
    null_r: [draws, M], of all latents of a, from `shift_null`.
    alpha: share of false ones among the matched.
    pooled: whether q are of the pooled p.

  Raises:
    ValueError: another shape, or too few draws for alpha.
  """
  null = np.asarray(null_r, np.float64)
  highest = matches.a.max(initial=0)
  if null.ndim != 2 or null.shape[1] <= highest:
    raise ValueError(
      "expected the null of every latent of a, [draws, M], got "
      f"{null.shape} and a match of latent {highest}"
    )
  if not 0 < alpha < 1 or (not pooled and alpha * (len(null) + 1) < 1 - 1e-9):
    raise ValueError(
      f"expected alpha in (0, 1) and at least 1 / alpha - 1 draws, got {alpha} "
      f"and {len(null)}: a smaller p than 1 / (draws + 1) cannot come out"
    )
  own = null[:, matches.a]
  # Rounding must not break a tie.
  r = matches.r - 1e-9
  p = (1 + (own >= r).sum(axis=0)) / (len(own) + 1)
  lower = np.searchsorted(np.sort(own, axis=None), r)
  p_pooled = (1 + own.size - lower) / (own.size + 1)
  q = benjamini_hochberg(p_pooled if pooled else p)
  return Significance(p, p_pooled, q, q <= alpha)


def _scores(correlations: PairwiseCorrelation, least: int) -> np.ndarray:
  """Correlations of pairs that may be matched, 0 of all others."""
  if least < 1:
    raise ValueError(f"expected least >= 1 tokens, got {least}")
  may = correlations.together >= least // 3
  may &= (correlations.fired_a >= least)[:, None]
  may &= correlations.fired_b >= least
  return np.where(may, np.maximum(correlations.pearson, 0), 0)


def _mutual(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  best_b, best_a = scores.argmax(axis=1), scores.argmax(axis=0)
  a = np.flatnonzero(best_a[best_b] == np.arange(len(scores)))
  return a, best_b[a]


def _greedy(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """In rounds: pairs that are mutually the best of what is left are greedy's.

  The best pair of all is among them in every round, so that there is an end.
  """
  left, partner = scores.copy(), np.full(len(scores), -1)
  while left.any():
    a, b = _mutual(left)
    there = left[a, b] > 0
    partner[a[there]] = b[there]
    left[a[there]] = 0
    left[:, b[there]] = 0
  a = np.flatnonzero(partner >= 0)
  return a, partner[a]


@jax.jit
def _sinkhorn(kernel: jax.Array, iterations) -> jax.Array:
  """Logarithms of the plan, [M, N]."""
  rows, columns = (-jnp.log(float(size)) for size in kernel.shape)

  def step(_, v):
    u = rows - jax.nn.logsumexp(kernel + v, axis=1)
    return columns - jax.nn.logsumexp(kernel + u[:, None], axis=0)

  v = jax.lax.fori_loop(0, iterations - 1, step, jnp.zeros(kernel.shape[1]))
  u = rows - jax.nn.logsumexp(kernel + v, axis=1)
  v = columns - jax.nn.logsumexp(kernel + u[:, None], axis=0)
  return kernel + u[:, None] + v
