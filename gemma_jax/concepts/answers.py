"""What a model answers, from its last residual stream, without its logits.

The head passes by in blocks of the vocabulary: a batch of streams by 262,144
tokens is never in memory.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemma_jax.models.config import ModelConfig
from gemma_jax.models.head import (
  add_exponentials,
  final_norm,
  head,
  logits,
  logits_of,
)

BLOCK = 4096  # tokens of the vocabulary


class Before(NamedTuple):
  """Distributions of the clean model at N positions.

  Attributes:
    log_total: [N], log-sum-exp of the logits.
    log_prob: [N], of the answer's token.
    rank: int [N], of that token; 0 is the likeliest.
    top: int [N], the likeliest token.
  """

  log_total: jax.Array
  log_prob: jax.Array
  rank: jax.Array
  top: jax.Array


class After(NamedTuple):
  """Distributions after K changes, at N positions each.

  Attributes:
    log_prob: [K, N], of the answer's token.
    kl: [K, N], KL(clean || changed), nats.
    rank: int [K, N], of the answer's token.
    flipped: bool [K, N], whether another token is the likeliest now.
  """

  log_prob: jax.Array
  kl: jax.Array
  rank: jax.Array
  flipped: jax.Array


def before(cfg: ModelConfig, params, x: jax.Array, tokens: jax.Array) -> Before:
  """The clean model's distributions.

  Args:
    cfg: of the model.
    params: of it, with its head.
    x: resid_post of the last block, [N, D].
    tokens: of the answers, int [N].
  """
  table, x = head(cfg, params), final_norm(cfg, params, x)
  own = logits_of(cfg, x, table[tokens])

  def step(carry, block):
    total, rank, best, top = carry
    ids, rows, new = block
    z = jnp.where(new, logits(cfg, x, rows), -jnp.inf)
    rank += jnp.sum((z > own[:, None]) & (ids != tokens[:, None]), axis=1)
    peak = jnp.max(z, axis=1)
    here = ids[jnp.argmax(z, axis=1)]
    top = jnp.where(peak > best, here, top)
    return (add_exponentials(*total, z), rank, jnp.maximum(best, peak), top)

  zero = jnp.zeros(len(x), jnp.int32)
  least = jnp.full(len(x), -jnp.inf)
  total, rank, _, top = _over_blocks(
    table, step, ((least, jnp.zeros(len(x))), zero, least, zero)
  )
  log_total = total[0] + jnp.log(total[1])
  return Before(log_total, own - log_total, rank, top)


def after(
  cfg: ModelConfig,
  params,
  changed: jax.Array,
  clean: jax.Array,
  known: Before,
  tokens: jax.Array,
) -> After:
  """Distributions after changes, beside the clean ones.

  Args:
    cfg: of the model.
    params: of it, with its head.
    changed: resid_post of the last block, [K, N, D].
    clean: without the change, [N, D].
    known: of `before`.
    tokens: of the answers, int [N].
  """
  table, several = head(cfg, params), changed.shape[:2]
  x = final_norm(cfg, params, changed).reshape(-1, changed.shape[-1])
  reference = final_norm(cfg, params, clean)

  def beside(ids):
    rows = jnp.broadcast_to(table[ids], (*several, table.shape[1]))
    return logits_of(cfg, x, rows.reshape(x.shape))

  every = jnp.broadcast_to(tokens, several).reshape(-1)
  tops = jnp.broadcast_to(known.top, several).reshape(-1)
  own, best = beside(tokens), beside(known.top)

  def step(carry, block):
    total, rank, over, cross, entropy = carry
    ids, rows, new = block
    z, plain = logits(cfg, x, rows), logits(cfg, reference, rows)
    p = jnp.where(new, jnp.exp(plain - known.log_total[:, None]), 0)
    cross += jnp.sum(p * z.reshape(*several, -1), axis=2)
    entropy += jnp.sum(p * plain, axis=1)
    z = jnp.where(new, z, -jnp.inf)
    rank += jnp.sum((z > own[:, None]) & (ids != every[:, None]), axis=1)
    over += jnp.sum((z > best[:, None]) & (ids != tops[:, None]), axis=1)
    return (add_exponentials(*total, z), rank, over, cross, entropy)

  zero = jnp.zeros(len(x), jnp.int32)
  total, rank, over, cross, entropy = _over_blocks(
    table,
    step,
    (
      (jnp.full(len(x), -jnp.inf), jnp.zeros(len(x))),
      zero,
      zero,
      jnp.zeros(several),
      jnp.zeros(several[1]),
    ),
  )
  log_total = total[0] + jnp.log(total[1])
  kl = entropy - known.log_total - cross + log_total.reshape(several)
  return After(
    (own - log_total).reshape(several),
    jnp.maximum(kl, 0),
    rank.reshape(several),
    (over > 0).reshape(several),
  )


def _over_blocks(table, step, carry):
  """Runs `step(carry, (ids, rows, which are new))` over the vocabulary."""
  size = min(BLOCK, len(table))

  def body(i, carry):
    # The last block begins early enough to be whole; what it repeats is old.
    start = jnp.minimum(i * size, len(table) - size)
    ids = start + jnp.arange(size)
    rows = jax.lax.dynamic_slice_in_dim(table, start, size)
    return step(carry, (ids, rows, ids >= i * size))

  return jax.lax.fori_loop(0, -(-len(table) // size), body, carry)
