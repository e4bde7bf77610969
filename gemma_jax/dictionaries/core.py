"""One functional core for SAEs and transcoders: init, encode, decode, loss.

Training happens in normalised coordinates: x is whitened, or what else was
asked for, and y scaled to unit variance (`Normalisation`), so that one
learning rate suits every site.
`fold` brings a trained dictionary back to raw activations.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.activations.normalise import Measured, matrices
from gemma_jax.dictionaries.config import DictionaryConfig
from gemma_jax.dictionaries.linear import Moments, Ridge
from gemma_jax.dictionaries.selection import kth_largest


class Normalisation(NamedTuple):
  """x -> (x - x_mean) @ x_map and y -> (y - y_mean) / y_scale.

  Attributes:
    x_mean: [D]; zeros for kinds that do not centre.
    x_map: [D, D].
    y_mean: [E].
    y_scale: scalar; root mean square over rows and dims of y - y_mean.
  """

  x_mean: jax.Array
  x_map: jax.Array
  y_mean: jax.Array
  y_scale: jax.Array


class State(NamedTuple):
  """What a dictionary carries through training besides its parameters.

  Attributes:
    norm: constants.
    since_fired: int32 [M], tokens since each latent last fired.
    threshold: running inference threshold, normalised; < 0 before any.
  """

  norm: Normalisation
  since_fired: jax.Array
  threshold: jax.Array


def normalisation(
  m: Moments, kind: str, *, epsilon: float, mean_norm: float | None = None
) -> Normalisation:
  """Constants from the training rows' moments.

  Args:
    m: moments of x and y.
    kind: what happens to x, one of `activations.normalise.KINDS`; y is always
      centred and scaled to unit mean variance.
    epsilon: of the kinds that whiten: eigenvalues are raised by that times
      their mean. 0 whitens completely, large not at all.
    mean_norm: mean L2 norm of x; "mean_norm" needs it.

  Raises:
    ValueError: another kind; or a site that does not vary.
  """
  covariance = m.covariance
  variance = np.diag(covariance)
  if variance.mean() <= 0 or m.variance_y <= 0:
    raise ValueError(
      "A site is constant over the training tokens; nothing can be learned. "
      "Check the site and the mask."
    )
  measured = Measured(m.count, m.mean_x, variance, covariance, mean_norm)
  mean, x_map, _ = matrices(measured, kind, shrinkage=epsilon)
  if x_map.ndim < 2:
    x_map = np.diag(np.broadcast_to(x_map, variance.shape))
  f32 = jnp.float32
  scale = np.sqrt(m.variance_y / len(m.mean_y))
  return Normalisation(
    jnp.asarray(mean, f32),
    jnp.asarray(x_map, f32),
    jnp.asarray(m.mean_y, f32),
    jnp.asarray(scale, f32),
  )


def normalise(norm: Normalisation, x, y) -> tuple[jax.Array, jax.Array]:
  """Raw x [B, D] and y [B, E] in the coordinates of training, float32."""
  x = (x.astype(jnp.float32) - norm.x_mean) @ norm.x_map
  y = (y.astype(jnp.float32) - norm.y_mean) / norm.y_scale
  return x, y


def init(
  cfg: DictionaryConfig,
  key: jax.Array,
  norm: Normalisation,
  ridge: Ridge | None = None,
  examples: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
  *,
  encoder_norm: float = 1.0,
  decoder_norm: float = 0.1,
):
  """Parameters and state at step 0.

  With `examples`, latent i starts as one example: its encoder reads that
  input and its decoder writes what the affine part leaves of that output.
  Examples are drawn in proportion to what is left of them. With a skip, the
  affine part starts at the ridge map.

  Args:
    cfg: the dictionary.
    key: random key.
    norm: constants of the coordinates.
    ridge: the affine map in raw coordinates; None starts from zero.
    examples: at least M rows of raw x [n, D] and y [n, E], and bool [n]: False
      at repeats of an earlier row, which would start latents that are always
      tied. None draws random directions.
    encoder_norm: norm of every latent's encoder.
    decoder_norm: norm of every decoder row.

  Returns:
    (params, state): `cfg.shapes()` in float32, and a `State`.
  """
  f32 = jnp.float32
  b_dec = jnp.zeros(cfg.d_out, f32)
  skip = jnp.zeros((cfg.d_in, cfg.d_out), f32)
  if ridge is not None and cfg.skip:
    # x = x_mean + xn @ inverse(x_map), so the map reads normalised inputs.
    skip = jnp.linalg.solve(norm.x_map, ridge.linear) / norm.y_scale
    there = norm.x_mean @ ridge.linear + ridge.bias - norm.y_mean
    b_dec = there / norm.y_scale
  if examples is None:
    enc_key, dec_key = jax.random.split(key)
    rows = jax.random.normal(enc_key, (cfg.width, cfg.d_in), f32)
    dec = jax.random.normal(dec_key, (cfg.width, cfg.d_out), f32)
  else:
    x, y, first = map(jnp.asarray, examples)
    x, y = normalise(norm, x, y)
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

  def unit(v):
    return v / jnp.maximum(jnp.linalg.norm(v, axis=-1, keepdims=True), 1e-9)

  params = {
    "W_enc": encoder_norm * unit(rows).T,
    "b_enc": jnp.zeros(cfg.width, f32),
    "W_dec": decoder_norm * unit(dec),
    "b_dec": b_dec,
  }
  if cfg.skip:
    params["W_skip"] = skip
  since = jnp.zeros(cfg.width, jnp.int32)
  return params, State(norm, since, jnp.asarray(-1.0, f32))


def pre_activations(params, x) -> jax.Array:
  """z = x @ W_enc + b_enc, [B, D] -> [B, M]; b_dec is not subtracted."""
  return x @ params["W_enc"] + params["b_enc"]


def select(cfg: DictionaryConfig, z, threshold=None):
  """Latents that stay: ReLU(z) above the threshold, [B, M] and the threshold.

  Args:
    cfg: the dictionary.
    z: pre-activations [B, M].
    threshold: for "batchtopk" at inference; None selects within the batch.
  """
  if cfg.activation == "topk":
    largest = jax.lax.top_k(jax.lax.stop_gradient(z), int(cfg.k))[0]
    cut = largest[..., -1:]
  elif threshold is None:
    cut = kth_largest(jax.lax.stop_gradient(z), cfg.k * len(z))
  else:
    cut = threshold
  return jnp.where((z >= cut) & (z > 0), z, 0), cut


def decode_prefixes(cfg: DictionaryConfig, params, x, acts) -> list[jax.Array]:
  """Reconstructions [B, E] of every prefix, each from the one before it."""
  y = params["b_dec"]
  if cfg.skip:
    y = y + x @ params["W_skip"]
  out, start = [], 0
  for stop in cfg.prefix_widths:
    y = y + acts[:, start:stop] @ params["W_dec"][start:stop]
    out.append(y)
    start = stop
  return out


def loss(cfg: DictionaryConfig, params, state: State, batch, hyper):
  """Mean over prefixes of the FVU, plus the aux-k loss of dead latents.

  The FVU here divides by the training set's variance (one, in normalised
  coordinates, per dimension), so it does not depend on the batch.

  Aux-k (Gao et al. 2024, arXiv 2406.04093, appendix A.2): the longest-dead
  latents fit the detached residual without a bias; the term is divided by
  the residual's variance.

  Args:
    cfg: the dictionary.
    params: as `init` returns them.
    state: as `init` returns it.
    batch: {"x": [B, D], "y": [B, E]} raw activations.
    hyper: {"aux_coefficient": scalar}.

  Returns:
    (loss, (state, metrics)): the new state, and scalars.
  """
  x, y = normalise(state.norm, batch["x"], batch["y"])
  z = pre_activations(params, x)
  acts, cut = select(cfg, z)
  recs = decode_prefixes(cfg, params, x, acts)
  size, total = len(x), y.size
  fvus = jnp.stack([jnp.sum((y - r) ** 2) / total for r in recs])
  fired = jnp.sum(acts > 0, axis=0, dtype=jnp.int32)
  # Capped, so that billions of tokens do not wrap around.
  since = jnp.where(fired > 0, 0, jnp.minimum(state.since_fired + size, 2**30))
  aux = jnp.zeros(())
  if cfg.aux_coefficient:
    aux = _aux_loss(cfg, params, z, y - recs[-1], state.since_fired)
  smallest = jnp.mean(cut)
  first = state.threshold < 0
  decay = cfg.threshold_decay
  threshold = jnp.where(
    first, smallest, decay * state.threshold + (1 - decay) * smallest
  )
  metrics = {
    "loss": fvus.mean(),
    "fvu": fvus[-1],
    "fvu_smallest_prefix": fvus[0],
    "aux_loss": aux,
    "l0": jnp.sum(fired) / size,
    "dead_fraction": jnp.mean(since >= cfg.dead_after),
  }
  new = State(state.norm, since, jax.lax.stop_gradient(threshold))
  return fvus.mean() + hyper["aux_coefficient"] * aux, (new, metrics)


def _aux_loss(cfg, params, z, residual, since_fired):
  residual = jax.lax.stop_gradient(residual)
  longest, index = jax.lax.top_k(
    since_fired, min(cfg.aux_candidates, cfg.width)
  )
  dead = longest >= cfg.dead_after
  candidates = jnp.where(dead, jax.nn.relu(z[:, index]), 0)
  if cfg.aux_k < len(index):
    cut = jax.lax.top_k(jax.lax.stop_gradient(candidates), cfg.aux_k)[0]
    candidates = jnp.where(candidates >= cut[:, -1:], candidates, 0)
  rec = candidates @ params["W_dec"][index]
  spread = jnp.sum((residual - residual.mean(0)) ** 2)
  error = jnp.sum((residual - rec) ** 2) / jnp.maximum(spread, 1e-9)
  return jnp.where(jnp.any(dead), error, 0.0)


def fold(cfg: DictionaryConfig, params, norm: Normalisation, threshold):
  """The same dictionary on raw activations.

  BatchTopK dictionaries come out with decoder rows of norm 1 and a threshold
  for each latent; TopK ones keep their norms, which their selection depends
  on. Neither changes what is active nor the reconstruction.

  Returns:
    `cfg.shapes()`, and `threshold` [M] for "batchtopk".
  """
  w = {name: np.asarray(x, np.float64) for name, x in params.items()}
  x_mean, x_map, y_mean, y_scale = (np.asarray(a, np.float64) for a in norm)
  out = {
    "W_enc": x_map @ w["W_enc"],
    "W_dec": w["W_dec"] * y_scale,
    "b_dec": y_mean + y_scale * w["b_dec"],
  }
  out["b_enc"] = w["b_enc"] - x_mean @ out["W_enc"]
  if cfg.skip:
    out["W_skip"] = y_scale * (x_map @ w["W_skip"])
    out["b_dec"] = out["b_dec"] - x_mean @ out["W_skip"]
  if cfg.activation == "batchtopk":
    norms = np.maximum(np.linalg.norm(out["W_dec"], axis=1), 1e-12)
    out["W_enc"] = out["W_enc"] * norms
    out["b_enc"] = out["b_enc"] * norms
    out["W_dec"] = out["W_dec"] / norms[:, None]
    out["threshold"] = float(threshold) * norms
  return {name: x.astype(np.float32) for name, x in out.items()}
