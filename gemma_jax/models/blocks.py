"""Runs the blocks: as scans, and one by one where a layer is named.

Depth is an explicit `jax.lax.scan` over parameters with a leading layer axis.
Layers that a capture or an edit names by number run on their own between the
scans, so that nothing else is recorded; `*` sites are outputs of the scans.
"""

import dataclasses
import functools
import inspect
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gemma_jax.models import families, layers, sharding
from gemma_jax.models import sites as sites_lib
from gemma_jax.models.config import ModelConfig
from gemma_jax.models.edits import Edit, PerLayer, Splice

# Past this many layers captured by number, one scan that writes them to a
# buffer compiles faster than a body for each.
MAX_OWN_BODIES = 4


def read_name(cfg: ModelConfig, splice: Splice) -> str:
  """Our name of the site that a splice reads."""
  return sites_lib.parse(f"blocks.0.{splice.read}", cfg).name


def _apply(cfg, edit, entry, name, x, layer, seen):
  """An edit of any kind, with `entry` the layer's part of a PerLayer."""
  read = ()
  if isinstance(edit, Splice):
    source = read_name(cfg, edit)
    read = (x if source == name else seen[source],)
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


@dataclasses.dataclass
class Blocks:
  """Runs blocks, as scans and one by one, and collects what was asked for."""

  cfg: ModelConfig
  params: Any
  per_layer: layers.Layer
  ctx: layers.Context
  keep_cache: bool
  unroll: bool

  def run(self, x, depth, wanted, changes):
    """x after `depth` blocks, {name: value}, and keys and values."""
    numbered = {site.layer for site, _ in changes} - {None}
    captured = {site.layer for site, _ in wanted.values()} - {None}
    # One stacked output for each name of `everywhere`, one buffer for each
    # (site, reduction) of `buffers`.
    everywhere = {n: w for n, w in wanted.items() if w[0].layer is None}
    buffered = {}
    if len(captured) > MAX_OWN_BODIES:
      for name, (site, reduction) in wanted.items():
        if site.layer is not None:
          key = site.name, id(reduction)
          buffered.setdefault(key, {})[name] = (site, reduction)
      captured = set()
    own = sorted(captured | numbered)
    found, stacks, caches = {}, [], []
    buffers = self._buffers(x, buffered, changes)

    def scan(x, buffers, start, stop):
      if start == stop:
        return x, buffers

      def step(carry, inputs):
        return self._step(carry, inputs, changes, everywhere, buffered)

      (x, buffers), (ys, kv) = jax.lax.scan(
        step,
        (x, buffers),
        self._inputs(slice(start, stop), changes),
        unroll=self.unroll,
      )
      stacks.append(ys)
      caches.append(kv)
      return x, buffers

    start = 0
    for layer in own:
      x, buffers = scan(x, buffers, start, layer)
      here = {n: w for n, w in wanted.items() if w[0].layer == layer}
      here = {} if buffered else here
      (x, buffers), (ys, kv) = self._step(
        (x, buffers),
        self._inputs(layer, changes),
        changes,
        everywhere | here,
        buffered,
        layer,
      )
      found |= {name: ys.pop(name) for name in here}
      stacks.append(jax.tree.map(lambda y: y[None], ys))
      caches.append(jax.tree.map(lambda y: y[None], kv))
      start = layer + 1
    x, buffers = scan(x, buffers, start, depth)
    for key, group in buffered.items():
      slots = _slots(group)
      for name, (site, _) in group.items():
        found[name] = jax.tree.map(
          lambda b, s=slots[site.layer]: b[s], buffers[key]
        )
    found |= _concatenate(stacks) if everywhere else {}
    cache = _concatenate(caches) if self.keep_cache else None
    return x, found, cache

  def _inputs(self, index, changes):
    entries = [
      _tree(edit) if site.layer is None else None for site, edit in changes
    ]
    return jax.tree.map(
      lambda a: a[index], (self.params, self.per_layer, entries)
    )

  def _step(self, carry, inputs, changes, names, buffered, layer=None):
    """One block: ((x, buffers), ({name: value}, keys and values))."""
    x, buffers = carry
    p, per_layer, entries = inputs
    edits = [
      (site.name, edit, entry)
      for (site, edit), entry in zip(changes, entries, strict=True)
      if site.layer is None or site.layer == layer
    ]
    record = _Recorder(self.cfg, per_layer.index, edits)
    block = families.of(self.cfg).Block(self.cfg, x.dtype)
    x, kv = block.apply({"params": p}, x, per_layer, self.ctx, record)
    x = sharding.constrain(x)

    def value(site, reduction):
      y = record.seen[site.name]
      return y if reduction is None else reduction(y)

    written = {}
    for key, group in buffered.items():
      slots = _slots(group)
      # Layers that nobody asked for are written to the slot after the last.
      table = [slots.get(l, len(slots)) for l in range(self.cfg.num_layers)]
      slot = jnp.array(table)[per_layer.index]
      written[key] = jax.tree.map(
        lambda b, y, s=slot: jax.lax.dynamic_update_index_in_dim(b, y, s, 0),
        buffers[key],
        value(*next(iter(group.values()))),
      )
    ys = {name: value(*w) for name, w in names.items()}
    return (x, written), (ys, kv if self.keep_cache else None)

  def _buffers(self, x, buffered, changes):
    """An empty buffer, [layers asked for + 1, ...], for each group."""
    if not buffered:
      return {}
    names = {key: next(iter(g.values())) for key, g in buffered.items()}
    shapes = jax.eval_shape(
      lambda x: self._step(
        (x, {}), self._inputs(0, changes), changes, names, {}
      )[1][0],
      x,
    )
    return {
      key: jax.tree.map(
        lambda s, g=group: jnp.zeros((len(_slots(g)) + 1, *s.shape), s.dtype),
        shapes[key],
      )
      for key, group in buffered.items()
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
