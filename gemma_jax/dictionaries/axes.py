"""Sums over the shards of a mesh, or over nothing on one device.

The training step runs under `shard_map`: rows are split over one mesh axis,
latents over another, and every device differentiates its own part of the
loss. Gradients of parameters are summed over rows afterwards; what crosses
latents inside the loss goes through `join` and `spread`, whose derivatives keep
every device's part its own.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Axes(NamedTuple):
  """Names of the mesh axes; None where nothing is split.

  Attributes:
    data: rows of the batch.
    latent: latents.
  """

  data: str | None = None
  latent: str | None = None

  @property
  def both(self) -> tuple[str, ...]:
    """Those that there are."""
    return tuple(axis for axis in self if axis)


ALONE = Axes()


def total(x, axes):
  """Sum over an axis name, or several; x itself where there is none."""
  return jax.lax.psum(x, axes) if axes else x


def largest(x, axes):
  """Maximum over an axis name, or several."""
  return jax.lax.pmax(x, axes) if axes else x


def size(axis: str | None) -> int:
  """Devices along an axis."""
  return jax.lax.axis_size(axis) if axis else 1


def offset(axis: str | None, local: int):
  """Where this device's part begins, of parts of `local` each."""
  return jax.lax.axis_index(axis) * local if axis else 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def join(x, axes):
  """The sum over `axes`; every device gets the gradient of its own part."""
  return total(x, axes)


join.defvjp(lambda x, axes: (total(x, axes), None), lambda axes, _, g: (g,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def spread(x, axes):
  """x, which all devices of `axes` hold alike; their gradients are summed."""
  return x


spread.defvjp(lambda x, axes: (x, None), lambda axes, _, g: (total(g, axes),))


def gather(x, axis: str | None):
  """The parts of all devices along `axis`, joined on the last axis of x."""
  if not axis:
    return x
  return jax.lax.all_gather(x, axis, axis=jnp.ndim(x) - 1, tiled=True)
