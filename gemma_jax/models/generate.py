"""Continuations, token by token, in one program."""

import functools

import jax
import jax.numpy as jnp

from gemma_jax.models import sharding
from gemma_jax.models.forward import run as run_model
from gemma_jax.models.head import unembed


@functools.partial(jax.jit, static_argnums=0)
def generate(static, params, tokens, valid, temperature, edits, key):
  """Greedy or sampled continuations.

  Args:
    static: the config, how many tokens to add, the edited sites, the
      attention of whole contexts, and whether to keep keys and values.
    params: see `forward`.
    tokens: int [B, T], padded on the left.
    valid: bool [B, T], False at padding, or None.
    temperature: 0 for the most likely token.
    edits: one for each edited site.
    key: of the sampling.

  Returns:
    int [B, how many], `pad_id` after the first of `eos_ids` in a row.
  """
  cfg, count, sites, attention, cached = static
  batch, length = tokens.shape
  if not count:
    return jnp.zeros((batch, 0), tokens.dtype)
  slots = length + count
  if valid is None:
    valid = jnp.ones(tokens.shape, bool)
  seen = jnp.pad(valid, ((0, 0), (0, count)), constant_values=True)
  edits = list(zip(sites, edits, strict=True))
  # The last block's output of the last token only: no logits of the others.
  last = f"blocks.{cfg.num_layers - 1}.resid_post"

  def run(tokens, valid, which, **kwargs):
    _, found, cache = run_model(
      cfg,
      params,
      tokens,
      valid,
      capture=(last,),
      edits=edits,
      stop_at=cfg.num_layers,
      attention=attention,
      **kwargs,
    )
    x = jax.lax.dynamic_index_in_dim(found[last], which, 1, keepdims=False)
    return unembed(cfg, params, x), cache

  def choose(logits, i):
    def sample():
      draw = jax.random.fold_in(key, i)
      return jax.random.categorical(draw, logits / temperature)

    greedy = functools.partial(jnp.argmax, logits, axis=-1)
    return jax.lax.cond(temperature > 0, sample, greedy).astype(tokens.dtype)

  def write(carry, logits, i):
    buffer, done = carry
    chosen = jnp.where(done, cfg.pad_id, choose(logits, i))
    ends = jnp.isin(chosen, jnp.asarray(cfg.eos_ids))
    return buffer.at[:, i].set(chosen), done | ends

  buffer = jnp.pad(tokens, ((0, 0), (0, count)), constant_values=cfg.pad_id)
  carry = buffer, jnp.zeros(batch, bool)
  cache = None
  if cached:
    logits, cache = run(tokens, valid, length - 1, keep_kv=True)
    room = ((0, 0), (0, 0), (0, count), (0, 0), (0, 0))
    cache = jax.tree.map(lambda a: jnp.pad(a, room), cache)
  else:
    logits, _ = run(buffer, seen, length - 1)
  carry = write(carry, logits, length)

  def unfinished(state):
    i, (_, done), _ = state
    return (i < slots) & ~jnp.all(done)

  def step(state):
    i, carry, cache = state
    buffer, _ = carry
    if cached:
      token = jax.lax.dynamic_slice_in_dim(buffer, i - 1, 1, axis=1)
      logits, cache = run(token, seen, 0, start=i - 1, cache=cache)
    else:
      logits, _ = run(buffer, seen, i - 1)
    return i + 1, write(carry, logits, i), cache

  state = jnp.asarray(length + 1), carry, cache
  _, (buffer, _), _ = jax.lax.while_loop(unfinished, step, state)
  return sharding.replicate(buffer[:, length:])
