"""The forward pass: one pure function over stacked parameters.

Depth is an explicit `jax.lax.scan` over parameters with a leading layer axis.
Layers that a capture or an edit names by number run on their own between the
scans, so that nothing else is recorded; `*` sites are outputs of the scans.
"""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from gemma_jax.models import gemma, sharding
from gemma_jax.models import sites as sites_lib
from gemma_jax.models.config import ModelConfig
from gemma_jax.models.sites import Edit, Site, Splice

# Past this many layers captured by number, one scan that records them all
# compiles faster than a body for each, and costs memory for L layers.
MAX_OWN_BODIES = 4


def forward(
  cfg: ModelConfig,
  params,
  tokens: jax.Array,
  *,
  mask: jax.Array | None = None,
  capture: Sequence[str] = (),
  edits: Mapping[str, Edit] | None = None,
  stop_at: int | str | None = None,
) -> tuple[jax.Array | None, dict[str, jax.Array]]:
  """Runs the model. Pure: jit it with everything but arrays static.

  Args:
    cfg: the model.
    params: `{"embed": [V, D], "blocks": {name: [L, ...]}, "final_norm": [D]}`;
      the blocks may hold only the first layers.
    tokens: int [B, T].
    mask: bool [B, T], False at padding; None means no padding.
    capture: sites to return, in any spelling that `sites.parse` accepts;
      `blocks.*.mlp_in` comes back stacked, [L, B, T, D].
    edits: site -> pure function of the value (or of the value and the layer
      index), or a `Splice`. A capture of an edited site sees the edited value.
    stop_at: stop early and return no logits: the number of blocks to run, or
      a site, after whose block to stop.

  Returns:
    logits [B, T, V] in float32 or wider (None with `stop_at`), and the
    captured sites under the names that were asked for.

  Raises:
    ValueError: a site or layer that does not exist, or one past `stop_at`;
      layers that are not loaded; one site edited under two names; tokens
      that are not integers [B, T], or a mask of another shape.
  """
  check_tokens(tokens)
  if mask is not None and mask.shape != tokens.shape:
    raise ValueError(
      f"mask must be [B, T] as tokens are, {tokens.shape}; got {mask.shape}."
    )
  depth = _depth(cfg, params, stop_at)
  wanted = {name: sites_lib.parse(name, cfg.num_layers) for name in capture}
  changes = {}
  for name, edit in (edits or {}).items():
    site = sites_lib.parse(name, cfg.num_layers)
    if site in changes:
      raise ValueError(
        f"{site} is edited twice, the second time as {name!r}. Make one "
        "function of the two."
      )
    changes[site] = _as_function(name, edit)
  for name, site in wanted.items() | {str(s): s for s in changes}.items():
    if (site.layer or 0) >= depth:
      raise ValueError(
        f"Site {name!r} lies past stop_at={stop_at!r}: only the first {depth} "
        "blocks run."
      )
  dtype = params["embed"].dtype
  valid = jnp.ones((1, tokens.shape[1]), bool) if mask is None else mask
  ctx = gemma.context(cfg, valid, dtype)
  with jax.named_scope("embed"):
    scale = jnp.asarray(cfg.width**0.5, dtype)
    x = sharding.constrain(params["embed"][tokens] * scale)
  x, found = _run_blocks(cfg, params["blocks"], x, ctx, depth, wanted, changes)
  logits = None if stop_at is not None else unembed(cfg, params, x)
  return logits, {name: found[site] for name, site in wanted.items()}


def unembed(cfg: ModelConfig, params, x: jax.Array) -> jax.Array:
  """Final norm, tied head and soft-cap: resid_post [..., D] -> [..., V]."""
  with jax.named_scope("unembed"):
    x = gemma.rms_norm(x, params["final_norm"], cfg)
    logits = jnp.einsum(
      "...d,vd->...v",
      x,
      params["embed"],
      preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
    )
    return gemma.soft_cap(logits, cfg.final_softcap)


def num_loaded(params) -> int:
  """How many layers the stacked parameters hold."""
  return params["blocks"]["pre_attn_norm"].shape[0]


def check_tokens(tokens) -> None:
  """Raises ValueError unless `tokens` are integers [B, T]."""
  if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(
      f"tokens must be integers [B, T]; got {tokens.dtype} of shape "
      f"{tokens.shape}."
    )


