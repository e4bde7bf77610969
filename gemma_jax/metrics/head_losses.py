"""The next token's loss, and KL, from a model's last residual streams.

The head passes by in blocks of the vocabulary, of which the logits of two
streams exist at once: those of all tokens are never in memory on CPUs. Blocks
are separate programs: inside a loop of one program the CPU runs everything but
the products on a single core.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.models import ModelConfig, sharding
from gemma_jax.models.head import (
  add_exponentials,
  final_norm,
  head,
  logits,
  logits_of,
)

ROWS = 256  # positions whose logits exist at once
TOKENS = 8192  # of the vocabulary, on CPUs: elsewhere all


def head_losses(
  cfg: ModelConfig,
  params,
  streams: Sequence[jax.Array],
  index: np.ndarray,
  targets: np.ndarray,
) -> np.ndarray:
  """Loss and KL of the next token at some positions.

  Args:
    cfg: of the model.
    params: of it, with its head.
    streams: resid_post of the last block, [N, D] each; the first is the clean
      model's.
    index: int [n], positions.
    targets: int [N], the token that follows each position.

  Returns:
    [S, 2, n], nats: -log p(target), and KL(first || this).
  """
  size, out = min(ROWS, len(targets)), [np.zeros((len(streams), 2, 0))]
  for start in range(0, len(index), size):
    at = index[start : start + size]
    # Programs are for `size` rows: the last are some of them again.
    rows = np.resize(at, size)
    found = _losses(cfg, params, streams, rows, targets[rows])
    out.append(found[..., : len(at)])
  return np.concatenate(out, axis=-1)


class _Sums(NamedTuple):
  """Over the tokens of the vocabulary that have passed by, [rows] each.

  Attributes:
    peak: the largest logit z.
    total: sum of exp(z - peak).
    apart: sum of exp(c - peak of c) (c - z), c the clean model's logits.
  """

  peak: jax.Array
  total: jax.Array
  apart: jax.Array


def _losses(cfg, params, streams, rows, targets) -> np.ndarray:
  """[S, 2, rows] at some rows of the streams."""
  table = head(cfg, params)
  streams = [_read(cfg, params, stream, rows) for stream in streams]
  none = np.zeros(len(rows), np.float32)
  sums = [_Sums(none - np.inf, none, none)] * len(streams)
  size = len(table) if jax.default_backend() != "cpu" else TOKENS
  for start in range(0, len(table), size):
    block = _block(table, start, min(size, len(table) - start))
    clean, sums[0] = _pass_clean(cfg, streams[0], block, sums[0])
    for i, stream in enumerate(streams[1:], 1):
      sums[i] = _pass(cfg, stream, block, clean, sums[i])
  own = _block_of(table, targets)
  return np.stack(
    [
      _finish(cfg, stream, own, sums[0], one)
      for stream, one in zip(streams, sums, strict=True)
    ]
  )


@functools.partial(jax.jit, static_argnums=0)
def _read(cfg, params, stream, rows):
  """What the head reads at some rows of a stream."""
  return final_norm(cfg, params, stream[rows])


@functools.partial(jax.jit, static_argnums=2)
def _block(table, start, size):
  return jax.lax.dynamic_slice_in_dim(table, start, size)


@jax.jit
def _block_of(table, tokens):
  return table[tokens]


@functools.partial(jax.jit, static_argnums=0)
def _pass_clean(cfg, x, block, sums: _Sums):
  """The clean model's logits, exp(c - peak), what becomes of sums; and sums."""
  z = logits(cfg, x, block)
  peak, total = add_exponentials(sums.peak, sums.total, z)
  p = jnp.exp(z - peak[:, None])
  return (z, p, jnp.exp(sums.peak - peak)), _Sums(peak, total, sums.apart)


@functools.partial(jax.jit, static_argnums=0)
def _pass(cfg, x, block, clean, sums: _Sums) -> _Sums:
  """Sums of another model, by what `_pass_clean` gave for the block."""
  c, p, factor = clean
  z = logits(cfg, x, block)
  apart = sums.apart * factor + jnp.sum(p * (c - z), axis=1)
  return _Sums(*add_exponentials(sums.peak, sums.total, z), apart)


@functools.partial(jax.jit, static_argnums=0)
def _finish(cfg, x, own, clean: _Sums, sums: _Sums):
  """[2, rows]: the loss at the tokens whose rows of the head are `own`, KL."""
  return _row_losses(logits_of(cfg, x, own), clean, sums)


def _row_losses(own, clean: _Sums, sums: _Sums):
  """[2, rows] of the logit of the token that comes, and sums of them all.

  Peaks are subtracted before anything is added: they may be large.
  """
  log = jnp.log(sums.total)
  more = (sums.peak - clean.peak) + (log - jnp.log(clean.total))
  both = jnp.stack([(sums.peak - own) + log, sums.apart / clean.total + more])
  # Whole on every process, which reads them all.
  return sharding.replicate(both)
