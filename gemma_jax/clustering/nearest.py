"""The nearest of some centroids, without all scores at once."""

import jax
import jax.numpy as jnp


def chunk_size() -> int:
  """Centroids whose scores exist at once: few enough for a CPU's caches."""
  return 2**9 if jax.default_backend() == "cpu" else 2**12


def scores(x: jax.Array, centroids: jax.Array) -> jax.Array:
  """x.c - |c|^2 / 2, the larger the nearer: [B, D], [C, D] -> [B, C]."""
  half = 0.5 * jnp.sum(centroids * centroids, axis=1, keepdims=True)
  # One product with a column more is less to write than a product and a sum.
  # GPUs would otherwise round the factors to TF32.
  return jnp.matmul(
    jnp.concatenate([x, jnp.ones_like(x[:, :1])], axis=1),
    jnp.concatenate([centroids, -half], axis=1).T,
    precision="highest",
  )


def first_at_least(s: jax.Array, least: jax.Array) -> jax.Array:
  """The first column of each row [B, C] that is at least [B], int32.

  Numbers of columns are float32 while they are compared: XLA reduces those
  several times faster on CPUs, where its argmax takes longer than the product.
  """
  last = s.shape[1] - 1
  before = jnp.arange(last, -1, -1, dtype=jnp.float32)
  most = jnp.max(jnp.where(s >= least[:, None], before, 0), axis=1)
  return last - most.astype(jnp.int32)


def first_largest(s: jax.Array) -> jax.Array:
  """The first largest column of each row [B, C], int32."""
  return first_at_least(s, jnp.max(s, axis=1))


def nearest(x: jax.Array, centroids: jax.Array) -> jax.Array:
  """The nearest centroid of each row, the first of equals.

  Args:
    x: [B, D], about the same centre as the centroids.
    centroids: [C, D].

  Returns:
    int32 [B].
  """
  best = label = None
  for start in range(0, len(centroids), chunk_size()):
    s = scores(x, centroids[start : start + chunk_size()])
    largest = jnp.max(s, axis=1)
    own = start + first_at_least(s, largest)
    if best is None:
      best, label = largest, own
    else:
      label = jnp.where(largest > best, own, label)
      best = jnp.maximum(largest, best)
  return label
