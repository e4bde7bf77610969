"""What directions write to the vocabulary: their logits, and how those spread.

A direction's logits are a row of a matrix that nobody can hold: 179,712 value
vectors of Gemma 3 1B by 262,144 tokens. So the vocabulary passes by in blocks,
and what stays of a direction is its moments and its extreme tokens.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gemma_jax.models import Model, families, layers, sharding
from gemma_jax.models.head import head

BLOCK = 1024  # tokens whose logits are computed at once
GROUP = 8  # tokens of a block of which the extremes are kept
# Logits of a chunk of directions, to look the extreme ones up in.
HELD = 2**27


@dataclasses.dataclass(frozen=True)
class Projection:
  """F directions in the vocabulary.

  Logits are those that a direction of its given length adds where the final
  norm divides by one: ranks, skew and kurtosis do not depend on that.

  Attributes:
    top_tokens: int32 [F, k], ids of the largest logits, largest first.
    top_logits: float32 [F, k].
    bottom_tokens: int32 [F, k], of the smallest, smallest first.
    bottom_logits: float32 [F, k].
    mean: float32 [F], over the tokens that were projected to.
    std: float32 [F], of the population.
    skew: float32 [F]; 0 where a direction has no logits but one.
    kurtosis: float32 [F], excess: 0 for a normal distribution.
  """

  top_tokens: np.ndarray
  top_logits: np.ndarray
  bottom_tokens: np.ndarray
  bottom_logits: np.ndarray
  mean: np.ndarray
  std: np.ndarray
  skew: np.ndarray
  kurtosis: np.ndarray


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["blocks", "mean", "second", "tokens"],
  meta_fields=["count"],
)
@dataclasses.dataclass(frozen=True)
class Readout:
  """The linear map from the residual stream to logits, less their mean.

  Attributes:
    blocks: float32 [blocks, BLOCK, D], the unembedding with the final norm's
      gain (and centring, if it is a LayerNorm), centred over tokens, which
      moves all logits of a direction alike; zeros behind the last token.
    mean: float32 [D], what was subtracted.
    second: float32 [D, D], second moments of the centred rows.
    tokens: int32 [count], their ids.
    count: how many tokens there are.
  """

  blocks: jax.Array
  mean: jax.Array
  second: jax.Array
  tokens: jax.Array
  count: int


def readout(model: Model, tokens=None) -> Readout:
  """How a model reads its residual stream into logits.

  The scale of the final norm depends on the whole stream and is left out, as
  is a soft-cap, which keeps the order.

  Args:
    model: with its head loaded.
    tokens: ids to project to, such as those that are words; None for all.

  Raises:
    ValueError: a head that is not loaded, ids outside the vocabulary, fewer
      than two tokens.
  """
  cfg = model.config
  table = head(cfg, model.params)
  tokens = np.arange(cfg.vocab_size) if tokens is None else np.asarray(tokens)
  whole = tokens.ndim == 1 and np.issubdtype(tokens.dtype, np.integer)
  if not whole or len(tokens) < 2:
    raise ValueError(
      f"tokens must be at least two ids, int [n]; got {tokens.dtype} of shape "
      f"{tokens.shape}."
    )
  if not 0 <= tokens.min() <= tokens.max() < cfg.vocab_size:
    raise ValueError(
      f"tokens run from {tokens.min()} to {tokens.max()}; the model's "
      f"vocabulary is 0..{cfg.vocab_size - 1}."
    )
  with jax.set_mesh(model.mesh):
    return _readout(
      cfg, table, model.params["final_norm"], jnp.asarray(tokens, jnp.int32)
    )


def value_vectors(model: Model, layer: int) -> jax.Array:
  """What each neuron of a layer's MLP writes to the residual stream, [F, D].

  Rows of the down projection; in Gemma 2 and 3 times the gain of the norm
  behind it, whose scale depends on all neurons and is left out.

  Raises:
    ValueError: a layer that does not exist or is not loaded.
  """
  cfg, loaded = model.config, model.num_loaded
  if type(layer) is not int or not 0 <= layer < loaded:
    raise ValueError(
      f"layer={layer!r} must be one of 0..{loaded - 1}: {loaded} of "
      f"{cfg.num_layers} layers are loaded."
    )
  with jax.set_mesh(model.mesh):
    vectors = model.params["blocks"]["down"][layer].astype(jnp.float32)
    return vectors * output_gain(model, layer)


def output_gain(model: Model, layer: int) -> jax.Array | float:
  """What the norm behind a layer's MLP multiplies with, [D], or 1."""
  gains = model.params["blocks"].get("post_mlp_norm")
  if gains is None:
    return 1.0
  return model.config.norm_offset + gains[layer].astype(jnp.float32)


