"""The head: from the last residual stream to logits, all or some."""

import jax
import jax.numpy as jnp

from gemma_jax.models import families
from gemma_jax.models.attention import soft_cap
from gemma_jax.models.config import ModelConfig


def unembed(cfg: ModelConfig, params, x: jax.Array) -> jax.Array:
  """Final norm, head and soft-cap: resid_post [..., D] -> logits [..., V].

  Raises:
    ValueError: see `head`.
  """
  table = head(cfg, params)
  with jax.named_scope("unembed"):
    return logits(cfg, final_norm(cfg, params, x), table)


def final_norm(cfg: ModelConfig, params, x: jax.Array) -> jax.Array:
  """What the head reads: resid_post [..., D] of the last block, normalised."""
  return families.of(cfg).norm(cfg, params, "final_norm", x)


def logits(cfg: ModelConfig, x: jax.Array, rows: jax.Array) -> jax.Array:
  """Of some tokens of the vocabulary, soft-capped.

  Args:
    cfg: of the model.
    x: of `final_norm`, [..., D].
    rows: of the head, [S, D].

  Returns:
    [..., S] in float32 or wider.
  """
  product = jnp.einsum(
    "...d,vd->...v",
    x,
    rows,
    preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
  )
  return soft_cap(product, cfg.final_softcap)


def logits_of(cfg: ModelConfig, x: jax.Array, rows: jax.Array) -> jax.Array:
  """Of one token at each position: `logits`, with rows [..., D]; [...]."""
  product = jnp.einsum(
    "...d,...d->...",
    x,
    rows,
    preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
  )
  return soft_cap(product, cfg.final_softcap)


def add_exponentials(
  peak: jax.Array, total: jax.Array, logits: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """A softmax's sum, of a vocabulary that passes by in blocks.

  Args:
    peak: the largest logit so far, [N]; -inf at first.
    total: sum of exp(logit - peak) so far, [N]; 0 at first.
    logits: of more tokens, [N, S].

  Returns:
    peak and total with them.
  """
  larger = jnp.maximum(peak, jnp.max(logits, axis=1))
  more = jnp.sum(jnp.exp(logits - larger[:, None]), axis=1)
  return larger, total * jnp.exp(peak - larger) + more


def head(cfg: ModelConfig, params) -> jax.Array:
  """The unembedding [V, D], which may be the embedding.

  Raises:
    ValueError: it is not loaded (`layers=` of a model that has its own).
  """
  name = "embed" if cfg.tied else "unembed"
  if name not in params:
    raise ValueError(
      "The head is not loaded: load the model without `layers` for logits."
    )
  return params[name]
