"""What one model's direction says in another."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax import progress
from gemma_jax.alignment import Map
from gemma_jax.concepts import projection
from gemma_jax.models import sharding, sites
from gemma_jax.models.forward import run_blocks
from gemma_jax.models.head import unembed
from studies import cross_places
from studies.cross_places import Side

LOGIT_ROWS = 256  # positions whose logits exist at once
VECTORS = ("native", "transferred", "random", "other")

DEFINITIONS = {
  "inject.effect": (
    "Mean change of the log-probability of the tokens that the native "
    "latent's direction raises most, nats per token, when dose * its typical "
    "activation * the vector is added; mean over positions, then latents."
  ),
  "inject.elsewhere": "The same of as many random other tokens.",
  "inject.kl": "KL(clean || changed), nats per token.",
  "inject.native": "The latent's own decoder row.",
  "inject.transferred": (
    "Its match's decoder row through the map, without the bias, made as long "
    "as the native one; as are the next two."
  ),
  "inject.random": "A direction at random.",
  "inject.other": "The transferred row of another match.",
}


def transferred(side: Side, latents, mapping: Map) -> np.ndarray:
  """Decoder rows of a side through a map's linear part, [K, E].

  Raises:
    ValueError: a map of another width, or that makes nothing of a row.
  """
  rows, weights = side.decoder(latents), np.asarray(mapping.weights)
  if rows.shape[1] != weights.shape[0]:
    raise ValueError(
      f"expected a map from the width of the side, {rows.shape[1]}, got one "
      f"from {weights.shape[0]}; is it the other way round?"
    )
  made = rows @ weights
  if not np.linalg.norm(made, axis=1).all():
    raise ValueError(
      f"expected a map that has a direction for every row, got zeros of "
      f"{mapping.name!r}"
    )
  return made


def inject(
  side: Side,
  latents,
  vectors: np.ndarray,
  typical: np.ndarray,
  config: Mapping[str, Any],
  seed: int,
) -> list[dict[str, Any]]:
  """Adds directions to a side's site; see `DEFINITIONS`.

  A vector is added at all counted positions from `start` on, and its effect
  is measured at `positions` of them, the same for all. All windows are one
  batch: take few.

  Args:
    side: of the model that is changed.
    latents: int [K], of its dictionary.
    vectors: [K, E], made by `transferred` of their matches.
    typical: [K], activations, such as the means where they fire.
    config: of `FIELDS`.
    seed: of directions, tokens, positions and resamples.

  Returns:
    For each of `VECTORS` and each dose {"vector", "dose", "effect", "low",
    "high", "elsewhere", "kl"}.

  Raises:
    ValueError: shapes that do not fit, fewer than two latents, or no counted
      position from `start` on.
  """
  model, rng = side.model, np.random.default_rng(seed)
  native = side.decoder(latents)
  count = len(native)
  shapes = vectors.shape, np.shape(typical)
  if shapes != (native.shape, (count,)) or count < 2:
    raise ValueError(
      f"expected 2 latents or more, vectors {native.shape} and typical "
      f"activations [{count}] of them, got {shapes[0]} and {shapes[1]}"
    )
  moved = side.mask & (np.arange(side.mask.shape[1]) >= config["start"])
  chosen = rng.permutation(np.flatnonzero(moved))[: config["positions"]]
  if not len(chosen):
    raise ValueError(
      f"expected counted positions from start={config['start']} on, got none "
      f"in windows of {side.mask.shape[1]}"
    )
  lengths = np.linalg.norm(native, axis=1) * typical
  given = {
    "native": native,
    "transferred": vectors,
    "random": rng.standard_normal(native.shape),
    "other": vectors[cross_places.dealt(count, rng)],
  }
  ways = {
    (name, dose): rows
    * (dose * lengths / np.linalg.norm(rows, axis=1))[:, None]
    for name, rows in given.items()
    for dose in config["doses"]
  }
  said = _said(model, native, config["set"], rng)
  with jax.set_mesh(model.mesh):
    _, found = model.forward(
      side.tokens, capture=(side.site,), stop_at=side.site
    )
    layer = np.int32(sites.parse(side.site, model.config).layer)
    moving = functools.partial(
      _final,
      (model.config, model.attention),
      model.params,
      found[side.site],
      sharding.put_batch(moved, model.mesh),
      chosen,
      layer,
    )
    clean = moving(np.zeros(native.shape[1], np.float32))
    sums = np.zeros((len(ways), count, 3))
    with progress.bar(count, "inject", unit="latents") as bar:
      for k, words in enumerate(said):
        changed = [moving(np.float32(rows[k])) for rows in ways.values()]
        for start in range(0, len(chosen), LOGIT_ROWS):
          part = slice(start, start + LOGIT_ROWS)
          before = _log_probs(model.config, model.params, clean[part])
          for total, rows in zip(sums[:, k], changed, strict=True):
            total += np.asarray(
              _effects(model.config, model.params, before, rows[part], words)
            )
        bar.update()
  out = []
  for (name, dose), row in zip(ways, sums / len(chosen), strict=True):
    effect, elsewhere, kl = row.T
    out.append(
      {
        "vector": name,
        "dose": float(dose),
        "effect": float(effect.mean()),
        **cross_places.interval(effect, config, seed),
        "elsewhere": float(elsewhere.mean()),
        "kl": float(kl.mean()),
      }
    )
  return out


def _said(model, rows: np.ndarray, size: int, rng) -> np.ndarray:
  """Tokens that rows raise most, and as many others, int [K, 2, size]."""
  table = projection.readout(model)
  top = projection.project_directions(model, table, rows, top_k=size).top_tokens
  every = np.arange(model.config.vocab_size)
  others = [
    rng.choice(np.setdiff1d(every, some), size, replace=False) for some in top
  ]
  return np.stack([top, others], axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _final(static, params, x, moved, chosen, layer, vector):
  """Last resid_post at the chosen of all positions, [N, D]."""
  cfg, attention = static
  x = x + jnp.where(moved[..., None], vector, 0).astype(x.dtype)
  x = run_blocks(cfg, params, x, layer + 1, cfg.num_layers, attention=attention)
  return sharding.replicate(x.reshape(-1, cfg.width)[chosen])


@functools.partial(jax.jit, static_argnums=0)
def _log_probs(cfg, params, rows):
  return jax.nn.log_softmax(unembed(cfg, params, rows), axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def _effects(cfg, params, before, rows, words):
  """Sums over rows: changes of two sets of tokens, and KL, [3]."""
  after = _log_probs(cfg, params, rows)
  sets = jnp.mean(after[:, words] - before[:, words], axis=-1)
  kl = jnp.sum(jnp.exp(before) * (before - after), axis=-1)
  made = jnp.concatenate([sets, kl[:, None]], axis=1)
  return sharding.replicate(jnp.sum(made, axis=0))
