"""What a model loses when a dictionary takes a site's place."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from gemma_jax import progress
from gemma_jax.metrics.ablation import (
  ABLATIONS,
  ByToken,
  Given,
  Replacement,
  Resample,
  donors,
  of_before,
  of_others,
)
from gemma_jax.metrics.head_losses import head_losses
from gemma_jax.metrics.intervals import document_interval
from gemma_jax.models import Model, edits, sharding, sites
from gemma_jax.models.forward import forward

DEFINITIONS = {
  "ce": "Mean next-token loss, nats per counted token.",
  "delta_ce": "ce less that of the clean model, nats per token.",
  "kl": "Mean KL(clean || replaced) of next-token distributions, nats.",
  "ce_recovered": (
    "(ce of the ablation - ce) / gap: 1 loses nothing, 0 is no better than "
    "the ablation; ratio of means."
  ),
  "gap": "delta_ce of the ablation, nats per token: small ones mean little.",
  "zero": "The ablation that sets the site to zero.",
  "mean": "The ablation that sets it to its mean over training tokens.",
  "resample": (
    "The ablation that sets it to its value at a random counted token of the "
    "batch, of another document where there is one."
  ),
  "interval": "Bootstrap over documents (BCa) at the level that is given.",
}


@dataclasses.dataclass(frozen=True, eq=False)
class SpliceLosses:
  """Sums over counted tokens, by document, in float64.

  Attributes:
    documents: int [G], ids of the documents that have counted tokens.
    tokens: int64 [G], how many.
    ce: name -> [G] sums of next-token loss, nats; "clean" is the whole model.
    kl: name -> [G] sums of KL(clean || replaced), nats.
  """

  documents: np.ndarray
  tokens: np.ndarray
  ce: dict[str, np.ndarray]
  kl: dict[str, np.ndarray]

  def means(self) -> dict[str, dict[str, float]]:
    """name -> {"ce", "kl": nats per token, "tokens": how many}."""
    count = int(self.tokens.sum())
    return {
      name: {
        "ce": float(self.ce[name].sum() / max(count, 1)),
        "kl": float(self.kl[name].sum() / max(count, 1)),
        "tokens": count,
      }
      for name in self.ce
    }

  def summary(
    self,
    ablations=ABLATIONS,
    *,
    level: float = 0.95,
    resamples: int = 1_000,
    seed: int = 0,
  ) -> dict[str, dict]:
    """All numbers of `DEFINITIONS` with their intervals.

    Args:
      ablations: names of the replacements that the others are held against;
        those that were not made are left out.
      level: see `document_interval`, as are the other two.
      resamples: see there.
      seed: see there.

    Returns:
      name -> {"ce", "kl", "tokens", "delta_ce", "delta_ce_interval",
      "kl_interval"}, and for what is no ablation "ce_recovered": {ablation:
      {"value", "gap", "interval"}}; "clean" has "ce", "ce_interval" and
      "tokens". Intervals are (low, high), or None for fewer than two
      documents.
    """

    def interval(top, bottom):
      return document_interval(
        top, bottom, level=level, resamples=resamples, seed=seed
      )

    means, whole = self.means(), self.ce["clean"]
    clean = means["clean"]["ce"]
    out = {
      "clean": {
        "ce": clean,
        "ce_interval": interval(whole, self.tokens),
        "tokens": means["clean"]["tokens"],
      }
    }
    against = [name for name in ablations if name in self.ce]
    for name, ce in self.ce.items():
      if name == "clean":
        continue
      out[name] = means[name] | {
        "delta_ce": means[name]["ce"] - clean,
        "delta_ce_interval": interval(ce - whole, self.tokens),
        "kl_interval": interval(self.kl[name], self.tokens),
      }
      if name in ablations:
        continue
      out[name]["ce_recovered"] = {
        other: {
          "value": ce_recovered(clean, means[name]["ce"], means[other]["ce"]),
          "gap": means[other]["ce"] - clean,
          "interval": interval(self.ce[other] - ce, self.ce[other] - whole),
        }
        for other in against
      }
    return out


def splice_losses(
  model: Model,
  tokens: np.ndarray,
  mask: np.ndarray,
  replacements: Mapping[str, Replacement | Resample | ByToken | Given],
  *,
  read: str,
  write: str,
  batch_size: int,
  document: np.ndarray | None = None,
  keep_unmasked: bool = True,
) -> SpliceLosses:
  """Next-token loss of the model with `write` replaced, by document.

  The loss is taken where the token to predict is counted, the same positions
  for every replacement, and belongs to that token's document.

  Args:
    model: with all its layers.
    tokens: int [W, T].
    mask: bool [W, T], True where a position counts: not BOS, not padding, no
      other special token.
    replacements: name -> function, `Resample`, `ByToken` or `Given`; "clean"
      is added. Large parameters belong in a `jax.tree_util.Partial`: what a
      function closes over is compiled into the program.
    read: site that the functions read, in the same block as `write`.
    write: site that they replace.
    batch_size: windows in one forward pass.
    document: int [W, T], whose document a position is; None takes every
      window for one.
    keep_unmasked: positions where the mask is False keep what they had; else
      they are replaced like all others.

  Raises:
    ValueError: `read` and `write` are sites of different blocks, a
      replacement is called "clean", or an array is not [W, T] or, if it is
      `Given`, [W, T, E].
  """
  if "clean" in replacements:
    raise ValueError('"clean" is the model as it is; choose another name.')
  if document is None:
    document = np.broadcast_to(np.arange(len(tokens))[:, None], tokens.shape)
  for name, array in (("mask", mask), ("document", document)):
    if array.shape != tokens.shape:
      raise ValueError(
        f"The {name} is {array.shape}; expected [W, T], {tokens.shape}."
      )
  names = tuple(replacements)
  _check_block(read, write, model.config)
  whole = (*tokens.shape, sites.width(write, model.config))
  for name, fn in replacements.items():
    if isinstance(fn, Given) and fn.values.shape != whole:
      raise ValueError(
        f"The values given for {name!r} are {fn.values.shape}; expected those "
        f"of {write} in all windows, [W, T, E], {whole}."
      )
  found, index = np.unique(document[:, 1:][mask[:, 1:]], return_inverse=True)
  owner = np.zeros(mask[:, 1:].shape, np.int64)
  owner[mask[:, 1:]] = index
  totals = np.zeros((1 + len(names), 2, len(found)))
  tally = np.bincount(index, minlength=len(found))
  generators = {
    name: np.random.default_rng(fn.seed)
    for name, fn in replacements.items()
    if isinstance(fn, Resample)
  }
  bar = progress.bar(len(index), "splice", unit="tokens")
  done = 0
  for start in range(0, len(tokens), batch_size):
    part = slice(start, start + batch_size)
    pad = ((0, batch_size - len(tokens[part])), (0, 0))
    padded = [np.pad(a[part], pad) for a in (tokens, mask, document)]
    replaced = padded[1] if keep_unmasked else np.ones_like(padded[1])
    functions = []
    for name, fn in replacements.items():
      if isinstance(fn, Resample):
        chosen = donors(*padded[1:], generators[name])
        fn = Partial(of_others, sharding.put_batch(chosen, model.mesh))
      elif isinstance(fn, ByToken):
        ids = sharding.put_batch(padded[0], model.mesh)
        fn = Partial(_by_token, fn.function, ids)
      elif isinstance(fn, Given):
        values = np.pad(fn.values[part], (*pad, (0, 0)))
        fn = Partial(of_before, sharding.put_batch(values, model.mesh))
      functions.append(fn if isinstance(fn, Partial) else Partial(fn))
    counted = padded[1][:, 1:].reshape(-1)
    values = _row_values(
      model, padded[0], replaced, counted, functions, read, write
    )
    owners = owner[part].reshape(-1)
    kept = counted[: len(owners)]
    for sums, rows in zip(totals, values[..., : len(owners)], strict=True):
      for total, row in zip(sums, rows, strict=True):
        total += np.bincount(owners[kept], row[kept], len(found))
    done += int(kept.sum())
    bar.update(done - bar.n)
    bar.set_postfix(
      ce=f"{totals[0, 0].sum() / max(done, 1):.4f}", refresh=False
    )
  bar.close()
  named = dict(zip(("clean", *names), totals, strict=True))
  return SpliceLosses(
    found,
    tally,
    {name: ce for name, (ce, _) in named.items()},
    {name: kl for name, (_, kl) in named.items()},
  )


def spliced_cross_entropy(
  model: Model,
  tokens: np.ndarray,
  mask: np.ndarray,
  replacements: Mapping[str, Replacement | Resample | ByToken | Given],
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
  return splice_losses(
    model,
    tokens,
    mask,
    replacements,
    read=read,
    write=write,
    batch_size=batch_size,
  ).means()


def _row_values(model, tokens, replaced, counted, functions, read, write):
  """[1 + R, 2, B * (T - 1)]: the loss and KL of the counted rows of a batch.

  The model runs once for each function, by one program for all of them.
  """
  targets = tokens[:, 1:].reshape(-1)
  values = np.zeros((1 + len(functions), 2, len(targets)))
  (index,) = np.nonzero(counted)
  cfg, params = model.config, model.params
  with jax.set_mesh(model.mesh):
    placed = [sharding.put_batch(a, model.mesh) for a in (tokens, replaced)]
    clean, x, y = _clean(cfg, params, placed[0], read, write)
    streams = [clean]
    for function in functions:
      made = _made(function, x, y, placed[1])
      streams.append(_stream(cfg, params, placed[0], made, write))
    values[..., index] = head_losses(cfg, params, streams, index, targets)
  return values


def _check_block(read: str, write: str, cfg) -> None:
  source, target = (sites.parse(s, cfg) for s in (read, write))
  if source.layer != target.layer:
    raise ValueError(
      f"read={read!r} and write={write!r} must be sites of one block."
    )


def _by_token(function, tokens, x, y):
  return function(tokens, x, y)


def _last(cfg) -> str:
  return f"blocks.{cfg.num_layers - 1}.resid_post"


def _predicting(cfg, stream):
  """[B, T, D] -> [B * (T - 1), D]: the positions that predict a token."""
  return stream[:, :-1].reshape(-1, cfg.width)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _clean(cfg, params, tokens, read, write):
  """Last resid_post of the model as it is, and two of its sites."""
  capture = (_last(cfg), read, write)
  _, found = forward(
    cfg, params, tokens, capture=capture, stop_at=cfg.num_layers
  )
  stream, x, y = (found[name] for name in capture)
  return _predicting(cfg, stream), x, y


@jax.jit
def _made(function, x, y, replaced):
  return jnp.where(replaced[..., None], function(x, y), y)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _stream(cfg, params, tokens, made, write):
  """Last resid_post with a site replaced."""
  _, found = forward(
    cfg,
    params,
    tokens,
    capture=(_last(cfg),),
    edits={write: edits.replace(made)},
    stop_at=cfg.num_layers,
  )
  return _predicting(cfg, found[_last(cfg)])


def ce_recovered(clean: float, spliced: float, ablated: float) -> float:
  """(CE ablated - CE spliced) / (CE ablated - CE clean): 1 is perfect.

  A single MLP's denominator can be hundredths of a nat; always show it.
  """
  gap = ablated - clean
  return float("nan") if gap == 0 else (ablated - spliced) / gap