def project(
  model: Model, layer: int, *, top_k: int = 50, tokens=None
) -> Projection:
  """Every value vector of a layer's MLP, projected to the vocabulary.

  After Geva et al. 2022 (arXiv 2203.14680), with the gains that the model
  applies on the way. For many layers, make one `readout` and call
  `project_directions` with the `value_vectors` of each.

  Args:
    model: with its head loaded.
    layer: whose MLP.
    top_k: how many tokens to keep of either end.
    tokens: see `readout`.

  Raises:
    ValueError: as `readout`, `value_vectors` and `project_directions`.
  """
  vectors = value_vectors(model, layer)
  return project_directions(model, readout(model, tokens), vectors, top_k=top_k)


def project_directions(
  model: Model,
  table: Readout,
  directions,
  *,
  top_k: int = 50,
  progress: Callable[[int], None] = lambda count: None,
) -> Projection:
  """Directions of the residual stream, projected to the vocabulary.

  Args:
    model: whose mesh splits the directions.
    table: made by `readout`.
    directions: [F, D], such as `value_vectors` or a dictionary's decoder.
    top_k: how many tokens to keep of either end.
    progress: called with the number of directions that were done.

  Raises:
    ValueError: directions of another width or not finite, a top_k that is not
      between 1 and the number of tokens.
  """
  width = table.mean.shape[0]
  if directions.ndim != 2 or directions.shape[1] != width:
    raise ValueError(
      f"directions must be [F, D] with D = {width}; got {directions.shape}."
    )
  if not 1 <= top_k <= table.count:
    raise ValueError(
      f"top_k={top_k} must be between 1 and the {table.count} tokens."
    )
  directions = np.asarray(directions, np.float32)
  bad = np.flatnonzero(~np.isfinite(directions).all(axis=1))
  if bad.size:
    raise ValueError(
      f"Directions {bad[:10].tolist()} are not finite ({bad.size} of "
      f"{len(directions)}). Is the checkpoint whole?"
    )
  held = table.blocks.shape[0] * table.blocks.shape[1]
  devices = model.mesh.size
  chunk = max(1, min(HELD // held, -(-len(directions) // devices))) * devices
  axes = model.mesh.axis_names
  split = NamedSharding(model.mesh, PartitionSpec(axes))
  parts = []
  with jax.set_mesh(model.mesh):
    # One buffer for all chunks: fresh pages would cost a quarter of the time.
    logits = jnp.zeros(
      (table.blocks.shape[0], chunk, table.blocks.shape[1]),
      device=NamedSharding(model.mesh, PartitionSpec(None, axes)),
    )
    for start in range(0, len(directions), chunk):
      some = directions[start : start + chunk]
      padded = np.zeros((chunk, width), np.float32)
      padded[: len(some)] = some
      on_mesh = jax.make_array_from_callback(
        padded.shape, split, lambda index, rows=padded: rows[index]
      )
      found, logits = _project(top_k, table, on_mesh, logits)
      found = jax.device_get(found)
      parts.append([array[: len(some)] for array in found])
      progress(len(some))
  return Projection(
    *(np.concatenate(arrays) for arrays in zip(*parts, strict=True))
  )


@functools.partial(jax.jit, static_argnums=0)
def _readout(cfg, table, gain, tokens):
  rows = table[tokens].astype(jnp.float32)
  rows = sharding.replicate(rows * (cfg.norm_offset + gain.astype(jnp.float32)))
  if families.of(cfg).norm is layers.layer_norm:
    rows = rows - jnp.mean(rows, axis=1, keepdims=True)
  mean = jnp.mean(rows, axis=0)
  rows = rows - mean
  second = jnp.matmul(rows.T, rows, precision="highest") / len(rows)
  blocks = -(-len(rows) // BLOCK)
  rows = jnp.pad(rows, ((0, blocks * BLOCK - len(rows)), (0, 0)))
  rows = rows.reshape(blocks, BLOCK, -1)
  return Readout(rows, mean, second, tokens, len(tokens))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _project(top_k, table, directions, logits):
  """The fields of a `Projection`, and the buffer of logits."""
  # The spread is known before any logit: unit logits need no second look.
  second = jnp.matmul(directions, table.second, precision="highest")
  std = jnp.sqrt(jnp.sum(second * directions, axis=1))
  scaled = directions / jnp.where(std > 0, std, 1)[:, None]
  tokens = table.blocks.shape[1]
  groups = tokens // GROUP

  def step(carry, index, real=None):
    cube, fourth, held = carry
    # By index: blocks but the last, as a scan's input, would be a copy.
    rows = jax.lax.dynamic_index_in_dim(table.blocks, index, 0, keepdims=False)
    own = scaled @ rows.T
    held = jax.lax.dynamic_update_index_in_dim(held, own, index, 0)
    # A loop over members of groups, not a reduction: it runs in cache.
    ends = []
    for member in range(GROUP):
      here = slice(member * groups, (member + 1) * groups)
      z = own[:, here]
      square = z * z
      cube, fourth = cube + square * z, fourth + square * square
      pair = (z, -z)
      if real is not None:
        pair = [jnp.where(real[here], x, -jnp.inf) for x in pair]
      ends = list(map(jnp.maximum, ends, pair)) if ends else list(pair)
    return (cube, fourth, held), tuple(ends)

  zero = jnp.zeros((len(scaled), groups), jnp.float32)
  last = len(table.blocks) - 1
  carry, (high, low) = jax.lax.scan(
    step, (zero, zero, logits), jnp.arange(last)
  )
  # Only the last block has rows that are no tokens.
  (cube, fourth, logits), ends = step(
    carry,
    last,
    last * tokens + jnp.arange(tokens) < table.count,
  )
  high, low = (
    jnp.concatenate([some, one[None]])
    for some, one in zip((high, low), ends, strict=True)
  )
  skew = jnp.sum(cube, axis=1) / table.count
  kurtosis = jnp.where(std > 0, jnp.sum(fourth, axis=1) / table.count - 3, 0)
  mean = jnp.sum(directions * table.mean, axis=1)
  ends = []
  for sign, extremes in ((1, high), (-1, low)):
    slots = _candidates(extremes, top_k, tokens)
    values = logits[
      slots // tokens, jnp.arange(len(scaled))[:, None], slots % tokens
    ]
    values = jnp.where(slots < table.count, sign * values, -jnp.inf)
    values, place = jax.lax.top_k(values, top_k)
    slots = jnp.take_along_axis(slots, place, axis=1)
    ends += [table.tokens[slots], sign * values * std[:, None] + mean[:, None]]
  fields = (*ends, mean, std, skew, kurtosis)
  return tuple(map(sharding.replicate, fields)), logits


def _candidates(extremes, top_k, tokens):
  """Slots [F, n] among which the `top_k` largest logits of each row are.

  No logit of a group exceeds the group's largest, so the largest logits lie in
  the groups whose own are largest.

  Args:
    extremes: the largest logit of each group, [blocks, F, groups].
    top_k: how many logits are wanted.
    tokens: of a block.
  """
  blocks, rows, groups = extremes.shape
  flat = jnp.moveaxis(extremes, 1, 0).reshape(rows, blocks * groups)
  best = jax.lax.top_k(flat, min(top_k, blocks * groups))[1]
  block, group = best // groups, best % groups
  members = jnp.arange(tokens // groups) * groups
  slots = block[..., None] * tokens + group[..., None] + members
  return slots.reshape(rows, -1)
