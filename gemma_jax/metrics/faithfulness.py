"""What a model loses when a dictionary takes a site's place."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from gemma_jax import progress
from gemma_jax.models import Model, Splice, sharding, sites
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
    replacements: name -> function; "clean" is added. Large parameters belong
      in a `jax.tree_util.Partial`: what a function closes over is compiled
      into the program.
    read: site that the functions read, in the same block as `write`.
    write: site that they replace.
    batch_size: windows in one forward pass.

  Returns:
    name -> {"ce": mean loss in nats per token, "kl": mean
    KL(clean || replaced) in nats per token, "tokens": how many}.

  Raises:
    ValueError: `read` and `write` are sites of different blocks.
  """
  names = tuple(replacements)
  functions = tuple(
    fn if isinstance(fn, Partial) else Partial(fn)
    for fn in replacements.values()
  )
  short = _same_block(read, write, model.config)
  totals = np.zeros((1 + len(names), 2))
  count = 0
  bar = progress.bar(int(mask[:, 1:].sum()), "splice", unit="tokens")
  for start in range(0, len(tokens), batch_size):
    part = slice(start, start + batch_size)
    pad = ((0, batch_size - len(tokens[part])), (0, 0))
    padded = np.pad(tokens[part], pad), np.pad(mask[part], pad)
    with jax.set_mesh(model.mesh):
      placed = [sharding.put_batch(a, model.mesh) for a in padded]
      streams = _streams(
        model.config, model.params, *placed, functions, short, write
      )
      # Blocks are separate programs: inside a loop of one program the CPU
      # runs everything but the products on a single core.
      flat = padded[0][:, 1:].reshape(-1), padded[1][:, 1:].reshape(-1)
      for at in range(0, len(flat[0]), LOGIT_ROWS):
        rows = slice(at, at + LOGIT_ROWS)
        if flat[1][rows].any():
          block = streams[:, rows], flat[0][rows], flat[1][rows]
          totals += _losses(model.config, model.params, *block)
    count += int(mask[part][:, 1:].sum())
    bar.update(count - bar.n)
    bar.set_postfix(ce=f"{totals[0, 0] / max(count, 1):.4f}", refresh=False)
  bar.close()
  means = totals / max(count, 1)
  return {
    name: {"ce": float(ce), "kl": float(kl), "tokens": count}
    for name, (ce, kl) in zip(("clean", *names), means, strict=True)
  }


def _same_block(read: str, write: str, cfg) -> str:
  """The short name of `read`."""
  source, target = (sites.parse(s, cfg) for s in (read, write))
  if source.layer != target.layer:
    raise ValueError(
      f"read={read!r} and write={write!r} must be sites of one block."
    )
  return source.name


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _streams(cfg, params, tokens, mask, functions, read, write):
  """Last resid_post of the clean model and of every replacement.

  Returns:
    [1 + R, B * (T - 1), D]: the positions that predict a token.
  """
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

  return jnp.stack([final({}), *map(spliced, functions)])


@functools.partial(jax.jit, static_argnums=0)
def _losses(cfg, params, streams, targets, counted):
  """[1 + R, 2] sums over counted rows of the loss and of KL from clean."""
  clean = unembed(cfg, params, streams[0])
  top = clean.max(-1, keepdims=True)
  weights = jnp.exp(clean - top)
  total = weights.sum(-1)
  clean_lse = top[:, 0] + jnp.log(total)
  out = []
  for i, stream in enumerate(streams):
    logits = unembed(cfg, params, stream) if i else clean
    lse = jax.nn.logsumexp(logits, axis=-1) if i else clean_lse
    ce = lse - jnp.take_along_axis(logits, targets[:, None], 1)[:, 0]
    # sum p (log p - log q), with log p - log q = clean - logits + constants.
    apart = jnp.sum(weights * (clean - logits), axis=-1) / total
    kl = apart - clean_lse + lse
    out.append([jnp.where(counted, v, 0).sum() for v in (ce, kl)])
  return jnp.array(out)


def ce_recovered(clean: float, spliced: float, ablated: float) -> float:
  """(CE ablated - CE spliced) / (CE ablated - CE clean): 1 is perfect.

  A single MLP's denominator can be hundredths of a nat; always show it.
  """
  gap = ablated - clean
  return float("nan") if gap == 0 else (ablated - spliced) / gap
