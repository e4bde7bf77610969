"""A network from one dictionary's codes to another's, of another model.

Three linear layers, with layer norm, GELU and dropout between them: what
published work on features across models calls a hypernetwork, though no
weights are generated (`hypernetwork` does that). What it is worth is its gain
over `maps.fit_ridge` on the same codes, and over a map of activations that
the target's own encoder reads.
"""

import jax
import jax.numpy as jnp

from gemma_jax.alignment.objective import CodeStatistics

_EPSILON = 1e-5  # added to variances, as PyTorch's LayerNorm does
# Deviation of the first biases. Without any, layer norm would see the same in
# codes of any length.
_BIAS = 0.3


def init(key: jax.Array, d_in: int, width: int, d_out: int) -> dict:
  """Parameters that predict the train mean, and fire at the train rates.

  Args:
    key: random key.
    d_in: latents of the source's dictionary.
    width: of both hidden layers.
    d_out: latents of the target's dictionary.

  Returns:
    {"layers": three of {"weights", "bias"}, "norms": two of {"gain", "bias"},
    "firing": {"gain", "bias"}}, all float32.

  Raises:
    ValueError: a width below 1.
  """
  if min(d_in, width, d_out) < 1:
    raise ValueError(
      f"expected widths of 1 or more, got {d_in}, {width} and {d_out}"
    )

  def hidden(key, rows):
    drawn = jax.random.normal(key, (rows + 1, width))
    return {"weights": drawn[1:] / rows**0.5, "bias": _BIAS * drawn[0]}

  def affine(size):
    return {"gain": jnp.ones(size), "bias": jnp.zeros(size)}

  first, second = jax.random.split(key)
  last = {"weights": jnp.zeros((width, d_out)), "bias": jnp.zeros(d_out)}
  return {
    "layers": [hidden(first, d_in), hidden(second, width), last],
    "norms": [affine(width), affine(width)],
    "firing": affine(d_out),
  }


def apply(
  params: dict,
  source: CodeStatistics,
  target: CodeStatistics,
  z,
  *,
  dropout: float = 0.0,
  key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Codes of the target where the source has z.

  Args:
    params: of `init`.
    source: of the source's codes over the training rows.
    target: of the target's.
    z: the source's codes [..., d_in], raw.
    dropout: share of hidden units that are left out, while training.
    key: random key of the dropout; None leaves none out.

  Returns:
    (codes, logits), both float32 [..., d_out]: raw codes, negative ones as
    they are, and log odds of firing.

  Raises:
    ValueError: a dropout outside [0, 1), or codes of another width.
  """
  if not 0 <= dropout < 1:
    raise ValueError(f"expected a dropout of 0 to below 1, got {dropout}")
  d_in = len(params["layers"][0]["weights"])
  if jnp.shape(z)[-1:] != (d_in,):
    raise ValueError(f"expected codes [..., {d_in}], got {jnp.shape(z)}")
  hidden = jnp.asarray(z, jnp.float32) / source.unit
  *inner, last = params["layers"]
  for i, (layer, norm) in enumerate(zip(inner, params["norms"], strict=True)):
    hidden = jax.nn.gelu(_normalised(_linear(layer, hidden), norm))
    if key is not None and dropout:
      kept = jax.random.bernoulli(
        jax.random.fold_in(key, i), 1 - dropout, hidden.shape
      )
      hidden = jnp.where(kept, hidden / (1 - dropout), 0)
  out = _linear(last, hidden)
  firing = params["firing"]
  logits = target.log_odds + firing["gain"] * out + firing["bias"]
  return target.mean + target.unit * out, logits


def parameters(params) -> int:
  """Numbers that it takes to store the parameters."""
  return sum(a.size for a in jax.tree.leaves(params))


def _linear(layer, x):
  return x @ layer["weights"] + layer["bias"]


def _normalised(x, norm):
  away = x - x.mean(-1, keepdims=True)
  variance = jnp.square(away).mean(-1, keepdims=True)
  return away / jnp.sqrt(variance + _EPSILON) * norm["gain"] + norm["bias"]
