"""What codes are worth on held-out tokens, each measured the same way."""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gemma_jax import data, metrics, models, probing
from gemma_jax.activations import ActivationStore
from gemma_jax.metrics import document_interval, rates
from gemma_jax.metrics.intervals import DocumentSums
from gemma_jax.probing import explain
from studies import evaluate
from studies.codes import Code
from trainers import stores

log = logging.getLogger("gemma_jax")

BLOCK = 2_048  # rows at once
LEAST_FIRING = 20  # tokens, of a latent that rules are sought for


class HeldOut(NamedTuple):
  """A site at held-out tokens.

  Attributes:
    x: float32 [N, D].
    token: int32 [N].
    document: int32 [N].
  """

  x: np.ndarray
  token: np.ndarray
  document: np.ndarray


def read(store: ActivationStore, site: str) -> HeldOut:
  """All rows of a store."""
  x, token, document = (
    store.read(0, len(store), name) for name in (site, "token", "document")
  )
  return HeldOut(np.asarray(x, np.float32), token, document)


@jax.jit
def _made(function, tokens, x):
  return function(tokens, x)


def explained_variance(
  found: Sequence[Code], held: HeldOut, eigenvalues: np.ndarray
) -> tuple[list[dict[str, Any]], dict[str, DocumentSums]]:
  """Rows of the table, and squared errors by document.

  Args:
    found: the codes.
    held: the rows.
    eigenvalues: of the training rows' covariance, [D].

  Returns:
    For each code its costs and its FVU with interval, Gaussian bound and
    shuffled control; "error" of each code by document and "away" of "all".
  """
  sums = {"all": DocumentSums()}
  away = np.square(held.x - held.x.mean(0, dtype=np.float64)).sum(1)
  sums["all"].add(held.document, away=away)
  order = np.random.default_rng(0).permutation(len(held.x))
  rows = []
  for code in found:
    made, speed = _reconstruct(code, held)
    off = np.square(held.x - made, dtype=np.float64).sum(1)
    dealt = np.square(held.x - made[order], dtype=np.float64).sum()
    sums[code.name] = DocumentSums()
    sums[code.name].add(held.document, error=off)
    interval = document_interval(
      sums[code.name]["error"], sums["all"]["away"]
    ) or (None, None)
    rows.append(
      {
        "name": code.name,
        "kind": code.kind,
        "bits": float(code.bits),
        "parameters": int(code.parameters),
        "encode_flops": float(code.encode_flops),
        "fvu": float(off.sum() / away.sum()),
        "fvu_low": interval[0],
        "fvu_high": interval[1],
        "fvu_bound": float(rates.gaussian_bound(eigenvalues, code.bits)),
        "fvu_shuffled": float(dealt / away.sum()),
        "encode_tokens_per_second": speed,
        **code.about,
      }
    )
  return rows, sums


def _reconstruct(code: Code, held: HeldOut):
  """[N, D], and rows per second in whole blocks after the first."""
  parts, seconds, rows = [], 0.0, 0
  for start in range(0, len(held.x), BLOCK):
    part = slice(start, start + BLOCK)
    began = time.perf_counter()
    made = _made(code.function, held.token[part], held.x[part])
    parts.append(np.asarray(made))
    if start and len(made) == BLOCK:  # the first one compiles
      seconds, rows = seconds + time.perf_counter() - began, rows + BLOCK
  return np.concatenate(parts), rows / seconds if rows else None


def splice(
  config: Mapping[str, Any],
  model: models.Model,
  found: Sequence[Code],
  site: str,
  mean: np.ndarray,
  windows: data.Windows,
) -> metrics.SpliceLosses:
  """What the model loses with each code in the site's place, and ablated.

  Args:
    config: `eval` of the study.
    model: whose site it is.
    found: the codes.
    site: that is replaced.
    mean: of the site over training tokens, [D].
    windows: held-out tokens.
  """
  return stores.splice(
    model,
    windows,
    config,
    {
      **{
        code.name: metrics.ByToken(
          jax.tree_util.Partial(_spliced, code.function)
        )
        for code in found
      },
      **metrics.ablations(mean),
    },
    read=site,
    write=site,
  )


def _spliced(function, tokens, x, y):
  return function(tokens, x).astype(y.dtype)


def interpreted(
  config: Mapping[str, Any],
  tokenizer,
  found: Sequence[Code],
  held: HeldOut,
  windows: data.Windows,
) -> dict[str, dict[str, Any]]:
  """How well rules on tokens say when latents and clusters are active.

  Args:
    config: `eval` of the study.
    tokenizer: of the model.
    found: the codes; those without latents are left out.
    held: the rows.
    windows: the tokens that the rows are of.

  Returns:
    Numbers by the code's name.
  """
  if not config["explained"]:
    return {}
  labels = probing.label(
    windows.tokens,
    windows.mask,
    tokenizer,
    documents=np.where(windows.mask, windows.document, -1),
  )
  kinds = explain.candidates(windows.tokens, windows.mask, labels)
  out = {}
  for code in found:
    if code.latents is None:
      continue
    log.info("explaining %s", code.name)
    z = evaluate.sparse_latents(code.latents, held.x)
    firing = np.asarray((z > 0).sum(0)).ravel()
    live = np.flatnonzero(firing >= LEAST_FIRING)
    chosen = np.random.default_rng(0).permutation(live)[: config["explained"]]
    score = evaluate.or_why(
      evaluate.noisy_explained,
      z,
      kinds,
      held.document,
      chosen,
      held.x,
      range(config["probe_seeds"]),
    )
    if "latents" not in score:
      continue
    auroc = score["latents"]["auroc"]
    out[code.name] = {
      "auroc": auroc["value"],
      "auroc_mdd": auroc["mdd"],
      "auroc_interval": auroc["interval"],
      "auroc_random": score["random"]["auroc"]["value"],
      "auroc_shuffled": score["shuffled"]["auroc"]["value"],
      "explained_latents": len(chosen),
    }
  return out
