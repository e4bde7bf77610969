"""From a trained dictionary to one for raw activations."""

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.dictionaries.config import DictionaryConfig
from gemma_jax.dictionaries.core.coordinates import (
  Normalisation,
  centre_tokens,
  normalise_input,
  row_norms,
)
from gemma_jax.dictionaries.core.forward import pre_activations
from gemma_jax.dictionaries.recipe import Recipe
from gemma_jax.dictionaries.selection import kth_largest


def calibrate(
  cfg: DictionaryConfig, recipe: Recipe, params, norm: Normalisation, x, k
) -> jax.Array:
  """The threshold above which k latents fire on a row of x on average.

  Args:
    cfg: the dictionary.
    recipe: how it was trained.
    params: trained.
    norm: constants of the coordinates.
    x: raw inputs [B, D], not trained on where there are others.
    k: mean number of latents.

  Returns:
    In the units of `State.threshold`.
  """
  if cfg.layer_norm:
    x = centre_tokens(x)[0]
  x = normalise_input(norm, x)
  if recipe.subtract_b_dec and not cfg.is_transcoder:
    x = x - params["b_dec"]
  z = pre_activations(params, x)
  if recipe.rank_by_norm:
    z = z * row_norms(params["W_dec"])
  cut = kth_largest(z, k * len(x))
  # Halfway to the largest that does not fire: rounding must not tip it.
  below = jnp.max(jnp.where(z < cut, z, 0))
  return (cut + jnp.maximum(below, 0)) / 2


def fold(
  cfg: DictionaryConfig,
  recipe: Recipe,
  params,
  norm: Normalisation,
  threshold=None,
) -> dict[str, np.ndarray]:
  """The same dictionary on raw activations.

  Decoder rows come out with norm 1, but for TopK where what it ranks would
  come out otherwise: plain activations of rows with different norms, or dims
  with scales of their own. Neither what is active nor the reconstruction
  changes.

  Args:
    cfg: the dictionary.
    recipe: how it was trained.
    params: trained.
    norm: constants of the coordinates.
    threshold: of "batchtopk", in the units of `State.threshold`.

  Returns:
    `cfg.shapes()`, float32.
  """
  w = {name: np.asarray(x, np.float64) for name, x in params.items()}
  x_mean, x_map, y_mean, y_scale, _ = (np.asarray(a, np.float64) for a in norm)
  enc, b_enc = w["W_enc"], w["b_enc"]
  if recipe.subtract_b_dec and not cfg.is_transcoder:
    b_enc = b_enc - w["b_dec"] @ enc
  out = {
    "W_enc": x_map @ enc,
    "W_dec": w["W_dec"] * y_scale,
    "b_dec": y_mean + y_scale * w["b_dec"],
  }
  shift = x_mean @ out["W_enc"]
  out["b_enc"] = b_enc - shift
  if cfg.skip:
    out["W_skip"] = x_map @ w["W_skip"] * y_scale
    out["b_dec"] = out["b_dec"] - x_mean @ out["W_skip"]
  if cfg.activation == "gated":
    # The magnitude has no gate's bias in it.
    out["r_mag"] = w["r_mag"]
    moved = (b_enc - w["b_enc"] - shift) * np.exp(w["r_mag"])
    out["b_mag"] = w["b_mag"] + moved
  if cfg.activation == "jumprelu":
    theta = w["threshold"]
    out["threshold"] = np.exp(theta) if recipe.log_threshold else theta
  norms = np.maximum(np.linalg.norm(out["W_dec"], axis=1), 1e-12)
  trained = np.linalg.norm(w["W_dec"], axis=1)
  # What top-k ranks is z times this.
  ranked = np.maximum(trained, 1e-12) if recipe.rank_by_norm else np.ones(1)
  if cfg.activation == "batchtopk":
    out["threshold"] = float(threshold) / ranked * np.ones(cfg.width)
  times, shares = norms, norms / ranked
  if cfg.activation == "topk" and np.ptp(shares) > 1e-5 * shares.max():
    times = ranked
  for name in ("b_enc", "b_mag", "threshold"):
    if name in out:
      out[name] = out[name] * times
  out["W_enc"] = out["W_enc"] * times
  out["W_dec"] = out["W_dec"] / times[:, None]
  return {name: x.astype(np.float32) for name, x in out.items()}
