"""What one block of rows adds to the statistics of a site, on the device.

`block` is traced inside the program that makes the rows, so that they need
not be read again; its arrays are small and `Statistics.update` takes them.
"""

import jax
import jax.numpy as jnp
from jax import lax

# Sun et al. 2024 (arXiv 2402.17762), section 2: what "massive" means.
MASSIVE = 100.0
MASSIVE_RATIO = 1_000.0

_GROUP = 16  # terms of one sum


def _pad(x: jax.Array, axis: int, fill: float) -> jax.Array:
  missing = [(0, 0), (0, 0)]
  missing[axis] = (0, -x.shape[axis] % _GROUP)
  return jnp.pad(x, missing, constant_values=fill)


def _over(axis, arrays, fills, combine):
  """Reduces [n, D] arrays over rows (axis 0) or dims (1), in one pass.

  Rounding grows with the terms of one sum: levels of 16 keep it near 1e-7.
  The barrier keeps XLA from joining the levels into one sum again.
  """
  start = tuple(map(jnp.float32, fills))
  while arrays[0].shape[axis] > _GROUP:
    padded = map(_pad, arrays, (axis,) * len(fills), fills)
    # Neighbouring rows are on one device, and dims far apart fill vectors.
    grouped = tuple(
      x.reshape(-1, _GROUP, x.shape[1])
      if axis == 0
      else x.reshape(len(x), _GROUP, -1)
      for x in padded
    )
    arrays = lax.reduce(grouped, start, combine, (1,))
    arrays = lax.optimization_barrier(arrays)
  return lax.reduce(tuple(arrays), start, combine, (axis,))


def _added(a, b):
  return tuple(p + q for p, q in zip(a, b, strict=True))


def block(
  x: jax.Array, valid: jax.Array, *, covariance: bool = False
) -> dict[str, jax.Array]:
  """Sums over the valid rows of x, for `Statistics.update`.

  Power sums are taken about the block's own mean and in units of a power of
  two near the largest distance from it, so that neither a large mean nor the
  fourth power of anything leaves float32. Rows that hold NaN or Inf are
  counted and left out of everything else. Works on rows split over a mesh;
  it costs least where each device's share is a multiple of 16 rows.

  Args:
    x: [n, D], bfloat16 or float32: the values as they are stored.
    valid: bool [n]; other rows count for nothing, whatever they hold.
    covariance: also the sum of outer products.

  Returns:
    Scalars: `count`, valid rows without NaN or Inf; `nan` and `inf`, such
    values in valid rows.
    Float32 [D], over the counted rows: `shift`, their mean; `scale`; `min` and
    `max`, infinite if there are none. Float32 `powers` [4, D]: sums of
    ((x - shift) / scale)^k for k = 1..4.
    By row, [n]: `valid`; `norm`, NaN for a row that is not counted; `peak`,
    the largest |x|; `peak_dim`, where; `massive`, peak > 100 and more than
    half of the row's |x| below peak / 1000, that is, a median below it (Sun
    et al. 2024, arXiv 2402.17762, section 2).
    With covariance, `outer` [D, D]: sum of (x - shift)^T (x - shift).

  Raises:
    ValueError: shapes that do not belong together.
  """
  if x.ndim != 2 or valid.shape != x.shape[:1]:
    raise ValueError(
      f"block expects x [n, D] and valid [n], received {x.shape} and "
      f"{valid.shape}; flatten batch and position first."
    )
  f32 = jnp.float32
  width = x.shape[1]
  x = x.astype(f32)
  size = jnp.abs(x)

  square, nan, infinite, peak = _over(
    1,
    (x * x, jnp.isnan(x).astype(f32), jnp.isinf(x).astype(f32), size),
    (0.0,) * 4,
    lambda a, b: (*_added(a[:3], b[:3]), jnp.maximum(a[3], b[3])),
  )
  keep = valid & (nan + infinite == 0)
  # A count tells whether the median lies below a bound; nothing is sorted.
  dims = jnp.broadcast_to(jnp.arange(width, dtype=f32), x.shape)
  below, peak_dim = _over(
    1,
    (
      (size * MASSIVE_RATIO < peak[:, None]).astype(f32),
      jnp.where(size == peak[:, None], dims, width),
    ),
    (0.0, float(width)),
    lambda a, b: (a[0] + b[0], jnp.minimum(a[1], b[1])),
  )
  massive = keep & (peak > MASSIVE) & (2 * below > width)

  kept = keep[:, None]
  count = jnp.sum(keep, dtype=jnp.int32)
  # Divided before it is summed, so that no sum leaves float32.
  share = 1 / jnp.maximum(count, 1).astype(f32)
  shift, low, high = _over(
    0,
    (
      jnp.where(kept, x * share, 0),
      jnp.where(kept, x, jnp.inf),
      jnp.where(kept, x, -jnp.inf),
    ),
    (0.0, jnp.inf, -jnp.inf),
    lambda a, b: (
      a[0] + b[0],
      jnp.minimum(a[1], b[1]),
      jnp.maximum(a[2], b[2]),
    ),
  )
  reach = jnp.maximum(high - shift, shift - low)
  exponent = jnp.frexp(jnp.where(count > 0, reach, 0))[1]
  exponent = jnp.clip(exponent, -120, 120)
  away = jnp.where(kept, x - shift, 0)
  unit = away * jnp.ldexp(f32(1), -exponent)
  unit2 = unit * unit
  powers = _over(
    0,
    (unit, unit2, unit2 * unit, unit2 * unit2),
    (0.0,) * 4,
    _added,
  )
  out = {
    "count": count,
    "nan": jnp.sum(jnp.where(valid, nan, 0)).astype(jnp.int32),
    "inf": jnp.sum(jnp.where(valid, infinite, 0)).astype(jnp.int32),
    "shift": shift,
    "scale": jnp.ldexp(f32(1), exponent),
    "powers": jnp.stack(powers),
    "min": low,
    "max": high,
    "valid": valid,
    "norm": jnp.where(
      keep, jnp.minimum(jnp.sqrt(square), jnp.finfo(f32).max), jnp.nan
    ),
    "peak": peak,
    "peak_dim": jnp.minimum(peak_dim, width - 1).astype(jnp.int32),
    "massive": massive,
  }
  if covariance:
    # GPUs would otherwise round the factors to TF32.
    out["outer"] = jnp.matmul(away.T, away, precision="highest")
  return out
