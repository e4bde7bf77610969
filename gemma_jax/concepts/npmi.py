"""Whether word families belong together, by how they meet in a corpus.

Normalised pointwise mutual information over sliding windows: C_NPMI of Röder
et al. 2015, "Exploring the space of topic coherence measures", their boolean
sliding window, one token further each time.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from scipy import sparse

from gemma_jax.concepts.nulls import Null, repeats

# Tokens in memory at a time.
CHUNK = 2**18
BINS = 10


@dataclasses.dataclass(frozen=True)
class Counts:
  """Windows that f families occur in.

  Attributes:
    windows: how many there are.
    families: int [f], their numbers.
    single: int64 [f], windows with each.
    joint: int64 csr [f, f], windows with both; symmetric, without a diagonal.
  """

  windows: int
  families: np.ndarray
  single: np.ndarray
  joint: sparse.csr_array


class Npmi(NamedTuple):
  """Of n sets of families.

  Attributes:
    value: [n], mean over pairs, from -1 to 1; NaN of fewer than 3 pairs.
    pairs: int [n], pairs of families that are frequent enough.
  """

  value: np.ndarray
  pairs: np.ndarray


def count(windows, families, wanted, *, width: int = 10) -> Counts:
  """Counts windows with one and with two of the wanted families.

  A window of `width` tokens slides by one within each row; a family that
  occurs in it several times counts once.

  Args:
    windows: int [N, T], token ids.
    families: int [V], family of each token, -1 for none.
    wanted: int [f], numbers of different families.
    width: tokens of a sliding window, at most T.

  Raises:
    ValueError: other shapes, ids outside the vocabulary, families that are
      negative or wanted twice, or a width that does not fit.
  """
  windows, families = np.asarray(windows), np.asarray(families)
  wanted = np.asarray(wanted)
  if windows.ndim != 2 or families.ndim != 1 or wanted.ndim != 1:
    raise ValueError(
      "expected tokens [N, T], families [V] and wanted ones [f], got "
      f"{windows.shape}, {families.shape} and {wanted.shape}"
    )
  n, length = windows.shape
  if not n or not 1 <= width <= length:
    raise ValueError(
      f"expected rows of at least {width} tokens, got {n} of {length}; take a "
      "smaller width, of at least 1"
    )
  if windows.min() < 0 or windows.max() >= len(families):
    raise ValueError(
      f"expected ids from 0 and below V = {len(families)}, got "
      f"{windows.min()} to {windows.max()}"
    )
  different = np.unique(wanted)
  if not len(wanted) or different[0] < 0 or len(different) < len(wanted):
    raise ValueError(
      "expected different families from 0 as wanted, got "
      f"{len(wanted)}, {len(different)} of them different and "
      f"{(different < 0).sum()} negative; take np.unique of those from 0"
    )
  highest = max(families.max(), wanted.max())
  # What is behind the highest family is where -1 refers to.
  index = np.full(highest + 2, -1, np.int64)
  index[wanted] = np.arange(len(wanted))
  of_token = index[families]
  both = sparse.csr_array((len(wanted), len(wanted)), dtype=np.int64)
  step = max(CHUNK // length, 1)
  for start in range(0, n, step):
    rows = of_token[windows[start : start + step]]
    both = both + _windows_with_both(rows, width, len(wanted))
  single = both.diagonal()
  twice = sparse.diags_array(2 * single, dtype=np.int64)
  both = (both + both.T - twice).tocsr()
  both.eliminate_zeros()
  return Counts(n * (length - width + 1), wanted, single, both)


def npmi(
  counts: Counts, sets, *, least: int = 5, epsilon: float = 1e-12
) -> Npmi:
  """Mean NPMI of pairs, ln(P_ij / (P_i P_j)) / -ln P_ij (Bouma 2009).

  ε is added to P_ij, as by Röder et al. 2015, equation 2: families that never
  meet have -1 + ln(P_i P_j) / ln ε.

  Args:
    counts: of `count`.
    sets: int [n, m], different families in a row, -1 for none.
    least: windows that both families of a pair must occur in, at least 1.
    epsilon: ε.

  Raises:
    ValueError: other shapes, families that were not counted or that are twice
      in a row, or `least` below 1.
  """
  places = _places(counts, sets, least)
  members = (places >= 0).sum(1)
  value = _mean_npmi(counts, places, epsilon)
  return Npmi(value, members * (members - 1) // 2)


def null(
  counts: Counts,
  sets,
  *,
  least: int = 5,
  epsilon: float = 1e-12,
  draws: int = 20_000,
  seed: int = 0,
) -> np.ndarray:
  """Share of random sets, matched by counts, of as high a mean NPMI.

  Counted families are ranked by their windows and cut into 10 bins of equal
  size; a random set takes different families of the bins of one of the sets.
  NPMI is compared after its expectation and standard deviation for these
  bins, see `Null`.

  Args:
    counts: of `count`.
    sets: as in `npmi`.
    least: as in `npmi`; rarer families are not drawn.
    epsilon: as in `npmi`.
    draws: random sets, for all n together.
    seed: of the random sets.

  Returns:
    p, float64 [n], at least 1 / (1 + draws); 1 where the NPMI is NaN.

  Raises:
    ValueError: as `npmi`, or no draws.
  """
  places = _places(counts, sets, least)
  frequent = np.flatnonzero(counts.single >= least)
  order = frequent[np.argsort(counts.single[frequent], kind="stable")]
  strata = np.full(len(counts.families), -1)
  strata[order] = np.arange(len(order)) * BINS // max(len(order), 1)
  # Fewer families than bins leave some empty.
  strata[frequent] = np.unique(strata[frequent], return_inverse=True)[1]
  return _fit(counts, strata, epsilon).compare(
    _mean_npmi(counts, places, epsilon),
    np.where(places < 0, -1, strata[places]),
    strata,
    lambda drawn: _mean_npmi(counts, drawn, epsilon),
    draws=draws,
    seed=seed,
  )[1]


def _windows_with_both(rows: np.ndarray, width: int, f: int):
  """Windows with both families, upper or lower triangle, and the diagonal.

  Each window is counted at the first occurrences in it of the two families.
  """
  length = rows.shape[1]
  before = _previous(rows, f)
  found = []
  for apart in range(width):
    position = np.arange(length - apart)
    left, right = rows[:, : length - apart], rows[:, apart:]
    earlier = np.maximum(before[:, : length - apart], before[:, apart:])
    first = np.maximum(earlier + 1, position + apart - width + 1)
    number = np.minimum(position, length - width) - first + 1
    here = (left >= 0) & (right >= 0) & (number > 0)
    found.append((number[here], left[here], right[here]))
  number, left, right = (np.concatenate(part) for part in zip(*found, strict=1))
  return sparse.coo_array((number, (left, right)), shape=(f, f)).tocsr()


def _previous(rows: np.ndarray, f: int) -> np.ndarray:
  """Position of the last occurrence before of the same family, or -1."""
  n, length = rows.shape
  here = np.flatnonzero(rows.ravel() >= 0)
  key = here // length * f + rows.ravel()[here]
  order = np.argsort(key, kind="stable")
  same = np.diff(key[order]) == 0
  found = np.full(n * length, -1)
  found[here[order[1:][same]]] = here[order[:-1][same]] % length
  return found.reshape(n, length)


def _places(counts: Counts, sets, least: int) -> np.ndarray:
  """Indices [n, m] into the families, -1 where none or too rare."""
  sets = np.asarray(sets)
  if sets.ndim != 2 or sets.dtype.kind not in "iu" or least < 1:
    raise ValueError(
      "expected whole numbers [n, m] and least from 1, got "
      f"{sets.dtype} {sets.shape} and {least}"
    )
  known = np.isin(sets, counts.families) | (sets < 0)
  twice = repeats(sets)
  if not known.all() or twice.any():
    raise ValueError(
      f"expected different families that were counted, got {(~known).sum()} "
      f"others and {twice.sum()} rows that repeat one; count those and put -1 "
      "in the place of these"
    )
  # As in `count`, what is behind the highest family is where -1 refers to.
  index = np.full(counts.families.max() + 2, -1)
  frequent = np.flatnonzero(counts.single >= least)
  index[counts.families[frequent]] = frequent
  return index[np.maximum(sets, -1)]


def _mean_npmi(counts: Counts, places: np.ndarray, epsilon) -> np.ndarray:
  """[n], NaN of fewer than 3 pairs."""
  i, j = np.triu_indices(places.shape[1], 1)
  a, b = places[:, i], places[:, j]
  there = (a >= 0) & (b >= 0)
  values = np.zeros(there.shape)
  # SciPy looks up no entries as a sparse array.
  if there.any():
    a, b = a[there], b[there]
    values[there] = _pair_npmi(counts, counts.joint[a, b], a, b, epsilon)
  pairs = there.sum(1)
  return values.sum(1) / np.where(pairs > 2, pairs, np.nan)


def _pair_npmi(counts: Counts, together, a, b, epsilon) -> np.ndarray:
  log = np.log(together / counts.windows + epsilon)
  alone = np.log(counts.single[a] / counts.windows)
  return (log - alone - np.log(counts.single[b] / counts.windows)) / -log


def _fit(counts: Counts, strata: np.ndarray, epsilon) -> Null:
  """Moments of the NPMI of families drawn from strata.

  That of families that never meet is -1 + x_a + x_b; joint counts are sparse,
  and with them what is added to it.
  """
  size = np.bincount(strata[strata >= 0])
  own = np.flatnonzero(strata >= 0)
  label = strata[own]
  x = np.log(counts.single[own] / counts.windows) / np.log(epsilon)
  joint = counts.joint[own][:, own].tocoo()
  a, b = joint.coords
  never = x[a] + x[b] - 1
  more = _pair_npmi(counts, joint.data, own[a], own[b], epsilon) - never
  added = sparse.coo_array((more, (a, b)), shape=joint.shape)
  squared = sparse.coo_array((more * (more + 2 * never), (a, b)), joint.shape)
  share = (label[:, None] == np.arange(len(size))) / size
  x_mean = x @ share
  x_variance = x**2 @ share - x_mean**2
  # Mean NPMI of each family with those of each stratum.
  rows = x[:, None] + x_mean - 1 + added @ share
  square = (x_mean[:, None] + x_mean - 1) ** 2 + share.T @ (squared @ share)
  square += x_variance[:, None] + x_variance
  return Null.fit(rows, square, 2 * x - 1, label)
