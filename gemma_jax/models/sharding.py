"""Meshes and where every tensor lives, on one screen."""

import logging
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")

# One rule per tensor, dims in the comment; blocks have a leading layer axis L.
RULES: Mapping[str, P] = {
  "embed": P("tensor", "fsdp"),  # V D
  "final_norm": P(),  # D
  "pre_attn_norm": P(),  # L D
  "q": P(None, "fsdp", "tensor", None),  # L D N H
  "k": P(None, "fsdp", "tensor", None),  # L D K H
  "v": P(None, "fsdp", "tensor", None),  # L D K H
  "o": P(None, "tensor", None, "fsdp"),  # L N H D
  "q_norm": P(),  # L H
  "k_norm": P(),  # L H
  "post_attn_norm": P(),  # L D
  "pre_mlp_norm": P(),  # L D
  "gate": P(None, "fsdp", "tensor"),  # L D F
  "up": P(None, "fsdp", "tensor"),  # L D F
  "down": P(None, "tensor", "fsdp"),  # L F D
  "post_mlp_norm": P(),  # L D
}
# Dims that may stay whole where an axis does not divide them.
MAY_REPLICATE = {("k", 2), ("v", 2), ("embed", 0)}
ACTIVATIONS = P(("data", "fsdp"), None, None)  # B T D


def make_mesh(
  sizes: Mapping[str, int] | None = None,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """A mesh over `AXES`.

  Args:
    sizes: axis -> devices along it; -1 (at most once) takes what is left;
      missing axes have one. None puts all devices on "data".
    devices: default, all of them.

  Raises:
    ValueError: an unknown axis, or sizes whose product is not the number of
      devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = dict(sizes or {"data": -1})
  unknown = sorted(set(sizes) - set(AXES))
  if unknown:
    raise ValueError(f"Unknown mesh axes {unknown}; expected some of {AXES}.")
  shape = [sizes.get(axis, 1) for axis in AXES]
  if shape.count(-1) > 1 or any(n < 1 and n != -1 for n in shape):
    raise ValueError(
      f"Mesh {sizes}: sizes must be positive, with at most one -1 (inferred)."
    )
  fixed = math.prod(n for n in shape if n != -1)
  shape = [len(devices) // fixed if n == -1 else n for n in shape]
  if math.prod(shape) != len(devices):
    raise ValueError(
      f"Mesh {sizes} needs a multiple of {fixed} devices; there are "
      f"{len(devices)}. Change one axis, or make it -1."
    )
  return jax.make_mesh(
    shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
  )


def spec(name: str, shape: Sequence[int], mesh: Mesh) -> P:
  """The rule of tensor `name`, with what may replicate made to fit.

  Raises:
    ValueError: a dimension that its mesh axis does not divide.
  """
  rule = RULES[name]
  fitted = list(rule)
  for dim, axis in enumerate(rule):
    if axis is None or shape[dim] % mesh.shape[axis] == 0:
      continue
    if (name, dim) not in MAY_REPLICATE:
      raise ValueError(
        f"{name} has {shape[dim]} entries in dimension {dim}, which mesh axis "
        f"{axis!r} of {mesh.shape[axis]} does not divide. Choose a divisor."
      )
    logging.getLogger("gemma_jax").info(
      "%s: dimension %d (%d) is replicated over %r (%d)",
      name,
      dim,
      shape[dim],
      axis,
      mesh.shape[axis],
    )
    fitted[dim] = None
  return P(*fitted)


def sharding(name: str, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
  """The `NamedSharding` of tensor `name` on `mesh`."""
  return NamedSharding(mesh, spec(name, shape, mesh))


def constrain(x: jax.Array) -> jax.Array:
  """Keeps activations [B, T, D] split over the batch, where a mesh is set."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
    return x
  return jax.lax.with_sharding_constraint(x, ACTIVATIONS)


def put_batch(array: np.ndarray, mesh: Mesh) -> jax.Array:
  """A host array [B, ...] split over the mesh's batch axes."""
  rest = (None,) * (array.ndim - 1)
  return jax.device_put(array, NamedSharding(mesh, P(("data", "fsdp"), *rest)))
