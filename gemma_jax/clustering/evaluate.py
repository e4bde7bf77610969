"""A quantiser on held-out activations: numbers, sizes, nearest contexts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax import progress
from gemma_jax.activations import ActivationStore
from gemma_jax.clustering import indices
from gemma_jax.clustering.quantise import Quantiser
from gemma_jax.metrics import (
  RunningFVU,
  RunningReconstruction,
  definitions,
  rates,
)

BLOCK = 2_048  # rows encoded at once
DEFINITIONS = definitions.DEFINITIONS | {
  "fvu_interval": "95 % bootstrap interval of fvu over documents.",
  "fvu_stages": "FVU with the first n stages of a residual quantiser.",
  "fvu_train_mean": "FVU of predicting the training mean.",
  "fvu_shuffled": "FVU of the reconstructions dealt to other tokens.",
  "bits": "log2 C for each stage: bits of a code of fixed length.",
  "bits_entropy": (
    "Entropy of the held-out codes, stage by stage: bits of the best code of "
    "variable length that ignores what stages say of one another."
  ),
  "parameters": "Numbers in the centroids.",
  "encode_flops": "FLOPs to encode a vector: the products with the centroids.",
  "empty_fraction": "Share of clusters that no held-out token falls into.",
  "size_gini": "Gini coefficient of the clusters' held-out sizes; 0 is equal.",
}


@dataclasses.dataclass(frozen=True)
class ClusterStatistics:
  """What fell into each cluster of the first stage.

  Attributes:
    codes: int32 [N, S] of the held-out rows.
    counts: int64 [C], rows of each.
    distances: float32 [N], of each row to its reconstruction.
    top_rows: int64 [C, n], the rows nearest to the centroid, nearest first;
      -1 where there are fewer.
  """

  codes: np.ndarray
  counts: np.ndarray
  distances: np.ndarray
  top_rows: np.ndarray


@jax.jit
def _encode(quantiser: Quantiser, x):
  codes = quantiser.encode(x)
  stages = [quantiser]
  if quantiser.kind == "residual":
    stages = [
      dataclasses.replace(quantiser, centroids=quantiser.centroids[: s + 1])
      for s in range(quantiser.stages)
    ]
    made = [q.decode(codes[..., : q.stages]) for q in stages]
  else:
    made = [quantiser.reconstruct(x)]
  return codes, jnp.stack(made)


def evaluate(
  quantiser: Quantiser,
  store: ActivationStore,
  site: str,
  train_mean: np.ndarray,
  *,
  top: int = 16,
) -> tuple[dict, ClusterStatistics]:
  """One pass over a held-out store.

  Args:
    quantiser: of the site.
    store: held-out activations.
    site: of it.
    train_mean: mean of the training activations, [D].
    top: rows to remember for each cluster.

  Returns:
    Numbers, see `DEFINITIONS`, and clusters.
  """
  count = len(store)
  full, constant, shuffled = RunningReconstruction(), RunningFVU(), RunningFVU()
  shorter = quantiser.stages - 1 if quantiser.kind == "residual" else 0
  prefixes = [RunningFVU() for _ in range(shorter)]
  rng = np.random.default_rng(0)
  codes, distances = [], []
  bar = progress.bar(count, "evaluate", unit="tokens")
  for start in range(0, count, BLOCK):
    stop = min(start + BLOCK, count)
    x = np.asarray(store.read(start, stop, site), np.float32)
    code, made = map(np.asarray, _encode(quantiser, x))
    codes.append(code)
    distances.append(np.linalg.norm(x - made[-1], axis=1))
    full.update(x, made[-1], store.read(start, stop, "document"))
    for running, rec in zip(prefixes, made[:-1], strict=True):
      running.update(x, rec)
    constant.update(x, np.broadcast_to(train_mean.astype(np.float32), x.shape))
    shuffled.update(x, made[-1][rng.permutation(len(x))])
    bar.update(stop - start)
  bar.close()
  codes, distances = np.concatenate(codes), np.concatenate(distances)
  sizes = [
    np.bincount(stage, minlength=quantiser.clusters) for stage in codes.T
  ]
  numbers = full.compute()
  interval = full.interval()
  numbers |= {
    "fvu_interval": None if interval is None else list(interval),
    "fvu_stages": [*(p.compute() for p in prefixes), numbers["fvu"]],
    "fvu_train_mean": constant.compute(),
    "fvu_shuffled": shuffled.compute(),
    "bits": quantiser.bits,
    "bits_entropy": sum(map(rates.label_entropy, sizes)),
    "parameters": quantiser.parameters,
    "encode_flops": quantiser.encode_flops,
    "empty_fraction": float(np.mean(sizes[0] == 0)),
    "size_gini": indices.size_gini(sizes[0]),
  }
  nearest = _nearest(codes[:, 0], distances, quantiser.clusters, top)
  return numbers, ClusterStatistics(codes, sizes[0], distances, nearest)


def _nearest(labels, distances, clusters, top) -> np.ndarray:
  """Rows of each cluster by distance, int64 [C, top], -1 beyond the last."""
  order = np.lexsort((distances, labels))
  starts = np.searchsorted(labels[order], np.arange(clusters))
  place = np.arange(len(order)) - starts[labels[order]]
  out = np.full((clusters, top), -1, np.int64)
  near = place < top
  out[labels[order][near], place[near]] = order[near]
  return out
