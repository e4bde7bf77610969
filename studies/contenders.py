"""The codes that are compared: dictionaries, clusterings, baselines."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_jax import activations, dictionaries
from gemma_jax.activations import ActivationStore
from gemma_jax.clustering import Quantiser, kmeans
from gemma_jax.clustering.quantise import of_centroids
from gemma_jax.clustering.rows import ArrayRows
from studies import codes
from studies.codes import Code
from trainers import clustering

SAMPLE = 4_096  # training rows on which the bits of a value are measured


def sample(store: ActivationStore, site: str, count: int) -> np.ndarray:
  """Some rows, float32 [count, D], or all where there are fewer."""
  rng = np.random.default_rng(0)
  drawn = rng.choice(len(store), min(count, len(store)), replace=False)
  return np.asarray(store.take(np.sort(drawn), site), np.float32)


def of_dictionaries(
  members: Sequence[Mapping[str, Any]], rows: np.ndarray
) -> Iterator[Code]:
  """Dictionaries of one sweep.

  Args:
    members: what `jobs.train` gave.
    rows: training rows [n, D] for the bits of a value.
  """
  for member in members:
    spent = member["tokens_train"] / member["tokens_per_second_train"]
    yield codes.of_dictionary(
      f"sae {member['name'] or ''}".strip(),
      dictionaries.load(member["path"]),
      rows,
      seconds_train=spent / len(members),
      host_memory_peak=member["memory"]["host_memory_peak"],
    )


def of_clusterings(results, workdir, prefixes: Sequence[int]) -> Iterator[Code]:
  """Clusterings of one run, residual ones cut after some of their stages.

  Args:
    results: what `trainers.clustering.run` gave.
    workdir: where it ran.
    prefixes: numbers of stages.
  """
  method = results["method"]
  for member in results["members"]:
    place = clustering.place(workdir, member["name"])
    q = Quantiser.load(place / "quantiser")
    kept = {n: member[n] for n in ("seconds_train", "host_memory_peak")}
    if method != "residual":
      kept["bits_entropy"] = member["bits_entropy"]
      yield codes.of_quantiser(member["name"], method, q, **kept)
      continue
    for stages in (s for s in prefixes if s <= q.stages):
      kept["seconds_train"] = member["seconds_train"] * stages / q.stages
      name = f"residual{q.clusters}x{stages}"
      yield codes.of_quantiser(name, method, q, stages, **kept)


def baselines(
  config: Mapping[str, Any],
  found: Sequence[Code],
  store: ActivationStore,
  site: str,
  mean: np.ndarray,
  vectors: np.ndarray,
  rows: np.ndarray,
  vocab_size: int,
) -> Iterator[Code]:
  """Those that see nothing, little, or the token alone.

  Args:
    config: of the study.
    found: the clusterings; random centroids are as many as their most.
    store: training rows.
    site: of it.
    mean: of those, [D].
    vectors: principal components, the largest first, [D, D].
    rows: training rows [n, D] for the bits of a value.
    vocab_size: of the model.
  """
  counts = [c.origin.clusters for c in found if c.kind == "kmeans"]
  if counts:
    random = of_centroids(sample(store, site, max(counts)))
    yield codes.of_quantiser(f"random{random.clusters}", "random", random)
  for rank in config["components"]:
    yield codes.of_components(mean, vectors[:, :rank], rows)
  means = activations.token_means(store, site, vocab_size)
  yield codes.of_tokens(means)
  if config["lookup_clusters"]:
    x = np.asarray(store.read(0, len(store), site), np.float32)
    left = x - np.asarray(means(store.read(0, len(store), "token")))
    rest = kmeans(ArrayRows(left), config["lookup_clusters"], max_iter=25)
    yield codes.of_tokens(means, of_centroids(rest.centroids))
