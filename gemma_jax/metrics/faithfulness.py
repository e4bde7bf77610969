"""What a model loses when a dictionary takes a site's place."""

import functools
import sys
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from gemma_jax.models import Model, Splice, sharding
from gemma_jax.models.forward import forward, unembed

# fn(value of the site read, value of the site replaced) -> replacement.
Replacement = Callable[[jax.Array, jax.Array], jax.Array]

LOGIT_ROWS = 256  # tokens whose logits exist at once


def spliced_cross_entropy(
  model: Model,
  tokens: np.ndarray,
  mask: np.ndarray,
  replacements: Mapping[str, Replacement],
  *,
  read: str,
  write: str,
  batch_size: int,
) -> dict[str, dict[str, float]]:
  """Next-token loss of the model with `write` replaced, against it whole.

  A replacement acts only where `mask` is True: BOS and padding keep what they
  had. The loss is taken where the token to predict is unmasked, the same
  positions for every replacement.

  Args:
    model: with all its layers.
    tokens: int [W, T].
    mask: bool [W, T].
    replacements: name -> function; "clean" is added.
    read: site that the functions read, in the same block as `write`.
    write: site that they replace.
    batch_size: windows in one forward pass.

  Returns:
    name -> {"ce": mean loss in nats per token, "kl": mean
    KL(clean || replaced) in nats per token, "tokens": how many}.
  """
  names = tuple(replacements)
  functions = tuple(replacements.values())
  short = read.rsplit(".", 1)[1]
  totals = np.zeros((1 + len(names), 2))
  count = 0
  for start in tqdm.trange(
    0,
    len(tokens),
    batch_size,
    desc="splice",
    unit=" batches",
    disable=not sys.stderr.isatty(),
  ):
    part = slice(start, start + batch_size)
    pad = ((0, batch_size - len(tokens[part])), (0, 0))
    with jax.set_mesh(model.mesh):
      sums = _batch(
        model.config,
        model.params,
        sharding.put_batch(np.pad(tokens[part], pad), model.mesh),
        sharding.put_batch(np.pad(mask[part], pad), model.mesh),
        functions,
        short,
        write,
      )
    totals += np.asarray(sums, np.float64)
    count += int(mask[part][:, 1:].sum())
  means = totals / max(count, 1)
  return {
    name: {"ce": float(ce), "kl": float(kl), "tokens": count}
    for name, (ce, kl) in zip(("clean", *names), means, strict=True)
  }


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6))
def _batch(cfg, params, tokens, mask, functions, read, write):
  """[1 + R, 2] sums of loss and of KL from the clean model."""
  last = f"blocks.{cfg.num_layers - 1}.resid_post"

  def final(edits):
    _, found = forward(
      cfg,
      params,
      tokens,
      capture=(last,),
      edits=edits,
      stop_at=cfg.num_layers,
    )
    return found[last][:, :-1].reshape(-1, cfg.width)

  def spliced(function):
    def where_unmasked(x, y):
      return jnp.where(mask[..., None], function(x, y), y)

    return final({write: Splice(read, where_unmasked)})

  streams = jnp.stack([final({}), *map(spliced, functions)])
  targets = tokens[:, 1:].reshape(-1)
  counted = mask[:, 1:].reshape(-1)
  rows = targets.shape[0]
  blocks = -(-rows // LOGIT_ROWS)
  pad = blocks * LOGIT_ROWS - rows
  streams = jnp.pad(streams, ((0, 0), (0, pad), (0, 0)))
  streams = streams.reshape(len(streams), blocks, LOGIT_ROWS, cfg.width)
  targets = jnp.pad(targets, (0, pad)).reshape(blocks, LOGIT_ROWS)
  counted = jnp.pad(counted, (0, pad)).reshape(blocks, LOGIT_ROWS)

  def losses(block):
    streams, targets, counted = block
    clean = jax.nn.log_softmax(unembed(cfg, params, streams[0]))
    out = []
    for i, stream in enumerate(streams):
      logp = (
        clean if i == 0 else jax.nn.log_softmax(unembed(cfg, params, stream))
      )
      ce = -jnp.take_along_axis(logp, targets[:, None], 1)[:, 0]
      kl = jnp.sum(jnp.exp(clean) * (clean - logp), axis=-1)
      out.append(
        jnp.stack(
          [
            jnp.sum(jnp.where(counted, ce, 0)),
            jnp.sum(jnp.where(counted, kl, 0)),
          ]
        )
      )
    return jnp.stack(out)

  parts = jax.lax.map(losses, (jnp.moveaxis(streams, 1, 0), targets, counted))
  return parts.sum(0)


def ce_recovered(clean: float, spliced: float, ablated: float) -> float:
  """(CE ablated - CE spliced) / (CE ablated - CE clean): 1 is perfect.

  A single MLP's denominator can be hundredths of a nat; always show it.
  """
  gap = ablated - clean
  return float("nan") if gap == 0 else (ablated - spliced) / gap
