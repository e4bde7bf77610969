"""What a model loses when a vector does: many changes and prompts at once.

Changes and prompts are rows of a batch, and one program runs the blocks from
the changed one on, whichever it is.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.concepts import answers
from gemma_jax.concepts.interventions import Change, Target
from gemma_jax.models import Model, PerLayer, Splice, sharding, sites
from gemma_jax.models.edits import as_pytree
from gemma_jax.models.forward import embed, run_blocks

ANSWERS = 128  # changed answer tokens at a time
PROMPTS = 32  # at most, of those


@dataclasses.dataclass(frozen=True)
class Prompts:
  """P texts that end with answers of up to A tokens.

  Attributes:
    tokens: int32 [P, T], padded on the left.
    mask: bool [P, T], False at padding.
    edited: bool [P, T], where vectors are changed: all but padding and BOS.
    answers: int32 [P, A], -1 where an answer is shorter.
    at: int32 [P, A], positions that predict them.
    num_bytes: float64 [P], of the answer, in UTF-8.
  """

  tokens: np.ndarray
  mask: np.ndarray
  edited: np.ndarray
  answers: np.ndarray
  at: np.ndarray
  num_bytes: np.ndarray


class Damage(NamedTuple):
  """K changes on P prompts; see `Clean` for the units.

  Attributes:
    log_prob: float64 [K, P], of the answer.
    kl: float64 [K, P], KL(clean || changed), mean over the answer's tokens.
    rank: int [K, P], the worst of the answer's tokens; 0 is the likeliest.
    flipped: bool [K, P], another token became the likeliest at one of them.
  """

  log_prob: np.ndarray
  kl: np.ndarray
  rank: np.ndarray
  flipped: np.ndarray


class Clean(NamedTuple):
  """The model as it is, on P prompts.

  Attributes:
    final: [P, A, D], residual stream that predicts the answer.
    log_total: float32 [P, A], log-sum-exp of the logits there.
    top: int32 [P, A], the likeliest token there.
    log_prob: float64 [P], nats, of the answer: the sum over its tokens.
    rank: int [P], as of `Damage`.
  """

  final: np.ndarray
  log_total: np.ndarray
  top: np.ndarray
  log_prob: np.ndarray
  rank: np.ndarray


def clean(model: Model, prompts: Prompts) -> Clean:
  """What the model makes of prompts without any change."""
  count, width = prompts.answers.shape
  rows, parts = max(1, min(PROMPTS, ANSWERS // width)), []
  for start in range(0, count, rows):
    some = np.minimum(np.arange(start, start + rows), count - 1)
    with jax.set_mesh(model.mesh):
      x = _stream(model, prompts, some, model.config.num_layers)
      found = _answer(
        model.config, model.params, x, prompts.at[some], prompts.answers[some]
      )
    parts.append([np.asarray(a)[: count - start] for a in found])
  final, log_total, top, log_prob, rank = (
    np.concatenate(arrays) for arrays in zip(*parts, strict=True)
  )
  real = prompts.answers >= 0
  return Clean(final, log_total, top, *_of_answers(log_prob, rank, real))


def run(
  model: Model,
  prompts: Prompts,
  before: Clean,
  target: Target,
  changes: Sequence[Change],
  *,
  progress: Callable[[int], None] = lambda rows: None,
) -> Damage:
  """Every change on every prompt.

  Args:
    model: with its head and all of its blocks.
    prompts: P of them.
    before: of these prompts, by `clean`.
    target: says the layer and the sites; the changes may be of others of its
      kind and layer.
    changes: K of them, of m units each.
    progress: called with the number of changed prompts that were run.

  Raises:
    ValueError: a layer or site that does not exist.
    FloatingPointError: a change that makes the model's output not finite.
  """
  cfg = model.config
  for name in (target.read, target.write):
    sites.parse(f"blocks.{target.layer}.{name}", cfg)
  (count, width), several = prompts.answers.shape, len(changes)
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *changes)
  static = (cfg, model.attention, target.read, target.write)
  at_once = max(1, min(PROMPTS, ANSWERS // width))
  ways = max(1, ANSWERS // (at_once * width))
  columns = []
  for start in range(0, count, at_once):
    some = np.minimum(np.arange(start, start + at_once), count - 1)
    with jax.set_mesh(model.mesh):
      prefix = _stream(model, prompts, some, target.layer)
    given = {
      name: getattr(side, name)[some]
      for side, names in (
        (prompts, ("mask", "edited", "answers", "at")),
        (before, ("final", "log_total", "top")),
      )
      for name in names
    }
    parts = []
    for first in range(0, several, ways):
      which = np.minimum(np.arange(first, first + ways), several - 1)
      with jax.set_mesh(model.mesh):
        found = _changed(
          static,
          model.params,
          as_pytree(target.coefficient),
          prefix,
          given,
          jax.tree.map(lambda a, which=which: a[which], stacked),
          np.int32(target.layer),
        )
      kept = min(ways, several - first)
      parts.append([np.asarray(a)[:kept] for a in found])
      progress(kept * min(at_once, count - start))
    rows = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
    columns.append([a[:, : count - start] for a in rows])
  log_prob, kl, rank, flipped = (
    np.concatenate(arrays, axis=1) for arrays in zip(*columns, strict=True)
  )
  real = prompts.answers >= 0
  total, worst = _of_answers(log_prob, rank, real)
  if not np.isfinite(total).all():
    raise FloatingPointError(
      f"{int((~np.isfinite(total)).any(axis=1).sum())} of {several} changes "
      f"at layer {target.layer} give NaN or infinity. Use smaller doses, or "
      "load the model with dtype='float32'."
    )
  mean_kl = np.where(real, kl, 0).sum(-1, dtype=np.float64) / real.sum(-1)
  return Damage(total, mean_kl, worst, (flipped & real).any(-1))


def losses(prompts: Prompts, before: Clean, found: Damage) -> np.ndarray:
  """Log-probability that answers lost, nats per byte, float64 [K, P]."""
  return (before.log_prob - found.log_prob) / prompts.num_bytes


def _of_answers(log_prob, rank, real):
  """Sums of log-probabilities [..., P] and worst ranks of tokens [..., A]."""
  total = np.where(real, log_prob, 0).sum(-1, dtype=np.float64)
  return total, np.where(real, rank, 0).max(-1)


def _stream(model, prompts, some, last):
  """The residual stream of some prompts that enters block `last`."""
  return _prefix(
    (model.config, model.attention),
    model.params,
    sharding.put_batch(prompts.tokens[some], model.mesh),
    sharding.put_batch(prompts.mask[some], model.mesh),
    np.int32(last),
  )


@functools.partial(jax.jit, static_argnums=0)
def _prefix(static, params, tokens, mask, last):
  cfg, attention = static
  x = embed(cfg, params, tokens, mask=mask)
  return run_blocks(cfg, params, x, 0, last, mask=mask, attention=attention)


@functools.partial(jax.jit, static_argnums=0)
def _answer(cfg, params, x, at, tokens):
  """The stream that predicts answers, [P, A, D], and what it predicts."""
  final = jnp.take_along_axis(x, at[..., None], axis=1)
  flat = final.reshape(-1, final.shape[-1])
  found = answers.before(cfg, params, flat, jnp.maximum(tokens, 0).ravel())
  log_total, log_prob, rank, top = (a.reshape(tokens.shape) for a in found)
  found = final, log_total, top, log_prob, rank
  return tuple(map(sharding.replicate, found))


@functools.partial(jax.jit, static_argnums=0)
def _changed(static, params, coefficient, prefix, given, change, layer):
  """log_prob, kl, rank and flipped [K, P, A] of changes on prompts."""
  cfg, attention, read, write = static
  several, count = len(change.norm_only), len(prefix)

  def each(a):
    """One for each change and prompt, [K P, ...]."""
    return jnp.repeat(a, count, axis=0)

  def every(a):
    return jnp.tile(a, (several, *(1,) * (a.ndim - 1)))

  change = jax.tree.map(each, change)
  edited = every(given["edited"])[..., None]

  def written(value):
    own = coefficient(change.where, value).astype(jnp.float32)
    amount = change.gain[:, None] * own + change.bias[:, None]
    amount = jnp.where(edited, amount, 0)
    return jnp.einsum("btm,bme->bte", amount, change.vectors)

  def plain(here, value, x):
    off = (here != layer) | change.norm_only[:, None, None]
    return (x + jnp.where(off, 0, written(value))).astype(x.dtype)

  def length(x):
    return jnp.mean(jnp.square(x), axis=-1, keepdims=True) + cfg.norm_eps

  def scaled(here, value, raw, x):
    wide = raw.astype(jnp.float32)
    ratio = jnp.sqrt(length(wide) / length(wide + written(value)))
    on = (here == layer) & change.norm_only[:, None, None]
    return (x * jnp.where(on, ratio, 1)).astype(x.dtype)

  numbers = jnp.arange(cfg.num_layers)
  edits = {f"blocks.*.{write}": Splice(read, PerLayer(plain, numbers))}
  if write == "mlp_raw" and "post_mlp_norm" in params["blocks"]:
    edits["blocks.*.mlp_out"] = Splice((read, write), PerLayer(scaled, numbers))
  x = run_blocks(
    cfg,
    params,
    sharding.constrain(every(prefix)),
    layer,
    cfg.num_layers,
    mask=every(given["mask"]),
    edits=edits,
    attention=attention,
  )
  final = jnp.take_along_axis(x, every(given["at"])[..., None], axis=1)
  shape = given["answers"].shape
  known = answers.Before(
    given["log_total"].ravel(), None, None, given["top"].ravel()
  )
  found = answers.after(
    cfg,
    params,
    final.reshape(several, -1, final.shape[-1]),
    given["final"].reshape(-1, final.shape[-1]),
    known,
    jnp.maximum(given["answers"], 0).ravel(),
  )
  return tuple(sharding.replicate(a.reshape(several, *shape)) for a in found)
