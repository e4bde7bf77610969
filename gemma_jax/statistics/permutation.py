"""What chance alone would have given: tests by exchange.

What is exchanged is a prompt or, where rows belong together, a whole block
(a document): exchanging tokens makes any difference significant.
"""

import dataclasses
import logging
from collections.abc import Callable

import numpy as np

from gemma_jax.statistics import arrangements, samples

log = logging.getLogger("gemma_jax")

ALTERNATIVES = ("two-sided", "greater", "less")


@dataclasses.dataclass(frozen=True)
class Permutation:
  """A permutation test.

  Attributes:
    statistic: as observed.
    p: never 0.
    draws: arrangements looked at: all of them, or random ones.
    exact: whether all of them, the observed one included.
    smallest_p: what p could have been at the least, with this many units. A
      test with `smallest_p` above alpha can show nothing.
    null: float64 [draws], the statistic of each arrangement.
  """

  statistic: float
  p: float
  draws: int
  exact: bool
  smallest_p: float
  null: np.ndarray


@dataclasses.dataclass(frozen=True)
class MaxPermutation:
  """A permutation test of K columns at once.

  Attributes:
    statistic: float64 [K], mean difference of each column.
    p: float64 [K], corrected for the K columns, never 0.
    p_of_max: of the column that stands out most, the least of `p`: whether
      there is a difference in any column.
    draws: as in `Permutation`.
    exact: as in `Permutation`.
    smallest_p: as in `Permutation`.
    null: float64 [draws], the largest standardised difference of each
      arrangement.
  """

  statistic: np.ndarray
  p: np.ndarray
  p_of_max: float
  draws: int
  exact: bool
  smallest_p: float
  null: np.ndarray


def permutation_test(
  x,
  y=None,
  *,
  design: str = "paired",
  statistic: Callable[..., np.ndarray] | None = None,
  strata=None,
  blocks=None,
  alternative: str = "two-sided",
  draws: int = 9_999,
  seed: int = 0,
) -> Permutation:
  """Whether x and y differ by more than an exchange of them would.

  "paired": the sign of each prompt's difference is as likely + as -.
  "independent": which prompts are in x and which in y could be otherwise.

  All arrangements are looked at if they are at most 20,000, the observed one
  among them. Otherwise `draws` random ones, and p = (b + 1) / (draws + 1)
  with b that are at least as extreme (Phipson and Smyth 2010, "Permutation
  p-values should never be zero"). A two-sided p is twice the smaller of the
  one-sided ones, at most 1, as in SciPy.

  Args:
    x: one value a row, [n]. Without `y`, differences of pairs.
    y: [n] of the same rows if paired, [m] of others if independent.
    design: "paired" or "independent".
    statistic: vectorised over arrangements. Paired: differences with their
      signs [A, n] -> [A]. Independent: all values [n + m], and which of them
      are in x, bool [A, n + m] -> [A]. By default the mean difference; with
      strata the mean over strata of each one's, so that all count alike.
    strata: capability of each row, [n], or [n + m] with the rows of x first.
      Independent: labels are exchanged within a stratum. Paired: signs need
      no strata, which only weight the mean difference.
    blocks: document of each row, like `strata`. Rows of a block keep
      together. Independent: a block is in one group and in one stratum.
    alternative: "two-sided"; "greater", x above y; or "less".
    draws: random arrangements, where there are too many.
    seed: of the random arrangements.

  Raises:
    ValueError: rows or labels that do not fit the design, values or
      statistics that are not finite, fewer than two blocks in all.
  """
  samples.choice(design, samples.DESIGNS, "design")
  samples.choice(alternative, ALTERNATIVES, "alternative")
  samples.count(draws, "draws")
  build = _paired if design == "paired" else _independent
  evaluate, observed, (ways, chunks) = build(
    x, y, statistic, strata, blocks, draws, np.random.default_rng(seed)
  )
  value = _checked(evaluate(observed[None]), 1)[0]
  null = np.concatenate(
    [_checked(evaluate(some), len(some)) for some in chunks]
  )
  exact = ways is not None
  # What is equal but for the order of its sums counts as equal.
  slack = 1e-10 * (abs(value) + np.median(np.abs(null)))
  above = _share(null >= value - slack, exact)
  below = _share(null <= value + slack, exact)
  p = {
    "greater": above,
    "less": below,
    "two-sided": np.minimum(1, 2 * np.minimum(above, below)),
  }[alternative]
  least = _smallest(ways or draws + 1, alternative)
  return Permutation(
    float(value), float(p), len(null), exact, _warned(least), null
  )


