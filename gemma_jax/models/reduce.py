"""Reductions of captured values, run where they were computed.

A capture may be a mapping of sites to functions, applied inside the jitted
forward pass, so that what is large never leaves the device:

    model.forward(tokens, capture={"blocks.*.resid_post": reduce.take(-1)})

Any pure function does, and those made here may be made again without
compiling again. For many sites, give them all the same one: it is then run
once in each layer, not once for each site.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.tree_util import Partial


def take(positions: int | Sequence[int]) -> Callable:
  """Positions of T: [B, T, D] -> [B, n, D], or [B, D] for a single one.

  Negative ones count from the end. Beyond the context the values are NaN.
  """
  return Partial(_take, jnp.asarray(positions))


def mean(mask=None) -> Callable:
  """The mean over batch and positions: [B, T, D] -> [D], in float32 or wider.

  Args:
    mask: bool [B or 1, T], what to count; None for everything.
  """
  return Partial(_mean, None if mask is None else jnp.asarray(mask))


@dataclasses.dataclass(frozen=True)
class top_k:
  """The k largest entries of D: [B, T, D] -> (values, indices), [B, T, k]."""

  k: int

  def __call__(self, x: jax.Array):
    return jax.lax.top_k(x, self.k)


@dataclasses.dataclass(frozen=True)
class cast:
  """Another dtype, by name."""

  dtype: str

  def __call__(self, x: jax.Array) -> jax.Array:
    return x.astype(self.dtype)


def chain(*functions: Callable) -> Callable:
  """One function after another, the first one first."""
  wrapped = [f if isinstance(f, Partial) else Partial(f) for f in functions]
  return Partial(_chain, wrapped)


def _take(positions, x):
  return jnp.take(x, positions, axis=1, mode="fill")


def _mean(mask, x):
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  if mask is None:
    return jnp.mean(wide, axis=(0, 1))
  mask = jnp.broadcast_to(mask, x.shape[:2])
  weight = mask[..., None].astype(wide.dtype)
  return jnp.sum(wide * weight, axis=(0, 1)) / jnp.sum(weight)


def _chain(functions, x):
  for function in functions:
    x = function(x)
  return x
