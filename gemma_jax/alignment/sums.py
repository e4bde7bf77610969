"""What a block of held-out rows adds to the scores of a map, on the device."""

import jax
import jax.numpy as jnp

from gemma_jax.alignment.rows import LEAST

# Rounding of a mean that went through float32, as a share of its norm.
_ROUNDING = 1e-6


@jax.jit
def block(predicted, actual, mean, count):
  """Sums over the first `count` rows of a block.

  About the train mean, p = y_hat - mean and y likewise: "error" of (y - p)^2,
  "yy", "y", "pp", "p" and "py" of each column; "centred" of cos(p, y) and
  "away", the rows whose y has one; "raw" and "there" without the mean off.

  Args:
    predicted: y_hat [n, E], n a multiple of `rows.LEAST`.
    actual: y [n, E].
    mean: float32 [E].
    count: rows that count.

  Returns:
    The sums, float32 [E] or []; {"p", "y"}: least values of y_hat and y, [E];
    the largest; {"error", "square"}: sums of (y - p)^2 and y^2 by row, [n].
  """
  rounding = _ROUNDING * jnp.linalg.norm(mean)

  def add(totals, group):
    sums, low, high = totals
    *pair, at = group
    counted = (at < count)[:, None]
    raw = {
      name: jnp.where(counted, a.astype(jnp.float32), 0)
      for name, a in zip("py", pair, strict=True)
    }
    # About the mean, and not from each other: of a map that predicts the
    # mean, the errors are then the deviations to the bit.
    p, y = (jnp.where(counted, a - mean, 0) for a in raw.values())
    error, square = jnp.square(y - p), jnp.square(y)
    columns = {"error": error, "yy": square, "y": y, "pp": p * p, "p": p}
    columns["py"] = p * y
    parts = {name: value.sum(0) for name, value in columns.items()}
    parts["centred"], parts["away"] = _cosines(p, y, rounding)
    parts["raw"], parts["there"] = _cosines(*raw.values(), 0)
    ends = (
      {k: jnp.where(counted, a, jnp.inf).min(0) for k, a in raw.items()},
      {k: jnp.where(counted, a, -jnp.inf).max(0) for k, a in raw.items()},
    )
    totals = (
      {name: sums[name] + part for name, part in parts.items()},
      jax.tree.map(jnp.minimum, low, ends[0]),
      jax.tree.map(jnp.maximum, high, ends[1]),
    )
    return totals, {"error": error.sum(1), "square": square.sum(1)}

  # What a CPU makes of a few rows stays in its cache: five times as fast.
  groups = [
    a.reshape(-1, LEAST, *a.shape[1:])
    for a in (predicted, actual, jnp.arange(len(actual)))
  ]
  none = jnp.zeros_like(mean)
  start = (
    dict.fromkeys(("error", "yy", "y", "pp", "p", "py"), none)
    | dict.fromkeys(("centred", "away", "raw", "there"), jnp.float32(0)),
    dict.fromkeys("py", none + jnp.inf),
    dict.fromkeys("py", none - jnp.inf),
  )
  (sums, low, high), by_row = jax.lax.scan(add, start, groups)
  by_row = {name: value.reshape(-1) for name, value in by_row.items()}
  return sums, low, high, by_row


def _cosines(p, y, least):
  """Sum of cosines, 0 where |p| <= least, and the number of rows with y."""
  p_norm, y_norm = jnp.linalg.norm(p, axis=1), jnp.linalg.norm(y, axis=1)
  defined = (p_norm > least) & (y_norm > 0)
  cosines = jnp.sum(p * y, axis=1) / jnp.where(defined, p_norm * y_norm, 1)
  number = jnp.sum(y_norm > 0, dtype=jnp.float32)
  return jnp.where(defined, cosines, 0).sum(), number
