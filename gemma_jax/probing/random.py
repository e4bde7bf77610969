"""Random features: what a dictionary has to beat."""

import numpy as np
import scipy.sparse

ROWS = 1 << 24  # projections in memory at a time


def random_latents(
  x: np.ndarray, density: np.ndarray, *, seed: int
) -> scipy.sparse.csr_matrix:
  """ReLU of random directions, each shifted to fire as often as it is told.

  Directions are Gaussian in standardised coordinates (each dimension with
  mean 0, variance 1), so that a few massive dimensions do not decide. With a
  dictionary's own densities, these are as many latents of the same L0.

  Args:
    x: [R, D] activations.
    density: [M] shares of the rows on which each latent is to fire.
    seed: of the directions.

  Returns:
    float32 [R, M]. Exactly round(density R) rows fire, fewer where ties at
    the threshold leave less.

  Raises:
    ValueError: densities outside [0, 1), or other shapes.
    FloatingPointError: activations that are not finite.
  """
  x, density = np.asarray(x, np.float32), np.asarray(density, np.float64)
  if x.ndim != 2 or density.ndim != 1:
    raise ValueError(
      f"expected x [R, D] and density [M], got {x.shape} and {density.shape}"
    )
  if density.size and not (density.min() >= 0 and density.max() < 1):
    raise ValueError(
      f"expected densities in [0, 1), got {density.min()} to {density.max()}"
    )
  if not np.isfinite(x).all():
    raise FloatingPointError("Activations that are not finite.")
  rows, dims = x.shape
  x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-12)
  rng = np.random.default_rng(seed)
  counts = np.minimum(np.round(density * rows).astype(int), rows - 1)
  parts = []
  size = max(1, ROWS // rows)
  for start in range(0, len(density), size):
    wanted = counts[start : start + size]
    directions = rng.standard_normal((len(wanted), dims), np.float32)
    z = directions @ x.T / np.float32(np.sqrt(dims))
    cuts = [
      np.partition(row, rows - 1 - n)[rows - 1 - n]
      for row, n in zip(z, wanted, strict=True)
    ]
    z -= np.asarray(cuts, np.float32)[:, None]
    parts.append(scipy.sparse.csr_matrix(np.maximum(z, 0)))
  return scipy.sparse.vstack(parts).T.tocsr()
