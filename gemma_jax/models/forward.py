"""The forward pass: one pure function over stacked parameters."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gemma_jax.models import attention as attention_lib
from gemma_jax.models import layers, sharding
from gemma_jax.models import sites as sites_lib
from gemma_jax.models.blocks import Blocks, read_names
from gemma_jax.models.config import ModelConfig
from gemma_jax.models.edits import Edit, PerLayer, Splice
from gemma_jax.models.head import unembed
from gemma_jax.models.sites import Site

Capture = Sequence[str] | Mapping[str, Callable | None]


def forward(
  cfg: ModelConfig,
  params,
  tokens: jax.Array,
  *,
  mask: jax.Array | None = None,
  capture: Capture = (),
  edits: Mapping[str, Edit] | None = None,
  stop_at: int | str | None = None,
  attention: str = "auto",
  unroll: bool = False,
) -> tuple[jax.Array | None, dict[str, Any]]:
  """Runs the model. Pure: jit it with everything but arrays static.

  Args:
    cfg: the model.
    params: `{"embed": [V, D], "blocks": {name: [L, ...]}, "final_norm": [D]}`
      and what else the family has; the blocks may hold only the first layers.
    tokens: int [B, T].
    mask: bool [B, T], False at padding, on either side; None means no padding.
      Positions count what is not padding.
    capture: sites to return, in any spelling that `sites.parse` accepts;
      `blocks.*.mlp_in` comes back stacked, [L, B, T, D]. A mapping gives each
      a function that reduces its value, [B, T, D], on the spot, or None; see
      `reduce`.
    edits: site -> pure function of the value (or of the value and the layer
      index), `PerLayer` or `Splice`; see the module `edits`. A capture of an
      edited site sees the edited value. Each layer that is edited by number
      is compiled by itself: for many, use `blocks.*` and `PerLayer`.
    stop_at: stop early and return no logits: the number of blocks to run, or
      a site, after whose block to stop.
    attention: "xla", "chunked", "cudnn" or "auto"; see the module `attention`.
    unroll: run the blocks one by one instead of in a scan. XLA's cost
      analysis counts a scan's body once; unrolled, it counts every layer.

  Returns:
    logits [B, T, V] in float32 or wider (None with `stop_at`), and the
    captured sites under the names that were asked for.

  Raises:
    ValueError: a site or layer that does not exist, or one past `stop_at`;
      layers that are not loaded; one site edited under two names; an edit that
      changes shape or dtype; tokens that are not integers [B, T], or longer
      than the model's context; a mask of another shape; an attention that
      lacks a feature of the model.
  """
  valid = None if mask is None else mask.astype(bool)
  logits, found, _ = run(
    cfg,
    params,
    tokens,
    valid,
    capture=capture,
    edits=list((edits or {}).items()),
    stop_at=stop_at,
    attention=attention,
    unroll=unroll,
  )
  return logits, found


def site_gradients(
  cfg: ModelConfig,
  params,
  tokens: jax.Array,
  sites: Sequence[str],
  loss: Callable[[jax.Array | None, Mapping[str, Any]], jax.Array],
  *,
  mask: jax.Array | None = None,
  capture: Capture = (),
  edits: Mapping[str, Edit] | None = None,
  stop_at: int | str | None = None,
  attention: str = "auto",
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, Any]]:
  """The gradient of a loss with respect to sites, as after their edits.

  Args:
    cfg: the model.
    params: see `forward`.
    tokens: int [B, T].
    sites: what to differentiate by.
    loss: pure function of the logits and the captured sites to a scalar.
    mask: see `forward`.
    capture: sites to return and to give to the loss.
    edits: see `forward`.
    stop_at: see `forward`.
    attention: see `forward`.

  Returns:
    The loss, {site: gradient} of the sites' own shapes and dtypes, and the
    captured sites.

  Raises:
    ValueError: see `forward`.
  """

  def outputs(noise, capture):
    # Adding nothing, after the edits, is where the gradient enters.
    return run(
      cfg,
      params,
      tokens,
      None if mask is None else mask.astype(bool),
      capture=capture,
      edits=list((edits or {}).items()),
      noise=noise,
      stop_at=stop_at,
      attention=attention,
    )[:2]

  shapes = jax.eval_shape(lambda: outputs({}, tuple(sites))[1])
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

  def objective(noise):
    logits, found = outputs(noise, capture)
    return loss(logits, found), found

  (value, found), gradients = jax.value_and_grad(objective, has_aux=True)(zeros)
  return value, gradients, found


def run(
  cfg,
  params,
  tokens,
  valid,
  *,
  capture=(),
  edits=(),
  noise=None,
  stop_at=None,
  attention="auto",
  unroll=False,
  start=0,
  cache=None,
  keep_kv=False,
):
  """`forward`, and what generation and gradients need besides.

  Args:
    cfg: the model.
    params: see `forward`.
    tokens: int [B, T].
    valid: bool [B, S], of all slots, or None where T = S and all are valid.
    capture: see `forward`.
    edits: pairs of a site and its edit.
    noise: site -> an array that is added to its value after the edits.
    stop_at: see `forward`.
    attention: see `forward`.
    unroll: see `forward`.
    start: the slot of the first token.
    cache: keys and values so far, [L, B, S, K, H] each, or None.
    keep_kv: whether to return the keys and values of these tokens.

  Returns:
    logits, sites, and the cache with these tokens in it; or, with `keep_kv`,
    keys and values of these tokens, [L, B, T, K, H] each.
  """
  check_tokens(tokens)
  length = tokens.shape[1]
  if not length:
    raise ValueError("The tokens are empty, [B, 0]; give at least one.")
  slots = length if cache is None else cache[0].shape[2]
  if slots > cfg.max_context:
    raise ValueError(
      f"The context is {slots} tokens long, and the model's longest is "
      f"{cfg.max_context}. Cut the text into windows."
    )
  if valid is not None and valid.shape != (tokens.shape[0], slots):
    raise ValueError(
      f"mask must be [B, T] as tokens are, {(tokens.shape[0], slots)}; got "
      f"{valid.shape}."
    )
  depth = _depth(cfg, params, stop_at)
  wanted, changes = _parse(cfg, capture, edits, noise or {}, depth, stop_at)
  dtype = params["embed"].dtype
  if cache is None:
    attention = attention_lib.choose(cfg, attention, length, dtype)
  else:
    attention = "xla"
  positions = _positions(valid, start, length)
  ctx = layers.context(
    cfg, positions, dtype, valid=valid, start=start, implementation=attention
  )
  x = _embed(cfg, params, tokens, positions)
  blocks = Blocks(cfg, params["blocks"], ctx, wanted, changes, keep_kv, unroll)
  x, found, cache = blocks.run(x, depth, cache)
  logits = None if stop_at is not None else unembed(cfg, params, x)
  return logits, found, cache


def embed(cfg: ModelConfig, params, tokens, *, mask=None) -> jax.Array:
  """What enters the first block, [B, T, D]; see `forward`."""
  check_tokens(tokens)
  valid = None if mask is None else mask.astype(bool)
  return _embed(cfg, params, tokens, _positions(valid, 0, tokens.shape[1]))


def run_blocks(
  cfg: ModelConfig,
  params,
  x: jax.Array,
  first: int | jax.Array,
  last: int | jax.Array,
  *,
  mask: jax.Array | None = None,
  edits: Mapping[str, Edit] | None = None,
  attention: str = "auto",
) -> jax.Array:
  """The residual stream after the blocks first .. last - 1. Pure.

  What is edited in late blocks needs no early ones again, and one program
  serves for all of them: the bounds may be traced.

  Args:
    cfg: the model.
    params: see `forward`, with all blocks.
    x: residual stream that enters block `first`, [B, T, D].
    first: block to begin with.
    last: block before which to end.
    mask: see `forward`.
    edits: of `blocks.*` only; see `forward`.
    attention: see `forward`.

  Raises:
    ValueError: layers that are not loaded, an edit of a single layer.
  """
  _depth(cfg, params, None)
  _, changes = _parse(cfg, (), (edits or {}).items(), {}, cfg.num_layers, None)
  if any(site.layer is not None for site, _ in changes):
    raise ValueError(
      f"edits of {', '.join(edits)}: expected blocks.* alone, since blocks "
      "that are not known before they run are not compiled one by one; look "
      "at the layer in the edit."
    )
  length = x.shape[1]
  valid = None if mask is None else mask.astype(bool)
  ctx = layers.context(
    cfg,
    _positions(valid, 0, length),
    x.dtype,
    valid=valid,
    start=0,
    implementation=attention_lib.choose(cfg, attention, length, x.dtype),
  )
  blocks = Blocks(cfg, params["blocks"], ctx, {}, changes)
  return blocks.run_between(x, first, last)


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


def _embed(cfg, params, tokens, positions) -> jax.Array:
  with jax.named_scope("embed"):
    x = params["embed"][tokens]
    if cfg.embed_scale != 1:
      x = x * jnp.asarray(cfg.embed_scale, x.dtype)
    if "positions" in params:
      x = x + params["positions"][positions]
    return sharding.constrain(x)


def _positions(valid, start, length) -> jax.Array:
  """Places of `length` tokens from slot `start` on; padding does not count."""
  if valid is None:
    return jnp.arange(length)[None]
  positions = jnp.cumsum(valid, axis=-1, dtype=jnp.int32) - 1
  positions = jnp.maximum(positions, 0)
  return jax.lax.dynamic_slice_in_dim(positions, start, length, axis=1)


def _depth(cfg, params, stop_at) -> int:
  loaded = num_loaded(params)
  if stop_at is None:
    depth = cfg.num_layers
  elif isinstance(stop_at, str):
    depth = sites_lib.last_layer((stop_at,), cfg)
  else:
    depth = stop_at
    if type(depth) is not int or not 0 <= depth <= cfg.num_layers:
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


def _parse(cfg, capture, edits, noise, depth, stop_at):
  """{name: (Site, reduction)}, and the changes as [(Site, edit)] in order."""
  check_capture(capture)
  reductions = capture if isinstance(capture, Mapping) else {}
  wanted = {
    name: (sites_lib.parse(name, cfg), reductions.get(name)) for name in capture
  }
  changes = {}
  for name, edit in edits:
    site = check_edit(cfg, name, edit)
    if site in changes:
      raise ValueError(
        f"{site} is edited twice, the second time as {name!r}. Make one "
        "function of the two."
      )
    changes[site] = edit
  changes = list(changes.items())
  for name, value in noise.items():
    site = sites_lib.parse(name, cfg)
    change = (
      PerLayer(jnp.add, value)
      if site.layer is None
      else (functools.partial(jnp.add, value))
    )
    changes.append((site, change))
  asked = [(name, site) for name, (site, _) in wanted.items()]
  for name, site in asked + [(str(site), site) for site, _ in changes]:
    if (site.layer or 0) >= depth:
      raise ValueError(
        f"Site {name!r} lies past stop_at={stop_at!r}: only the first {depth} "
        "blocks run."
      )
  return wanted, changes


def check_capture(capture) -> None:
  """Raises ValueError for a single name, whose letters are no sites."""
  if isinstance(capture, str):
    raise ValueError(
      f"capture={capture!r} must be a sequence of sites; make it a list."
    )


def check_edit(cfg: ModelConfig, name: str, edit) -> Site:
  """The site `name`; raises ValueError unless `edit` can be its edit."""
  site = sites_lib.parse(name, cfg)
  fn = edit
  if isinstance(edit, Splice):
    order = sites_lib.NAMES.index
    for read in read_names(cfg, edit):
      if order(read) > order(site.name):
        raise ValueError(
          f"Splice at {name!r} reads {read!r}, which a block computes later. "
          "Read an earlier site of the block."
        )
    fn = edit.fn
  if isinstance(fn, PerLayer):
    if site.layer is not None:
      raise ValueError(
        f"The edit at {name!r} is PerLayer, for `blocks.*`; give a function."
      )
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(fn.tree)}
    if sizes - {(cfg.num_layers,)}:
      raise ValueError(
        f"The arrays of PerLayer at {name!r} must have a leading axis of "
        f"{cfg.num_layers}, one entry per layer; got {sorted(sizes)}."
      )
    fn = fn.fn
  if not callable(fn):
    raise ValueError(
      f"The edit at {name!r} must be a function or a Splice; got {edit!r}."
    )
  return site
