"""What could be exchanged for what: every way, or random ones."""

import itertools
from collections.abc import Iterator

import numpy as np
from scipy import special

# So many arrangements are all looked at.
EXACT = 20_000
# Values in memory at a time, 32 MiB of them.
CHUNK = 2**22


def signs(
  units: int, draws: int, rng: np.random.Generator, width: int
) -> tuple[int | None, Iterator[np.ndarray]]:
  """Signs of units.

  Args:
    units: how many.
    draws: random arrangements, if all are more than `EXACT`.
    rng: of the random arrangements.
    width: values in memory for each arrangement.

  Returns:
    The number of all arrangements, None if those given are random; and
    chunks [A, units] of 1. and -1., the observed arrangement being all 1.
  """
  ways = 2**units if 2**units <= EXACT else None

  def chunks():
    size, total = max(1, CHUNK // width), ways or draws
    for start in range(0, total, size):
      rows = np.arange(start, min(start + size, total))[:, None]
      if ways:
        yield 1.0 - 2 * (rows >> np.arange(units) & 1)
      else:
        yield 1.0 - 2 * rng.integers(0, 2, (len(rows), units))

  return ways, chunks()


def labels(
  first: np.ndarray,
  stratum: np.ndarray,
  draws: int,
  rng: np.random.Generator,
  width: int,
) -> tuple[int | None, Iterator[np.ndarray]]:
  """Which units are in the first group, as many of each stratum as observed.

  Args:
    first: whether each unit is, as observed, bool [units].
    stratum: of each unit, whole numbers from 0, [units].
    draws: as in `signs`.
    rng: as in `signs`.
    width: as in `signs`.

  Returns:
    As `signs`, chunks being bool [A, units].
  """
  strata = [np.flatnonzero(stratum == s) for s in range(stratum.max() + 1)]
  chosen = [first[members].sum() for members in strata]
  ways = np.prod(special.binom([len(members) for members in strata], chosen))
  size = max(1, CHUNK // width)
  if ways > EXACT:
    return None, _random_labels(first, strata, draws, size, rng)
  every = itertools.product(*map(itertools.combinations, strata, chosen))
  return round(ways), _all_labels(every, len(first), size)


def _all_labels(every, units, size):
  while some := list(itertools.islice(every, size)):
    chunk = np.zeros((len(some), units), bool)
    for row, parts in zip(chunk, some, strict=True):
      row[list(itertools.chain(*parts))] = True
    yield chunk


def _random_labels(first, strata, draws, size, rng):
  for start in range(0, draws, size):
    chunk = np.tile(first, (min(size, draws - start), 1))
    for members in strata:
      chunk[:, members] = rng.permuted(chunk[:, members], axis=1)
    yield chunk
