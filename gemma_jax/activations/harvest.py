"""From token windows to a store: the model's sites, in one pass."""

import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Sequence

import jax
from jax.experimental import multihost_utils

from gemma_jax import cache
from gemma_jax.activations import fingerprints, layout
from gemma_jax.activations.harvester import Harvester
from gemma_jax.activations.records import write_statistics
from gemma_jax.activations.store import ActivationStore, is_complete
from gemma_jax.data import Windows, WindowStream
from gemma_jax.models import Model

log = logging.getLogger("gemma_jax")

__all__ = ["harvest", "store_path"]


def store_path(
  model_directory: str | os.PathLike,
  windows: Windows | WindowStream,
  capture: Sequence[str],
  *,
  dtype: str,
  compute_dtype: str,
  keep: float = 1.0,
  keep_seed: int = 0,
) -> pathlib.Path:
  """Where the cache keeps the activations that these inputs make."""
  made_by = {
    "format": layout.FORMAT,
    "model": fingerprints.of_model(model_directory),
    "windows": fingerprints.of_windows(windows),
    "sites": list(capture),
    "dtype": dtype,
    "compute_dtype": compute_dtype,
    "keep": [keep, keep_seed],
    # Two kinds of device do not give the same bits.
    "backend": jax.default_backend(),
  }
  text = json.dumps(made_by, sort_keys=True).encode()
  key = hashlib.sha256(text).hexdigest()[:24]
  return cache.directory("activations", key)


def harvest(
  model: Model | None,
  windows: Windows | WindowStream,
  capture: Sequence[str],
  where: str | os.PathLike,
  *,
  batch_size: int | None = None,
  dtype: str = "bfloat16",
  keep: float = 1.0,
  keep_seed: int = 0,
  statistics: bool = True,
  covariance: bool = False,
  append: bool = False,
) -> ActivationStore:
  """Writes the sites of every counted position of `windows` to a store.

  A complete store is opened and nothing is computed; an interrupted one is
  gone on with, to the same bits, and a repaired one is filled. The model
  stops after the last site. Text is tokenised, computed on and written at the
  same time. Each process of several writes a part of its own.

  Args:
    model: with at least the layers that the sites need; None if the store is
      known to be complete.
    windows: what to run; a `WindowStream` is tokenised on the way.
    capture: names of single-layer sites.
    where: a path or URL, see `store_path`.
    batch_size: windows in a forward pass; None takes what fits, see
      `capture.fitting_batch`, or what the interrupted store was made with.
    dtype: of the stored vectors, "bfloat16", "float32" or "int8".
    keep: share of the counted positions to store, chosen by a hash of their
      number and `keep_seed`.
    keep_seed: of that choice.
    statistics: take them in the same pass; `ActivationStore.statistics`. Of
      what the model gave, where the store is int8.
    covariance: with covariance.
    append: write behind what is there; a store by the same model and sites.

  Raises:
    FloatingPointError: the model gave NaN or Inf; names the document.
    ValueError: the store was made by another model, site or text.
    OSError: the disk is full, or the place refuses: nothing committed is lost.
  """
  capture = tuple(capture)
  if append and jax.process_count() > 1:
    raise ValueError(
      "Only one process can append. Harvest to another place and merge: "
      "`python -m launch.store merge`."
    )
  if is_complete(where) and (model is None or not append):
    here = {
      "sites": sorted(capture),
      "dtype": dtype,
      "windows": fingerprints.of_windows(windows),
      "keep": [keep, keep_seed],
    }
    if model is not None:
      here |= fingerprints.describe(model)
    store = _opened(where, here)
    if statistics and store.statistics(capture[0]) is None:
      log.info(
        "%s has no statistics: `python -m launch.store stats` takes them", where
      )
    elif store.root.read("stats.json") is None and jax.process_index() == 0:
      write_statistics(store)
    log.info("activations: using %s", where)
    return store
  if model is None:
    raise ValueError(f"{where} is not complete: pass the model to harvest.")
  if not 0 < keep <= 1:
    raise ValueError(f"keep={keep}; expected a share above 0, at most 1.")
  run = Harvester(
    model,
    windows,
    capture,
    where,
    batch_size=batch_size,
    dtype=dtype,
    keep=keep,
    keep_seed=keep_seed,
    with_statistics=statistics,
    covariance=covariance,
    append=append,
  )
  run.go()
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("harvest")
  store = ActivationStore.open(where)
  if jax.process_index() == 0:
    write_statistics(store)
  log.info(
    "activations: %d tokens at %.0f tokens/s to %s",
    len(store),
    store.tokens_per_second,
    where,
  )
  return store


def _opened(where, here) -> ActivationStore:
  """A complete store; refuses one of another model, sites or text."""
  store = ActivationStore.open(where)
  first = store.parts[0]["made_by"]
  known = store.metadata | {
    "sites": sorted(store.sites),
    "dtype": store.dtype,
    **{name: first.get(name) for name in ("windows", "keep")},
  }
  there = {name: known.get(name) for name in here}
  if here != there:
    raise ValueError(
      f"{where} was made by another harvest "
      f"({layout.differences(here, there)}). Use another place, or append."
    )
  return store
