"""Replacements that take away what a site says: the zero of the scale."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

# fn(value of the site read, value of the site replaced) -> replacement.
Replacement = Callable[[jax.Array, jax.Array], jax.Array]

ABLATIONS = ("zero", "mean", "resample")


@dataclasses.dataclass(frozen=True)
class Resample:
  """A replacement: the site's values of other random tokens of the batch.

  Donors are counted tokens, of another document where the batch has one,
  drawn anew for every batch, with replacement.

  Attributes:
    seed: of the drawing.
  """

  seed: int = 0


@dataclasses.dataclass(frozen=True)
class ByToken:
  """A replacement that knows which token stands where.

  Attributes:
    function: (tokens [B, T], value read, value replaced) -> replacement.
  """

  function: Partial


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
  """A replacement: values that were computed before, such as by another model.

  Attributes:
    values: float32 [W, T, E], of all windows in their order.
  """

  values: np.ndarray


def ablations(mean, *, seed: int = 0) -> dict[str, Replacement | Resample]:
  """The three ablations of `ABLATIONS`, for `splice_losses`.

  Args:
    mean: of the site over training tokens, [E].
    seed: of the resampling.
  """
  return {
    "zero": Partial(_zero),
    "mean": Partial(_constant, jnp.asarray(mean, jnp.float32)),
    "resample": Resample(seed),
  }


def donors(
  mask: np.ndarray, document: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
  """For every position a random counted one, of another document if possible.

  Without another document it is another token, and without one of those
  the position itself.

  Args:
    mask: bool [B, T], which positions count.
    document: int [B, T], whose document each position is.
    rng: where the draws come from.

  Returns:
    int32 [B, T], positions of the flattened batch.
  """
  owner = document.reshape(-1)
  pool = np.flatnonzero(mask)
  pool = pool[np.argsort(owner[pool], kind="stable")]
  if not len(pool):
    return np.arange(owner.size, dtype=np.int32).reshape(mask.shape)
  # Own documents are runs of the pool, to be jumped over.
  first = np.searchsorted(owner[pool], owner, "left")
  last = np.searchsorted(owner[pool], owner, "right")
  # With a single document, the run to jump over is the token itself.
  place = np.full(owner.size, len(pool))
  place[pool] = np.arange(len(pool))
  alone = last - first == len(pool)
  first = np.where(alone, place, first)
  last = np.where(alone, np.minimum(place + 1, len(pool)), last)
  run = last - first
  draw = rng.integers(0, np.maximum(len(pool) - run, 1))
  draw = np.minimum(draw + np.where(draw >= first, run, 0), len(pool) - 1)
  return pool[draw].reshape(mask.shape).astype(np.int32)


def of_others(chosen, x, y):
  """The value, [B, T, E], at the positions `donors` chose."""
  return y.reshape(-1, y.shape[-1])[chosen]


def of_before(values, x, y):
  """What was `Given` of a batch, [B, T, E]."""
  return values.astype(y.dtype)


def _zero(x, y):
  return jnp.zeros_like(y)


def _constant(mean, x, y):
  return jnp.broadcast_to(mean.astype(y.dtype), y.shape)
