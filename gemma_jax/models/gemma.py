"""Gemma 2 and 3: the parameters and the arithmetic of one block.

Numerics follow Hugging Face's eager `modeling_gemma2.py` and
`modeling_gemma3.py`, which released checkpoints are evaluated with: norms in
float32 and cast last, RoPE's cos and sin cast to the compute dtype, scores
scaled, then soft-capped, then masked, softmax in float32.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gemma_jax.models.config import ModelConfig

# `site(name, x)` applies the edits of the site, records it, returns it.
SiteFn = Callable[[str, jax.Array], jax.Array]


class Layer(NamedTuple):
  """What differs from layer to layer besides the parameters; scan inputs.

  Attributes:
    index: int32 scalar, the layer's number.
    is_global: bool scalar; whether to attend beyond the window.
  """

  index: jax.Array
  is_global: jax.Array


class Context(NamedTuple):
  """What all layers share; local in entry 0 and global in entry 1.

  Attributes:
    cos: [2, B or 1, T, H / 2] in the compute dtype.
    sin: the same shape.
    mask: bool [2, B or 1, T, S], True where position T may see S.
  """

  cos: jax.Array
  sin: jax.Array
  mask: jax.Array


def layers(cfg: ModelConfig) -> Layer:
  """The per-layer scan inputs, each [L]."""
  return Layer(
    jnp.arange(cfg.num_layers, dtype=jnp.int32),
    jnp.array(cfg.layer_is_global),
  )


def context(cfg: ModelConfig, valid: jax.Array, dtype) -> Context:
  """RoPE tables and attention masks.

  Args:
    cfg: the model.
    valid: bool [B or 1, T], False at padding. Positions count valid tokens,
      so left and right padding both work.
    dtype: the compute dtype.
  """
  positions = jnp.maximum(jnp.cumsum(valid, axis=-1) - 1, 0)
  fp = jnp.promote_types(dtype, jnp.float32)
  half = jnp.arange(0, cfg.head_dim, 2).astype(fp) / cfg.head_dim

  def angles(theta, factor):
    frequency = 1.0 / (jnp.asarray(theta, fp) ** half) / factor
    return positions[..., None].astype(fp) * frequency

  both = jnp.stack(
    [
      angles(cfg.rope_theta_local, 1.0),
      angles(cfg.rope_theta_global, cfg.rope_factor_global),
    ]
  )
  distance = positions[:, :, None] - positions[:, None, :]
  # Order comes from the index: padding shares its neighbour's position.
  index = jnp.arange(valid.shape[-1])
  causal = (index[:, None] >= index[None, :]) & valid[:, None, :]
  mask = jnp.stack([causal & (distance < cfg.window), causal])
  return Context(jnp.cos(both).astype(dtype), jnp.sin(both).astype(dtype), mask)


def rms_normalise(x: jax.Array, eps: float) -> jax.Array:
  """x / rms(x) over the last axis, in float32 or wider; no gain, no cast."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def gain(x: jax.Array, weight: jax.Array, cfg: ModelConfig) -> jax.Array:
  """x * (norm_offset + weight), in x's dtype."""
  return x * (cfg.norm_offset + weight.astype(x.dtype))


def rms_norm(x: jax.Array, weight: jax.Array, cfg: ModelConfig) -> jax.Array:
  """RMSNorm with gain in float32 or wider, cast to x's dtype last."""
  y = rms_normalise(x, cfg.norm_eps)
  return gain(y, weight, cfg).astype(x.dtype)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
  """cap * tanh(x / cap), or x itself when cap is None."""
  return x if cap is None else cap * jnp.tanh(x / cap)


def rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates [B, T, ., H]: dims i and i + H / 2 turn together."""
  first, second = jnp.split(x, 2, axis=-1)
  cos, sin = cos[:, :, None, :], sin[:, :, None, :]
  return jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )


def mlp(cfg: ModelConfig, p, x: jax.Array, site: SiteFn) -> jax.Array:
  """Gated MLP and its post-norm, [B, T, D] `mlp_in` -> `mlp_out`.

  `p` holds `gate`, `up` [D, F], `down` [F, D] and `post_mlp_norm` [D].
  """
  gate = jnp.einsum("btd,df->btf", x, p["gate"])
  up = jnp.einsum("btd,df->btf", x, p["up"])
  hidden = site("mlp_hidden", jax.nn.gelu(gate, approximate=True) * up)
  raw = site("mlp_raw", jnp.einsum("btf,fd->btd", hidden, p["down"]))
  return site("mlp_out", rms_norm(raw, p["post_mlp_norm"], cfg))


def attention(cfg, p, x, layer: Layer, ctx: Context, site: SiteFn):
  """Self-attention, its output projection and post-norm, [B, T, D]."""
  which = layer.is_global.astype(jnp.int32)
  cos, sin, mask = ctx.cos[which], ctx.sin[which], ctx.mask[which]
  q = jnp.einsum("btd,dnh->btnh", x, p["q"])
  k = jnp.einsum("bsd,dkh->bskh", x, p["k"])
  v = jnp.einsum("bsd,dkh->bskh", x, p["v"])
  if cfg.qk_norm:
    q = rms_norm(q, p["q_norm"], cfg)
    k = rms_norm(k, p["k_norm"], cfg)
  q, k = rope(q, cos, sin), rope(k, cos, sin)
  batch, length = x.shape[:2]
  groups = cfg.num_heads // cfg.num_kv_heads
  q = q.reshape(batch, length, cfg.num_kv_heads, groups, cfg.head_dim)
  scores = jnp.einsum("btkgh,bskh->bkgts", q, k) * jnp.asarray(
    cfg.query_scale, q.dtype
  )
  scores = soft_cap(scores, cfg.attn_softcap)
  scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
  lowest = jnp.finfo(scores.dtype).min
  scores = jnp.where(mask[:, None, None], scores, lowest)
  weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
  z = jnp.einsum("bkgts,bskh->btkgh", weights, v)
  z = site("attn_z", z.reshape(batch, length, cfg.num_heads * cfg.head_dim))
  z = z.reshape(batch, length, cfg.num_heads, cfg.head_dim)
  out = jnp.einsum("btnh,nhd->btd", z, p["o"])
  return site("attn_out", rms_norm(out, p["post_attn_norm"], cfg))


class Block(nn.Module):
  """Declares one layer's parameters and runs it."""

  cfg: ModelConfig
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, layer: Layer, ctx: Context, site: SiteFn
  ) -> jax.Array:
    """Runs the block on the residual stream, [B, T, D] -> [B, T, D]."""
    cfg = self.cfg
    p = {
      name: self.param(name, _initializer(name, shape), shape, self.dtype)
      for name, shape in block_shapes(cfg).items()
    }
    x = site("resid_pre", x)
    normed = rms_norm(x, p["pre_attn_norm"], cfg)
    with jax.named_scope("attention"):
      x = site("resid_mid", x + attention(cfg, p, normed, layer, ctx, site))
    with jax.named_scope("mlp"):
      # Recorded before the gain and before the cast: float32 in bf16 models.
      normed = site("mlp_norm", rms_normalise(x, cfg.norm_eps))
      normed = gain(normed, p["pre_mlp_norm"], cfg).astype(x.dtype)
      x = site("resid_post", x + mlp(cfg, p, site("mlp_in", normed), site))
    return x


def block_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Shape of every parameter of one block, by name."""
  d, f, h = cfg.width, cfg.mlp_width, cfg.head_dim
  shapes = {
    "pre_attn_norm": (d,),
    "q": (d, cfg.num_heads, h),
    "k": (d, cfg.num_kv_heads, h),
    "v": (d, cfg.num_kv_heads, h),
    "o": (cfg.num_heads, h, d),
    "post_attn_norm": (d,),
    "pre_mlp_norm": (d,),
    "gate": (d, f),
    "up": (d, f),
    "down": (f, d),
    "post_mlp_norm": (d,),
  }
  if cfg.qk_norm:
    shapes |= {"q_norm": (h,), "k_norm": (h,)}
  return shapes


def _initializer(name: str, shape: tuple[int, ...]):
  if name.endswith("norm"):
    # Not zeros: a missing gain must be visible in a random model.
    return nn.initializers.normal(0.3)
  inputs = shape[0] * (shape[1] if name == "o" else 1)
  return nn.initializers.normal(inputs**-0.5)
