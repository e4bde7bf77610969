"""Rows of two models that belong together: checked, float64, centred."""

import numpy as np

from gemma_jax.metrics.reconstruction import pilot


def pair_shapes(x, y, *, least: int = 2) -> int:
  """Number of rows n of x [n, D] and y [n, E].

  Raises:
    ValueError: other shapes, or fewer than `least` rows.
  """
  x, y = np.shape(x), np.shape(y)
  if len(x) != 2 or len(y) != 2 or x[0] != y[0] or 0 in (x[1], y[1]):
    raise ValueError(
      f"expected x [n, D] and y [n, E], row i of both from the same item, got "
      f"{x} and {y}; pair the rows first"
    )
  if x[0] < least:
    raise ValueError(f"expected at least {least} rows, got {x[0]}")
  return x[0]


def finite(x, name: str, first: int = 0) -> np.ndarray:
  """Rows as float64; the number of the first is only for the error.

  Raises:
    ValueError: a value that is not finite.
  """
  x = np.asarray(x).astype(np.float64, copy=False)
  bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
  if len(bad):
    raise ValueError(
      f"expected finite values, got others in {len(bad)} rows of {name}, first "
      f"in row {first + bad[0]}; leave those rows out of x and y"
    )
  return x


def pair(x, y, *, least: int = 2) -> tuple[np.ndarray, np.ndarray]:
  """Both as float64, [n, D] and [n, E].

  Raises:
    ValueError: as `pair_shapes` and `finite`.
  """
  pair_shapes(x, y, least=least)
  return finite(x, "x"), finite(y, "y")


def centred(x: np.ndarray) -> np.ndarray:
  """Rows [n, D] less their mean; equal rows become 0, to the bit."""
  return x - pilot(x)


def unit_rows(x: np.ndarray, name: str) -> np.ndarray:
  """Rows [n, D] over their norms.

  Raises:
    ValueError: a row of zeros.
  """
  norms = np.linalg.norm(x, axis=1)
  if not norms.all():
    raise ValueError(
      f"row {np.flatnonzero(norms == 0)[0]} of {name} is all zeros and has no "
      "direction; leave such rows out of x and y"
    )
  return x / norms[:, None]
