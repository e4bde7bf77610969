"""Next-token distributions of two models over one vocabulary.

All take logits or log-probabilities [..., V], work in float32 log-softmax,
return float32 [...], and can be jitted. -inf is an impossible token.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

_LN2 = float(np.log(2))


def kl(a: jax.Array, b: jax.Array) -> jax.Array:
  """KL(A || B) = sum p_A log(p_A / p_B), nats (Kullback and Leibler 1951).

  Args:
    a: logits [..., V].
    b: logits [..., V] over the same vocabulary.

  Raises:
    ValueError: other shapes, or values that are NaN or +inf (not under jit).
  """
  return _kl(*_pair(a, b))


def jsd(a: jax.Array, b: jax.Array) -> jax.Array:
  """Jensen-Shannon divergence, bits, in [0, 1] (Lin 1991).

  Args and errors as `kl`.
  """
  return _jsd(*_pair(a, b))


def hellinger(a: jax.Array, b: jax.Array) -> jax.Array:
  """Hellinger distance sqrt(sum (sqrt p_A - sqrt p_B)^2 / 2), in [0, 1].

  Args and errors as `kl`.
  """
  return _hellinger(*_pair(a, b))


def top1_agreement(a: jax.Array, b: jax.Array) -> jax.Array:
  """1 where both prefer the same token, else 0; ties go to the first.

  Args and errors as `kl`.
  """
  a, b = _pair(a, b)
  return (a.argmax(-1) == b.argmax(-1)).astype(jnp.float32)


def topk_overlap(a: jax.Array, b: jax.Array, *, k: int = 10) -> jax.Array:
  """Jaccard index of the k likeliest tokens, in [0, 1].

  Args:
    a: logits [..., V].
    b: logits [..., V] over the same vocabulary.
    k: tokens, at most V.

  Raises:
    ValueError: as `kl`, or another k.
  """
  return _topk_overlap(*_pair(a, b), k)


def rbo(
  a: jax.Array, b: jax.Array, *, p: float = 0.9, depth: int = 100
) -> jax.Array:
  """Rank-biased overlap of the likeliest tokens, extrapolated, in [0, 1].

  A_k p^k + (1 - p) / p sum_{d=1..k} A_d p^d with A_d the share that the first
  d tokens have in common (Webber, Moffat and Zobel 2010, "A similarity measure
  for indefinite rankings": RBO_EXT of lists of one length). The first 10
  ranks have 86 % of the weight at p = .9.

  Args:
    a: logits [..., V].
    b: logits [..., V] over the same vocabulary.
    p: persistence, in (0, 1); the larger, the deeper.
    depth: ranks k that are compared, or V if that is less.

  Raises:
    ValueError: as `kl`, or another p or depth.
  """
  if not 0 < p < 1:
    raise ValueError(f"expected a persistence in (0, 1), got {p}")
  a, b = _pair(a, b)
  return _rbo(a, b, p, min(depth, a.shape[-1]))


def _pair(a, b) -> tuple[jax.Array, jax.Array]:
  a, b = jnp.asarray(a), jnp.asarray(b)
  if a.ndim < 1 or b.ndim < 1 or a.shape[-1] != b.shape[-1]:
    raise ValueError(
      f"expected logits [..., V] over one vocabulary, got {a.shape} and "
      f"{b.shape}; of two vocabularies, compare texts by cross_likelihood"
    )
  if a.shape != b.shape:
    raise ValueError(
      f"expected logits at the same places, got {a.shape} and {b.shape}"
    )
  for name, x in (("a", a), ("b", b)):
    # Under jit there are no values to look at yet.
    if not isinstance(x, jax.core.Tracer) and (bad := int(_undefined(x))):
      raise ValueError(
        f"expected logits below infinity, got {bad} NaN or +inf in {name}"
      )
  return a.astype(jnp.float32), b.astype(jnp.float32)


# Compiled whole, so that no intermediate [..., V] is kept outside of jit.


@jax.jit
def _undefined(x):
  return jnp.sum(jnp.isnan(x) | (x == jnp.inf))


@jax.jit
def _kl(a, b):
  return _divergence(jax.nn.log_softmax(a), jax.nn.log_softmax(b))


@jax.jit
def _jsd(a, b):
  a, b = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
  middle = jnp.logaddexp(a, b) - _LN2
  found = _divergence(a, middle) + _divergence(b, middle)
  return jnp.clip(found / (2 * _LN2), 0, 1)


@jax.jit
def _hellinger(a, b):
  a, b = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
  squares = jnp.sum(jnp.square(jnp.exp(a / 2) - jnp.exp(b / 2)), axis=-1)
  return jnp.minimum(jnp.sqrt(squares / 2), 1)


@functools.partial(jax.jit, static_argnums=2)
def _topk_overlap(a, b, k):
  shared = _same(a, b, k).sum((-2, -1))
  return shared / (2 * k - shared)


@functools.partial(jax.jit, static_argnums=3)
def _rbo(a, b, p, depth):
  same = _same(a, b, depth)
  ranks = jnp.arange(depth)
  # A token counts from the deeper of its two ranks on.
  deeper = jnp.sum(same * jnp.maximum(ranks[:, None], ranks), axis=-1)
  deeper = jnp.where(same.any(-1), deeper, depth)
  counts = jnp.sum(deeper[..., None] <= ranks, axis=-2)
  agreement = counts / (ranks + 1)
  weights = (1 - p) / p * p ** (ranks + 1.0)
  # Not a product of matrices, which GPUs would round to TF32.
  found = agreement[..., -1] * p**depth + jnp.sum(agreement * weights, axis=-1)
  return jnp.clip(found, 0, 1)


def _divergence(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
  """KL in nats from log-probabilities.

  Terms are p log(p / q) - p + q, which sum to the same and are never negative:
  of near distributions the plain terms cancel and leave rounding.
  """
  p, q = jnp.exp(log_p), jnp.exp(log_q)
  ratio = jnp.where(p > 0, log_q - log_p, 0)
  near = jnp.abs(ratio) < 1
  close = p * (jnp.expm1(jnp.where(near, ratio, 0)) - ratio)
  terms = jnp.where(near & (p > 0), close, q - p - p * ratio)
  return jnp.sum(terms, axis=-1)


def _same(a: jax.Array, b: jax.Array, k: int) -> jax.Array:
  """Whether a's token of one rank is b's of another, [..., k, k]."""
  if not 1 <= k <= a.shape[-1]:
    raise ValueError(f"expected 1 to {a.shape[-1]} ranks, got {k}")
  first, second = (jax.lax.top_k(x, k)[1] for x in (a, b))
  return first[..., :, None] == second[..., None, :]
