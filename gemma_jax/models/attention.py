"""Attention: scores, window, soft-cap, softmax; three implementations.

`xla` computes all T x S scores and has every feature. `chunked` goes through
the queries in chunks and only looks at the keys that a chunk may see: the
same numbers with less work and far less memory. `cudnn` is the fused kernel
of NVIDIA's library. One that lacks a feature of the model raises.
"""

import math

import jax
import jax.numpy as jnp

from gemma_jax.models.config import ModelConfig

IMPLEMENTATIONS = ("auto", "xla", "chunked", "cudnn")
# Queries of a chunk: the fastest of 128, 256 and 512 on a CPU; not measured on
# GPUs. And slices of the queries that are compiled one by one, each with the
# keys that it may see.
CHUNK = 128
SLICES = 16


def choose(cfg: ModelConfig, implementation: str, length: int, dtype) -> str:
  """The implementation that will run.

  Args:
    cfg: the model.
    implementation: one of `IMPLEMENTATIONS`; "auto" takes `chunked` for
      contexts of more than one chunk, else `xla`.
    length: T, queries.
    dtype: the compute dtype.

  Raises:
    ValueError: an unknown one, or one that lacks a feature of this model.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"attention={implementation!r} is unknown; expected one of "
      f"{', '.join(IMPLEMENTATIONS)}."
    )
  if implementation == "auto":
    return "chunked" if length > CHUNK else "xla"
  if implementation == "cudnn":
    lacks = []
    if cfg.attn_softcap is not None:
      lacks.append(f"soft-capped scores (attn_softcap={cfg.attn_softcap})")
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
      lacks.append(f"{jnp.dtype(dtype).name} (only bfloat16 and float16)")
    if cfg.head_dim % 8 or cfg.head_dim > 256:
      lacks.append(f"heads of {cfg.head_dim} (a multiple of 8, up to 256)")
    if jax.default_backend() != "gpu":
      lacks.append(f"a device of kind {jax.default_backend()!r} (only GPUs)")
    if lacks:
      raise ValueError(
        f"attention='cudnn' lacks what this model needs: {'; '.join(lacks)}. "
        "Use 'xla', 'chunked' or 'auto', which have every feature."
      )
  return implementation


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
  """cap * tanh(x / cap), or x itself when cap is None."""
  return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
  cfg: ModelConfig,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  is_global: jax.Array,
  *,
  start: jax.Array | int,
  valid: jax.Array | None,
  implementation: str,
) -> jax.Array:
  """Causal softmax attention, within the window where a layer is local.

  A key is seen from its own slot on, and a local layer's window counts slots
  as Hugging Face's masks do.

  Args:
    cfg: the model.
    q: [B, T, N, H], after norm and RoPE.
    k: [B, S, K, H].
    v: [B, S, K, H].
    is_global: bool scalar.
    start: the slot, among the keys, of the first query.
    valid: bool [B or 1, S], False where a key is padding; None for none.
    implementation: of `choose`; only "xla" takes queries that do not begin
      with the keys (S > T).

  Returns:
    [B, T, N, H].
  """
  if implementation == "cudnn":
    return _cudnn(cfg, q, k, v, is_global, valid)
  if implementation == "chunked":
    return _chunked(cfg, q, k, v, is_global, valid)
  see = _visible(cfg, is_global, q.shape[1], k.shape[1], start, 0, valid)
  return _softmax(cfg, q, k, v, see)


def _visible(cfg, is_global, queries, keys, first_query, first_key, valid):
  """bool [B or 1, T, S]: which key each query sees."""
  i = first_query + jnp.arange(queries)[:, None]
  j = first_key + jnp.arange(keys)[None, :]
  see = i >= j
  if cfg.window is not None:
    see &= (i - j < cfg.window) | is_global
  if valid is None:
    return see[None]
  return see & valid[:, None, first_key : first_key + keys]


def _softmax(cfg, q, k, v, see):
  """All scores at once; scaled, then capped, then masked, as in Gemma 2."""
  batch, length = q.shape[:2]
  groups = cfg.num_heads // cfg.num_kv_heads
  q = q.reshape(batch, length, cfg.num_kv_heads, groups, cfg.head_dim)
  scores = jnp.einsum("btkgh,bskh->bkgts", q, k)
  scores = scores * jnp.asarray(cfg.query_scale, q.dtype)
  scores = soft_cap(scores, cfg.attn_softcap)
  scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
  lowest = jnp.finfo(scores.dtype).min
  scores = jnp.where(see[:, None, None], scores, lowest)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  z = jnp.einsum("bkgts,bskh->btkgh", weights, v)
  return z.reshape(batch, length, cfg.num_heads, cfg.head_dim)


def _either(cfg, is_global, length, run):
  """run(True) or run(False), with a choice only where they differ."""
  if cfg.window is None or cfg.window >= length:
    return run(True)
  return jax.lax.cond(is_global, lambda: run(True), lambda: run(False))


def _chunked(cfg, q, k, v, is_global, valid):
  length = q.shape[1]
  q = jnp.pad(q, ((0, 0), (0, -length % CHUNK), (0, 0), (0, 0)))
  chunks = q.shape[1] // CHUNK
  size = CHUNK * math.ceil(chunks / SLICES)

  def run(is_global):
    return jnp.concatenate(
      [slice_of(low, is_global) for low in range(0, chunks * CHUNK, size)],
      axis=1,
    )[:, :length]

  def slice_of(low, is_global):
    high = min(low + size, chunks * CHUNK)
    first = 0 if is_global else max(0, low - cfg.window + 1)
    last = min(high, length)
    keys, values = k[:, first:last], v[:, first:last]

    # Gradients compute its scores again; they would keep those of all chunks.
    @jax.checkpoint
    def chunk(start_and_q):
      start, part = start_and_q
      see = _visible(cfg, is_global, CHUNK, last - first, start, first, valid)
      return _softmax(cfg, part, keys, values, see)

    if high - low == CHUNK:
      return chunk((low, q[:, low:high]))
    starts = jnp.arange(low, high, CHUNK)
    parts = q[:, low:high].reshape(q.shape[0], -1, CHUNK, *q.shape[2:])
    z = jax.lax.map(chunk, (starts, parts.swapaxes(0, 1)))
    return z.swapaxes(0, 1).reshape(q.shape[0], -1, *q.shape[2:])

  return _either(cfg, is_global, length, run)


def _cudnn(cfg, q, k, v, is_global, valid):
  mask = None
  if valid is not None:
    shape = (q.shape[0], 1, q.shape[1], k.shape[1])
    mask = jnp.broadcast_to(valid[:, None, None, :], shape)

  def run(is_global):
    local = None if is_global else (cfg.window - 1, 0)
    return jax.nn.dot_product_attention(
      q,
      k,
      v,
      mask=mask,
      scale=cfg.query_scale,
      is_causal=True,
      local_window_size=local,
      implementation="cudnn",
    )

  return _either(cfg, is_global, q.shape[1], run)
