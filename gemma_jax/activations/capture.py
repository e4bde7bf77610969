"""Windows to sites: one jitted program, and a batch that fits its device."""

import dataclasses
import functools
import logging
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gemma_jax import machine
from gemma_jax.activations.sums import block
from gemma_jax.data import Windows
from gemma_jax.models import Model, sharding, sites
from gemma_jax.models.forward import forward

log = logging.getLogger("gemma_jax")

SHARE = 0.8  # of the free memory that a forward pass may take
# Beyond so many tokens per device a larger batch gains nothing.
ENOUGH_TOKENS = {"cpu": 2_048, "gpu": 32_768, "tpu": 32_768}


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6, 7))
def capture_sites(
  cfg, params, tokens, valid, capture, dtype, statistics, covariance
):
  """({site: [B, T, D]}, {site: sums over the valid rows, see `sums.block`})."""
  depth = sites.last_layer(capture, cfg)
  _, found = forward(cfg, params, tokens, capture=capture, stop_at=depth)
  found = {name: x.astype(dtype) for name, x in found.items()}
  found = {name: _by_window(x) for name, x in found.items()}
  sums = {
    name: block(
      x.reshape(-1, x.shape[-1]), valid.reshape(-1), covariance=covariance
    )
    for name, x in found.items()
    if statistics
  }
  return found, jax.tree.map(sharding.replicate, sums)


