"""A batch as the loss sees it, and the loss's terms besides the error."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemma_jax.dictionaries.axes import (
  Axes,
  gather,
  join,
  offset,
  size,
  spread,
  total,
)
from gemma_jax.dictionaries.core.coordinates import (
  centre_tokens,
  normalise,
  row_norms,
  slices,
)
from gemma_jax.dictionaries.jump import step

COUNTING = ("l0", "target_l0", "target_l0_token")  # they train thresholds


class Seen(NamedTuple):
  """A batch in normalised coordinates; `rows` counts those of all devices."""

  x: jax.Array
  y: jax.Array
  b_in: jax.Array
  rows: int
  axes: Axes

  @property
  def read(self):
    """What the encoder reads."""
    return self.x - self.b_in


def see(cfg, recipe, params, state, batch, axes) -> tuple[dict, Seen]:
  """A raw batch as the dictionary sees it, and its parameters as they act.

  The trained logarithm of a threshold becomes the threshold.
  """
  x, y = batch["x"], batch["y"]
  if cfg.layer_norm:
    x, y = centre_tokens(x)[0], centre_tokens(y)[0]
  x, y = normalise(state.norm, x, y)
  params = dict(params)
  if recipe.log_threshold and "threshold" in params:
    params["threshold"] = jnp.exp(params["threshold"])
  b_in = jnp.zeros(cfg.d_in)
  if recipe.subtract_b_dec and not cfg.is_transcoder:
    b_in = spread(params["b_dec"], axes.latent)
  return params, Seen(x, y, b_in, len(x) * size(axes.data), axes)


def ramp(length: float, steps) -> jax.Array:
  return jnp.clip(steps / length, 0, 1) if length else jnp.ones(())


def scale_of(kind, seen):
  """What squared errors, summed, are divided by."""
  if kind == "sum":
    return seen.rows
  if kind == "mean":
    return seen.rows * seen.y.shape[-1]
  return jnp.maximum(spread_of(seen.y, seen), 1e-9)


def spread_of(y, seen):
  """Summed squared distance of the rows to their mean, over all devices."""
  y = jax.lax.stop_gradient(y)
  mean = total(y.sum(0), seen.axes.data) / seen.rows
  return total(jnp.sum((y - mean) ** 2), seen.axes.data)


def unit_weights(cfg, recipe, params):
  """What one unit of each latent's activation counts as in sparsity terms."""
  if not recipe.sparsity_by_norm:
    return jnp.ones(())
  if not cfg.parts:
    return row_norms(params["W_dec"])
  return sum(row_norms(params["W_dec"][:, part]) for part in slices(cfg.parts))


def sparsity(cfg, recipe, params, seen, z, acts, k):
  """The sparsity term, mean over rows."""
  axes, rows = seen.axes, seen.rows
  if recipe.sparsity == "none":
    return jnp.zeros(())
  weights = unit_weights(cfg, recipe, params)
  if recipe.sparsity == "l1":
    value = jax.nn.relu(z) if cfg.activation == "gated" else acts
    value = value * weights
    if recipe.sparsity_power == 1:
      return join(jnp.sum(value), axes.both) / rows
    # The derivative of a power is infinite at 0.
    power = jnp.where(value > 0, value, 1) ** recipe.sparsity_power
    each = join(jnp.sum(jnp.where(value > 0, power, 0), axis=-1), axes.latent)
    each = jnp.where(each > 0, each, 1) ** (1 / recipe.sparsity_power) * (
      each > 0
    )
    return join(jnp.sum(each), axes.data) / rows
  if recipe.sparsity == "tanh":
    value = jnp.tanh(recipe.tanh_scale * acts * weights)
    return join(jnp.sum(value), axes.both) / rows
  at = z if recipe.step_sees == "pre_activation" else acts
  fires = step(
    at, params["threshold"], recipe.bandwidth, recipe.gradient_to_input
  )
  if recipe.sparsity == "l0":
    return join(jnp.sum(fires), axes.both) / rows
  if recipe.sparsity == "target_l0":
    return (join(jnp.sum(fires), axes.both) / rows / k - 1) ** 2
  each = join(jnp.sum(fires, axis=-1), axes.latent)
  return join(jnp.sum(2 / k * (each - k) ** 2), axes.data) / rows


def gate_loss(cfg, recipe, params, seen, z):
  """Squared error of what the gate alone, as activation, reconstructs."""
  frozen = params
  if recipe.gated_detach:
    frozen = jax.lax.stop_gradient(params)
  rec = join(jax.nn.relu(z) @ frozen["W_dec"], seen.axes.latent)
  rec = rec + frozen["b_dec"]
  if cfg.skip:
    rec = rec + seen.x @ frozen["W_skip"]
  return join(jnp.sum((seen.y - rec) ** 2), seen.axes.data)


def aux_loss(cfg, recipe, params, seen, residual, since, limit):
  """Dead latents fit the residual: Gao et al. 2024 (arXiv 2406.04093), A.2.

  Of the dead, the `aux_k` largest of each row write without a bias. They are
  looked for among the longest dead, so that few columns of the encoder are
  read; None looks at all.
  """
  axes = seen.axes
  dead_here = since >= limit
  count = total(jnp.sum(dead_here), axes.latent)
  aux_k = cfg.d_out // 2 if recipe.aux_k is None else recipe.aux_k
  local = len(since)
  some = recipe.aux_candidates is not None
  some &= (recipe.aux_candidates or 0) < cfg.width

  def term():
    W_enc, b_enc, W_dec = (params[n] for n in ("W_enc", "b_enc", "W_dec"))
    dead, mine = dead_here, True
    if some:
      longest, index = jax.lax.top_k(
        gather(since, axes.latent), recipe.aux_candidates
      )
      dead = longest >= limit
      index = index - offset(axes.latent, local)
      mine = (index >= 0) & (index < local)
      index = jnp.clip(index, 0, local - 1)
      W_enc, b_enc, W_dec = W_enc[:, index], b_enc[index], W_dec[index]
    z = seen.read @ W_enc + b_enc
    norms = jnp.linalg.norm(W_dec, axis=-1)
    if some:
      z = join(jnp.where(mine, z, 0), axes.latent)
      norms = total(jnp.where(mine, norms, 0), axes.latent)
    acts = jax.nn.relu(z) if recipe.aux_relu else z
    rank = jax.lax.stop_gradient(z * norms if recipe.rank_by_norm else z)
    rank = jnp.where(dead, rank, -jnp.inf)
    keep = dead
    if aux_k < (rank.shape[1] if some else cfg.width):
      best = jax.lax.top_k(rank, min(aux_k, rank.shape[1]))[0]
      if not some and axes.latent:
        best = jax.lax.top_k(gather(best, axes.latent), aux_k)[0]
      keep = dead & (rank >= best[:, -1:])
    acts = jnp.where(keep & mine, acts, 0)
    rec = join(acts @ W_dec, axes.latent)
    error = join(jnp.sum((residual - rec) ** 2), axes.data)
    if recipe.aux_scale == "residual":
      error = error / jnp.maximum(spread_of(residual, seen), 1e-9)
    elif recipe.aux_scale == "total":
      error = error / jnp.maximum(spread_of(seen.y, seen), 1e-9)
    else:
      error = error / scale_of(recipe.aux_scale, seen)
    if recipe.aux_ramp:
      error = error * jnp.minimum(count / aux_k, 1)
    return error

  return jax.lax.cond(count > 0, term, lambda: jnp.zeros(()))
