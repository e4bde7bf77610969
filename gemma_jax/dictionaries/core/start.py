"""How a dictionary starts."""

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.dictionaries.config import DictionaryConfig
from gemma_jax.dictionaries.core.coordinates import (
  Normalisation,
  State,
  centre_tokens,
  normalise,
  unit,
)
from gemma_jax.dictionaries.linear import Ridge
from gemma_jax.dictionaries.recipe import Recipe


def init(
  cfg: DictionaryConfig,
  recipe: Recipe,
  key: jax.Array,
  norm: Normalisation,
  ridge: Ridge | None = None,
  examples: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
):
  """Parameters and state at step 0.

  From examples, latent i starts as one of them: its encoder reads that input
  and its decoder writes what the affine part leaves of that output. Examples
  are drawn in proportion to what is left of them. With a skip, the affine
  part starts at the ridge map.

  Args:
    cfg: the dictionary.
    recipe: how it starts.
    key: random key.
    norm: constants of the coordinates.
    ridge: the affine map in raw coordinates; None starts from zero.
    examples: rows of raw x [n, D] and y [n, E], M of them at least where
      latents start from them, and bool [n]: False at repeats of an earlier
      row, which would start latents that are always tied.

  Returns:
    (params, state): parameters in float32, and a `State`.
  """
  f32 = jnp.float32
  x = y = first = None
  needed = (recipe.init, recipe.b_enc_init, recipe.b_dec_init)
  if examples is None and needed != ("random", "zeros", "zeros"):
    raise ValueError("This recipe starts from examples; pass some.")
  if examples is not None:
    x, y, first = map(jnp.asarray, examples)
    if cfg.layer_norm:
      x, y = centre_tokens(x)[0], centre_tokens(y)[0]
    x, y = normalise(norm, x, y)
  b_dec = jnp.zeros(cfg.d_out, f32)
  skip = jnp.zeros((cfg.d_in, cfg.d_out), f32)
  if ridge is not None and cfg.skip and recipe.skip_init == "ridge":
    # x = x_mean + xn @ inverse(x_map), so the map reads normalised inputs.
    skip = jnp.linalg.solve(norm.x_map, ridge.linear) / norm.y_scale
    there = norm.x_mean @ ridge.linear + ridge.bias - norm.y_mean
    b_dec = there / norm.y_scale
  elif recipe.b_dec_init == "mean":
    b_dec = y.mean(0)
  elif recipe.b_dec_init == "geometric_median":
    b_dec = geometric_median(y)
  if recipe.init == "random":
    enc_key, dec_key = jax.random.split(key)
    dec = jax.random.normal(dec_key, (cfg.width, cfg.d_out), f32)
    rows = jax.random.normal(enc_key, (cfg.width, cfg.d_in), f32)
    if recipe.encoder_init != "independent" and cfg.d_in == cfg.d_out:
      rows = dec
  else:
    left = y - x @ skip - b_dec
    if len(x) < cfg.width:
      raise ValueError(
        f"{len(x)} examples cannot start {cfg.width} latents; harvest more."
      )
    # Not zero even where the affine part explains everything.
    weight = (jnp.sum(left * left, axis=-1) + 1e-12) * first
    chosen = jax.random.choice(
      key, len(x), (cfg.width,), replace=False, p=weight / weight.sum()
    )
    rows, dec = x[chosen], left[chosen]
  encoder_norm = recipe.encoder_norm
  if encoder_norm is None:
    encoder_norm = recipe.decoder_norm
  if recipe.encoder_init == "he":
    encoder_norm = (2 * cfg.d_in / cfg.width) ** 0.5
  W_enc = encoder_norm * unit(rows).T
  b_enc = jnp.zeros(cfg.width, f32)
  if recipe.b_enc_init == "centre":
    b_enc = -x.mean(0) @ W_enc
  params = {
    "W_enc": W_enc,
    "b_enc": b_enc,
    "W_dec": recipe.decoder_norm * unit(dec),
    "b_dec": b_dec,
  }
  if cfg.skip:
    params["W_skip"] = skip
  if cfg.activation == "gated":
    params |= {n: jnp.zeros(cfg.width, f32) for n in ("r_mag", "b_mag")}
  if cfg.activation == "jumprelu":
    start = jnp.full(cfg.width, recipe.threshold_init, f32)
    params["threshold"] = jnp.log(start) if recipe.log_threshold else start
  since = jnp.zeros(cfg.width, jnp.int32)
  threshold = jnp.asarray(0.0 if recipe.threshold_from_zero else -1.0, f32)
  return params, State(norm, since, threshold, jnp.zeros((), jnp.int32))


def geometric_median(y, *, steps: int = 100, tolerance: float = 1e-5):
  """The point of least summed distance to the rows of [n, E], by Weiszfeld."""

  def unfinished(state):
    i, _, moved = state
    return (i < steps) & (moved >= tolerance)

  def move(state):
    i, at, _ = state
    distance = jnp.linalg.norm(y - at, axis=-1)
    weight = 1 / jnp.maximum(distance, 1e-12)
    new = weight @ y / weight.sum()
    return i + 1, new, jnp.linalg.norm(new - at)

  start = (0, y.mean(0), jnp.asarray(jnp.inf, y.dtype))
  return jax.lax.while_loop(unfinished, move, start)[1]
