"""Shuffled batches straight from the model: nothing touches the disk."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gemma_jax.activations import capture as capturing
from gemma_jax.activations.stream import check_batches
from gemma_jax.data import Windows, WindowStream
from gemma_jax.models import Model, sharding, sites
from gemma_jax.models.forward import forward

ROWS = ("data", "fsdp")  # mesh axes that split windows and rows


class _Block(NamedTuple):
  """Windows whose rows are shuffled together, `batch` at a time.

  Attributes:
    epoch: of the windows.
    number: of the block in its epoch.
    parts: one for each forward pass.
    rows: int [n], the counted positions among all of its positions.
  """

  epoch: int
  number: int
  parts: list[Windows]
  rows: np.ndarray


class ModelStream:
  """Endless batches of a model's sites, made as they are used.

  The sites of one block of windows lie in device memory and give batches in a
  random order, while those of the next block take their place in a second
  half of the ring: one forward pass for as many rows as it brings. Every
  counted position comes once per epoch. Batch b is a pure function of
  (model, windows, seed, b, sizes): `start=b` resumes exactly, at the price of
  the forward passes of the block that b lies in.

  Args:
    model: with at least the layers that the sites need.
    windows: what to run, epoch after epoch.
    capture: names of single-layer sites.
    batch_size: rows in a batch.
    seed: of the order.
    start: number of the first batch to yield.
    windows_per_pass: in a forward pass; None takes what fits.
    buffer_rows: positions of a block; twice as many lie in device memory.
    dtype: of the vectors, "bfloat16" or "float32".

  Raises:
    ValueError: sizes that the mesh does not divide, sites of all layers.
    FloatingPointError: while iterating: the model gave NaN or Inf.
  """

  def __init__(
    self,
    model: Model,
    windows: Windows | WindowStream,
    capture: Sequence[str],
    batch_size: int,
    seed: int,
    *,
    start: int = 0,
    windows_per_pass: int | None = None,
    buffer_rows: int = 2**17,
    dtype: str = "bfloat16",
  ):
    check_batches(batch_size, start)
    self._model, self._windows = model, windows
    self._capture, self._dtype = tuple(capture), dtype
    self._width = capturing.widths(model, capture)
    whole = isinstance(windows, Windows)
    self._context = (
      windows.tokens.shape[1] if whole else windows.fields["context"]
    )
    self._pass = windows_per_pass or capturing.fitting_batch(
      model, capture, self._context, dtype
    )
    ways = model.mesh.shape["data"] * model.mesh.shape["fsdp"]
    if self._pass % ways or batch_size % ways:
      raise ValueError(
        f"windows_per_pass={self._pass} and batch_size={batch_size} do not "
        f"divide over the {ways} devices of the mesh's data and fsdp axes. "
        "Use multiples."
      )
    self._batch, self._seed, self._start = batch_size, seed, start
    self._passes = max(1, buffer_rows // (self._pass * self._context))

  def __iter__(self) -> Iterator[dict[str, jax.Array]]:
    with jax.set_mesh(self._model.mesh):
      halves = [self._empty(), self._empty()]
    blocks = self._blocks()
    try:
      yield from self._draw(blocks, halves)
    finally:
      blocks.close()

  # ------------------------------------------------------------------ windows
  def _blocks(self) -> Iterator[_Block]:
    """Blocks without end; the last of an epoch may be smaller."""
    for epoch in itertools.count():
      counted = 0
      whole = isinstance(self._windows, Windows)
      source = iter([self._windows] if whole else self._windows)
      number, parts = 0, []
      for part in capturing.rebatch(source, self._pass):
        parts.append(part)
        counted += part.num_tokens
        if len(parts) == self._passes:
          yield self._block(epoch, number, parts)
          number, parts = number + 1, []
      if parts:
        yield self._block(epoch, number, parts)
      if not counted:
        raise ValueError(
          "No position of these windows counts: there is nothing to stream. "
          "Look at their masks."
        )

  def _block(self, epoch, number, parts) -> _Block:
    size = self._pass * self._context
    rows = [
      np.flatnonzero(part.mask) + i * size for i, part in enumerate(parts)
    ]
    return _Block(epoch, number, parts, np.concatenate(rows))

  # --------------------------------------------------------------------- ring
  def _empty(self) -> dict[str, jax.Array]:
    where = NamedSharding(self._model.mesh, P(None, ROWS, None))
    shape = self._passes, self._pass * self._context
    make = jax.jit(
      lambda: {
        site: jnp.zeros((*shape, d), self._dtype)
        for site, d in self._width.items()
      },
      out_shardings=where,
    )
    return make()

  def _fill(self, half, block: _Block, index: int, bad: list) -> dict:
    """One forward pass into its place; `bad` gets a count of what is not."""
    part = block.parts[index]
    missing = self._pass - len(part.tokens)
    tokens, mask = (
      np.pad(x, ((0, missing), (0, 0))) for x in (part.tokens, part.mask)
    )
    mesh = self._model.mesh
    with jax.set_mesh(mesh):
      half, wrong = _forward_into(
        self._model.config,
        self._capture,
        half,
        self._model.params,
        sharding.put_batch(tokens, mesh),
        sharding.put_batch(mask, mesh),
        np.int32(index),
      )
    bad.append((part, wrong))
    return half

  def _draw(self, blocks, halves) -> Iterator[dict[str, Any]]:
    skip = self._start * self._batch
    for block in blocks:
      if skip < len(block.rows):
        break
      skip -= len(block.rows)
    here, there = halves
    bad: list = []
    for index in range(len(block.parts)):
      here = self._fill(here, block, index, bad)
    _check(bad)
    following, filled = next(blocks), 0
    order = self._order(block)
    at = skip
    out, got = None, 0
    while True:
      if at == len(order):
        # What is left of the next block's passes, then the halves change.
        while filled < len(following.parts):
          there = self._fill(there, following, filled, bad)
          filled += 1
        _check(bad)
        here, there, block = there, here, following
        following, filled = next(blocks), 0
        order, at = self._order(block), 0
        continue
      take = min(self._batch - got, len(order) - at)
      out = self._take(here, order[at : at + take], out, got)
      at, got = at + take, got + take
      # As large a share of the next block as has gone of this one.
      while filled * len(order) < at * len(following.parts):
        there = self._fill(there, following, filled, bad)
        filled += 1
      if got == self._batch:
        yield out
        out, got = None, 0

  def _order(self, block: _Block) -> np.ndarray:
    rng = np.random.default_rng((self._seed, block.epoch, block.number))
    return block.rows[rng.permutation(len(block.rows))]

  def _take(self, half, rows, out, got):
    """Puts rows of a half into a batch, from its row `got` on."""
    index = np.zeros(self._batch, np.int32)
    index[got : got + len(rows)] = rows
    new = np.zeros(self._batch, bool)
    new[got : got + len(rows)] = True
    part, row = np.divmod(index, self._pass * self._context)
    mesh = self._model.mesh
    with jax.set_mesh(mesh):
      if len(rows) == self._batch:
        return _gather(half, part, row)
      fresh = _gather(half, part, row)
      return fresh if out is None else _choose(new, fresh, out)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _forward_into(cfg, capture, half, params, tokens, mask, index):
  """Writes sites [B, T, D] to place `index` of [passes, B T, D]."""
  depth = sites.last_layer(capture, cfg)
  _, found = forward(cfg, params, tokens, capture=capture, stop_at=depth)
  wrong = {}
  for site, x in found.items():
    x = sharding.constrain(x.astype(half[site].dtype))
    wrong[site] = jnp.sum(mask & ~jnp.isfinite(x).all(-1))
    rows = x.reshape(1, -1, x.shape[-1])
    half = half | {
      site: jax.lax.dynamic_update_slice(half[site], rows, (index, 0, 0))
    }
  return half, wrong


@jax.jit
def _gather(half, part, row):
  where = P(ROWS, None)
  return {
    site: jax.lax.with_sharding_constraint(x[part, row], where)
    for site, x in half.items()
  }


@functools.partial(jax.jit, donate_argnums=2)
def _choose(new, fresh, old):
  return {
    site: jnp.where(new[:, None], x, old[site]) for site, x in fresh.items()
  }


def _check(bad: list) -> None:
  """Raises FloatingPointError for a block that was not finite; empties it."""
  for part, wrong in bad:
    for site, count in jax.device_get(wrong).items():
      if count:
        first = part.documents[0] if part.documents else "a long document"
        raise FloatingPointError(
          f"{site} is not finite at {count} positions of the windows that "
          f"begin with {first}. Check the weights, or compute in float32."
        )
  bad.clear()
