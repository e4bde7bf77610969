"""What a recipe minimises, and what it keeps true of parameters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemma_jax.dictionaries import pairs as pairs_lib
from gemma_jax.dictionaries.axes import (
  ALONE,
  Axes,
  join,
  largest,
  offset,
  total,
)
from gemma_jax.dictionaries.config import SELECTING, DictionaryConfig
from gemma_jax.dictionaries.core import terms
from gemma_jax.dictionaries.core.coordinates import (
  State,
  row_norms,
  unit,
)
from gemma_jax.dictionaries.core.forward import pre_activations, select
from gemma_jax.dictionaries.jump import jump
from gemma_jax.dictionaries.recipe import Recipe
from gemma_jax.dictionaries.selection import kth_largest

FAR = 2**30  # tokens; counts stop here, so that billions do not wrap around


def hyper(cfg: DictionaryConfig, recipe: Recipe) -> dict[str, jax.Array]:
  """What may differ between the members of a sweep, as arrays."""
  values = {
    "k": 0.0 if cfg.k is None else cfg.k,
    "sparsity": recipe.sparsity_coefficient,
    "aux": recipe.aux_coefficient,
  }
  return {name: jnp.asarray(x, jnp.float32) for name, x in values.items()}


def loss(
  cfg: DictionaryConfig,
  recipe: Recipe,
  params,
  state: State,
  batch,
  hyper,
  *,
  axes: Axes = ALONE,
  sparse: bool = True,
):
  """What the recipe minimises: reconstruction, sparsity, dead latents.

  Under `shard_map` every device passes its rows and latents and gets the
  gradient of its own part; see `axes`.

  Args:
    cfg: the dictionary.
    recipe: how it is trained.
    params: as `init` returns them.
    state: as `init` returns it.
    batch: {"x": [B, D], "y": [B, E]} raw activations.
    hyper: as `hyper` returns it.
    axes: of the mesh.
    sparse: after the encoder's product, touch active latents only; the same
      numbers up to rounding, but that a dense top-k keeps all values that
      equal the k-th. Without effect unless `can_be_sparse`.

  Returns:
    (loss, (state, metrics)): the new state, and scalars.

  Raises:
    ValueError: the recipe does not suit the activation.
  """
  check(cfg, recipe)
  sparse &= can_be_sparse(cfg, recipe)
  params, seen = terms.see(cfg, recipe, params, state, batch, axes)
  x, y, rows = seen.x, seen.y, seen.rows
  if not recipe.train_b_enc:
    params["b_enc"] = jax.lax.stop_gradient(params["b_enc"])
  k = annealed(recipe, hyper["k"], state.steps)

  # ------------------------------------------------------- reconstruction
  if sparse:
    written, acts, z = _sparse(cfg, recipe, params, seen, k)
  else:
    written, acts, z = dense(cfg, recipe, params, seen, k)
  base = params["b_dec"]
  if cfg.skip:
    base = base + x @ params["W_skip"]
  recs = base + jnp.cumsum(join(written, axes.latent), axis=0)
  errors = jnp.sum((y - recs) ** 2, axis=(1, 2))
  bias_prefix = recipe.bias_prefix and len(cfg.prefix_widths) > 1
  n = len(cfg.prefix_widths) + bias_prefix
  weight = {"mean": 1 / n, "sum": 1.0, "mean_of_shares": 1 / n**2}
  summed = errors.sum()
  if bias_prefix:
    summed = summed + jnp.sum((y - base) ** 2)
  scale = terms.scale_of(recipe.loss, seen)
  objective = weight[recipe.prefix_weights] * join(summed, axes.data) / scale
  metrics = {
    "loss": objective,
    "fvu": total(errors[-1], axes.data)
    / (rows * cfg.d_out * state.norm.y_variance),
    "fvu_smallest_prefix": total(errors[0], axes.data)
    / (rows * cfg.d_out * state.norm.y_variance),
  }
  if recipe.multi_topk:
    more, _, _ = (_sparse if sparse else dense)(
      cfg, recipe, params, seen, 4 * k, most=4
    )
    more = base + join(more, axes.latent).sum(0)
    extra = join(jnp.sum((y - more) ** 2), axes.data) / scale
    objective = objective + recipe.multi_topk * extra

  # ------------------------------------------------- who fires, who is dead
  fired = total(acts.fired, axes.data)
  since = jnp.where(fired > 0, 0, jnp.minimum(state.since_fired + rows, FAR))
  counted = since if recipe.aux_after_batch else state.since_fired
  limit = recipe.dead_after
  if recipe.dead_after_steps is not None:
    limit = (recipe.dead_after_steps + 1) * rows
  limit = min(limit, FAR)
  metrics["l0"] = total(jnp.sum(fired), axes.latent) / rows
  metrics["dead_fraction"] = (
    total(jnp.sum(since >= limit), axes.latent) / cfg.width
  )

  # ---------------------------------------------------------- other terms
  if recipe.sparsity != "none" or recipe.pre_activation_coefficient:
    ramp = terms.ramp(recipe.sparsity_warmup, state.steps)
    term = terms.sparsity(cfg, recipe, params, seen, z, acts.values, hyper["k"])
    metrics["sparsity_loss"] = term
    objective = objective + ramp * hyper["sparsity"] * term
    if recipe.pre_activation_coefficient:
      below = jax.nn.relu(params["threshold"] - z) * (counted >= limit)
      below = jnp.sum(below * terms.unit_weights(cfg, recipe, params))
      below = join(below, axes.both) / rows
      objective = objective + recipe.pre_activation_coefficient * below
  if cfg.activation == "gated":
    objective = (
      objective + terms.gate_loss(cfg, recipe, params, seen, z) / scale
    )
  if recipe.aux_coefficient:
    residual = y - recs[-1]
    if recipe.aux_detach:
      residual = jax.lax.stop_gradient(residual)
    aux = terms.aux_loss(cfg, recipe, params, seen, residual, counted, limit)
    metrics["aux_loss"] = aux
    objective = objective + hyper["aux"] * aux

  # ------------------------------------------------------------ threshold
  running = state.threshold
  if cfg.activation == "batchtopk":
    decay = recipe.threshold_decay
    moved = decay * running + (1 - decay) * acts.smallest
    moved = jnp.where(running < 0, acts.smallest, moved)
    ready = jnp.isfinite(acts.smallest)
    ready &= state.steps >= recipe.threshold_start
    running = jax.lax.stop_gradient(jnp.where(ready, moved, running))
  return objective, (
    State(state.norm, since, running, state.steps + 1),
    metrics,
  )


def can_be_sparse(cfg: DictionaryConfig, recipe: Recipe) -> bool:
  """Whether the step may touch active latents only.

  Other activations, and sparsity terms, need all pre-activations.
  """
  return cfg.activation in SELECTING and recipe.sparsity == "none"


def check(cfg: DictionaryConfig, recipe: Recipe) -> None:
  """Raises ValueError unless the recipe suits the dictionary."""
  needs = {
    "jumprelu": {
      f"sparsity {recipe.sparsity!r}": recipe.sparsity in terms.COUNTING,
      "pre_activation_coefficient": recipe.pre_activation_coefficient,
    },
    "topk or batchtopk": {"multi_topk": recipe.multi_topk},
  }
  for activation, own in needs.items():
    for name, wanted in own.items():
      if wanted and cfg.activation not in activation.split(" or "):
        raise ValueError(
          f"recipe.{name} needs activation {activation}; this is "
          f"{cfg.activation!r}."
        )
  if recipe.sparsity in terms.COUNTING[1:] and cfg.k is None:
    raise ValueError(f"recipe.sparsity {recipe.sparsity!r} needs k.")
  if cfg.parts and (recipe.normalise == "mean_norm" or cfg.layer_norm):
    kind = "layer_norm" if cfg.layer_norm else "normalise 'mean_norm'"
    raise ValueError(
      f"recipe.{kind} is of one site; a crosscoder has {len(cfg.parts)}. Use "
      "normalise 'mean_square', or another preset."
    )


def annealed(recipe, k, steps):
  """The k of a step."""
  if recipe.k_start is None:
    return k
  left = 1 - terms.ramp(recipe.k_anneal, steps)
  return k + (recipe.k_start - k) * left


class _Acts(NamedTuple):
  """What the loss needs of the activations.

  Attributes:
    values: [B, M], or None on the sparse path.
    fired: int32 [M].
    smallest: the smallest positive one that top-k kept, as ranked.
  """

  values: jax.Array | None
  fired: jax.Array
  smallest: jax.Array


def _sparse(cfg, recipe, params, seen, k, most: int = 1):
  """What every group writes [G, B, E], from the active latents alone."""
  read, axes = seen.read, seen.axes
  z = pre_activations(params, read, _dtype(recipe))
  z = jax.lax.stop_gradient(z)
  norms = jax.lax.stop_gradient(row_norms(params["W_dec"]))
  ranked = z * norms if recipe.rank_by_norm else z
  most = min(most * max(cfg.k, recipe.k_start or 0), cfg.width)
  if cfg.activation == "topk":
    found = pairs_lib.per_row(ranked, k, int(most), axes)
  else:
    found = pairs_lib.per_batch(ranked, k, most, axes)
  positive = jnp.where(found.value > 0, found.value, jnp.inf)
  smallest = -largest(-jnp.min(positive), axes.both)
  if recipe.rank_by_norm:
    found = found._replace(
      value=found.value / jnp.where(norms > 0, norms, 1)[found.latent]
    )
  width = len(norms)
  written = pairs_lib.decode(
    cfg.prefix_widths,
    params["W_enc"],
    params["b_enc"],
    params["W_dec"],
    seen.b_in,
    jax.lax.stop_gradient(read),
    offset(axes.latent, width),
    found,
  )
  return written, _Acts(None, pairs_lib.fired(found, width), smallest), z


def _dtype(recipe):
  return None if recipe.products == "float32" else recipe.products


def dense(cfg, recipe, params, seen, k, most: int = 1):
  """The same from all latents: [G, B, E], activations, pre-activations."""
  axes = seen.axes
  z = pre_activations(params, seen.read, _dtype(recipe))
  smallest = jnp.asarray(jnp.inf)
  if cfg.activation in SELECTING:
    ranked = jax.lax.stop_gradient(z)
    if recipe.rank_by_norm:
      ranked = ranked * jax.lax.stop_gradient(row_norms(params["W_dec"]))
    if cfg.activation == "topk":
      most = min(most * max(cfg.k, recipe.k_start or 0), cfg.width)
      cut = pairs_lib.per_row(ranked, k, int(most), axes).cut
    else:
      keep = jnp.floor(k * seen.rows)
      cut = kth_largest(ranked, keep, axes=axes.both)
    kept = (ranked >= cut) & (ranked > 0)
    acts = jnp.where(kept, z, 0)
    smallest = jnp.min(jnp.where(kept, ranked, jnp.inf))
    smallest = -largest(-smallest, axes.both)
  elif cfg.activation == "jumprelu":
    acts = jump(
      z, params["threshold"], recipe.bandwidth, recipe.gradient_to_input
    )
  elif cfg.activation == "gated":
    acts = select(cfg, params, z)
  else:
    acts = jax.nn.relu(z)
  fired = jnp.sum(acts > 0, axis=0, dtype=jnp.int32)
  written = _write(cfg, params["W_dec"], acts, axes)
  return written, _Acts(acts, fired, smallest), z


def _write(cfg, W_dec, acts, axes):
  """What every Matryoshka group writes: [G, B, E]."""
  if len(cfg.prefix_widths) == 1:
    return (acts @ W_dec)[None]
  starts = (0, *cfg.prefix_widths[:-1])
  groups = list(zip(starts, cfg.prefix_widths, strict=True))
  if not axes.latent:
    return jnp.stack([acts[:, a:b] @ W_dec[a:b] for a, b in groups])
  # Where the groups end differs from device to device.
  index = offset(axes.latent, len(W_dec)) + jnp.arange(len(W_dec))
  return jnp.stack(
    [jnp.where((index >= a) & (index < b), acts, 0) @ W_dec for a, b in groups]
  )


def constrain(recipe: Recipe, params):
  """Parameters with what the recipe demands of them made true."""
  params = dict(params)
  if recipe.decoder != "free":
    params["W_dec"] = unit(params["W_dec"])
  if "threshold" in params and not recipe.log_threshold:
    # Below 0 negative pre-activations would pass.
    params["threshold"] = jnp.maximum(params["threshold"], 0)
  return params


def project(recipe: Recipe, params, gradients):
  """Gradients without what would change the norm of unit decoder rows."""
  if recipe.decoder == "free":
    return gradients
  rows, g = unit(params["W_dec"]), gradients["W_dec"]
  along = jnp.sum(g * rows, axis=-1, keepdims=True)
  return {**gradients, "W_dec": g - along * rows}
