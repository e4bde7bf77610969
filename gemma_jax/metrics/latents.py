"""How often latents fire, and how much their decoder rows repeat each other."""

import jax
import jax.numpy as jnp
import numpy as np

PERCENTILES = (5, 25, 50, 75, 95)
# Edges of the histogram of log10 density.
EDGES = np.arange(-8, 0.01, 0.25)

# Cosines that exist at once: 256 MiB.
_COSINES = 2**26

DEFINITIONS = {
  "l0": "Mean number of active latents (activation > 0) per token.",
  "l0_percentiles": (
    "Percentiles over tokens of that number: the smallest with at least this "
    "share of tokens at or below it."
  ),
  "density": "Per latent: share of tokens on which it fires.",
  "density_histogram": (
    "Latents by log10 density; those below the first edge are in the first "
    "bin, those that never fire in none but `dead`."
  ),
  "dead_fraction": "Share of latents that fire on no token.",
  "dense_fraction": "Share of latents that fire on more than 10 % of tokens.",
  "decoder_coherence": (
    "Mean over latents of the largest |cos| between its decoder row and "
    "another latent's."
  ),
}


class RunningLatents:
  """Firing of latents over batches of tokens; a latent fires where it is > 0.

  Counts are whole numbers: how tokens fall into batches changes nothing.
  """

  def __init__(self):
    self.count = 0
    self._fired = None  # int64 [M], tokens on which each fires
    self._tokens = None  # int64 [M + 1], tokens with 0, 1, ... active latents

  def update(self, activations, *, mask=None) -> "RunningLatents":
    """Adds tokens.

    Args:
      activations: [..., M], on any device.
      mask: bool [...], False for tokens that do not count, such as BOS and
        padding, whatever they hold; None counts all.

    Raises:
      ValueError: another M than before, or a mask of another shape or dtype.
      FloatingPointError: a counted activation that is not finite.
    """
    shape = np.shape(activations)
    if mask is None:
      mask = np.ones(shape[:-1], bool)
    mask = np.asarray(mask)
    if mask.shape != shape[:-1] or mask.dtype != bool:
      raise ValueError(
        f"The mask is {mask.dtype} {mask.shape}; expected bool, an entry per "
        f"token, {shape[:-1]}."
      )
    if self._fired is None:
      self._fired = np.zeros(shape[-1], np.int64)
      self._tokens = np.zeros(shape[-1] + 1, np.int64)
    if shape[-1] != len(self._fired):
      raise ValueError(
        f"{shape[-1]} latents after {len(self._fired)}; give each dictionary "
        "an accumulator of its own."
      )
    fired, active, finite = map(
      np.asarray, _count(jnp.asarray(activations), jnp.asarray(mask))
    )
    if not finite:
      raise FloatingPointError(
        "Activations that are not finite: look at the dictionary's input."
      )
    counted = active[mask.reshape(-1)]
    self.count += len(counted)
    self._fired += fired
    self._tokens += np.bincount(counted, minlength=len(self._tokens))
    return self

  @property
  def density(self) -> np.ndarray:
    """Share of tokens on which each latent fires, float64 [M]."""
    return self._fired / self.count

  def compute(self) -> dict:
    """The numbers of `DEFINITIONS` so far, for a JSON file.

    `density` itself is left to the property, and `decoder_coherence` to its
    function.

    Returns:
      {"l0", "l0_percentiles": {"5": ...}, "density_histogram": {"edges",
      "counts", "dead"}, "dead_fraction", "dense_fraction", "tokens"}.

    Raises:
      ValueError: no tokens yet.
    """
    if not self.count:
      raise ValueError("No token has been counted: give some, or see the mask.")
    below = np.cumsum(self._tokens)
    percentiles = {
      str(p): int(np.searchsorted(100 * below, p * self.count))
      for p in PERCENTILES
    }
    alive = self._fired > 0
    logs = np.log10(self.density[alive])
    counts, _ = np.histogram(np.maximum(logs, EDGES[0]), EDGES)
    return {
      "l0": int(self._fired.sum()) / self.count,
      "l0_percentiles": percentiles,
      "density_histogram": {
        "edges": EDGES.tolist(),
        "counts": counts.tolist(),
        "dead": int((~alive).sum()),
      },
      "dead_fraction": float(np.mean(~alive)),
      "dense_fraction": float(np.mean(10 * self._fired > self.count)),
      "tokens": self.count,
    }


def largest_cosines(decoder) -> np.ndarray:
  """Largest |cos| of every decoder row with another row.

  Blocks of rows are compared with all rows, so that no more than 2^26
  cosines exist at once.

  Args:
    decoder: [M, E], at least two rows; a row of zeros has cosine 0.

  Returns:
    float32 [M].

  Raises:
    ValueError: not [M, E] with M >= 2.
  """
  decoder = jnp.asarray(decoder, jnp.float32)
  if decoder.ndim != 2 or len(decoder) < 2:
    raise ValueError(
      f"The decoder is {decoder.shape}; expected [M, E] with two rows or more."
    )
  width = len(decoder)
  block = min(width, max(1, _COSINES // width))
  unit = _unit(decoder)
  out = np.empty(width, np.float32)
  for start in range(0, width, block):
    # The last block reaches back, so that all blocks are one program.
    first = min(start, width - block)
    out[first : first + block] = _largest(unit, first, block)
  return out


def decoder_coherence(decoder) -> float:
  """Mean over latents of `largest_cosines`, in [0, 1]: 1 where rows repeat.

  Args:
    decoder: [M, E], at least two rows.

  Raises:
    ValueError: not [M, E] with M >= 2.
  """
  return float(largest_cosines(decoder).mean(dtype=np.float64))


@jax.jit
def _count(activations, mask):
  """Tokens by latent, latents by token, and whether all that counts is finite.

  Returns:
    int32 [M], int32 [n], bool.
  """
  width = activations.shape[-1]
  activations, mask = activations.reshape(-1, width), mask.reshape(-1)
  active = (activations > 0) & mask[:, None]
  finite = jnp.all(jnp.isfinite(activations) | ~mask[:, None])
  return (
    active.sum(0, dtype=jnp.int32),
    active.sum(1, dtype=jnp.int32),
    finite,
  )


@jax.jit
def _unit(rows):
  norm = jnp.linalg.norm(rows, axis=1, keepdims=True)
  return rows / jnp.where(norm > 0, norm, 1)


def _largest_of_block(unit, first, block):
  rows = jax.lax.dynamic_slice_in_dim(unit, first, block)
  # GPUs would otherwise round the factors to TF32.
  cosines = jnp.abs(jnp.matmul(rows, unit.T, precision="highest"))
  own = first + jnp.arange(block)[:, None] == jnp.arange(len(unit))
  return jnp.minimum(jnp.where(own, 0, cosines).max(1), 1)


_largest = jax.jit(_largest_of_block, static_argnums=2)
