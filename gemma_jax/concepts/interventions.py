"""What can be changed in a model's stream, and how.

Something is written to the residual stream as coefficient times vector: by a
neuron, by a dictionary's latent, along a direction. A change adds

    (gain * coefficient + bias) * vector

where that is written, so that no weight is copied. A gain of -1 with the
vector itself takes it away and a bias puts its mean back; another vector with
a gain of 1 is noise in proportion.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from gemma_jax.models import Model
from gemma_jax.models.edits import as_pytree


@dataclasses.dataclass(frozen=True)
class Target:
  """What is changed together: m units of one layer.

  Attributes:
    layer: of all of them.
    read: site of a block from which coefficients are computed.
    write: site of the same block where they are written.
    coefficient: (where, value of `read` [B, T, ...]) -> [B, T, m], with an
      entry of `where` for each row; keep it in a variable.
    where: pytree of arrays [m, ...]: which units.
    vectors: float32 [m, E], what one unit of coefficient writes.
  """

  layer: int
  read: str
  write: str
  coefficient: Callable[[Any, jax.Array], jax.Array]
  where: Any
  vectors: np.ndarray


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["where", "gain", "bias", "vectors", "norm_only"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Change:
  """Adds sum_m (gain * coefficient + bias) * vectors.

  Attributes:
    where: of a `Target`.
    gain: float32 [m].
    bias: float32 [m].
    vectors: float32 [m, E].
    norm_only: bool, leaves the MLP's direction as it is and only scales it
      as the change would through the norm behind it.
  """

  where: Any
  gain: np.ndarray
  bias: np.ndarray
  vectors: np.ndarray
  norm_only: np.ndarray


def neurons(model: Model, layer: int, indices: Sequence[int]) -> Target:
  """Neurons of an MLP, which write through the down projection.

  Raises:
    ValueError: neurons that do not exist.
  """
  width = model.config.mlp_width
  where = np.asarray(indices, np.int32)
  if (
    where.ndim != 1
    or not where.size
    or not 0 <= where.min() <= where.max() < width
  ):
    raise ValueError(f"neurons must be some of 0..{width - 1}; got {indices}")
  down = model.params["blocks"]["down"][layer, where]
  return Target(
    layer,
    "mlp_hidden",
    "mlp_raw",
    _neurons,
    where,
    np.asarray(down.astype(jnp.float32)),
  )


def direction(layer: int, site: str, vector: np.ndarray) -> Target:
  """The component of a site, such as "resid_post", along a vector [D].

  Raises:
    ValueError: a vector without length.
  """
  vector = np.asarray(vector, np.float32)
  norm = np.linalg.norm(vector)
  if vector.ndim != 1 or not norm > 0 or not np.isfinite(norm):
    raise ValueError(
      f"a direction must be a finite vector [D] of some length; got shape "
      f"{vector.shape} and norm {norm}"
    )
  unit = (vector / norm)[None]
  return Target(layer, site, site, _along, unit, unit)


def latents(
  layer: int,
  read: str,
  write: str,
  encode: Callable[[jax.Array], jax.Array],
  indices: Sequence[int],
  vectors: np.ndarray,
) -> Target:
  """Latents of a dictionary, with their decoder's rows [m, E] as vectors.

  Args:
    layer: of both sites.
    read: site that the dictionary reads.
    write: site that it writes.
    encode: [..., D] -> [..., M], a `jax.tree_util.Partial` or kept in a
      variable.
    indices: of the latents.
    vectors: float32 [m, E].
  """
  return Target(
    layer,
    read,
    write,
    Partial(_latents, as_pytree(encode)),
    np.asarray(indices, np.int32),
    np.asarray(vectors, np.float32),
  )


def _neurons(where, hidden):
  return jnp.take_along_axis(hidden, where[:, None, :], axis=2)


def _along(where, x):
  return jnp.einsum("btd,bmd->btm", x.astype(jnp.float32), where)


def _latents(encode, where, x):
  return jnp.take_along_axis(encode(x), where[:, None, :], axis=2)


def scale(target: Target, factor: float) -> Change:
  """Multiplies coefficients: 0 removes them, -1 turns them round."""
  return _change(target, gain=factor - 1)


def set_to(
  target: Target, values: np.ndarray, vectors: np.ndarray | None = None
) -> Change:
  """Puts values [m], such as means over a text, in the coefficients' place.

  With other vectors [m, E] it writes as much along those instead, and leaves
  the target's own alone: a control.
  """
  return _change(target, gain=-1, bias=values, vectors=vectors)


def norm_only(target: Target, values: np.ndarray) -> Change:
  """What `set_to` does to the length of the MLP's output, and nothing else.

  A control for Gemma, whose norm behind the MLP scales all neurons when one
  changes; elsewhere it changes nothing.
  """
  return _change(target, gain=-1, bias=values, norm_only=True)


def replace(target: Target, vectors: np.ndarray) -> Change:
  """Writes other vectors [m, E] with the same coefficients."""
  return _change(target, gain=1, vectors=vectors - target.vectors)


def add(target: Target, vectors: np.ndarray) -> Change:
  """Writes vectors [m, E] in addition, with the same coefficients.

  Feature-level edits are such: minus a value vector's part in the span of some
  of a dictionary's decoder rows (PISCES, arXiv 2505.22586).
  """
  return _change(target, gain=1, vectors=vectors)


def random_directions(target: Target, seed: int) -> np.ndarray:
  """Gaussian directions [m, E] as long as the target's vectors."""
  rng = np.random.default_rng(seed)
  drawn = rng.standard_normal(target.vectors.shape)
  drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
  return _like(drawn, target)


def noise(target: Target, ratio: float, seed: int) -> Change:
  """Adds Gaussian noise whose length is about `ratio` times the vector's.

  sigma = ratio * ||v|| / sqrt(E) for each coordinate. An absolute sigma, as
  in Hong et al. 2024 (arXiv 2406.11614), is several times some models' vectors
  and a small part of others'.
  """
  rng = np.random.default_rng(seed)
  drawn = rng.standard_normal(target.vectors.shape)
  return add(target, _like(drawn / drawn.shape[1] ** 0.5 * ratio, target))


def _like(drawn, target):
  lengths = np.linalg.norm(target.vectors, axis=1, keepdims=True)
  return (drawn * lengths).astype(np.float32)


def _change(target, *, gain, bias=0.0, vectors=None, norm_only=False):
  several = len(target.vectors)
  return Change(
    target.where,
    np.full(several, gain, np.float32),
    np.broadcast_to(np.asarray(bias, np.float32), several),
    target.vectors if vectors is None else np.asarray(vectors, np.float32),
    np.array(norm_only),
  )
