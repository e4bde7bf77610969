"""Runs the windows that a store lacks, and writes what comes of them."""

import dataclasses
import functools
import logging
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from gemma_jax import cache, machine, progress
from gemma_jax.activations import capture as capturing
from gemma_jax.activations import fingerprints, layout
from gemma_jax.activations.records import load_statistics, save_statistics
from gemma_jax.activations.statistics import Statistics
from gemma_jax.activations.store import read_manifest
from gemma_jax.activations.writer import Writer
from gemma_jax.data import Windows, WindowStream
from gemma_jax.models import Model, sites

log = logging.getLogger("gemma_jax")

# The covariance is saved once so many times its bytes have been written.
COVARIANCE_SHARE = 20


@dataclasses.dataclass(eq=False)
class Harvester:
  """One process's share of a harvest; see `harvest` for the arguments."""

  model: Model
  windows: Windows | WindowStream
  capture: tuple[str, ...]
  where: str | os.PathLike
  _: dataclasses.KW_ONLY
  batch_size: int | None
  dtype: str
  keep: float
  keep_seed: int
  with_statistics: bool
  covariance: bool
  append: bool

  def __post_init__(self):
    model, windows, capture = self.model, self.windows, self.capture
    self.width = capturing.widths(model, capture)
    stream = isinstance(windows, WindowStream)
    fields = windows.fields if stream else {}
    self.text = fingerprints.of_windows(windows)
    self.sources = windows.sources
    self.context = fields["context"] if stream else int(windows.tokens.shape[1])
    self.expected = (
      fields.get("max_tokens") if stream else int(windows.num_tokens)
    )
    # int8 is made of what the model gave.
    self.computed = jnp.dtype("float32" if self.dtype == "int8" else self.dtype)
    ways = model.mesh.shape["data"] * model.mesh.shape["fsdp"]
    self.batch = self.batch_size
    if self.batch is None:
      self.batch = self._batch_there() or capturing.fitting_batch(
        model,
        capture,
        self.context,
        str(self.computed),
        statistics=self.with_statistics,
        covariance=self.covariance,
      )
    if self.batch % ways:
      raise ValueError(
        f"batch_size={self.batch} windows do not divide over the {ways} "
        "devices of the mesh's data and fsdp axes. Use a multiple."
      )
    self.metadata = fingerprints.describe(model)
    self.made_by = {
      "windows": self.text,
      "fields": fields,
      "context": self.context,
      "keep": [self.keep, self.keep_seed],
      "covariance": self.covariance,
      # Another batch or mesh may give other bits, and other processes have
      # other windows, so they may not go on with these.
      "batch_size": self.batch,
      "mesh": dict(model.mesh.shape),
      "process": [jax.process_index(), jax.process_count()],
    }
    if self.append:
      self._check_alike()
    self.mine = capturing.own_windows(model, self.batch, self.context)
    self.names: dict[int, tuple] = {}  # of documents that may still come up
    self.saved_rows, self.done = 0, False
    self.statistics = {
      site: Statistics(
        d,
        positions=self.context,
        sources=self.sources,
        covariance=self.covariance,
      )
      for site, d in self.width.items()
      if self.with_statistics
    }
    self.covered = 0  # rows that the statistics know

  def _batch_there(self) -> int | None:
    """The batch size of an interrupted store."""
    try:
      root, manifest = read_manifest(self.where)
    except FileNotFoundError:
      return None
    found = {
      part["made_by"]["batch_size"]
      for part in layout.parts(root, manifest)
      if part and part["made_by"].get("windows") == self.text
    }
    return found.pop() if len(found) == 1 else None

  def _check_alike(self) -> None:
    """Refuses to append what could not be summed up with what is there."""
    try:
      parts = layout.parts(*read_manifest(self.where))
    except FileNotFoundError:
      return
    for name in ("context", "covariance"):
      for part in filter(None, parts):
        there = part["made_by"].get(name)
        if there != self.made_by[name]:
          raise ValueError(
            f"{self.where} was harvested with {name}={there}; only the same "
            f"can be appended, got {self.made_by[name]}."
          )

  def go(self) -> None:
    """Computes and writes what is not there yet."""
    with Writer(
      self.where,
      sites=self.width,
      dtype=self.dtype,
      metadata=self.metadata,
      made_by=self.made_by,
      sources=self.sources,
      part=jax.process_index(),
      parts=jax.process_count(),
      append=self.append,
      state=self._state if self.with_statistics else None,
    ) as writer:
      self._resume(writer)
      self._check_space(writer)
      if self.append:
        writer.root.delete("stats.json")  # it tells of fewer rows
      self._loop(writer)
      self.done = True
      if isinstance(self.windows, WindowStream):
        writer.report = self.windows.report()
        log.info("text: %s", self.windows.describe().replace("\n", "; "))

  def _state(self) -> bytes | None:
    """The statistics; None while they weigh much beside the new rows."""
    row = sum(self.width.values()) * self.computed.itemsize
    weight = self.covariance * sum(8 * d * d for d in self.width.values())
    new = (self.covered - self.saved_rows) * row
    if not self.done and new < COVARIANCE_SHARE * weight:
      return None
    self.saved_rows = self.covered
    return save_statistics(self.statistics, covered=self.covered)

  def _resume(self, writer: Writer) -> None:
    saved = writer.saved if self.with_statistics else None
    self.covered = writer.committed
    if saved is not None:
      found = load_statistics(saved, str(writer.location))
      self.covered = found.pop("covered")
      self.statistics = found
    elif self.with_statistics:
      self.covered = 0
    # Of every process: all must run the same batches.
    everyone = np.asarray([divmod(self.covered, 2**31)], np.int32)
    self.parts = [writer.description]
    if jax.process_count() > 1:
      everyone = multihost_utils.process_allgather(everyone[0])
      self.parts = layout.parts(*read_manifest(self.where))
      # Nobody writes before everybody has read.
      multihost_utils.sync_global_devices("resume")
    self.named = min(part["documents"] for part in self.parts)
    self.saved_rows = self.covered
    high, low = everyone.astype(np.int64).T
    self.everyone = high * 2**31 + low

  def _check_space(self, writer: Writer) -> None:
    if writer.location.path is None or self.expected is None:
      return
    row = sum(self.width.values()) * jnp.dtype(self.dtype).itemsize
    left = self.expected * self.keep / jax.process_count() - writer.committed
    cache.require_space(
      writer.location.path, max(0.0, left) * row, "The activations"
    )

  def _loop(self, writer: Writer) -> None:
    """Two batches are under way: one computed, one written."""
    bar = _Bar(self, writer.committed)
    waiting = None
    whole = isinstance(self.windows, Windows)
    blocks = iter([self.windows] if whole else self.windows)
    try:
      for job in self._jobs(blocks):
        launched = self._launch(job)
        if waiting is not None:
          bar.update(self._finish(writer, *waiting))
        waiting = job, launched
      if waiting is not None:
        bar.update(self._finish(writer, *waiting))
    finally:
      bar.close()
      if hasattr(blocks, "close"):
        blocks.close()

  def _jobs(self, blocks) -> Iterator[dict[str, Any]]:
    """Batches that some process lacks, with the kept positions."""
    number = 0  # of the windows before
    owners = self._owners()
    rows = np.zeros(len(owners), np.int64)  # before this batch, by process
    for windows in capturing.rebatch(blocks, self.batch):
      valid = windows.mask & self._kept(number, windows.mask.shape)
      number += len(valid)
      counts = np.asarray(
        [valid[own[own < len(valid)]].sum() for own in owners]
      )
      end = rows + counts
      me = jax.process_index()
      lacking = [
        b > covered or layout.lacks(part, int(a), int(b))
        for part, covered, a, b in zip(
          self.parts, self.everyone, rows, end, strict=True
        )
      ]
      job = {
        "windows": windows,
        "valid": valid,
        "row": int(rows[me]),
        "count": int(counts[me]),
      }
      rows = end
      known = windows.first_document + len(windows.documents)
      if any(lacking) or known > self.named:
        yield job

  def _owners(self) -> list[np.ndarray]:
    """Windows of a batch that each process writes."""
    if jax.process_count() == 1:
      return [self.mine]
    mine = np.full(self.batch, -1, np.int32)
    mine[: len(self.mine)] = self.mine
    everyone = multihost_utils.process_allgather(mine)
    return [row[row >= 0] for row in np.asarray(everyone)]

  def _kept(self, first: int, shape) -> np.ndarray | bool:
    """Which positions token subsampling keeps: a hash of their numbers."""
    if self.keep == 1:
      return np.True_
    start = first * shape[1]
    x = np.arange(start, start + shape[0] * shape[1], dtype=np.uint64)
    # Steele et al. 2014, splitmix64.
    with np.errstate(over="ignore"):
      x += np.uint64(self.keep_seed * 0xD1B54A32D192ED03 % 2**64)
      x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
      x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
      x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
      x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).reshape(shape) < self.keep * 2.0**53

  def _launch(self, job):
    # The statistics are of this process's rows.
    found, sums = capturing.launch(
      self.model,
      job["windows"],
      job["valid"],
      self.batch,
      self.capture,
      self.computed,
      self.with_statistics and jax.process_count() == 1,
      self.covariance,
    )
    for x in jax.tree.leaves((found, sums)):
      x.copy_to_host_async()
    return found, sums

  def _finish(self, writer, job, launched) -> int:
    """Writes a batch's rows and adds up its statistics."""
    found, sums = launched
    windows, valid = job["windows"], job["valid"]
    own = self.mine[self.mine < len(valid)]
    valid = valid[own]
    rows = {
      name: capturing.local_values(x, self.mine)[: len(own)][valid]
      for name, x in found.items()
    }
    where = np.broadcast_to(
      np.arange(self.context, dtype=np.int32), valid.shape
    )
    labels = {
      "token": windows.tokens[own][valid],
      "document": windows.document[own][valid],
      "position": where[valid],
      "source": np.repeat(windows.source[own], valid.sum(1)),
      "begin": windows.begin[own][valid],
      "end": windows.end[own][valid],
    }
    sums = self._own_sums(jax.device_get(sums), rows)
    for i, name in enumerate(windows.documents, windows.first_document):
      self.names[i] = name
    self._check_finite(rows, labels, sums)
    oldest = windows.document[windows.document >= 0].min(initial=2**31 - 1)
    self.names = {i: n for i, n in self.names.items() if i >= oldest}
    end = job["row"] + job["count"]
    writer.append(
      rows | labels,
      first_row=job["row"],
      documents=windows.documents,
      first_document=windows.first_document,
    )
    if end > self.covered:
      for site, part in sums.items():
        self.statistics[site].update(
          part,
          first_row=job["row"],
          **{
            name: labels[name]
            for name in ("position", "source", "document", "token")
          },
        )
      self.covered = end
    return job["count"]

  def _own_sums(self, sums, rows):
    """Sums over this process's windows only."""
    if jax.process_count() == 1 or not self.with_statistics:
      return sums
    room = len(self.mine) * self.context  # one shape, one program
    return {
      site: capturing.sums_of(x, room, self.covariance)
      for site, x in rows.items()
    }

  def _check_finite(self, rows, labels, sums) -> None:
    for name, x in rows.items():
      if sums and not sums[name]["nan"] and not sums[name]["inf"]:
        continue
      bad = ~np.isfinite(x.astype(np.float32)).all(-1)
      if bad.any():
        row = int(np.flatnonzero(bad)[0])
        number = int(labels["document"][row])
        document = self.names.get(number, f"document {number}")
        raise FloatingPointError(
          f"{name} is not finite at position {labels['position'][row]} of "
          f"{document}. Check the weights, or compute in float32."
        )


_matmul_rate = functools.cache(machine.matmul_rate)


class _Bar:
  """Progress with tokens/s, GB/s, the share of the machine's FLOP/s, time."""

  def __init__(self, run: Harvester, initial: int):
    model = run.model
    total = run.expected
    if total is not None:
      total = int(total * run.keep / jax.process_count())
    self._bar = progress.bar(total, "harvest", unit="tokens", initial=initial)
    depth = sites.last_layer(run.capture, model.config)
    flops = model.config.flops_per_token(depth, run.context, unembed=False)
    self._flops = flops / run.keep
    self._row = sum(run.width.values()) * run.computed.itemsize
    rate = _matmul_rate(str(model.params["embed"].dtype))
    self._peak = rate * len(jax.local_devices())
    self._began, self._done = None, 0

  def update(self, count: int) -> None:
    self._bar.update(count)
    if self._began is None:  # the first batch was compiled, too
      self._began = time.perf_counter()
      return
    self._done += count
    rate = self._done / (time.perf_counter() - self._began)
    self._bar.set_postfix_str(
      f"{rate * self._row / 1e9:.3g} GB/s, MFU "
      f"{rate * self._flops / self._peak:.0%}",
      refresh=False,
    )

  def close(self) -> None:
    self._bar.close()
