"""A dictionary on held-out activations: numbers, baselines, latents."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax import progress
from gemma_jax.activations import ActivationStore
from gemma_jax.dictionaries import core, linear
from gemma_jax.dictionaries.dictionary import Dictionary, encode
from gemma_jax.dictionaries.linear import Ridge
from gemma_jax.metrics import RunningFVU

DEFINITIONS = {
  "fvu": (
    "sum |y - y_hat|^2 / sum |y - mean(y)|^2 over all held-out tokens, mean "
    "over the same tokens, all latents."
  ),
  "fvu_prefixes": "The same with only the first n latents, for every prefix.",
  "fvu_min": "Smallest of fvu_prefixes.",
  "fvu_max": "Largest of fvu_prefixes.",
  "fvu_mean_prefixes": "Mean of fvu_prefixes.",
  "fvu_linear": (
    "FVU of ridge regression from the same input, fitted on the training "
    "tokens; its penalty chosen on a tenth of them."
  ),
  "fvu_mean": "FVU of predicting the held-out mean: 1 by definition.",
  "fvu_train_mean": "FVU of predicting the training mean.",
  "fvu_shuffled": (
    "FVU of the reconstructions dealt to other tokens at random: a control "
    "that must not be below 1."
  ),
  "l0": "Mean number of active latents per held-out token.",
  "dead_fraction": "Share of latents that fire on no held-out token.",
}


@dataclasses.dataclass(frozen=True)
class LatentStatistics:
  """How each latent behaves over the held-out tokens; arrays [M] or [M, n].

  Attributes:
    tokens: how many tokens were seen.
    density: share of tokens on which it fires.
    mean_activation: over the tokens on which it fires; 0 where it never does.
    max_activation: the largest.
    energy: sum over tokens of (activation * decoder norm)^2.
    top_rows: [M, n] rows of the store with the largest activations,
      descending; -1 where there are fewer.
    top_activations: [M, n] their activations.
  """

  tokens: int
  density: np.ndarray
  mean_activation: np.ndarray
  max_activation: np.ndarray
  energy: np.ndarray
  top_rows: np.ndarray
  top_activations: np.ndarray


def evaluate(
  dictionary: Dictionary,
  store: ActivationStore,
  ridge: Ridge,
  train_mean: np.ndarray,
  *,
  batch_size: int = 2048,
  top: int = 16,
) -> tuple[dict, LatentStatistics, dict[str, np.ndarray]]:
  """One pass over a held-out store.

  Args:
    dictionary: folded, with its sites in the store.
    store: held-out activations.
    ridge: the linear baseline.
    train_mean: mean of the training targets, [E].
    batch_size: rows at a time.
    top: contexts to remember for each latent.

  Returns:
    numbers (see `DEFINITIONS`), latents, and norms [N] of "input", "target",
    "reconstruction" and "error".
  """
  cfg = dictionary.config
  prefixes = [RunningFVU() for _ in cfg.prefix_widths]
  affine, constant, shuffled = RunningFVU(), RunningFVU(), RunningFVU()
  rng = np.random.default_rng(0)
  width = cfg.width
  sums = {
    "fired": np.zeros(width, np.int64),
    "total": np.zeros(width),
    "energy": np.zeros(width),
  }
  best = (
    jnp.zeros((width, top), jnp.float32),
    jnp.full((width, top), -1, jnp.int32),
  )
  norms = {n: [] for n in ("input", "target", "reconstruction", "error")}
  rows = len(store)
  bar = progress.bar(rows, "evaluate", unit="tokens")
  for start in range(0, rows, batch_size):
    stop = min(start + batch_size, rows)
    x = np.asarray(linear.rows(store, start, stop, cfg.read), np.float32)
    y = np.asarray(linear.rows(store, start, stop, cfg.write), np.float32)
    recs, acts = _reconstruct(cfg, dictionary.params, x)
    best = _merge(best, acts, start)
    for name, part in _sums(acts, dictionary.params["W_dec"]).items():
      sums[name] += np.asarray(part)
    recs = np.asarray(recs)
    for running, rec in zip(prefixes, recs, strict=True):
      running.update(y, rec)
    affine.update(y, ridge(x))
    constant.update(y, np.broadcast_to(train_mean.astype(np.float32), y.shape))
    shuffled.update(y, recs[-1][rng.permutation(len(y))])
    norms["input"].append(np.linalg.norm(x, axis=-1))
    norms["target"].append(np.linalg.norm(y, axis=-1))
    norms["reconstruction"].append(np.linalg.norm(recs[-1], axis=-1))
    norms["error"].append(np.linalg.norm(y - recs[-1], axis=-1))
    bar.update(stop - start)
    bar.set_postfix(fvu=f"{prefixes[-1].compute():.4f}", refresh=False)
  bar.close()
  full = prefixes[-1]
  by_prefix = [running.compute() for running in prefixes]
  mean = _mean_predictor(store, cfg.write, full.mean, batch_size)
  numbers = {
    "fvu": full.compute(),
    "fvu_prefixes": dict(
      zip(map(str, cfg.prefix_widths), by_prefix, strict=True)
    ),
    "fvu_min": min(by_prefix),
    "fvu_max": max(by_prefix),
    "fvu_mean_prefixes": float(np.mean(by_prefix)),
    "fvu_linear": affine.compute(),
    "fvu_mean": mean,
    "fvu_train_mean": constant.compute(),
    "fvu_shuffled": shuffled.compute(),
    "l0": float(sums["fired"].sum() / rows),
    "dead_fraction": float(np.mean(sums["fired"] == 0)),
  }
  values, where = map(np.asarray, best)
  latents = LatentStatistics(
    rows,
    sums["fired"] / rows,
    sums["total"] / np.maximum(sums["fired"], 1),
    values[:, 0],
    sums["energy"],
    np.where(values > 0, where, -1),
    values,
  )
  return numbers, latents, {n: np.concatenate(v) for n, v in norms.items()}


def _mean_predictor(store, site, mean, batch_size) -> float:
  running = RunningFVU()
  for start in range(0, len(store), batch_size):
    stop = min(start + batch_size, len(store))
    y = linear.rows(store, start, stop, site)
    running.update(y, np.broadcast_to(mean, y.shape))
  return running.compute()


@functools.partial(jax.jit, static_argnums=0)
def _reconstruct(cfg, params, x):
  acts = encode(cfg, params, x)
  return jnp.stack(core.decode_prefixes(cfg, params, x, acts)), acts


@jax.jit
def _sums(acts, decoder):
  squares = jnp.sum(acts * acts, axis=0) * jnp.sum(decoder * decoder, axis=1)
  return {
    "fired": jnp.sum(acts > 0, axis=0),
    "total": jnp.sum(acts, axis=0),
    "energy": squares,
  }


@jax.jit
def _merge(best, acts, start):
  """The largest activations of every latent, so far and in this batch."""
  values, rows = best
  new = start + jnp.broadcast_to(jnp.arange(len(acts)), acts.T.shape)
  values = jnp.concatenate([values, acts.T], axis=1)
  rows = jnp.concatenate([rows, new.astype(jnp.int32)], axis=1)
  values, index = jax.lax.top_k(values, best[0].shape[1])
  return values, jnp.take_along_axis(rows, index, axis=1)
