"""Models whose weights were changed by a known amount.

What such a change does to a measure says what the measure can see. Matrices
(embeddings among them) change; gains of norms and biases stay as they are.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gemma_jax.models.model import Model

GROUP = 32  # weights that share a scale, as in GGUF's simple types


def add_noise(model: Model, scale: float, *, seed: int = 0) -> Model:
  """Adds `scale` standard deviations of each matrix, Gaussian.

  Args:
    model: any.
    scale: 0.1 changes a matrix by a tenth of its spread.
    seed: of the noise.

  Raises:
    ValueError: a scale that is negative or not finite.
  """
  if not 0 <= scale < math.inf:
    raise ValueError(f"expected a scale of noise of 0 or more, got {scale}")
  return _changed(model, _noisy, scale, f"noise {scale:g}, seed {seed}", seed)


def requantise(model: Model, bits: int) -> Model:
  """Rounds weights to 2^bits - 1 equal steps in groups of `GROUP`.

  Symmetric, with the largest of a group at the end of the range.

  Args:
    model: any.
    bits: 2 to 8.

  Raises:
    ValueError: other bits.
  """
  if type(bits) is not int or not 2 <= bits <= 8:
    raise ValueError(f"expected 2 to 8 bits a weight, got {bits!r}")
  return _changed(model, _rounded, 2 ** (bits - 1) - 1, f"{bits} bits", 0)


def redraw(model: Model, *, seed: int = 0) -> Model:
  """Draws each matrix anew, Gaussian of the mean and spread that it had.

  What such a model has in common with the trained one comes from the text and
  the architecture: the floor of a comparison.

  Args:
    model: any.
    seed: of the weights.
  """
  return _changed(model, _redrawn, 0, f"redrawn, seed {seed}", seed)


def _changed(model: Model, fn: Callable, amount, what: str, seed: int) -> Model:
  key = jax.random.key(seed)

  def change(name, x):
    if name.endswith(("norm", "bias")):
      return x
    # By name, so that no matrix depends on which others are loaded.
    own = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return jax.device_put(_by_layer(fn, amount, x, own), x.sharding)

  params = {
    name: change(name, x[None])[0]
    for name, x in model.params.items()
    if name != "blocks"
  }
  blocks = {n: change(n, x) for n, x in model.params["blocks"].items()}
  return dataclasses.replace(
    model, params={**params, "blocks": blocks}, changes=(*model.changes, what)
  )


@functools.partial(jax.jit, static_argnums=0)
def _by_layer(fn, amount, x, key):
  def one(i, layer):
    draw = jax.random.fold_in(key, i)
    return fn(draw, layer.astype(jnp.float32), amount).astype(x.dtype)

  return jax.lax.map(lambda pair: one(*pair), (jnp.arange(len(x)), x))


def _noisy(key, x, scale):
  return x + scale * jnp.std(x) * jax.random.normal(key, x.shape)


def _redrawn(key, x, _):
  return jnp.mean(x) + jnp.std(x) * jax.random.normal(key, x.shape)


def _rounded(_, x, largest):
  groups = x.reshape(-1, math.gcd(GROUP, x.shape[-1]))
  step = jnp.max(jnp.abs(groups), axis=1, keepdims=True) / largest
  steps = jnp.round(groups / jnp.where(step > 0, step, 1))
  return (steps * step).reshape(x.shape)
