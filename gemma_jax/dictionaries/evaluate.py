"""A dictionary on held-out activations: numbers, baselines, latents."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma_jax import machine, progress
from gemma_jax.activations import ActivationStore
from gemma_jax.dictionaries import linear
from gemma_jax.dictionaries.dictionary import Dictionary, reconstruct_prefixes
from gemma_jax.dictionaries.linear import Ridge
from gemma_jax.metrics import (
  RunningFVU,
  RunningReconstruction,
  definitions,
  latents,
)

DEFINITIONS = (
  definitions.DEFINITIONS
  | {n: v for n, v in latents.DEFINITIONS.items() if n != "density"}
  | {
    "fvu": (
      "sum |y - y_hat|^2 / sum |y - mean(y)|^2 over all held-out tokens, mean "
      "over the same tokens, all latents."
    ),
    "batch_size": "Rows in a batch, of which some numbers depend.",
    "fvu_interval": "95 % bootstrap interval of fvu over documents.",
    "fvu_prefixes": "The same with only the first n latents, every prefix.",
    "l0_prefixes": "l0 of the first n latents, every prefix.",
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
    "dead_fraction": "Share of latents that fire on no held-out token.",
  }
)
MOST_ROWS = 2_048  # in one batch of a device
SHARE = 0.8  # of the free memory that a batch may take


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
  batch_size: int | None = None,
  top: int = 16,
  mesh: Mesh | None = None,
) -> tuple[dict, LatentStatistics, dict[str, np.ndarray]]:
  """One pass over a held-out store.

  Args:
    dictionary: folded, with its sites in the store.
    store: held-out activations.
    ridge: the linear baseline.
    train_mean: mean of the training targets, [E].
    batch_size: rows at a time; None: what the devices' memory holds.
    top: contexts to remember for each latent.
    mesh: over all of whose devices rows are split; None: one device.

  Returns:
    numbers (see `DEFINITIONS`), latents, and norms [N] of "input", "target",
    "reconstruction" and "error".
  """
  cfg, count = dictionary.config, len(store)
  if batch_size is None:
    batch_size = fitting_rows(dictionary, mesh, top=top)
  prefixes = [RunningFVU() for _ in cfg.prefix_widths[:-1]]
  full, firing = RunningReconstruction(), latents.RunningLatents()
  affine, constant, shuffled = RunningFVU(), RunningFVU(), RunningFVU()
  rng = np.random.default_rng(0)
  sums = {"total": np.zeros(cfg.width), "energy": np.zeros(cfg.width)}
  best = (
    jnp.zeros((cfg.width, top), jnp.float32),
    jnp.full((cfg.width, top), -1, jnp.int32),
  )
  norms = {n: [] for n in ("input", "target", "reconstruction", "error")}
  params = dictionary.params
  if mesh is not None:
    params, best = jax.device_put((params, best), NamedSharding(mesh, P()))
  bar = progress.bar(count, "evaluate", unit="tokens")
  for start in range(0, count, batch_size):
    stop = min(start + batch_size, count)
    x = np.asarray(linear.rows(store, start, stop, cfg.read), np.float32)
    y = np.asarray(linear.rows(store, start, stop, cfg.write), np.float32)
    recs, acts, found, best = _pass(
      cfg, params, _put(x, mesh), best, np.int32(start)
    )
    for name, part in found.items():
      sums[name] += np.asarray(part)
    firing.update(acts)
    recs = np.asarray(recs)
    for running, rec in zip(prefixes, recs[:-1], strict=True):
      running.update(y, rec)
    full.update(y, recs[-1], store.read(start, stop, "document"))
    affine.update(y, ridge(x))
    constant.update(y, np.broadcast_to(train_mean.astype(np.float32), y.shape))
    shuffled.update(y, recs[-1][rng.permutation(len(y))])
    norms["input"].append(np.linalg.norm(x, axis=-1))
    norms["target"].append(np.linalg.norm(y, axis=-1))
    norms["reconstruction"].append(np.linalg.norm(recs[-1], axis=-1))
    norms["error"].append(np.linalg.norm(y - recs[-1], axis=-1))
    bar.update(stop - start)
    if full.count > 1:
      bar.set_postfix(fvu=f"{full.compute()['fvu']:.4f}", refresh=False)
  bar.close()
  numbers = full.compute()
  by_prefix = [*(p.compute() for p in prefixes), numbers["fvu"]]
  interval = full.interval()
  numbers |= {
    "batch_size": batch_size,
    "fvu_interval": None if interval is None else list(interval),
    "fvu_prefixes": dict(
      zip(map(str, cfg.prefix_widths), by_prefix, strict=True)
    ),
    "l0_prefixes": {
      str(width): float(firing.density[:width].sum())
      for width in cfg.prefix_widths
    },
    "fvu_min": min(by_prefix),
    "fvu_max": max(by_prefix),
    "fvu_mean_prefixes": float(np.mean(by_prefix)),
    "fvu_linear": affine.compute(),
    "fvu_mean": _mean_predictor(store, cfg.write, full.mean, batch_size),
    "fvu_train_mean": constant.compute(),
    "fvu_shuffled": shuffled.compute(),
    **{n: v for n, v in firing.compute().items() if n != "tokens"},
    "decoder_coherence": latents.decoder_coherence(dictionary.params["W_dec"]),
  }
  values, where = map(np.asarray, best)
  fired = np.rint(firing.density * count)
  statistics = LatentStatistics(
    count,
    firing.density,
    sums["total"] / np.maximum(fired, 1),
    values[:, 0],
    sums["energy"],
    np.where(values > 0, where, -1),
    values,
  )
  return numbers, statistics, {n: np.concatenate(v) for n, v in norms.items()}


def fitting_rows(
  dictionary: Dictionary, mesh: Mesh | None = None, *, top: int = 16
) -> int:
  """Rows that surely fit a device: XLA's own account, nothing is tried.

  Raises:
    MemoryError: not even one row for each device fits.
  """
  cfg = dictionary.config
  limit = SHARE * machine.device_memory()[1]
  ways = 1 if mesh is None else mesh.size
  rows = MOST_ROWS
  f32 = jnp.float32
  best = (
    jax.ShapeDtypeStruct((cfg.width, top), f32),
    jax.ShapeDtypeStruct((cfg.width, top), jnp.int32),
  )
  start = jax.ShapeDtypeStruct((), jnp.int32)
  while True:
    # Every device holds its share of the rows and all of the dictionary.
    x = jax.ShapeDtypeStruct((rows, cfg.d_in), f32)
    size = (
      _pass.lower(cfg, dictionary.params, x, best, start)
      .compile()
      .memory_analysis()
    )
    need = size.temp_size_in_bytes + size.output_size_in_bytes
    if need <= limit:
      return rows * ways
    if rows == 1:
      raise MemoryError(
        f"Evaluating one row of M = {cfg.width} needs {need / 2**30:.2f} GiB "
        f"beside the dictionary, and {limit / 2**30:.2f} GiB are free."
      )
    rows //= 2


def _put(x: np.ndarray, mesh: Mesh | None):
  if mesh is None:
    return x
  even = len(x) % mesh.size == 0
  return jax.device_put(
    x, NamedSharding(mesh, P(mesh.axis_names if even else None))
  )


def _mean_predictor(store, site, mean, batch_size) -> float:
  running = RunningFVU()
  for start in range(0, len(store), batch_size):
    stop = min(start + batch_size, len(store))
    y = linear.rows(store, start, stop, site)
    running.update(y, np.broadcast_to(mean, y.shape))
  return running.compute()


@functools.partial(jax.jit, static_argnums=0)
def _pass(cfg, params, x, best, start):
  """Reconstructions of every prefix, activations, their sums, the largest."""
  acts, recs = reconstruct_prefixes(cfg, params, x)
  norms = jnp.sum(params["W_dec"] ** 2, axis=1)
  sums = {
    "total": jnp.sum(acts, axis=0),
    "energy": jnp.sum(acts * acts, axis=0) * norms,
  }
  return recs, acts, sums, _merge(best, acts, start)


def _merge(best, acts, start):
  """The largest activations of every latent, so far and in this batch."""
  values, rows = best
  new = start + jnp.broadcast_to(jnp.arange(len(acts)), acts.T.shape)
  values = jnp.concatenate([values, acts.T], axis=1)
  rows = jnp.concatenate([rows, new.astype(jnp.int32)], axis=1)
  values, index = jax.lax.top_k(values, best[0].shape[1])
  return values, jnp.take_along_axis(rows, index, axis=1)
