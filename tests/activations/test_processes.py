"""Several processes: each writes its own part, all read the same batches."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

import gemma_jax
from gemma_jax import models
from gemma_jax.activations import ActivationStore, harvest, layout, measure
from tests.activations.windows import SITES, make_windows

ROOT = pathlib.Path(gemma_jax.__file__).parent.parent
OPTIONS = {"batch_size": 8, "dtype": "float32"}

# Breaks off after five batches, goes on, and streams what came of it.
JOB = """
import sys
import jax
import numpy as np

address, process, path, found = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(address, 2, int(process))

from gemma_jax import models
from gemma_jax.activations import Stream, harvest, layout
from gemma_jax.activations.harvester import Harvester
from jax.sharding import NamedSharding, PartitionSpec as P
from tests.activations.test_processes import OPTIONS
from tests.activations.windows import SITES, make_windows

layout.SHARD_ROWS, layout.CHUNK_ROWS = 20, 10
mesh = models.make_mesh({"data": 4, "tensor": 2})
model = models.load_model("random:gemma2-tiny", mesh=mesh)
real, calls = Harvester._launch, []

def breaks_off(self, job):
  calls.append(job)
  if len(calls) == 6:
    raise KeyboardInterrupt
  return real(self, job)

Harvester._launch = breaks_off
try:
  harvest(model, make_windows(80), SITES, path, **OPTIONS)
  raise SystemExit("it was not interrupted")
except KeyboardInterrupt:
  pass
store = harvest(model, make_windows(80), SITES, path, **OPTIONS)
assert len(calls) < 6 + 10, "everything was computed again"
rows = NamedSharding(mesh, P(("data", "fsdp")))
batches = iter(Stream(store, 16, 0, buffer_rows=40, sharding=rows))
mine = [next(batches)[SITES[0]] for _ in range(12)]
batches.close()
assert not mine[0].is_fully_addressable
np.savez(
  f"{found}{process}.npz",
  **{
    f"{i}/{s.index[0].start}": s.data
    for i, x in enumerate(mine)
    for s in x.addressable_shards
  },
)
"""


@pytest.fixture
def small_chunks(monkeypatch):
  monkeypatch.setattr(layout, "SHARD_ROWS", 20)
  monkeypatch.setattr(layout, "CHUNK_ROWS", 10)


def run_two(tmp_path):
  with socket.create_server(("localhost", 0)) as server:
    address = f"localhost:{server.getsockname()[1]}"
  (tmp_path / "job.py").write_text(JOB)
  processes = [
    subprocess.Popen(
      [
        *(sys.executable, tmp_path / "job.py", address, str(i)),
        *(tmp_path / "store", tmp_path / "found"),
      ],
      cwd=ROOT,
      env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  try:
    said = [process.communicate(timeout=300)[1] for process in processes]
  finally:
    for process in processes:
      process.kill()
  for process, err in zip(processes, said, strict=True):
    assert process.returncode == 0, err[-3000:]


def test_two_processes_write_two_parts_that_hold_what_one_would_write(
  tmp_path, one_device, small_chunks
):
  run_two(tmp_path)
  store = ActivationStore.open(tmp_path / "store")
  windows = make_windows(80)
  model = models.load_model("random:gemma2-tiny", mesh=one_device)
  alone = harvest(model, windows, SITES, tmp_path / "one", **OPTIONS)
  assert len(store.parts) == 2
  assert min(p["stop"] - p["start"] for p in store.parts) > 0
  # Part i has process i's windows of every batch of eight.
  number = np.repeat(np.arange(80), windows.mask.sum(1))
  order = np.argsort(number % 8 // 4, kind="stable")
  for name in ("token", "position", "begin"):
    np.testing.assert_array_equal(
      store.read(0, len(store), name), alone.read(0, len(alone), name)[order]
    )
  for site in SITES:
    np.testing.assert_allclose(
      store.read(0, len(store), site),
      alone.read(0, len(alone), site)[order],
      atol=2e-5,
    )
    found = store.statistics(site)
    again = measure(store, site)
    np.testing.assert_allclose(found.mean, again.mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found.variance, again.variance, rtol=1e-5)
  # The document's number tells which part, its name is the same.
  named = [
    [s.documents[i] for i in s.read(0, len(s), "document")]
    for s in (store, alone)
  ]
  assert named[0] == [named[1][i] for i in order]
  assert_streams_agree(tmp_path, store)


def assert_streams_agree(tmp_path, store):
  """Both processes' slices are those of the batches that one process reads."""
  batches = store.stream(16, 0, buffer_rows=40)
  whole = [next(batches)[SITES[0]] for _ in range(12)]
  batches.close()
  seen = set()
  for process in range(2):
    with np.load(tmp_path / f"found{process}.npz") as found:
      for key in found.files:
        batch, start = map(int, key.split("/"))
        rows = slice(start, start + len(found[key]))
        np.testing.assert_array_equal(whole[batch][rows], found[key])
        seen |= {(batch, row) for row in range(16)[rows]}
  assert len(seen) == 12 * 16
  assert jax.process_count() == 1
