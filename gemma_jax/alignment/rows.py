"""Paired rows of two models, in blocks of few shapes."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.metrics.similarity.rows import finite, pair_shapes

LEAST = 16  # rows of the shortest block


def blocks(x, y, size: int) -> Iterator[tuple]:
  """Cuts paired rows into blocks whose lengths are powers of two.

  Batches of any length then need only a few compiled programs.

  Args:
    x: [n, D], on the host or a device.
    y: [n, E], row i of the same item as row i of `x`.
    size: most rows of a block, a power of two, `LEAST` or more.

  Yields:
    (number of the first row, rows that count, x [p, D], y [p, E]); rows from
    the count on are zeros.

  Raises:
    ValueError: shapes that do not fit.
  """
  x, y = (a if isinstance(a, jax.Array) else np.asarray(a) for a in (x, y))
  for start in range(0, pair_shapes(x, y, least=0), size):
    pair = x[start : start + size], y[start : start + size]
    count = len(pair[0])
    length = max(LEAST, 1 << (count - 1).bit_length())
    yield start, count, *(_padded(a, length) for a in pair)


def refuse(x, y, start: int) -> None:
  """Raises for rows whose sums were not finite.

  Args:
    x: [n, D].
    y: [n, E].
    start: number of the first row.

  Raises:
    ValueError: always.
  """
  finite(x, "x", start)
  finite(y, "y", start)
  raise ValueError(
    f"expected rows whose squares fit float32, got |x| up to "
    f"{np.abs(x).max():g} and |y| up to {np.abs(y).max():g}; scale them down"
  )


def _padded(rows, length: int):
  missing = length - len(rows)
  if not missing:
    return rows
  pad = jnp.pad if isinstance(rows, jax.Array) else np.pad
  return pad(rows, ((0, missing), (0, 0)))
