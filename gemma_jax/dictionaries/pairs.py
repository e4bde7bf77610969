"""Active latents as a list of (row, latent, value), and sums along it.

Of M latents, k fire on a token. After the encoder's product everything that a
training step needs touches only those: a row of the decoder for each pair in
the reconstruction, a row of each gradient on the way back. Pairs are handled
in blocks whose working set stays in cache.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemma_jax.dictionaries.axes import ALONE, Axes, gather, size
from gemma_jax.dictionaries.selection import kth_largest

CHUNK = 16  # neighbouring latents of which only the largest is compared first
# Pairs at once. On CPUs their rows stay in cache (measured on two cores);
# GPUs want much work at once, within their memory (not measured).
BLOCK, BLOCK_ON_GPUS = 512, 2**16


class Pairs(NamedTuple):
  """Which latents fire where, in the order of the rows.

  Attributes:
    row: int32 [P]; B and more after the last pair.
    latent: int32 [P].
    value: float32 [P], 0 after the last pair.
    count: int32, how many there are.
    cut: float32 [] or [B, 1], the smallest value kept.
  """

  row: jax.Array
  latent: jax.Array
  value: jax.Array
  count: jax.Array
  cut: jax.Array


def _chunks(z):
  """[B, M] as [B * M / CHUNK, CHUNK], filled up with zeros."""
  z = jnp.pad(z, ((0, 0), (0, -z.shape[1] % CHUNK)))
  return z.reshape(-1, CHUNK)


def per_row(z, k, most: int, axes: Axes = ALONE) -> Pairs:
  """The k largest of ReLU(z) in every row, exactly.

  The k largest values of a row lie in those k chunks of it that have the
  largest maxima, so two short selections do the work of a long one. Of values
  that equal the k-th the first are kept, as a sort has them; where a mesh
  splits the latents, all of them.

  Args:
    z: [B, M], this device's latents.
    k: how many, a scalar; may be traced.
    most: the largest k that is possible.
    axes: mesh axes.
  """
  rows, width = z.shape
  chunks = _chunks(z).reshape(rows, -1, CHUNK)
  n = min(most, chunks.shape[1])
  _, which = jax.lax.top_k(chunks.max(-1), n)
  which = jnp.sort(which, axis=-1)  # so that of equal values the first win
  near = jnp.take_along_axis(chunks, which[..., None], axis=1)
  values, at = jax.lax.top_k(near.reshape(rows, -1), min(most, n * CHUNK))
  latent = jnp.take_along_axis(which, at // CHUNK, axis=1) * CHUNK + at % CHUNK
  best = gather(values, axes.latent)
  if axes.latent:
    best = jax.lax.top_k(best, min(most, best.shape[1]))[0]
  last = jnp.clip(jnp.asarray(k, jnp.int32), 1, best.shape[1]) - 1
  cut = jnp.take_along_axis(best, jnp.full((rows, 1), last), axis=1)
  keep = (values >= cut) & (values > 0) & (latent < width)
  if not axes.latent:
    keep &= jnp.arange(values.shape[1]) <= last
  row = jnp.broadcast_to(jnp.arange(rows)[:, None], keep.shape)
  return Pairs(
    row.ravel(),
    jnp.where(keep, latent, 0).ravel(),
    jnp.where(keep, values, 0).ravel(),
    jnp.asarray(keep.size),
    jnp.maximum(cut, 0),
  )


def per_batch(z, k, most: float, axes: Axes = ALONE) -> Pairs:
  """The k * B largest of ReLU(z) over all rows, exactly and without a sort.

  The k * B largest chunk maxima tell which chunks can hold such a value; the
  cut is found among those. On a mesh B counts the rows of all devices.

  Args:
    z: [B, M], this device's rows and latents.
    k: how many for each row on average, a scalar; may be traced.
    most: the largest k that is possible.
    axes: mesh axes.
  """
  rows, width = z.shape
  total_rows = rows * size(axes.data)
  room = min(max(int(most * total_rows), 1), z.size)
  keep = jnp.floor(k * total_rows)
  chunks = _chunks(z)
  highest = chunks.max(-1)
  floor = kth_largest(highest, keep, axes=axes.both)
  # A cut below all positive values is so small that it compares equal to 0.
  near = _where((highest >= floor) & (highest > 0), min(room, len(highest)))
  values = chunks.at[near].get(mode="fill", fill_value=0)
  cut = kth_largest(values, keep, axes=axes.both)
  kept = (values >= cut) & (values > 0)
  at = _where(kept.ravel(), room)
  per = -(-width // CHUNK)
  chunk = near.at[at // CHUNK].get(mode="fill", fill_value=len(highest))
  return Pairs(
    chunk // per,
    chunk % per * CHUNK + at % CHUNK,
    values.ravel().at[at].get(mode="fill", fill_value=0),
    jnp.minimum(jnp.sum(kept, dtype=jnp.int32), room),
    cut,
  )


def _where(mask, room: int):
  """Places of the first `room` True in [n]; n where there are fewer."""
  place = jnp.where(mask, jnp.cumsum(mask, dtype=jnp.int32) - 1, room)
  out = jnp.full(room, mask.size, jnp.int32)
  return out.at[place].set(
    jnp.arange(mask.size, dtype=jnp.int32), mode="drop", unique_indices=True
  )


def _block(pairs) -> int:
  most = BLOCK if jax.default_backend() == "cpu" else BLOCK_ON_GPUS
  return min(most, len(pairs))


def _over_blocks(count, arrays, body, start):
  """Folds `body(carry, number, *block)` over the first `count` pairs."""
  block = _block(arrays[0])
  # Places after the last pair name no row and weigh nothing.
  blocks = [jnp.pad(a, (0, -len(a) % block)).reshape(-1, block) for a in arrays]

  def step(i, carry):
    return body(carry, i, *(a[i] for a in blocks))

  return jax.lax.fori_loop(0, -(-count // block), step, start)


def _scatter(size, out, value, table, source, count):
  """Sum over pairs of value * table[source] into row `out` of [size, d]."""

  def body(total, _, out, value, source):
    rows = table.at[source].get(mode="clip") * value[:, None]
    return total.at[out].add(rows, mode="drop")

  start = jnp.zeros((size, table.shape[1]), table.dtype)
  return _over_blocks(count, (out, value, source), body, start)


def _dots(a, at_a, b, at_b, count):
  """Of row at_a of a with row at_b of b, for every pair: [P]."""

  def body(found, i, at_a, at_b):
    rows = a.at[at_a].get(mode="clip") * b.at[at_b].get(mode="clip")
    return found.at[i].set(rows.sum(-1))

  block = _block(at_a)
  start = jnp.zeros((-(-len(at_a) // block), block), a.dtype)
  found = _over_blocks(count, (at_a, at_b), body, start)
  return found.ravel()[: len(at_a)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def decode(
  prefix_widths: tuple[int, ...], W_enc, b_enc, W_dec, b_in, x, first, pairs
) -> jax.Array:
  """What the latents of every Matryoshka group write: [G, B, E].

  The gradient reaches the encoder through the pairs alone. Multiplied out by
  the chain rule: with c the cotangent of what a pair writes to, the latent's
  derivative is da = c . W_dec[latent]; W_dec[latent] gets value * c,
  W_enc[:, latent] gets da * x, b_enc[latent] gets da.

  Args:
    prefix_widths: where the groups end, over all devices.
    W_enc: [D, M]; only its gradient is of interest, the values are known.
    b_enc: [M].
    W_dec: [M, E].
    b_in: [D], subtracted from the input; zeros where nothing is.
    x: [B, D], from which `b_in` was subtracted.
    first: number of this device's first latent.
    pairs: what fires.
  """
  out = _group_rows(prefix_widths, len(x), first, pairs)
  size = len(prefix_widths) * len(x)
  flat = _scatter(size, out, pairs.value, W_dec, pairs.latent, pairs.count)
  return flat.reshape(len(prefix_widths), len(x), -1)


def _group_rows(prefix_widths, rows, first, pairs):
  ends = jnp.asarray(prefix_widths[:-1], jnp.int32)
  group = jnp.searchsorted(ends, pairs.latent + first, side="right")
  size = len(prefix_widths) * rows
  return jnp.where(pairs.row < rows, group * rows + pairs.row, size)


def _decode_forward(prefix_widths, W_enc, b_enc, W_dec, b_in, x, first, pairs):
  out = decode(prefix_widths, W_enc, b_enc, W_dec, b_in, x, first, pairs)
  return out, (W_enc, W_dec, x, first, pairs)


def _decode_backward(prefix_widths, kept, cotangent):
  W_enc, W_dec, x, first, pairs = kept
  count, latent = pairs.count, pairs.latent
  at = _group_rows(prefix_widths, len(x), first, pairs)
  flat = cotangent.reshape(-1, cotangent.shape[-1])
  da = _dots(flat, at, W_dec, latent, count)
  da = jnp.where(pairs.value > 0, da, 0)
  d_dec = _scatter(len(W_dec), latent, pairs.value, flat, at, count)
  d_enc = _scatter(len(W_dec), latent, da, x, pairs.row, count).T
  d_bias = jnp.zeros(len(W_dec), da.dtype).at[latent].add(da)
  # Every row's share of -b_in adds up before the encoder turns it.
  return d_enc, d_bias, d_dec, -(W_enc @ d_bias), None, None, None


decode.defvjp(_decode_forward, _decode_backward)


def fired(pairs: Pairs, width: int) -> jax.Array:
  """On how many rows each latent fires: int32 [M]."""
  return jnp.zeros(width, jnp.int32).at[pairs.latent].add(pairs.value > 0)
