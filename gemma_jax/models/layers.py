"""The arithmetic that families share: norms, RoPE, projections, MLPs.

Numerics follow Hugging Face's eager torch modules, which released
checkpoints are evaluated with: norms in float32 and cast last, RoPE's cos
and sin cast to the compute dtype.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gemma_jax.models import attention, tables
from gemma_jax.models.config import ModelConfig

# `site(name, x)` applies the edits of the site, records it, returns it.
SiteFn = Callable[[str, jax.Array], jax.Array]

ACTIVATIONS = {
  "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "silu": jax.nn.silu,
}


class Layer(NamedTuple):
  """What differs from layer to layer besides the parameters.

  Attributes:
    index: int32 scalar, the layer's number.
    is_global: bool scalar; whether to attend beyond the window.
    cache: keys and values of the slots so far, [B, S, K, H] each, or None.
  """

  index: jax.Array
  is_global: jax.Array
  cache: tuple[jax.Array, jax.Array] | None = None


class Context(NamedTuple):
  """What all layers share.

  Attributes:
    cos: [2, B or 1, T, R / 2], local layers' and global layers', in the
      compute dtype; None without RoPE.
    sin: the same shape.
    valid: bool [B or 1, S], False where a key is padding; None for none.
    start: the slot, among the keys, of the first query.
    attention: an implementation, of `attention.choose`.
  """

  cos: jax.Array | None
  sin: jax.Array | None
  valid: jax.Array | None
  start: jax.Array | int
  attention: str


def stacked(cfg: ModelConfig) -> Layer:
  """Every layer's, each [L]; without a cache."""
  return Layer(
    jnp.arange(cfg.num_layers, dtype=jnp.int32),
    jnp.array(cfg.layer_is_global),
  )


def context(
  cfg: ModelConfig,
  positions: jax.Array,
  dtype,
  *,
  valid: jax.Array | None = None,
  start: jax.Array | int = 0,
  implementation: str = "xla",
) -> Context:
  """RoPE tables for queries at `positions`, int [B or 1, T].

  The other arguments are `Context`'s.
  """
  cos = sin = None
  if cfg.rope_dim:
    fp = jnp.promote_types(dtype, jnp.float32)
    half = jnp.arange(0, cfg.rope_dim, 2).astype(fp) / cfg.rope_dim

    def angles(theta, factor):
      frequency = 1.0 / (jnp.asarray(theta, fp) ** half) / factor
      return positions[..., None].astype(fp) * frequency

    both = jnp.stack(
      [
        angles(cfg.rope_theta_local, 1.0),
        angles(cfg.rope_theta_global, cfg.rope_factor_global),
      ]
    )
    cos, sin = jnp.cos(both).astype(dtype), jnp.sin(both).astype(dtype)
  return Context(cos, sin, valid, start, implementation)


def declare(module: nn.Module, table: tables.Table, cfg: ModelConfig, dtype):
  """Declares every tensor of a table as a Linen parameter; {name: array}."""
  return {
    name: module.param(
      name, initializer(name, row, cfg), tables.shape(row, cfg), dtype
    )
    for name, row in table.items()
  }


def initializer(name: str, row: tables.Row, cfg: ModelConfig):
  """Random weights in which every feature is visible."""
  if name.endswith("norm"):
    # Not one: a missing gain must be visible in a random model.
    def gains(key, shape, dtype):
      noise = 0.3 * jax.random.normal(key, shape, dtype)
      return noise + jnp.asarray(1 - cfg.norm_offset, dtype)

    return gains
  if name.endswith("bias"):
    return nn.initializers.normal(0.3)
  size = tables.sizes(cfg)
  inputs = {"o": size["N"] * size["H"], "down": size["F"]}.get(name, size["D"])
  return nn.initializers.normal(inputs**-0.5)


# Every norm is `norm(cfg, p, name, x)`, with `p` the block's or the model's
# parameters; `unit` is the same before gain and bias, in float32 or wider.


def rms_unit(cfg: ModelConfig, x: jax.Array) -> jax.Array:
  """x / rms(x) over the last axis."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return x * jax.lax.rsqrt(
    jnp.mean(x * x, axis=-1, keepdims=True) + cfg.norm_eps
  )


def rms_norm(cfg: ModelConfig, p, name: str, x: jax.Array) -> jax.Array:
  """RMSNorm with gain in float32 or wider, cast to x's dtype last."""
  y = rms_unit(cfg, x)
  return affine(cfg, p, name, y).astype(x.dtype)