def max_permutation_test(
  differences,
  *,
  strata=None,
  blocks=None,
  alternative: str = "two-sided",
  draws: int = 9_999,
  seed: int = 0,
) -> MaxPermutation:
  """A paired test of each of K columns, corrected for the best of them.

  Every arrangement flips a prompt in all columns alike, so that their
  dependence stays as it is. The p of a column is the chance that any column
  stands out as much: single-step maxT (Westfall and Young 1993,
  "Resampling-based multiple testing", chapter 2). Columns are compared by
  their sum over the root of the sum of squares: that is monotone in
  Student's t, so that units do not matter.

  Args:
    differences: of pairs, rows [n, K], the columns being layers or measures.
    strata: as in `permutation_test`, paired.
    blocks: as in `permutation_test`, paired.
    alternative: "two-sided", "greater" or "less".
    draws: random arrangements, if all are more than 20,000.
    seed: of the random arrangements.

  Raises:
    ValueError: as in `permutation_test`.
  """
  samples.choice(alternative, ALTERNATIVES, "alternative")
  samples.count(draws, "draws")
  d = np.asarray(differences, np.float64)
  if d.ndim != 2 or not d.size:
    raise ValueError(f"expected differences [n, K], got {d.shape}")
  samples.sample(d.ravel(), "differences", least=1)
  sums = _block_sums(d, strata, blocks)
  scale = np.sqrt(np.sum(sums**2, axis=0))
  # A column without any difference stands out in no arrangement.
  standardised = np.divide(
    sums, scale, out=np.zeros_like(sums), where=scale > 0
  )
  direction = {
    "two-sided": np.abs,
    "greater": lambda z: z,
    "less": np.negative,
  }[alternative]
  observed = direction(standardised.sum(0))
  rng = np.random.default_rng(seed)
  ways, chunks = arrangements.signs(len(sums), draws, rng, max(sums.shape))
  null = np.concatenate(
    [direction(some @ standardised).max(1) for some in chunks]
  )
  exact = ways is not None
  slack = 1e-10 * np.abs(null).max()
  p = _share(null[:, None] >= observed - slack, exact)
  # Of all signs, those observed and their opposites have the same largest.
  least = _smallest(ways, alternative) if exact else 1 / (draws + 1)
  return MaxPermutation(
    sums.sum(0), p, float(p.min()), len(null), exact, _warned(least), null
  )


def smallest_p(n: int, *, alternative: str = "two-sided") -> float:
  """The least p of an exact sign-flip test of n prompts: 2 / 2^n, or 1 / 2^n.

  Three prompts: .25; five: .0625; six: .03125. No effect is too large for it.

  Raises:
    ValueError: n that is not a whole number above 0, or another alternative.
  """
  samples.count(n, "n")
  samples.choice(alternative, ALTERNATIVES, "alternative")
  return _smallest(2 ** int(n), alternative)


def least_n(alpha: float = 0.05, *, alternative: str = "two-sided") -> int:
  """The fewest prompts with which a sign-flip test can reach alpha.

  Raises:
    ValueError: alpha not between 0 and 1, or another alternative.
  """
  samples.probability(alpha, "alpha")
  n = 1
  while smallest_p(n, alternative=alternative) > alpha:
    n += 1
  return n


