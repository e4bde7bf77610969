"""The coordinates in which dictionaries train, and what training carries."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.activations.normalise import Measured, matrices
from gemma_jax.dictionaries.linear import Moments
from gemma_jax.dictionaries.recipe import Recipe


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

  @classmethod
  def identity(cls, d_in: int, d_out: int) -> "Normalisation":
    """Raw coordinates; y has a variance of 1 there."""
    zero_x, zero_y = jnp.zeros(d_in), jnp.zeros(d_out)
    return cls(zero_x, jnp.eye(d_in), zero_y, zero_y + 1, jnp.ones(()))


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
  mean_norms: tuple[float, float] | None = None,
  parts: tuple[int, ...] = (),
) -> Normalisation:
  """Constants from the training rows' moments.

  Args:
    m: moments of x and y.
    recipe: says what happens to x and y.
    mean_norms: mean L2 norm of x, and that of y; "mean_norm" needs them.
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
  norm_x, norm_y = mean_norms or (None, None)
  x_mean, x_map = np.zeros(d), np.zeros((d, d))
  for part in slices(parts if sum(parts) == d else (d,)):
    measured = Measured(
      m.count,
      m.mean_x[part],
      variance[part],
      covariance[part, part],
      norm_x,
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
    for part in slices(parts or (e,)):
      y_scale[part] = np.sqrt(m.variance_y[part].mean())
  elif d == e and np.array_equal(m.mean_x, m.mean_y):
    y_mean, y_scale = x_mean, 1 / np.diag(x_map)
  else:
    measured = Measured(m.count, m.mean_y, m.variance_y, None, norm_y)
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


def slices(widths):
  ends = np.cumsum(widths)
  return [slice(end - n, end) for n, end in zip(widths, ends, strict=True)]


def normalise(norm: Normalisation, x, y) -> tuple[jax.Array, jax.Array]:
  """Raw x [B, D] and y [B, E] in the coordinates of training, float32."""
  y = (y.astype(jnp.float32) - norm.y_mean) / norm.y_scale
  return normalise_input(norm, x), y


def normalise_input(norm: Normalisation, x) -> jax.Array:
  """Raw x [B, D] in the coordinates of training, float32."""
  # GPUs would otherwise round the factors to TF32.
  return jnp.matmul(
    x.astype(jnp.float32) - norm.x_mean, norm.x_map, precision="highest"
  )


def centre_tokens(x) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(x - mean) / (std + 1e-5) of every row, its mean and its std [..., 1].

  The deviation divides by D - 1, as matryoshka_sae's does.
  """
  x = x.astype(jnp.float32)
  mean = x.mean(-1, keepdims=True)
  std = jnp.std(x, axis=-1, keepdims=True, ddof=1)
  return (x - mean) / (std + 1e-5), mean, std


def unit(v):
  """Rows of norm 1; rows of zeros stay."""
  return v / jnp.maximum(jnp.linalg.norm(v, axis=-1, keepdims=True), 1e-9)


def row_norms(rows):
  """[M, E] -> [M]; of a row of zeros the gradient is 0 too."""
  square = jnp.sum(rows * rows, axis=-1)
  some = square > 0
  return jnp.where(some, jnp.sqrt(jnp.where(some, square, 1)), 0)
