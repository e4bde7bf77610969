"""Exact selection of the largest values without a sort.

The bits of a non-negative float32 order as integers, so the k-th largest
value is found by bisection on bits: each step is one count, which shards.
"""

import jax
import jax.numpy as jnp

from gemma_jax.dictionaries import axes as mesh


def kth_largest(
  z: jax.Array,
  k: jax.Array | float,
  axis: int | None = None,
  axes: tuple[str, ...] = (),
) -> jax.Array:
  """A threshold t > 0 such that `z >= t` keeps the k largest of ReLU(z).

  Where fewer than k values are positive, all positive ones are kept; values
  equal to the k-th are all kept.

  Args:
    z: float32, [..., M].
    k: how many to keep.
    axis: None for all of z at once, -1 for every row.
    axes: of a mesh under `shard_map`, over which z is split.

  Returns:
    float32 [] or [..., 1].

  Raises:
    TypeError: z is not float32.
  """
  if z.dtype != jnp.float32:
    raise TypeError(f"kth_largest bisects float32 bits; got {z.dtype}.")
  bits = jax.lax.bitcast_convert_type(jnp.maximum(z, 0), jnp.int32)
  keep = axis is not None

  def count(t):
    here = jnp.sum(bits >= t, axis=axis, keepdims=keep, dtype=jnp.int32)
    return mesh.total(here, axes)

  # The answer lies in [low, high); an exact hit closes the interval on it.
  top = mesh.largest(jnp.max(bits, axis=axis, keepdims=keep), axes) + 1
  low = jnp.ones_like(top)
  high = jnp.where(count(low) <= k, 2, top)

  def unfinished(interval):
    low, high = interval
    return jnp.any(high - low > 1)

  def bisect(interval):
    low, high = interval
    middle = low + (high - low) // 2
    n = count(middle)
    return (
      jnp.where(n >= k, middle, low),
      jnp.where(n == k, middle + 1, jnp.where(n > k, high, middle)),
    )

  low, _ = jax.lax.while_loop(unfinished, bisect, (low, high))
  return jax.lax.bitcast_convert_type(low, jnp.float32)
