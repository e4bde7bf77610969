"""Maps that look at no activation: the mean of each token, or position.

Much of a residual stream is the token that stands there, so that a map that
does not beat its token's mean has transferred nothing else.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 2**22  # numbers that are float64 at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TokenLookup:
  """A row of a table for each token; the mean for tokens without one.

  Attributes:
    tokens: int32 [U], sorted: those with a row of their own.
    table: float32 [U + 1, E], the last row the mean.
    about: `rows` that were seen, `least`, and `covered`, the share of rows
      whose token has a row of its own.
    name: "token" or "position".
  """

  tokens: jax.Array
  table: jax.Array
  about: dict
  name: str = dataclasses.field(metadata={"static": True})

  @property
  def parameters(self) -> int:
    """Numbers of the table."""
    return self.table.size

  def __call__(self, tokens) -> jax.Array:
    """int [...] -> float32 [..., E]."""
    tokens = jnp.asarray(tokens)
    at = jnp.searchsorted(self.tokens, tokens)
    known = jnp.searchsorted(self.tokens, tokens, side="right") > at
    return self.table[jnp.where(known, at, len(self.table) - 1)]


def fit_lookup(tokens, y, *, least: int = 2) -> TokenLookup:
  """The mean of y for every token, and of all rows for rare tokens.

  Args:
    tokens: int [n].
    y: rows [n, E]: what the other model has where the token stands.
    least: a token seen less often has no row of its own.

  Raises:
    ValueError: shapes that do not fit, no rows, tokens that are not whole
      numbers, values that are not finite, or `least` below 1.
  """
  return _fit("token", tokens, y, least)


def fit_position(positions, y, *, least: int = 2) -> TokenLookup:
  """The mean of y for every position in the context, as `fit_lookup`.

  Args:
    positions: int [n].
    y: rows [n, E].
    least: a position seen less often has no row of its own.

  Raises:
    ValueError: as `fit_lookup`.
  """
  return _fit("position", positions, y, least)


def _fit(name: str, tokens, y, least: int) -> TokenLookup:
  tokens = np.asarray(tokens)
  shape = np.shape(y)
  if len(shape) != 2 or tokens.shape != shape[:1] or 0 in shape:
    raise ValueError(
      f"expected a {name} for each row, [n] and y [n, E], got {tokens.shape} "
      f"and {shape}"
    )
  if not np.issubdtype(tokens.dtype, np.integer) or least < 1:
    raise ValueError(
      f"expected whole numbers and least >= 1, got {tokens.dtype} and {least}"
    )
  found, slots, counts = np.unique(
    tokens, return_inverse=True, return_counts=True
  )
  frequent = counts >= least
  # All rare tokens share the slot behind the others.
  own = np.where(frequent, np.cumsum(frequent) - 1, frequent.sum())
  slots = own[slots]
  sums = _sums(slots, y, frequent.sum() + 1)
  mean = sums.sum(0) / len(tokens)
  table = sums[:-1] / counts[frequent, None]
  covered = float(counts[frequent].sum() / len(tokens))
  return TokenLookup(
    jnp.asarray(found[frequent], jnp.int32),
    jnp.asarray(np.concatenate([table, mean[None]]), jnp.float32),
    {"rows": len(tokens), "least": least, "covered": covered},
    name,
  )


def _sums(slots: np.ndarray, y, size: int) -> np.ndarray:
  """Float64 sums of the rows of y [n, E] by slot, [size, E]."""
  width = np.shape(y)[1]
  sums = np.zeros((size, width))
  step = max(1, BLOCK // width)
  for start in range(0, len(slots), step):
    rows = np.asarray(y[start : start + step]).astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(rows).all(1))
    if len(bad):
      raise ValueError(
        f"expected finite values, got others in {len(bad)} rows of y, first in "
        f"row {start + bad[0]}; leave those rows out"
      )
    here = slots[start : start + step]
    order = np.argsort(here, kind="stable")
    own, first = np.unique(here[order], return_index=True)
    sums[own] += np.add.reduceat(rows[order], first, axis=0)
  return sums
