"""Edits: pure functions that change a site on its way through a block.

An edit is a function of the value, or of the value and the layer's index.
Those made here carry their arrays as data of a pytree, so that another
vector or strength is not another program: nothing compiles again.

    model.forward(tokens, edits={"blocks.9.resid_post": edits.add(direction)})

An edit returns the shape and the dtype that it was given.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["tree"], meta_fields=["fn"]
)
@dataclasses.dataclass(frozen=True)
class PerLayer:
  """An edit of `blocks.*` with other arrays in each layer.

  Attributes:
    fn: pure function; gets the layer's entry of `tree` before its other
      arguments.
    tree: pytree of arrays, [L, ...] each.
  """

  fn: Callable
  tree: Any


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["fn"], meta_fields=["read"]
)
@dataclasses.dataclass(frozen=True)
class Splice:
  """An edit that reads earlier sites of the same block, or the same site.

  `fn(read, value)` returns what replaces `value`; a transcoder takes the
  MLP's place with

      edits={"blocks.9.mlp_out": Splice("mlp_in", lambda x, y: transcoder(x))}

  Attributes:
    read: the site to read, as edited, by its name in a block (`mlp_in`, or
      TransformerLens's); or a tuple of several, which `fn` gets one by one.
    fn: pure function of two arrays or more, [B, T, ...] each, or a `PerLayer`
      of one.
  """

  read: str | tuple[str, ...]
  fn: Callable[..., jax.Array] | PerLayer


# What may stand as an edit.
Edit = Callable[..., jax.Array] | PerLayer | Splice


def replace(value) -> Edit:
  """Puts `value` in the site's place; any shape that broadcasts to it."""
  return Partial(_replace, jnp.asarray(value))


def add(vector, strength: float = 1.0) -> Edit:
  """Adds `strength * vector`; any shape that broadcasts to the site's."""
  return Partial(_add, jnp.asarray(vector), jnp.asarray(strength))


def scale(factor) -> Edit:
  """Multiplies by `factor`; any shape that broadcasts to the site's."""
  return Partial(_scale, jnp.asarray(factor))


def project_out(direction) -> Edit:
  """Removes the component along `direction`, [D], of any length but zero."""
  return Partial(_project_out, jnp.asarray(direction))


def at(positions, edit: Edit) -> Edit:
  """Restricts `edit` to some positions of a whole context.

  Generation needs `cache=False` for it, and prompts without padding: with the
  cache, tokens come alone.

  Args:
    positions: bool [B or 1, T], or int [n], indices into T; negative ones
      count from its end, and those beyond it are nowhere.
    edit: a function of the value.
  """
  return Partial(_at, jnp.atleast_1d(jnp.asarray(positions)), as_pytree(edit))


def splice(read: str, fn: Callable, *, error_of: Callable | None = None):
  """`fn(read)` in the site's place, with or without the error term.

  Args:
    read: the site that `fn` reads, by its name in a block.
    fn: pure function of its value, such as a dictionary's reconstruction,
      possibly with latents changed.
    error_of: the reconstruction without a change. What it gets wrong is added
      back, as a constant: with `error_of=fn` the model computes what it did,
      and gradients go through `fn`.
  """
  if error_of is None:
    return Splice(read, Partial(_splice, as_pytree(fn)))
  functions = as_pytree(fn), as_pytree(error_of)
  return Splice(read, Partial(_splice_with_error, *functions))


def as_pytree(edit: Edit) -> Edit:
  """An edit that can be an argument of a jitted function."""
  if isinstance(edit, Splice):
    return Splice(edit.read, as_pytree(edit.fn))
  return edit if isinstance(edit, Partial | PerLayer) else Partial(edit)


def _replace(value, x):
  return jnp.broadcast_to(value.astype(x.dtype), x.shape)


def _add(vector, strength, x):
  return x + (strength * vector).astype(x.dtype)


def _scale(factor, x):
  return x * factor.astype(x.dtype)


def _project_out(direction, x):
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  unit = direction.astype(wide.dtype)
  unit = unit / jnp.linalg.norm(unit)
  return (wide - (wide @ unit)[..., None] * unit).astype(x.dtype)


def _at(positions, edit, x):
  length = x.shape[1]
  if length == 1:
    raise ValueError(
      "An edit made with `at` counts positions of a whole context, and got a "
      "single token. In generation, pass cache=False."
    )
  if positions.dtype == bool:
    if positions.shape not in ((1, length), x.shape[:2]):
      raise ValueError(
        f"The mask of an edit made with `at` is {positions.shape}; expected "
        f"[B or 1, T], {x.shape[:2]}."
      )
  else:
    positions = jnp.where(positions < 0, positions + length, positions)
    hits = positions[:, None] == jnp.arange(length)
    positions = jnp.any(hits, axis=0)[None]
  return jnp.where(positions[..., None], edit(x), x)


def _splice(fn, read, value):
  return fn(read).astype(value.dtype)


def _splice_with_error(fn, error_of, read, value):
  error = jax.lax.stop_gradient(value - error_of(read).astype(value.dtype))
  return fn(read).astype(value.dtype) + error
