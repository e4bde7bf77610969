"""From inputs to activations to reconstructions."""

import jax
import jax.numpy as jnp

from gemma_jax.dictionaries.config import DictionaryConfig


def pre_activations(params, x, dtype=None) -> jax.Array:
  """z = x @ W_enc + b_enc, [B, D] -> [B, M], float32.

  Args:
    params: of a dictionary.
    x: input; b_dec is not subtracted.
    dtype: of the factors of the product; None: float32, and on GPUs really so
      (not TF32).
  """
  W = params["W_enc"]
  if dtype is not None:
    x, W = x.astype(dtype), W.astype(dtype)
  precision = "highest" if dtype is None else None
  z = jnp.matmul(x, W, precision=precision, preferred_element_type=jnp.float32)
  return z + params["b_enc"]


def select(cfg: DictionaryConfig, params, z):
  """Activations of a folded dictionary from its pre-activations [B, M]."""
  if cfg.activation == "gated":
    pi = z - params["b_enc"]
    magnitude = jnp.exp(params["r_mag"]) * pi + params["b_mag"]
    return jnp.where(z > 0, jnp.maximum(magnitude, 0), 0)
  if cfg.activation == "topk":
    values, index = jax.lax.top_k(z, int(cfg.k))
    at = jnp.arange(len(z))[:, None], index
    return jnp.zeros_like(z).at[at].set(jnp.maximum(values, 0))
  floor = params.get("threshold", 0.0)
  return jnp.where((z > floor) & (z > 0), z, 0)


def decode_prefixes(cfg: DictionaryConfig, params, x, acts) -> list[jax.Array]:
  """Reconstructions [B, E] of every prefix, each from the one before it."""
  y = params["b_dec"]
  if cfg.skip:
    y = y + x @ params["W_skip"]
  out, start = [], 0
  for stop in cfg.prefix_widths:
    y = y + acts[:, start:stop] @ params["W_dec"][start:stop]
    out.append(y)
    start = stop
  return out
