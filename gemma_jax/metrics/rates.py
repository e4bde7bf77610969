"""Bits: what a code costs, and the least that any code could cost."""

import numpy as np
from scipy.special import gammaln

LN2 = float(np.log(2))


def support_bits(width: float, l0) -> np.ndarray:
  """Bits to say which `l0` of `width` latents are active: log2 C(M, L0).

  Args:
    width: M.
    l0: active latents, whole or not, any shape.
  """
  l0 = np.asarray(l0, np.float64)
  if (l0 < 0).any() or (l0 > width).any():
    raise ValueError(f"Expected 0 to {width} active latents, got {l0}.")
  ways = gammaln(width + 1) - gammaln(l0 + 1) - gammaln(width - l0 + 1)
  return ways / LN2


def firing_entropy(density) -> float:
  """Bits to say which latents are active, if they fire independently.

  Args:
    density: share of tokens on which each latent fires, [M].
  """
  p = np.asarray(density, np.float64)
  q = 1 - p
  with np.errstate(divide="ignore", invalid="ignore"):
    terms = p * np.log2(p) + q * np.log2(q)
  return float(0 - np.nansum(terms))


def label_entropy(counts) -> float:
  """Entropy of a label in bits, from how often each occurred, [C]."""
  p = np.asarray(counts, np.float64)
  p = p[p > 0] / p.sum()
  return float(0 - np.sum(p * np.log2(p)))


def gaussian_bound(eigenvalues, bits) -> np.ndarray:
  """Least FVU of a Gaussian source at given rates: reverse water-filling.

  No code of a Gaussian vector with this covariance does better (Cover and
  Thomas, "Elements of Information Theory", theorem 10.3.3). Activations are
  not Gaussian, and can be coded in fewer bits: the line is for orientation.

  Args:
    eigenvalues: of the covariance, [D].
    bits: rates, bits a vector, any shape.

  Returns:
    Distortion over the total variance, the shape of `bits`.
  """
  values = np.sort(np.maximum(np.asarray(eigenvalues, np.float64), 0))[::-1]
  values = values[values > 0]
  bits = np.asarray(bits, np.float64)
  if not len(values) or (bits < 0).any():
    raise ValueError(
      f"Expected some variance and no negative bits, got {len(values)} "
      f"eigenvalues above 0 and {bits}."
    )
  # With the first n components coded, the water stands at their level.
  n = np.arange(1, len(values) + 1)
  logs = np.cumsum(np.log2(values))
  beneath = np.append(values[1:], 0)
  with np.errstate(divide="ignore"):
    # The rate at which component n + 1 would begin to be coded.
    until = (logs - n * np.log2(beneath)) / 2
  rest = np.cumsum(values[::-1])[::-1]
  rest = np.append(rest[1:], 0)
  at = np.searchsorted(until, bits.ravel())
  level = 2 ** ((logs[at] - 2 * bits.ravel()) / n[at])
  return ((n[at] * level + rest[at]) / values.sum()).reshape(bits.shape)
