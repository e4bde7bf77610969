"""How a model uses its neurons: how much, with which sign, and where."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from gemma_jax.models import Model


@dataclasses.dataclass(frozen=True)
class Usage:
  """Coefficients of all neurons, a_j in sum_j a_j v_j, over a text.

  Attributes:
    tokens: how many positions counted.
    mean: float32 [L, F], of the coefficient.
    mass: float32 [L, F], mean of its absolute value.
    positive: float32 [L, F], share of the mass with positive coefficients.
    high: float32 [L, F, k], the largest coefficients, one a window at most,
      largest first; -inf where there are fewer windows.
    high_at: int32 [L, F, k, 2], window and position of each.
    low: float32 [L, F, k], the smallest, smallest first; inf likewise.
    low_at: int32 [L, F, k, 2].
  """

  tokens: int
  mean: np.ndarray
  mass: np.ndarray
  positive: np.ndarray
  high: np.ndarray
  high_at: np.ndarray
  low: np.ndarray
  low_at: np.ndarray


def measure(
  model: Model,
  tokens: np.ndarray,
  mask: np.ndarray,
  *,
  contexts: int = 10,
  batch_size: int = 8,
  progress: Callable[[int], None] = lambda tokens: None,
) -> Usage:
  """Runs a text through the model and looks at `mlp_hidden` of every layer.

  Only sums and each window's extremes leave the device.

  Args:
    model: with all of its blocks.
    tokens: int [W, T], windows.
    mask: bool [W, T], which positions count.
    contexts: how many to keep of either sign.
    batch_size: windows at a time.
    progress: called with the number of positions that were done.

  Raises:
    ValueError: windows and mask of different shapes, no position that counts.
    FloatingPointError: coefficients that are not finite.
  """
  if tokens.shape != mask.shape or tokens.ndim != 2 or not mask.any():
    raise ValueError(
      f"expected windows [W, T] and their mask with positions that count; got "
      f"{tokens.shape}, {mask.shape} and {int(mask.sum())} positions"
    )
  sums, ends = 0, []
  for start in range(0, len(tokens), batch_size):
    rows = np.arange(start, start + batch_size)
    real = rows < len(tokens)
    rows = np.minimum(rows, len(tokens) - 1)
    counted = mask[rows] & real[:, None]
    _, sites = model.forward(
      tokens[rows],
      capture={"blocks.*.mlp_hidden": Partial(_tally, jnp.asarray(counted))},
      stop_at=model.config.num_layers,
    )
    found = jax.device_get(sites["blocks.*.mlp_hidden"])
    sums = sums + np.stack(found["sums"]).astype(np.float64)
    ends = [
      _merge(ends[i] if ends else None, found[name], start, contexts)
      for i, name in enumerate(("high", "low"))
    ]
    progress(int(counted.sum()))
  if not np.isfinite(sums).all():
    layers = np.unique(np.argwhere(~np.isfinite(sums))[:, 1]).tolist()
    raise FloatingPointError(
      f"Coefficients of layers {layers} are NaN or infinite. Load the model "
      "with dtype='float32', or look at its weights."
    )
  count = int(mask.sum())
  total, mass = sums / count
  positive = np.where(mass > 0, (mass + total) / (2 * mass + (mass == 0)), 0.5)
  (high, high_at), (low, low_at) = ends
  return Usage(
    count,
    *(x.astype(np.float32) for x in (total, mass, positive)),
    high,
    high_at,
    -low,
    low_at,
  )


def _tally(counted, x):
  """Of one layer, [B, T, F]: sums, and extremes of each window."""
  x = x.astype(jnp.float32)
  here = counted[..., None]
  kept = jnp.where(here, x, 0)

  def extremes(y):
    y = jnp.where(here, y, -jnp.inf)
    return jnp.max(y, axis=1), jnp.argmax(y, axis=1).astype(jnp.int32)

  return {
    "sums": (jnp.sum(kept, axis=(0, 1)), jnp.sum(jnp.abs(kept), axis=(0, 1))),
    "high": extremes(x),
    "low": extremes(-x),
  }


def _merge(before, found, first: int, contexts: int):
  """The largest so far, [L, F, k], and where, [L, F, k, 2]."""
  values, positions = (np.moveaxis(x, 1, 2) for x in found)  # [L, F, B]
  windows = np.broadcast_to(
    first + np.arange(values.shape[2], dtype=np.int32), values.shape
  )
  at = np.stack([windows, positions], axis=-1)
  if before is not None:
    values = np.concatenate([before[0], values], axis=2)
    at = np.concatenate([before[1], at], axis=2)
  order = np.argsort(-values, axis=2, kind="stable")[:, :, :contexts]
  return (
    np.take_along_axis(values, order, axis=2),
    np.take_along_axis(at, order[..., None], axis=2),
  )