def _depth(cfg, params, stop_at) -> int:
  loaded = num_loaded(params)
  if stop_at is None:
    depth = cfg.num_layers
  elif isinstance(stop_at, str):
    depth = sites_lib.last_layer((stop_at,), cfg.num_layers)
  else:
    depth = stop_at
    if not 0 <= depth <= cfg.num_layers:
      raise ValueError(
        f"stop_at={stop_at} must be 0..{cfg.num_layers}, the number of "
        "blocks to run."
      )
  if depth > loaded:
    raise ValueError(
      f"{depth} blocks are needed and the first {loaded} of "
      f"{cfg.num_layers} are loaded. Load more (layers={depth}), or pass "
      f"stop_at={loaded} or less."
    )
  return depth


def _as_function(name, edit):
  """An edit as fn(value, layer index, sites so far in the block)."""
  if isinstance(edit, Splice):
    read = sites_lib.parse(f"blocks.0.{edit.read}", 1).name
    here = sites_lib.parse(name, 10**9).name
    if read == here:
      return lambda x, layer, seen: edit.fn(x, x)
    if sites_lib.NAMES.index(read) > sites_lib.NAMES.index(here):
      raise ValueError(
        f"Splice at {name!r} reads {read!r}, which a block computes later. "
        "Read an earlier site of the block."
      )
    return lambda x, layer, seen: edit.fn(seen[read], x)
  if not callable(edit):
    raise ValueError(
      f"The edit at {name!r} must be a function or a Splice; got {edit!r}."
    )
  needed = [
    p
    for p in inspect.signature(edit).parameters.values()
    if p.default is p.empty
    and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
  ]
  if len(needed) >= 2:
    return lambda x, layer, seen: edit(x, layer)
  return lambda x, layer, seen: edit(x)


@dataclasses.dataclass
class _Recorder:
  """The `site` function of one block: edits, then remembers, then returns."""

  layer: jax.Array
  edits: Mapping[str, list]
  seen: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

  def __call__(self, name: str, x: jax.Array) -> jax.Array:
    for edit in self.edits.get(name, ()):
      y = edit(x, self.layer, self.seen)
      if jnp.shape(y) != x.shape:
        raise ValueError(
          f"An edit of {name} returned shape {jnp.shape(y)}; expected "
          f"{x.shape}."
        )
      x = jnp.asarray(y).astype(x.dtype)
    self.seen[name] = x
    return x


def _run_blocks(cfg, blocks, x, ctx, depth, wanted, changes):
  """Runs `depth` blocks as segments; returns x and {Site: value}."""
  everywhere = {s.name for s in wanted.values() if s.layer is None}
  captured = {s.layer for s in wanted.values() if s.layer is not None}
  edited = {s.layer for s in changes if s.layer is not None}
  by_scan = set()
  if len(captured) > MAX_OWN_BODIES:
    by_scan = {s.name for s in wanted.values() if s.layer is not None}
    captured = set()
  own = sorted(captured | edited)
  stacked = everywhere | by_scan
  layers = gemma.layers(cfg)

  def body(x, inputs, names, layer=None):
    p, per_layer = inputs
    edits = {}
    for site, change in changes.items():
      if site.layer is None or site.layer == layer:
        edits.setdefault(site.name, []).append(change)
    record = _Recorder(per_layer.index, edits)
    block = gemma.Block(cfg, p["q"].dtype)
    x = block.apply({"params": p}, x, per_layer, ctx, record)
    x = sharding.constrain(x)
    return x, {name: record.seen[name] for name in names}

  found: dict[Site, jax.Array] = {}
  pieces: list[dict[str, jax.Array]] = []

  def scan(x, start, stop):
    if start == stop:
      return x
    part = jax.tree.map(lambda a: a[start:stop], (blocks, layers))
    x, ys = jax.lax.scan(lambda x, inputs: body(x, inputs, stacked), x, part)
    pieces.append(ys)
    return x

  start = 0
  for layer in own:
    x = scan(x, start, layer)
    names = stacked | {s.name for s in wanted.values() if s.layer == layer}
    part = jax.tree.map(lambda a, l=layer: a[l], (blocks, layers))
    x, seen = body(x, part, names, layer)
    pieces.append({name: seen[name][None] for name in stacked})
    found |= {Site(layer, name): value for name, value in seen.items()}
    start = layer + 1
  x = scan(x, start, depth)
  for name in stacked:
    whole = jnp.concatenate([piece[name] for piece in pieces])
    found[Site(None, name)] = whole
    found |= {Site(l, name): whole[l] for l in range(depth)}
  return x, found