def _paired(x, y, statistic, strata, blocks, draws, rng):
  d = samples.differences(x, y)
  if statistic is None:
    sums = _block_sums(d, strata, blocks)
    units = width = len(sums)

    def evaluate(signs):
      return signs @ sums
  else:
    if strata is not None:
      raise ValueError(
        "signs need no strata: they can only weight the mean difference, so "
        "give either strata or a statistic that knows them"
      )
    block = samples.codes(blocks, len(d), "blocks")
    units, width = _several(block), len(d)

    def evaluate(signs):
      return statistic(signs[:, block] * d)

  return (
    evaluate,
    np.ones(units),
    arrangements.signs(units, draws, rng, width),
  )


def _independent(x, y, statistic, strata, blocks, draws, rng):
  x, y = samples.sample(x, "x", least=1), samples.sample(y, "y", least=1)
  values, in_x = np.append(x, y), np.arange(len(x) + len(y)) < len(x)
  block = samples.codes(blocks, len(values), "blocks")
  first = _of_blocks(in_x, block, "group")
  stratum = np.zeros(_several(block), int)
  if strata is not None:
    stratum = _of_blocks(
      samples.codes(strata, len(values), "strata"), block, "stratum"
    )
  if statistic is None:
    groups = [np.flatnonzero(stratum == s) for s in range(stratum.max() + 1)]
    if any(first[group].all() or not first[group].any() for group in groups):
      raise ValueError(
        "expected rows of x and of y in every stratum, got one with rows of "
        "one group only; leave it out"
      )
    # Sums of values near 0 are exact enough to see ties.
    sums = np.bincount(block, values - np.median(values))
    counts = np.bincount(block)

    def evaluate(labels):
      return np.mean(
        [
          _mean_difference(labels[:, group], sums[group], counts[group])
          for group in groups
        ],
        axis=0,
      )
  else:

    def evaluate(labels):
      return statistic(values, labels[:, block])

  width = len(first) if statistic is None else len(values)
  return (
    evaluate,
    first,
    arrangements.labels(first, stratum, draws, rng, width),
  )


def _mean_difference(labels, sums, counts):
  """[A] of labels [A, blocks]; blocks differ in their number of rows."""
  top, rows = labels @ sums, labels @ counts
  return top / rows - (sums.sum() - top) / (counts.sum() - rows)


def _of_blocks(rows, block, name) -> np.ndarray:
  """What all rows of a block have in common, [blocks]."""
  out = rows[np.unique(block, return_index=True)[1]]
  if (out[block] != rows).any():
    raise ValueError(
      f"expected the rows of a block in one {name}, got a block in several; "
      "blocks of both groups are pairs: average each and test the differences"
    )
  return out


def _block_sums(d, strata, blocks) -> np.ndarray:
  """Parts of blocks in the mean difference: [n] -> [blocks], also [n, K]."""
  block = samples.codes(blocks, len(d), "blocks")
  stratum = np.zeros(len(d), int)
  if strata is not None:
    stratum = samples.codes(strata, len(d), "strata")
  sizes = np.bincount(stratum)
  weighted = d / (len(sizes) * sizes[stratum]).reshape(-1, *[1] * (d.ndim - 1))
  out = np.zeros((_several(block), *d.shape[1:]))
  np.add.at(out, block, weighted)
  return out


def _several(block) -> int:
  if block.max() < 1:
    raise ValueError("expected at least two blocks to exchange, got one")
  return int(block.max()) + 1


def _checked(values, count: int) -> np.ndarray:
  values = np.asarray(values, np.float64)
  if values.shape != (count,) or not np.isfinite(values).all():
    raise ValueError(
      f"expected finite statistics [{count}], one an arrangement, got "
      f"{values.shape} with {np.sum(~np.isfinite(values))} not finite"
    )
  return values


def _share(extreme, exact: bool):
  """p of what is as extreme; the observed arrangement is one of them."""
  b, m = extreme.sum(axis=0), len(extreme)
  return b / m if exact else (b + 1) / (m + 1)


def _smallest(ways, alternative: str) -> float:
  return min(1.0, float((2 if alternative == "two-sided" else 1) / ways))


def _warned(least: float) -> float:
  if least > 0.05:
    log.warning(
      "p cannot be less than %.3g: with so few units or draws a test can show "
      "nothing at 5 %%",
      least,
    )
  return least
