"""k-means that goes on where it was interrupted."""

import json
import logging
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file

from gemma_jax import checkpoints, progress
from gemma_jax.clustering.kmeans import KMeans, Lloyd
from gemma_jax.clustering.lloyd import Iteration
from trainers import fields, loop

log = logging.getLogger("gemma_jax")

DONE = "kmeans.safetensors"


def fit(
  rows,
  k: int,
  directory: pathlib.Path,
  *,
  seed: int,
  init: str,
  max_iter: int,
  tol: float,
  spherical: bool,
  minibatch: int | None,
  checkpoint_every: int,
  mesh: Mesh,
) -> KMeans:
  """k-means with checkpoints and metrics.jsonl; at once if it was done before.

  Args:
    rows: `clustering.rows.Rows`.
    k: C.
    directory: of this clustering alone.
    seed: as for `clustering.kmeans`, as are those without a word here.
    init: see there.
    max_iter: see there; of mini-batches, how often N rows are read.
    tol: see there.
    spherical: see there.
    minibatch: rows of a mini-batch; None: Lloyd's algorithm.
    checkpoint_every: iterations.
    mesh: see there.

  Raises:
    SystemExit: SIGTERM arrived; the state is saved and the code is 0.
  """
  if (directory / DONE).exists():
    found = load_file(directory / DONE)
    about = json.loads((directory / "kmeans.json").read_text())
    return KMeans(**found, inertia=about["inertia"], n_iter=about["n_iter"])
  began = time.perf_counter()
  method = Lloyd(rows, k, spherical=spherical, tol=tol, mesh=mesh)
  store = checkpoints.Checkpoints(directory / "checkpoints", keep=2)
  with loop.sigterm() as stopping:
    now = _restore(store, k, rows) or method.start(init, seed=seed)
    going = (
      method.iterations(now)
      if minibatch is None
      else method.minibatches(now, minibatch, seed=seed)
    )
    before = _seconds(directory, now.number)
    began -= before
    start = now
    converged = minibatch is None and method.converged(start)
    if start.number >= max_iter or converged:
      going = iter(())  # it was stopped between its last and the labels
    for now in _recorded(
      going, start, directory, k, len(rows), max_iter, began
    ):
      if now.number % checkpoint_every == 0 or stopping:
        store.save(now.number, _arrays(now))
      if now.number == max_iter or stopping:
        break
    store.close()
    if stopping:
      log.info(
        "stopped at iteration %d: resume by the same command", now.number
      )
      raise SystemExit(0)
  found = method.finish(now)
  arrays = {n: getattr(found, n) for n in ("centroids", "labels", "counts")}
  fields.write_json(
    directory / "kmeans.json",
    {
      "inertia": found.inertia,
      "n_iter": found.n_iter,
      "seconds": time.perf_counter() - began,
    },
  )
  partial = directory / f".{DONE}"
  save_file(arrays, partial)
  partial.rename(directory / DONE)
  return found


def _seconds(directory: pathlib.Path, number: int) -> float:
  """Spent up to an iteration; what was logged beyond it goes."""
  path = directory / "metrics.jsonl"
  kept = [row for row in loop.read_metrics(path) if row["step"] <= number]
  path.write_text("".join(json.dumps(row) + "\n" for row in kept))
  return kept[-1]["seconds"] if kept else 0.0


def _recorded(
  going: Iterator[Iteration], start, directory, k, rows, max_iter, began
) -> Iterator[Iteration]:
  """The same iterations, with a progress bar and a line for each."""
  at = time.perf_counter()
  bar = progress.bar(
    max_iter * rows,
    f"k-means, C = {k}",
    unit="tokens",
    initial=start.number * rows,
  )
  with (directory / "metrics.jsonl").open("a") as file, bar:
    for now in going:
      spent, at = time.perf_counter() - at, time.perf_counter()
      row: dict[str, Any] = {
        "step": now.number,
        "inertia": now.inertia / rows,
        "moved": now.moved / rows,
        "empty": int((now.counts == 0).sum()),
        "tokens_per_second": rows / spent,
        "seconds": at - began,
      }
      file.write(json.dumps(row) + "\n")
      file.flush()
      bar.update(rows)
      bar.set_postfix(
        inertia=f"{row['inertia']:.5g}",
        moved=f"{row['moved']:.2%}",
        refresh=False,
      )
      yield now


def _arrays(now: Iteration) -> dict[str, np.ndarray]:
  return {n: np.asarray(v) for n, v in now._asdict().items()}


def _restore(store: checkpoints.Checkpoints, k: int, rows) -> Iteration | None:
  """The newest iteration that was saved."""
  shapes = Iteration(
    np.int64(0),
    np.zeros((k, rows.width), np.float32),
    np.zeros(len(rows), np.int32),
    np.float64(0),
    np.int64(0),
    np.float64(0),
    np.zeros(k, np.int64),
  )
  state, step = store.restore(_arrays(shapes))
  if state is None:
    return None
  log.info("resuming at iteration %d", step)
  found = Iteration(**{n: np.asarray(v) for n, v in state.items()})
  return found._replace(
    number=int(found.number),
    inertia=float(found.inertia),
    moved=int(found.moved),
    shift=float(found.shift),
  )