def _by_window(x):
  """Whole vectors on the devices of their windows, on a mesh."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return sharding.constrain(x)


def widths(model: Model, capture: Sequence[str]) -> dict[str, int]:
  """Site -> D.

  Raises:
    ValueError: a site that this model does not have, or of all layers.
  """
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  valid = jax.ShapeDtypeStruct((1, 2), bool)
  found, _ = jax.eval_shape(
    lambda params, tokens, valid: capture_sites(
      model.config,
      params,
      tokens,
      valid,
      tuple(capture),
      "float32",
      False,
      False,
    ),
    model.params,
    tokens,
    valid,
  )
  wrong = [name for name, x in found.items() if len(x.shape) != 3]
  if wrong:
    raise ValueError(
      f"{', '.join(wrong)} are many layers at once. Name each layer by itself."
    )
  return {name: x.shape[-1] for name, x in found.items()}


def fitting_batch(
  model: Model,
  capture: Sequence[str],
  context: int,
  dtype: str,
  *,
  limit: float | None = None,
  statistics: bool = True,
  covariance: bool = False,
) -> int:
  """Windows in a forward pass that surely fits: nothing is tried by running.

  The program is compiled for growing batches, and XLA's own account of its
  memory is compared with what the device has left.

  Args:
    model: on its mesh.
    capture: sites.
    context: T.
    dtype: of the captured vectors.
    limit: bytes for one device; default, a share of what is free.
    statistics: whether they are taken in the same pass.
    covariance: with covariance.

  Raises:
    MemoryError: not even one window for each device fits.
  """
  if limit is None:
    limit = SHARE * machine.device_memory()[1]
  ways = model.mesh.shape["data"] * model.mesh.shape["fsdp"]
  most = ways * max(1, ENOUGH_TOKENS[jax.default_backend()] // context)
  needs = functools.partial(
    _bytes,
    model,
    tuple(capture),
    context,
    dtype,
    options=(statistics, covariance),
  )
  first, second = needs(ways), needs(2 * ways)
  if first > limit:
    raise MemoryError(
      f"One window of {context} tokens for each device needs "
      f"{first / 2**30:.2f} GiB beside the parameters, and "
      f"{limit / 2**30:.2f} GiB are free. Use a shorter context, fewer sites, "
      "or a mesh of more devices."
    )
  # Memory is about a straight line in the batch; compiling makes sure.
  slope = max(second - first, 1)
  steps = min(most // ways, int(1 + (limit - first) // slope))
  batch = ways * 2 ** (steps.bit_length() - 1)
  found = needs(batch)
  while found > limit:
    batch //= 2
    found = needs(batch)
  while 2 * batch <= most and (larger := needs(2 * batch)) <= limit:
    batch, found = 2 * batch, larger
  if jax.process_count() > 1:  # one program for all
    batch = int(multihost_utils.process_allgather(np.int32(batch)).min())
  log.info(
    "batch_size=%d windows: %.2f GiB of %.2f GiB that are free per device",
    batch,
    found / 2**30,
    limit / 2**30,
  )
  return batch


def _bytes(model, capture, context, dtype, batch, options=(True, False)) -> int:
  """What a batch needs on each device, its parameters left out."""
  where = NamedSharding(model.mesh, P(("data", "fsdp"), None))
  tokens, valid = (
    jax.ShapeDtypeStruct((batch, context), kind, sharding=where)
    for kind in (jnp.int32, bool)
  )
  with jax.set_mesh(model.mesh):
    size = (
      capture_sites.lower(
        model.config, model.params, tokens, valid, capture, dtype, *options
      )
      .compile()
      .memory_analysis()
    )
  # The outputs of the batch before are still on their way to the host.
  return size.temp_size_in_bytes + 2 * size.output_size_in_bytes


def rebatch(blocks: Iterable[Windows], size: int) -> Iterator[Windows]:
  """The same windows, `size` at a time; the last batch may be smaller."""
  held: list[Windows] = []
  count = 0
  for part in blocks:
    while len(part.tokens):
      head, part = _cut(part, size - count)
      held.append(head)
      count += len(head.tokens)
      if count == size:
        yield _join(held)
        held, count = [], 0
  if held:
    yield _join(held)


ARRAYS = ("tokens", "mask", "document", "begin", "end", "source")


def _cut(windows: Windows, at: int) -> tuple[Windows, Windows]:
  """The first `at` windows, with all new documents, and the rest."""
  head = {name: getattr(windows, name)[:at] for name in ARRAYS}
  rest = {name: getattr(windows, name)[at:] for name in ARRAYS}
  known = windows.first_document + len(windows.documents)
  return (
    dataclasses.replace(windows, **head),
    dataclasses.replace(windows, documents=(), first_document=known, **rest),
  )


def _join(parts: Sequence[Windows]) -> Windows:
  if len(parts) == 1:
    return parts[0]
  arrays = {
    name: np.concatenate([getattr(part, name) for part in parts])
    for name in ARRAYS
  }
  return Windows(
    documents=tuple(d for part in parts for d in part.documents),
    first_document=parts[0].first_document,
    **arrays,
  )


def launch(model: Model, windows: Windows, valid, batch, capture, *options):
  """Starts a forward pass over at most `batch` windows; does not wait."""
  missing = batch - len(windows.tokens)
  tokens, valid = (
    np.pad(x, ((0, missing), (0, 0))) for x in (windows.tokens, valid)
  )
  with jax.set_mesh(model.mesh):
    found, sums = capture_sites(
      model.config,
      model.params,
      sharding.put_batch(tokens, model.mesh),
      sharding.put_batch(valid, model.mesh),
      capture,
      *options,
    )
  return found, sums


def own_windows(model: Model, batch: int, context: int) -> np.ndarray:
  """Which windows of a batch this process writes, int [n]."""
  where = NamedSharding(model.mesh, P(("data", "fsdp"), None))
  owners = {}
  for device, index in where.devices_indices_map((batch, context)).items():
    rows = index[0].indices(batch)[:2]
    owners[rows] = min(owners.get(rows, 2**31), device.process_index)
  mine = [
    np.arange(*rows)
    for rows, owner in sorted(owners.items())
    if owner == jax.process_index()
  ]
  return np.concatenate([np.empty(0, np.int64), *mine]).astype(np.int64)


def local_values(x: jax.Array, windows: np.ndarray) -> np.ndarray:
  """Those windows of a batch [B, T, D] that this process holds."""
  if x.is_fully_addressable:
    return np.asarray(x)[windows] if len(windows) < len(x) else np.asarray(x)
  found = {}
  for shard in x.addressable_shards:
    start, _, _ = shard.index[0].indices(len(x))
    if start not in found and start in windows:
      found[start] = np.asarray(shard.data)
  return np.concatenate([found[start] for start in sorted(found)])


_block = jax.jit(block, static_argnames="covariance")


def sums_of(x: np.ndarray, room: int, covariance: bool) -> dict:
  """`sums.block` of rows [n, D], n at most `room`, on a device of ours."""
  padded = np.pad(x, ((0, room - len(x)), (0, 0)))
  valid = np.arange(room) < len(x)
  return jax.device_get(_block(padded, valid, covariance=covariance))
