"""Upper bounds of scores: most rows keep their centroid, and that can be shown.

With an orthonormal basis whose first A vectors span most of the variance, as
in activations they do,

  x.c = x_A.c_A + x_rest.c_rest <= x_A.c_A + |x_rest| |c_rest|,

which is one product of A + 2 numbers instead of D. A row whose bounds on all
other centroids stay below the score of its own keeps its label; only for the
others are the scores needed. Labels are those that all scores give.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma_jax.clustering import nearest
from gemma_jax.clustering.rows import Rows

SHARE = 0.3  # of the dims that bounds have
SAMPLE = 2**14  # rows that the basis is of
SLACK = 1e-6  # of |x| |c| and |c|^2: what rounding may do to a score


def basis(rows: Rows, placed) -> np.ndarray:
  """The leading principal components of some rows, float32 [D, A].

  Args:
    rows: N of them.
    placed: [n, D] -> the same as blocks have it.
  """
  rng = np.random.default_rng(0)
  drawn = rng.choice(len(rows), min(len(rows), SAMPLE), replace=False)
  x = placed(rows.take(np.sort(drawn)))
  _, vectors = np.linalg.eigh(np.asarray(x.T @ x, np.float64))
  return np.float32(vectors[:, ::-1][:, : max(1, round(SHARE * rows.width))])


@jax.jit
def of_rows(x: jax.Array, basis: jax.Array) -> jax.Array:
  """(x_A, |x_rest|, 1): [B, D], [D, A] -> [B, A + 2].

  By Cauchy and Schwarz, SLACK in both norms adds at least SLACK |x| |c|.
  """
  leading = jnp.matmul(x, basis, precision="highest")
  whole = jnp.sum(x * x, axis=1, keepdims=True)
  rest = whole - jnp.sum(leading * leading, axis=1, keepdims=True)
  rest = jnp.sqrt(jnp.maximum(rest, 0) + SLACK * whole)
  return jnp.concatenate([leading, rest, jnp.ones_like(rest)], axis=1)


@jax.jit
def of_centroids(centroids: jax.Array, basis: jax.Array) -> jax.Array:
  """(c_A, |c_rest|, -|c|^2 / 2): [C, D], [D, A] -> [C, A + 2]."""
  half = (0.5 - SLACK) * jnp.sum(centroids * centroids, axis=1)
  return of_rows(centroids, basis).at[:, -1].set(-half)


def rivals(
  rows: jax.Array, centroids: jax.Array, least: jax.Array
) -> jax.Array:
  """How many bounds of each row reach its `least`, float32 [B].

  Args:
    rows: [B, A + 2], of `of_rows`.
    centroids: [C, A + 2], of `of_centroids`.
    least: [B].
  """
  count, chunk = jnp.zeros(len(rows), jnp.float32), nearest.chunk_size()
  for start in range(0, len(centroids), chunk):
    bounds = jnp.matmul(
      rows, centroids[start : start + chunk].T, precision="highest"
    )
    # XLA sums float32 several times faster than Booleans on CPUs.
    count += jnp.sum(jnp.where(bounds >= least[:, None], 1.0, 0.0), axis=1)
  return count


class Bounds:
  """Of the rows of `Blocks`, made once where those are kept.

  Args:
    basis: [D, A], of `basis`.
    mesh: of the blocks.
  """

  def __init__(self, basis: np.ndarray, mesh: Mesh):
    self._basis = jax.device_put(basis, NamedSharding(mesh, P()))
    self._rows: dict[int, jax.Array] = {}

  def of_block(self, start: int, x: jax.Array, keep: bool) -> jax.Array:
    """Of the block whose first row is number `start`."""
    if start in self._rows:
      return self._rows[start]
    made = of_rows(x, self._basis)
    if keep:
      self._rows[start] = made
    return made

  def of_centroids(self, centroids: jax.Array) -> jax.Array:
    """See the function."""
    return of_centroids(centroids, self._basis)
