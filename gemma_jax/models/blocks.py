"""Runs the blocks: as scans, and one by one where a layer is named.

Depth is an explicit `jax.lax.scan` over parameters with a leading layer axis.
Layers that a capture or an edit names by number run on their own between the
scans, so that nothing else is recorded; `*` sites are outputs of the scans.
"""

import dataclasses
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemma_jax.models import families, layers, sharding
from gemma_jax.models import sites as sites_lib
from gemma_jax.models.config import ModelConfig
from gemma_jax.models.edits import Edit, PerLayer, Splice

# Past this many layers captured by number, one scan that writes them to a
# buffer compiles faster than a body for each.
MAX_OWN_BODIES = 4


def read_names(cfg: ModelConfig, splice: Splice) -> tuple[str, ...]:
  """Our names of the sites that a splice reads."""
  read = (splice.read,) if isinstance(splice.read, str) else splice.read
  return tuple(sites_lib.parse(f"blocks.0.{name}", cfg).name for name in read)


def _apply(cfg, edit, entry, name, x, layer, seen):
  """An edit of any kind, with `entry` the layer's part of a PerLayer."""
  read = []
  if isinstance(edit, Splice):
    sources = read_names(cfg, edit)
    read = [x if source == name else seen[source] for source in sources]
    edit = edit.fn
  if isinstance(edit, PerLayer):
    edit = functools.partial(edit.fn, entry)
  if read:
    return edit(*read, x)
  try:
    parameters = inspect.signature(edit).parameters.values()
  except ValueError:  # a builtin
    return edit(x)
  needed = [
    p
    for p in parameters
    if p.default is p.empty
    and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
  ]
  return edit(x, layer) if len(needed) >= 2 else edit(x)


@dataclasses.dataclass
class _Recorder:
  """The `site` function of one block: edits, then remembers, then returns.

  `edits` are (name, edit, the layer's entry of a PerLayer).
  """

  cfg: ModelConfig
  layer: jax.Array
  edits: Sequence[tuple[str, Edit, Any]]
  seen: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

  def __call__(self, name: str, x: jax.Array) -> jax.Array:
    for site, edit, entry in self.edits:
      if site != name:
        continue
      y = jnp.asarray(
        _apply(self.cfg, edit, entry, name, x, self.layer, self.seen)
      )
      if (y.shape, y.dtype) != (x.shape, x.dtype):
        raise ValueError(
          f"An edit of {name} returned {y.dtype} of shape {y.shape}; expected "
          f"{x.dtype} of shape {x.shape}. End it with .astype(x.dtype), and "
          "keep every axis."
        )
      x = y
    self.seen[name] = x
    return x


class _Carry(NamedTuple):
  """What goes from block to block.

  Attributes:
    x: the residual stream, [B, T, D].
    buffers: {(site, reduction): [layers asked for + 1, ...]}.
    cache: keys and values of all slots, [L, B, S, K, H] each, or None.
  """

  x: jax.Array
  buffers: dict
  cache: tuple[jax.Array, jax.Array] | None


