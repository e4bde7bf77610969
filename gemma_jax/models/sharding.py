"""Meshes and where every tensor lives, on one screen."""

import logging
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")

# One rule per tensor: its dims, each with the mesh axis that splits it. Norms
# and biases are small: every device has them whole.
RULES: Mapping[str, str] = {
  "embed": "V:tensor D:fsdp",
  "positions": "T:tensor D:fsdp",
  "unembed": "V:tensor D:fsdp",
  "q": "L D:fsdp N:tensor H",
  "k": "L D:fsdp K:tensor H",
  "v": "L D:fsdp K:tensor H",
  "o": "L N:tensor H D:fsdp",
  "gate": "L D:fsdp F:tensor",
  "up": "L D:fsdp F:tensor",
  "down": "L F:tensor D:fsdp",
}
# Dims that stay whole where an axis does not divide them: heads of keys and
# values, of which there may be one, and vocabularies, which may be odd.
MAY_REPLICATE = "KV"
ACTIVATIONS = P(("data", "fsdp"), None, None)  # B T D


def make_mesh(
  sizes: Mapping[str, int] | None = None,
  devices: Sequence[jax.Device] | None = None,
  axes: tuple[str, ...] = AXES,
) -> Mesh:
  """A mesh over `AXES`, or others.

  Args:
    sizes: axis -> devices along it; -1 (at most once) takes what is left;
      missing axes have one. None puts all devices on "data".
    devices: default, all of them.
    axes: names, in order.

  Raises:
    ValueError: an unknown axis, or sizes whose product is not the number of
      devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = dict(sizes or {"data": -1})
  unknown = sorted(set(sizes) - set(axes))
  if unknown:
    raise ValueError(f"Unknown mesh axes {unknown}; expected some of {axes}.")
  shape = [sizes.get(axis, 1) for axis in axes]
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
    shape, axes, axis_types=(AxisType.Auto,) * len(axes), devices=devices
  )


def check(mesh: Mesh) -> None:
  """Raises ValueError for a mesh that is not as `make_mesh` makes them."""
  if mesh.axis_names != AXES or set(mesh.axis_types) != {AxisType.Auto}:
    raise ValueError(
      f"The mesh has axes {mesh.axis_names} of types {mesh.axis_types}; "
      f"expected {AXES}, all of them Auto. Make it with models.make_mesh."
    )


def spec(name: str, shape: Sequence[int], mesh: Mesh) -> P:
  """The rule of tensor `name`, with what may replicate made to fit.

  Raises:
    ValueError: a dimension that its mesh axis does not divide.
  """
  fitted = []
  for dim, size in zip(RULES.get(name, "").split(), shape, strict=False):
    letter, _, axis = dim.partition(":")
    if not axis or size % mesh.shape[axis] == 0:
      fitted.append(axis or None)
      continue
    if letter not in MAY_REPLICATE:
      raise ValueError(
        f"{name} has {size} entries in dimension {letter}, which mesh axis "
        f"{axis!r} of {mesh.shape[axis]} does not divide. Choose a divisor."
      )
    logging.getLogger("gemma_jax").info(
      "%s: dimension %s (%d) is replicated over %r (%d)",
      name,
      letter,
      size,
      axis,
      mesh.shape[axis],
    )
    fitted.append(None)
  return P(*fitted)


def sharding(name: str, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
  """The `NamedSharding` of tensor `name` on `mesh`."""
  return NamedSharding(mesh, spec(name, shape, mesh))


def constrain(x: jax.Array) -> jax.Array:
  """Keeps activations [B, T, D] split over the batch, where a mesh is set."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not _splits(x.shape[0], mesh):
    return x
  return jax.lax.with_sharding_constraint(x, ACTIVATIONS)


def replicate(x: jax.Array) -> jax.Array:
  """Gives every device, and so every process, all of `x`."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, P())


def put_batch(array: np.ndarray, mesh: Mesh) -> jax.Array:
  """A host array [B, ...], the same in each process, split over the batch.

  A batch that the mesh does not divide is whole on every device.
  """
  rest = (None,) * (array.ndim - 1)
  axes = ("data", "fsdp") if _splits(array.shape[0], mesh) else None
  where = NamedSharding(mesh, P(axes, *rest))
  # Not device_put, which wants all devices to be of this process.
  return jax.make_array_from_callback(
    array.shape, where, lambda index: array[index]
  )


def _splits(batch: int, mesh) -> bool:
  return batch % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
