"""One functional core for SAEs, transcoders, crosscoders: init, encode, loss.

Training happens in normalised coordinates (`Normalisation`), so that one
learning rate suits every site. `fold` brings a trained dictionary back to raw
activations. What a dictionary is stands in its `DictionaryConfig`, how it is
trained in its `Recipe`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.activations.normalise import Measured, matrices
from gemma_jax.dictionaries import pairs as pairs_lib
from gemma_jax.dictionaries.axes import (
  ALONE,
  Axes,
  gather,
  join,
  largest,
  offset,
  size,
  spread,
  total,
)
from gemma_jax.dictionaries.config import SELECTING, DictionaryConfig
from gemma_jax.dictionaries.jump import jump, step
from gemma_jax.dictionaries.linear import Moments, Ridge
from gemma_jax.dictionaries.recipe import Recipe
from gemma_jax.dictionaries.selection import kth_largest

COUNTING = ("l0", "target_l0", "target_l0_token")  # they train thresholds
FAR = 2**30  # tokens; counts stop here, so that billions do not wrap around


class Normalisation(NamedTuple):
  """x -> (x - x_mean) @ x_map and y -> (y - y_mean) / y_scale.

  Attributes:
    x_mean: [D]; zeros for kinds that do not centre.
    x_map: [D, D].
    y_mean: [E].
    y_scale: [E].
    y_variance: scalar, mean variance of a dim of y in these coordinates.
  """

  x_mean: jax.Array
  x_map: jax.Array
  y_mean: jax.Array
  y_scale: jax.Array
  y_variance: jax.Array


class State(NamedTuple):
  """What a dictionary carries through training besides its parameters.

  Attributes:
    norm: constants.
    since_fired: int32 [M], tokens since each latent last fired.
    threshold: running inference threshold, normalised; < 0 before any.
    steps: int32, steps done.
  """

  norm: Normalisation
  since_fired: jax.Array
  threshold: jax.Array
  steps: jax.Array


def normalisation(
  m: Moments,
  recipe: Recipe,
  *,
  mean_norm: float | None = None,
  parts: tuple[int, ...] = (),
) -> Normalisation:
  """Constants from the training rows' moments.

  Args:
    m: moments of x and y.
    recipe: says what happens to x and y.
    mean_norm: mean L2 norm of x; "mean_norm" needs it.
    parts: widths of the sites that y joins, each scaled by itself, and x too
      if they are the same ones.

  Raises:
    ValueError: a kind that cannot be; or a site that does not vary.
  """
  covariance = m.covariance
  variance = np.diag(covariance)
  if variance.mean() <= 0 or m.variance_y.sum() <= 0:
    raise ValueError(
      "A site is constant over the training tokens; nothing can be learned. "
      "Check the site and the mask."
    )
  if parts and recipe.normalise == "mean_norm":
    raise ValueError(
      "normalise 'mean_norm' needs one site; use 'mean_square' for several."
    )
  d, e = len(m.mean_x), len(m.mean_y)
  x_mean, x_map = np.zeros(d), np.zeros((d, d))
  for part in _slices(parts if sum(parts) == d else (d,)):
    measured = Measured(
      m.count,
      m.mean_x[part],
      variance[part],
      covariance[part, part],
      mean_norm,
    )
    mean, to, _ = matrices(
      measured, recipe.normalise, shrinkage=recipe.whiten_epsilon
    )
    x_mean[part] = mean
    if to.ndim < 2:
      to = np.diag(np.broadcast_to(to, mean.shape))
    x_map[part, part] = to
  y_mean, y_scale = np.array(m.mean_y), np.ones(e)
  if recipe.target == "variance":
    for part in _slices(parts or (e,)):
      y_scale[part] = np.sqrt(m.variance_y[part].mean())
  elif d == e and np.array_equal(m.mean_x, m.mean_y):
    y_mean, y_scale = x_mean, 1 / np.diag(x_map)
  else:
    measured = Measured(m.count, m.mean_y, m.variance_y)
    y_mean, _, back = matrices(measured, recipe.normalise)
    y_scale = np.broadcast_to(back, (e,))
  f32 = jnp.float32
  return Normalisation(
    jnp.asarray(x_mean, f32),
    jnp.asarray(x_map, f32),
    jnp.asarray(y_mean, f32),
    jnp.asarray(y_scale, f32),
    jnp.asarray(np.mean(m.variance_y / y_scale**2), f32),
  )


def _slices(widths):
  ends = np.cumsum(widths)
  return [slice(end - n, end) for n, end in zip(widths, ends, strict=True)]


def normalise(norm: Normalisation, x, y) -> tuple[jax.Array, jax.Array]:
  """Raw x [B, D] and y [B, E] in the coordinates of training, float32."""
  x = (x.astype(jnp.float32) - norm.x_mean) @ norm.x_map
  y = (y.astype(jnp.float32) - norm.y_mean) / norm.y_scale
  return x, y


def centre_tokens(x) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(x - mean) / (std + 1e-5) of every row, its mean and its std [..., 1].

  The deviation divides by D - 1, as matryoshka_sae's does.
  """
  x = x.astype(jnp.float32)
  mean = x.mean(-1, keepdims=True)
  std = jnp.std(x, axis=-1, keepdims=True, ddof=1)
  return (x - mean) / (std + 1e-5), mean, std


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
  W_enc = encoder_norm * _unit(rows).T
  b_enc = jnp.zeros(cfg.width, f32)
  if recipe.b_enc_init == "centre":
    b_enc = -x.mean(0) @ W_enc
  params = {
    "W_enc": W_enc,
    "b_enc": b_enc,
    "W_dec": recipe.decoder_norm * _unit(dec),
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


def _unit(v):
  return v / jnp.maximum(jnp.linalg.norm(v, axis=-1, keepdims=True), 1e-9)


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


def hyper(cfg: DictionaryConfig, recipe: Recipe) -> dict[str, jax.Array]:
  """What may differ between the members of a sweep, as arrays."""
  values = {
    "k": 0.0 if cfg.k is None else cfg.k,
    "sparsity": recipe.sparsity_coefficient,
    "aux": recipe.aux_coefficient,
  }
  return {name: jnp.asarray(x, jnp.float32) for name, x in values.items()}


def pre_activations(params, x, dtype=None) -> jax.Array:
  """z = x @ W_enc + b_enc, [B, D] -> [B, M], float32.

  Args:
    params: of a dictionary.
    x: input; b_dec is not subtracted.
    dtype: of the factors of the product; None leaves them.
  """
  W = params["W_enc"]
  if dtype is not None:
    x, W = x.astype(dtype), W.astype(dtype)
  z = jnp.matmul(x, W, preferred_element_type=jnp.float32)
  return z + params["b_enc"]


def select(cfg: DictionaryConfig, params, z):
  """Activations of a folded dictionary from its pre-activations [B, M]."""
  if cfg.activation == "gated":
    pi = z - params["b_enc"]
    magnitude = jnp.exp(params["r_mag"]) * pi + params["b_mag"]
    return jnp.where(z > 0, jnp.maximum(magnitude, 0), 0)
  if cfg.activation == "topk":
    values, index = jax.lax.top_k(z, int(cfg.k))
    at = jnp.arange(len(z))[:, None], index
    return jnp.zeros_like(z).at[at].set(jnp.maximum(values, 0))
  floor = params.get("threshold", 0.0)
  return jnp.where((z > floor) & (z > 0), z, 0)


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
      numbers up to rounding. Dense is the only way of "relu", "gated" and
      "jumprelu", and of sparsity terms.

  Returns:
    (loss, (state, metrics)): the new state, and scalars.

  Raises:
    ValueError: the recipe does not suit the activation.
  """
  _check(cfg, recipe)
  sparse &= cfg.activation in SELECTING and recipe.sparsity == "none"
  x, y = batch["x"], batch["y"]
  if cfg.layer_norm:
    x, y = centre_tokens(x)[0], centre_tokens(y)[0]
  x, y = normalise(state.norm, x, y)
  rows = len(x) * size(axes.data)
  params = dict(params)
  if not recipe.train_b_enc:
    params["b_enc"] = jax.lax.stop_gradient(params["b_enc"])
  b_in = jnp.zeros(cfg.d_in)
  if recipe.subtract_b_dec and not cfg.is_transcoder:
    b_in = spread(params["b_dec"], axes.latent)
  threshold = params.get("threshold")
  if recipe.log_threshold and threshold is not None:
    params["threshold"] = threshold = jnp.exp(threshold)
  seen = _Seen(x, y, b_in, rows, axes)
  k = _annealed(recipe, hyper["k"], state.steps)

  # ------------------------------------------------------- reconstruction
  if sparse:
    written, acts, z = _sparse(cfg, recipe, params, seen, k)
  else:
    written, acts, z = _dense(cfg, recipe, params, seen, k)
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
  scale = _scale(recipe.loss, seen)
  objective = weight[recipe.prefix_weights] * join(summed, axes.data) / scale
  metrics = {
    "loss": objective,
    "fvu": total(errors[-1], axes.data)
    / (rows * cfg.d_out * state.norm.y_variance),
    "fvu_smallest_prefix": total(errors[0], axes.data)
    / (rows * cfg.d_out * state.norm.y_variance),
  }
  if recipe.multi_topk:
    more, _, _ = (_sparse if sparse else _dense)(
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
  metrics["l0"] = total(jnp.sum(fired), axes.latent) / rows
  metrics["dead_fraction"] = (
    total(jnp.sum(since >= limit), axes.latent) / cfg.width
  )

  # ---------------------------------------------------------- other terms
  if recipe.sparsity != "none" or recipe.pre_activation_coefficient:
    ramp = _ramp(recipe.sparsity_warmup, state.steps)
    term = _sparsity(cfg, recipe, params, seen, z, acts.values, hyper["k"])
    metrics["sparsity_loss"] = term
    objective = objective + ramp * hyper["sparsity"] * term
    if recipe.pre_activation_coefficient:
      below = jax.nn.relu(threshold - z) * (counted >= limit)
      below = jnp.sum(below * _weights(cfg, recipe, params))
      below = join(below, axes.both) / rows
      objective = objective + recipe.pre_activation_coefficient * below
  if cfg.activation == "gated":
    objective = objective + _gate_loss(cfg, recipe, params, seen, z) / scale
  if recipe.aux_coefficient:
    residual = y - recs[-1]
    if recipe.aux_detach:
      residual = jax.lax.stop_gradient(residual)
    aux = _aux_loss(cfg, recipe, params, seen, residual, counted, limit)
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


def _check(cfg, recipe):
  """Raises ValueError unless the recipe's terms suit the activation."""
  needs = {
    "jumprelu": {
      f"sparsity {recipe.sparsity!r}": recipe.sparsity in COUNTING,
      "pre_activation_coefficient": recipe.pre_activation_coefficient,
    },
    "topk or batchtopk": {"multi_topk": recipe.multi_topk},
  }
  for activation, terms in needs.items():
    for name, wanted in terms.items():
      if wanted and cfg.activation not in activation.split(" or "):
        raise ValueError(
          f"recipe.{name} needs activation {activation}; this is "
          f"{cfg.activation!r}."
        )
  if recipe.sparsity in COUNTING[1:] and cfg.k is None:
    raise ValueError(f"recipe.sparsity {recipe.sparsity!r} needs k.")


class _Seen(NamedTuple):
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


def _ramp(length: float, steps) -> jax.Array:
  return jnp.clip(steps / length, 0, 1) if length else jnp.ones(())


def _annealed(recipe, k, steps):
  if recipe.k_start is None:
    return k
  left = 1 - _ramp(recipe.k_anneal, steps)
  return k + (recipe.k_start - k) * left


def _norms(rows):
  """[M, E] -> [M]; of a row of zeros the gradient is 0 too."""
  square = jnp.sum(rows * rows, axis=-1)
  some = square > 0
  return jnp.where(some, jnp.sqrt(jnp.where(some, square, 1)), 0)


def _weights(cfg, recipe, params):
  """What one unit of each latent's activation counts as in sparsity terms."""
  if not recipe.sparsity_by_norm:
    return jnp.ones(())
  if not cfg.parts:
    return _norms(params["W_dec"])
  return sum(_norms(params["W_dec"][:, part]) for part in _slices(cfg.parts))


def _scale(kind, seen):
  """What squared errors, summed, are divided by."""
  if kind == "sum":
    return seen.rows
  if kind == "mean":
    return seen.rows * seen.y.shape[-1]
  return jnp.maximum(_spread_of(seen.y, seen), 1e-9)


def _spread_of(y, seen):
  """Summed squared distance of the rows to their mean, over all devices."""
  y = jax.lax.stop_gradient(y)
  mean = total(y.sum(0), seen.axes.data) / seen.rows
  return total(jnp.sum((y - mean) ** 2), seen.axes.data)


def _sparse(cfg, recipe, params, seen, k, most: int = 1):
  """What every group writes [G, B, E], from the active latents alone."""
  read, axes = seen.read, seen.axes
  z = pre_activations(params, read, _dtype(recipe))
  z = jax.lax.stop_gradient(z)
  norms = jax.lax.stop_gradient(_norms(params["W_dec"]))
  ranked = z * norms if recipe.rank_by_norm else z
  most = min(most * max(cfg.k, recipe.k_start or 0), cfg.width)
  if cfg.activation == "topk":
    found = pairs_lib.per_row(ranked, k, int(most), axes)
  else:
    found = pairs_lib.per_batch(ranked, k, most, axes)
  positive = jnp.where(found.value > 0, found.value, jnp.inf)
  smallest = -largest(-jnp.min(positive), axes.both)
  if recipe.rank_by_norm:
    found = found._replace(value=found.value / norms[found.latent])
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


def _dense(cfg, recipe, params, seen, k, most: int = 1):
  """The same from all latents: [G, B, E], activations, pre-activations."""
  axes = seen.axes
  z = pre_activations(params, seen.read, _dtype(recipe))
  smallest = jnp.asarray(jnp.inf)
  if cfg.activation in SELECTING:
    ranked = jax.lax.stop_gradient(z)
    if recipe.rank_by_norm:
      ranked = ranked * jax.lax.stop_gradient(_norms(params["W_dec"]))
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


def _sparsity(cfg, recipe, params, seen, z, acts, k):
  """The sparsity term, mean over rows."""
  axes, rows = seen.axes, seen.rows
  if recipe.sparsity == "none":
    return jnp.zeros(())
  weights = _weights(cfg, recipe, params)
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


def _gate_loss(cfg, recipe, params, seen, z):
  """Squared error of what the gate alone, as activation, reconstructs."""
  frozen = params
  if recipe.gated_detach:
    frozen = jax.lax.stop_gradient(params)
  rec = join(jax.nn.relu(z) @ frozen["W_dec"], seen.axes.latent)
  rec = rec + frozen["b_dec"]
  if cfg.skip:
    rec = rec + seen.x @ frozen["W_skip"]
  return join(jnp.sum((seen.y - rec) ** 2), seen.axes.data)


def _aux_loss(cfg, recipe, params, seen, residual, since, limit):
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
      error = error / jnp.maximum(_spread_of(residual, seen), 1e-9)
    elif recipe.aux_scale == "total":
      error = error / jnp.maximum(_spread_of(seen.y, seen), 1e-9)
    else:
      error = error / _scale(recipe.aux_scale, seen)
    if recipe.aux_ramp:
      error = error * jnp.minimum(count / aux_k, 1)
    return error

  return jax.lax.cond(count > 0, term, lambda: jnp.zeros(()))


def constrain(recipe: Recipe, params):
  """Parameters with what the recipe demands of them made true."""
  params = dict(params)
  if recipe.decoder != "free":
    params["W_dec"] = _unit(params["W_dec"])
  if "threshold" in params and not recipe.log_threshold:
    # Below 0 negative pre-activations would pass.
    params["threshold"] = jnp.maximum(params["threshold"], 0)
  return params


def project(recipe: Recipe, params, gradients):
  """Gradients without what would change the norm of unit decoder rows."""
  if recipe.decoder == "free":
    return gradients
  rows, g = _unit(params["W_dec"]), gradients["W_dec"]
  along = jnp.sum(g * rows, axis=-1, keepdims=True)
  return {**gradients, "W_dec": g - along * rows}


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
  x = (x.astype(jnp.float32) - norm.x_mean) @ norm.x_map
  if recipe.subtract_b_dec and not cfg.is_transcoder:
    x = x - params["b_dec"]
  z = pre_activations(params, x)
  if recipe.rank_by_norm:
    z = z * _norms(params["W_dec"])
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


def resample(
  cfg: DictionaryConfig,
  recipe: Recipe,
  params,
  state: State,
  batch,
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
    key: random key, the same on all devices.
    axes: of the mesh.

  Returns:
    The parameters, and which latents [M] moved.
  """
  x, y = batch["x"], batch["y"]
  if cfg.layer_norm:
    x, y = centre_tokens(x)[0], centre_tokens(y)[0]
  x, y = normalise(state.norm, x, y)
  rows = len(x) * size(axes.data)
  b_in = jnp.zeros(cfg.d_in)
  if recipe.subtract_b_dec and not cfg.is_transcoder:
    b_in = params["b_dec"]
  acting = dict(params)
  if recipe.log_threshold and "threshold" in params:
    acting["threshold"] = jnp.exp(params["threshold"])
  seen = _Seen(x, y, b_in, rows, axes)
  written, _, _ = _dense(cfg, recipe, acting, seen, cfg.k)
  base = params["b_dec"] + (x @ params["W_skip"] if cfg.skip else 0)
  left = y - base - join(written, axes.latent).sum(0)

  def everywhere(a):
    if not axes.data:
      return a
    return jax.lax.all_gather(a, axes.data, tiled=True)

  error = everywhere(jnp.linalg.norm(left, axis=-1))
  noise = jax.random.gumbel(key, error.shape)
  order = jax.lax.top_k(jnp.log(error + 1e-12) + noise, rows)[1]
  dead = state.since_fired >= recipe.resample_every // 2 * rows
  everyone = gather(dead, axes.latent)
  rank = jnp.cumsum(everyone) - 1
  here = offset(axes.latent, len(dead))
  rank = jax.lax.dynamic_slice_in_dim(rank, here, len(dead))
  moved = dead & (rank < rows)
  chosen = order[jnp.clip(rank, 0, rows - 1)]
  norms = jnp.linalg.norm(params["W_enc"], axis=0)
  living = total(jnp.sum(jnp.where(dead, 0, norms)), axes.latent)
  living /= jnp.maximum(total(jnp.sum(~dead), axes.latent), 1)
  enc = 0.2 * living * _unit(everywhere(seen.read)[chosen])
  size_of = recipe.decoder_norm if recipe.decoder == "free" else 1.0
  dec = size_of * _unit(everywhere(y - base)[chosen])
  new = dict(params)
  new["W_enc"] = jnp.where(moved, enc.T, params["W_enc"])
  new["W_dec"] = jnp.where(moved[:, None], dec, params["W_dec"])
  new["b_enc"] = jnp.where(moved, 0, params["b_enc"])
  return new, moved