@dataclasses.dataclass
class Blocks:
  """Runs blocks, as scans and one by one, and collects what was asked for.

  Attributes:
    cfg: the model.
    params: the stacked parameters of the blocks.
    ctx: what all layers share.
    wanted: {name: (Site, reduction or None)}.
    changes: (Site, edit) in the order in which they apply.
    keep_kv: whether to return the keys and values of these tokens.
    unroll: whether to compile every layer by itself.
  """

  cfg: ModelConfig
  params: Any
  ctx: layers.Context
  wanted: Mapping[str, tuple[sites_lib.Site, Any]]
  changes: Sequence[tuple[sites_lib.Site, Edit]]
  keep_kv: bool = False
  unroll: bool = False

  def __post_init__(self):
    captured = {site.layer for site, _ in self.wanted.values()} - {None}
    numbered = {site.layer for site, _ in self.changes} - {None}
    # Names that are outputs of the scans, and of layers on their own; the
    # many of the latter that share a buffer, by site and reduction.
    self.stacked = {n: w for n, w in self.wanted.items() if w[0].layer is None}
    self.single = {
      n: w for n, w in self.wanted.items() if w[0].layer is not None
    }
    self.buffered = {}
    if len(captured) > MAX_OWN_BODIES:
      for name, (site, reduction) in self.single.items():
        group = self.buffered.setdefault((site.name, id(reduction)), {})
        group[name] = site, reduction
      self.single, captured = {}, set()
    self.own = sorted(captured | numbered)

  def run(self, x, depth, cache=None):
    """x after `depth` blocks, {name: value}, and keys and values."""
    carry = _Carry(x, self._buffers(x, cache), cache)
    found, stacks, kvs = {}, [], []

    def scan(carry, start, stop):
      if start == stop:
        return carry
      inputs = jnp.arange(start, stop), self._entries(slice(start, stop))
      carry, (ys, kv) = jax.lax.scan(
        lambda carry, inputs: self._step(carry, *inputs, self.stacked),
        carry,
        inputs,
        unroll=self.unroll,
      )
      stacks.append(ys)
      kvs.append(kv)
      return carry

    start = 0
    for layer in self.own:
      carry = scan(carry, start, layer)
      here = {n: w for n, w in self.single.items() if w[0].layer == layer}
      carry, (ys, kv) = self._step(
        carry, layer, self._entries(layer), self.stacked | here, layer
      )
      found |= {name: ys.pop(name) for name in here}
      stacks.append(jax.tree.map(lambda y: y[None], ys))
      kvs.append(jax.tree.map(lambda y: y[None], kv))
      start = layer + 1
    carry = scan(carry, start, depth)
    for key, group in self.buffered.items():
      slots = _slots(group)
      for name, (site, _) in group.items():
        found[name] = jax.tree.map(
          lambda b, s=slots[site.layer]: b[s], carry.buffers[key]
        )
    found |= _concatenate(stacks) if self.stacked else {}
    cache = _concatenate(kvs) if self.keep_kv else carry.cache
    return carry.x, found, cache

  def run_between(self, x, first, last):
    """x [B, T, D] after the blocks first .. last - 1, which may be traced."""

    def step(index, x):
      carry = _Carry(x, {}, None)
      return self._step(carry, index, self._entries(index), {})[0].x

    return jax.lax.fori_loop(first, last, step, x)

  def _entries(self, index):
    """Each change's arrays of one layer, or of some; None but for PerLayer."""
    return [
      jax.tree.map(lambda a: a[index], _tree(edit)) for _, edit in self.changes
    ]

  def _step(self, carry, index, entries, names, layer=None):
    """One block; `layer` is its number where it runs on its own.

    Returns:
      The carry, and ({name: value}, keys and values or None).
    """
    cfg = self.cfg

    # By index and not as an input of the scan, which would be a copy of the
    # parameters wherever it does not run over all of them.
    def take(a):
      return jax.lax.dynamic_index_in_dim(a, index, 0, keepdims=False)

    p = jax.tree.map(take, self.params)
    here = layers.stacked(cfg)._replace(cache=carry.cache)
    here = jax.tree.map(take, here)
    edits = [
      (site.name, edit, entry)
      for (site, edit), entry in zip(self.changes, entries, strict=True)
      if site.layer is None or site.layer == layer
    ]
    record = _Recorder(cfg, here.index, edits)
    block = families.of(cfg).Block(cfg, carry.x.dtype)
    x, kv = block.apply({"params": p}, carry.x, here, self.ctx, record)

    def value(site, reduction):
      y = record.seen[site.name]
      return y if reduction is None else reduction(y)

    buffers = {}
    for key, group in self.buffered.items():
      slots = _slots(group)
      # Layers that nobody asked for are written to the slot after the last.
      table = [slots.get(l, len(slots)) for l in range(cfg.num_layers)]
      buffers[key] = jax.tree.map(
        functools.partial(_write, jnp.array(table)[index]),
        carry.buffers[key],
        value(*next(iter(group.values()))),
      )
    cache = carry.cache
    if cache is not None:
      # Only the new slots of one layer, so that the cache stays in its place.
      at = (index, 0, self.ctx.start, 0, 0)
      cache = jax.tree.map(
        lambda c, new: jax.lax.dynamic_update_slice(c, new[None], at),
        cache,
        kv,
      )
    ys = {name: value(*w) for name, w in names.items()}
    carry = _Carry(sharding.constrain(x), buffers, cache)
    return carry, (ys, kv if self.keep_kv else None)

  def _buffers(self, x, cache):
    """An empty buffer, [layers asked for + 1, ...], for each group."""
    if not self.buffered:
      return {}
    firsts = {key: next(iter(g.values())) for key, g in self.buffered.items()}
    plain = dataclasses.replace(self, wanted={})
    shapes = jax.eval_shape(
      lambda x: plain._step(_Carry(x, {}, cache), 0, plain._entries(0), firsts)[
        1
      ][0],
      x,
    )

    def empty(group, shape):
      return jnp.zeros((len(_slots(group)) + 1, *shape.shape), shape.dtype)

    return {
      key: jax.tree.map(functools.partial(empty, group), shapes[key])
      for key, group in self.buffered.items()
    }


def _slots(group) -> dict[int, int]:
  """{layer: its place in the buffer}."""
  asked = sorted({site.layer for site, _ in group.values()})
  return {layer: i for i, layer in enumerate(asked)}


def _tree(edit):
  """The arrays of a PerLayer, also within a Splice; None for others."""
  fn = edit.fn if isinstance(edit, Splice) else edit
  return fn.tree if isinstance(fn, PerLayer) else None


def _concatenate(pieces):
  return jax.tree.map(lambda *parts: jnp.concatenate(parts), *pieces)


def _write(slot, buffer, value):
  return jax.lax.dynamic_update_index_in_dim(buffer, value, slot, 0)