def layer_unit(cfg: ModelConfig, x: jax.Array) -> jax.Array:
  """(x - mean(x)) / std(x) over the last axis."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  x = x - jnp.mean(x, axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(
    jnp.mean(x * x, axis=-1, keepdims=True) + cfg.norm_eps
  )


def layer_norm(cfg: ModelConfig, p, name: str, x: jax.Array) -> jax.Array:
  """LayerNorm with gain and bias in float32 or wider, cast last."""
  return affine(cfg, p, name, layer_unit(cfg, x)).astype(x.dtype)


def affine(cfg: ModelConfig, p, name: str, x: jax.Array) -> jax.Array:
  """x * (norm_offset + weight), plus the bias where there is one."""
  x = x * (cfg.norm_offset + p[name].astype(x.dtype))
  bias = p.get(f"{name}_bias")
  return x if bias is None else x + bias.astype(x.dtype)


def rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates the leading dims of [B, T, ., H]: i and i + R / 2 turn together.

  cos and sin are [B or 1, T, R / 2].
  """
  half = cos.shape[-1]
  first, second, rest = jnp.split(x, [half, 2 * half], axis=-1)
  cos, sin = cos[:, :, None, :], sin[:, :, None, :]
  return jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin, rest], axis=-1
  )


def dense(equation: str, p, name: str, x: jax.Array) -> jax.Array:
  """x times p[name], plus its bias where there is one."""
  y = jnp.einsum(equation, x, p[name])
  bias = p.get(f"{name}_bias")
  return y if bias is None else y + bias


def mlp_input(
  cfg: ModelConfig, p, x: jax.Array, site: SiteFn, unit: Callable
) -> jax.Array:
  """What the MLP reads, through the sites `mlp_norm` and `mlp_in`."""
  # Recorded before the gain and before the cast: float32 in bf16 models.
  normed = site("mlp_norm", unit(cfg, x))
  normed = affine(cfg, p, "pre_mlp_norm", normed).astype(x.dtype)
  return site("mlp_in", normed)


def mlp(cfg: ModelConfig, p, x: jax.Array, site: SiteFn) -> jax.Array:
  """The MLP, gated where there is a gate: `mlp_in` -> `mlp_raw`, [B, T, D].

  `p` holds `up` [D, F], `down` [F, D], and `gate` [D, F] or not.
  """
  act = ACTIVATIONS[cfg.activation]
  if "gate" in p:
    gate = dense("btd,df->btf", p, "gate", x)
    hidden = act(gate) * dense("btd,df->btf", p, "up", x)
  else:
    hidden = act(dense("btd,df->btf", p, "up", x))
  hidden = site("mlp_hidden", hidden)
  return site("mlp_raw", dense("btf,fd->btd", p, "down", hidden))


def self_attention(
  cfg: ModelConfig, p, x: jax.Array, layer: Layer, ctx: Context, site: SiteFn
):
  """Attention and its output projection, [B, T, D].

  Returns:
    What the heads write, before any post-norm, and the keys and values of
    these tokens, [B, T, K, H] each.
  """
  q = dense("btd,dnh->btnh", p, "q", x)
  k = dense("bsd,dkh->bskh", p, "k", x)
  v = dense("bsd,dkh->bskh", p, "v", x)
  if cfg.qk_norm:
    q = rms_norm(cfg, p, "q_norm", q)
    k = rms_norm(cfg, p, "k_norm", k)
  if cfg.rope_dim:
    which = layer.is_global.astype(jnp.int32)
    cos, sin = ctx.cos[which], ctx.sin[which]
    q, k = rope(q, cos, sin), rope(k, cos, sin)
  new = k, v
  if layer.cache is not None:
    k, v = (
      jax.lax.dynamic_update_slice_in_dim(old, here, ctx.start, axis=1)
      for old, here in zip(layer.cache, new, strict=True)
    )
  z = attention.attend(
    cfg,
    q,
    k,
    v,
    layer.is_global,
    start=ctx.start,
    valid=ctx.valid,
    implementation=ctx.attention,
  )
  z = site("attn_z", z.reshape(*x.shape[:2], cfg.num_heads * cfg.head_dim))
  z = z.reshape(*x.shape[:2], cfg.num_heads, cfg.head_dim)
  return dense("btnh,nhd->btd", p, "o", z), new


def pre_norm_block(
  cfg: ModelConfig,
  p,
  x: jax.Array,
  layer: Layer,
  ctx: Context,
  site: SiteFn,
  *,
  norm: Callable,
  unit: Callable,
):
  """A block with norms before its branches and none after.

  The MLP reads the stream after attention, or beside it, where the residual
  is parallel.

  Returns:
    The residual stream [B, T, D] after the block, and `self_attention`'s keys
    and values.
  """
  x = site("resid_pre", x)
  with jax.named_scope("attention"):
    normed = norm(cfg, p, "pre_attn_norm", x)
    out, kv = self_attention(cfg, p, normed, layer, ctx, site)
    out = site("attn_out", out)
  if not cfg.parallel_residual:
    x = site("resid_mid", x + out)
  with jax.named_scope("mlp"):
    read = mlp_input(cfg, p, x, site, unit)
    branch = site("mlp_out", mlp(cfg, p, read, site))
  if cfg.parallel_residual:
    branch = out + branch
  return site("resid_post", x + branch), kv
