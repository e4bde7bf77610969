"""Dead latents start again."""

import jax
import jax.numpy as jnp

from gemma_jax.dictionaries.axes import (
  ALONE,
  Axes,
  gather,
  join,
  offset,
  total,
)
from gemma_jax.dictionaries.config import DictionaryConfig
from gemma_jax.dictionaries.core.coordinates import (
  State,
  unit,
)
from gemma_jax.dictionaries.core.objective import FAR, annealed, dense
from gemma_jax.dictionaries.core.terms import see
from gemma_jax.dictionaries.recipe import Recipe


def resample(
  cfg: DictionaryConfig,
  recipe: Recipe,
  params,
  state: State,
  batch,
  hyper,
  key: jax.Array,
  *,
  axes: Axes = ALONE,
):
  """Restarts dead latents at inputs that are reconstructed badly.

  Latents that have not fired for half of `recipe.resample_every` steps get
  an input each, drawn without replacement in proportion to its error's norm:
  its direction as encoder, 0.2 of the mean norm of the living, and the
  direction of the output without the bias as decoder. (dictionary_learning's
  rule, after Bricken et al. 2023.)

  Args:
    cfg: the dictionary.
    recipe: how it is trained.
    params: parameters.
    state: after the step.
    batch: raw, as for `loss`.
    hyper: as for `loss`.
    key: random key, the same on all devices.
    axes: of the mesh.

  Returns:
    The parameters, and which latents [M] moved.
  """
  acting, seen = see(cfg, recipe, params, state, batch, axes)
  x, y, rows = seen.x, seen.y, seen.rows
  k = annealed(recipe, hyper["k"], state.steps)
  written, _, _ = dense(cfg, recipe, acting, seen, k)
  base = params["b_dec"] + (x @ params["W_skip"] if cfg.skip else 0)
  left = y - base - join(written, axes.latent).sum(0)

  def everywhere(a):
    if not axes.data:
      return a
    return jax.lax.all_gather(a, axes.data, tiled=True)

  error = everywhere(jnp.linalg.norm(left, axis=-1))
  noise = jax.random.gumbel(key, error.shape)
  order = jax.lax.top_k(jnp.log(error + 1e-12) + noise, rows)[1]
  limit = min(recipe.resample_every // 2 * rows, FAR)
  dead = state.since_fired >= limit
  everyone = gather(dead, axes.latent)
  rank = jnp.cumsum(everyone) - 1
  here = offset(axes.latent, len(dead))
  rank = jax.lax.dynamic_slice_in_dim(rank, here, len(dead))
  moved = dead & (rank < rows)
  chosen = order[jnp.clip(rank, 0, rows - 1)]
  norms = jnp.linalg.norm(params["W_enc"], axis=0)
  living = total(jnp.sum(jnp.where(dead, 0, norms)), axes.latent)
  living /= jnp.maximum(total(jnp.sum(~dead), axes.latent), 1)
  enc = 0.2 * living * unit(everywhere(seen.read)[chosen])
  size_of = recipe.decoder_norm if recipe.decoder == "free" else 1.0
  dec = size_of * unit(everywhere(y - base)[chosen])
  new = dict(params)
  new["W_enc"] = jnp.where(moved, enc.T, params["W_enc"])
  new["W_dec"] = jnp.where(moved[:, None], dec, params["W_dec"])
  new["b_enc"] = jnp.where(moved, 0, params["b_enc"])
  return new, moved
