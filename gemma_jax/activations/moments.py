"""Central moments of every dimension, and how those of two sets combine."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
  """Float64 sums over rows of the powers of the distance from their mean.

  Attributes:
    count: rows.
    mean: [D].
    m2: sum of (x - mean)^2, [D].
    m3: of (x - mean)^3.
    m4: of (x - mean)^4.
  """

  count: int
  mean: np.ndarray
  m2: np.ndarray
  m3: np.ndarray
  m4: np.ndarray


def combine(a: Moments, b: Moments) -> Moments:
  """Moments of two sets of rows together; either may be empty.

  Pebay 2008, "Formulas for robust, one-pass parallel computation of
  covariances and arbitrary-order statistical moments" (SAND2008-6212), the
  pairwise updates of M2, M3 and M4.
  """
  # As floats: the fourth powers of counts leave 64-bit integers.
  na, nb = float(a.count), float(b.count)
  n = na + nb
  if not na or not nb:
    return b if nb else a
  d = b.mean - a.mean
  e = d / n
  return Moments(
    a.count + b.count,
    a.mean + nb * e,
    a.m2 + b.m2 + na * nb * d * e,
    a.m3
    + b.m3
    + na * nb * (na - nb) * d * e**2
    + 3 * e * (na * b.m2 - nb * a.m2),
    a.m4
    + b.m4
    + na * nb * (na**2 - na * nb + nb**2) * d * e**3
    + 6 * e**2 * (na**2 * b.m2 + nb**2 * a.m2)
    + 4 * e * (na * b.m3 - nb * a.m3),
  )


def of_sums(sums: Mapping[str, np.ndarray]) -> Moments:
  """Moments of the rows that `sums.block` summed, at least one."""
  n = int(sums["count"])
  scale = np.asarray(sums["scale"], np.float64)
  s1, s2, s3, s4 = (
    np.asarray(s, np.float64) * scale**k
    for k, s in enumerate(sums["powers"], 1)
  )
  m = s1 / n
  mean = sums["shift"] + m
  m2 = np.maximum(s2 - n * m**2, 0)
  m3 = s3 - 3 * m * s2 + 2 * n * m**3
  m4 = s4 - 4 * m * s3 + 6 * m**2 * s2 - 3 * n * m**4
  # What is left of a constant dimension is the rounding of its mean.
  same = sums["min"] == sums["max"]
  mean = np.where(same, sums["min"], mean)
  return Moments(n, mean, *(np.where(same, 0, p) for p in (m2, m3, m4)))
