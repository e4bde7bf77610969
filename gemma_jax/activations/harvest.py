"""From token windows to a store: the model's sites, in one pass."""

import functools
import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax import cache, progress
from gemma_jax.activations.store import (
  FORMAT,
  MANIFEST,
  ActivationStore,
  Writer,
  read_manifest,
)
from gemma_jax.data import Windows
from gemma_jax.data import fingerprint as fingerprint_windows
from gemma_jax.models import Model, sharding, sites
from gemma_jax.models.forward import forward

log = logging.getLogger("gemma_jax")


def fingerprint_model(directory: str | os.PathLike) -> str:
  """A hash of a checkpoint: configuration, and samples of every weights file.

  64 blocks of 4 KiB spread over each file, so that it takes milliseconds; a
  fine-tuned or requantised model changes everywhere, so it cannot hide.
  """
  directory = pathlib.Path(directory)
  h = hashlib.sha256((directory / "config.json").read_bytes())
  for path in sorted(directory.glob("*.safetensors")):
    size = path.stat().st_size
    h.update(f"{path.name}:{size}".encode())
    with path.open("rb") as f:
      for i in range(64):
        f.seek(max(0, size - 4096) * i // 63)
        h.update(f.read(4096))
  return h.hexdigest()


def store_path(
  model_directory: str | os.PathLike,
  windows: Windows,
  capture: Sequence[str],
  *,
  dtype: str,
  compute_dtype: str,
) -> pathlib.Path:
  """Where the cache keeps the activations that these inputs make."""
  made_by = {
    "format": FORMAT,
    "model": fingerprint_model(model_directory),
    "windows": fingerprint_windows(windows),
    "sites": list(capture),
    "dtype": dtype,
    "compute_dtype": compute_dtype,
    # Two kinds of device do not give the same bits.
    "backend": jax.default_backend(),
  }
  text = json.dumps(made_by, sort_keys=True).encode()
  key = hashlib.sha256(text).hexdigest()[:24]
  return cache.directory("activations", key)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _sites(cfg, params, tokens, capture, dtype):
  depth = sites.last_layer(capture, cfg)
  _, found = forward(cfg, params, tokens, capture=capture, stop_at=depth)
  return {name: x.astype(dtype) for name, x in found.items()}


def harvest(
  model: Model,
  windows: Windows,
  capture: Sequence[str],
  path: str | os.PathLike,
  *,
  batch_size: int,
  dtype: str = "bfloat16",
) -> ActivationStore:
  """Writes the sites of every unmasked position of `windows` to a store.

  A complete store at `path` is opened and nothing is computed; an interrupted
  one is gone on with, to the same bits. The model stops after the last site.

  Args:
    model: with at least the layers that the sites need.
    windows: tokens [W, T] and which positions count.
    capture: names of single-layer sites.
    path: of the store, see `store_path`.
    batch_size: windows in one forward pass.
    dtype: of the stored vectors, "bfloat16" or "float32".

  Raises:
    FloatingPointError: the model gave NaN or Inf; names the document.
  """
  path = pathlib.Path(path)
  if is_complete(path):
    log.info("activations: using %s", path)
    return ActivationStore.open(path)
  capture = tuple(capture)
  ways = model.mesh.shape["data"] * model.mesh.shape["fsdp"]
  if batch_size % ways:
    raise ValueError(
      f"batch_size={batch_size} windows do not divide over the {ways} devices "
      "of the mesh's data and fsdp axes. Use a multiple."
    )
  width = _widths(model, capture)
  total = int(windows.mask.sum())
  metadata = {
    "model": str(model.directory),
    "family": model.config.family,
    "windows": fingerprint_windows(windows),
    "documents": len(windows.documents),
    # Another batch size may give other bits, so it may not go on with these.
    "batch_size": batch_size,
    "context": int(windows.tokens.shape[1]),
    "compute_dtype": str(model.params["embed"].dtype),
  }
  with Writer(
    path, rows=total, sites=width, dtype=dtype, metadata=metadata
  ) as writer:
    row = sum(width.values()) * jnp.dtype(dtype).itemsize
    left = (total - writer.committed) * row
    cache.require_space(path, left, "The activations")
    _write(model, windows, capture, writer, batch_size, dtype)
  store = ActivationStore.open(path)
  log.info(
    "activations: %d tokens at %.0f tokens/s to %s",
    total,
    store.tokens_per_second,
    path,
  )
  return store


def _write(model, windows, capture, writer, batch_size, dtype) -> None:
  """Appends what `writer` has not committed yet."""
  rows_before = np.concatenate([[0], np.cumsum(windows.mask.sum(1))])
  # Batches keep their boundaries on resume, so that values keep their bits.
  done = int(np.searchsorted(rows_before, writer.committed, "right")) - 1
  first = done // batch_size * batch_size
  surplus = writer.committed - int(rows_before[first])
  total = int(rows_before[-1])
  bar = progress.bar(total, "harvest", unit="tokens", initial=writer.committed)
  ahead = None
  for start in [*range(first, len(windows.tokens), batch_size), None]:
    launched = (
      None
      if start is None
      else _launch(model, windows, start, batch_size, capture, jnp.dtype(dtype))
    )
    # The device computes the batch just launched while this one is written.
    if ahead is not None:
      rows = _rows(windows, *ahead)
      rows = {name: x[surplus:] for name, x in rows.items()}
      surplus = 0
      writer.append(rows)
      bar.update(len(rows["token"]))
    ahead = launched
  bar.close()


def is_complete(path: str | os.PathLike) -> bool:
  """Whether a store is there with all its rows.

  Raises:
    ValueError: its manifest is damaged.
  """
  path = pathlib.Path(path)
  if not (path / MANIFEST).exists():
    return False
  manifest = read_manifest(path)
  return manifest["committed"] == manifest["rows"]


def _widths(model, capture) -> dict[str, int]:
  shape = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  found = jax.eval_shape(
    lambda params, tokens: _sites(
      model.config, params, tokens, capture, jnp.dtype("float32")
    ),
    model.params,
    shape,
  )
  return {name: x.shape[-1] for name, x in found.items()}


def _launch(model, windows, start, batch_size, capture, dtype):
  tokens = windows.tokens[start : start + batch_size]
  missing = batch_size - len(tokens)
  tokens = np.pad(tokens, ((0, missing), (0, 0)))
  with jax.set_mesh(model.mesh):
    placed = sharding.put_batch(tokens, model.mesh)
    found = _sites(model.config, model.params, placed, capture, dtype)
  for x in found.values():
    x.copy_to_host_async()
  return start, found


def _rows(windows, start, found) -> dict[str, np.ndarray]:
  size = min(len(next(iter(found.values()))), len(windows.tokens) - start)
  batch = slice(start, start + size)
  mask = windows.mask[batch]
  rows = {name: np.asarray(x)[:size][mask] for name, x in found.items()}
  rows["token"] = windows.tokens[batch][mask]
  rows["document"] = windows.document[batch][mask]
  where = np.broadcast_to(np.arange(mask.shape[1], dtype=np.int32), mask.shape)
  rows["position"] = where[mask]
  for name in found:
    bad = ~np.isfinite(rows[name].astype(np.float32)).all(-1)
    if bad.any():
      row = int(np.flatnonzero(bad)[0])
      document = windows.documents[rows["document"][row]]
      raise FloatingPointError(
        f"{name} is not finite at position {rows['position'][row]} of "
        f"{document}. Check the weights, or compute in float32."
      )
  return rows
