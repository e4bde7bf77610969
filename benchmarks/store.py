"""GB/s of an activation store: ours against NumPy's files.

  python benchmarks/store.py [--gib=4] [--width=2304] [--rounds=3] [--json]

The same bfloat16 vectors of one site. Writing, batch by batch, until the
bytes are on the disk: a store (with checksums, labels and manifest), `.npy`
files and compressed `.npz` files of one shard each. Reading: a shuffled epoch
of the store in batches, against `np.load` of the `.npy` files in their order.
Before every reading the files are dropped from the page cache, where a store
larger than memory is not; `--warm` leaves them there. All take turns.
"""

import os
import pathlib
import shutil
import statistics
import tempfile
import time

import ml_dtypes
import numpy as np
import turns
from absl import app, flags

from gemma_jax.activations import ActivationStore, Writer
from gemma_jax.activations.layout import LABELS, SHARD_ROWS

GIB = flags.DEFINE_float("gib", 4.0, "Size of the vectors.")
WIDTH = flags.DEFINE_integer("width", 2304, "D.")
BATCH = flags.DEFINE_integer("batch", 4096, "Rows in a batch of the stream.")
BUFFER = flags.DEFINE_integer("buffer_rows", 2**15, "Rows of a block.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Times that each is run.")
WARM = flags.DEFINE_bool("warm", False, "Read from the page cache.")
PLACE = flags.DEFINE_string("dir", None, "Where; default: a temporary place.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object per claim.")

SITE = "blocks.12.resid_post"
APPEND = 4096  # rows that a forward pass gives at once


def shard_of(index: int, width: int) -> np.ndarray:
  """Normal values; the first value of a row says which row it is."""
  rng = np.random.default_rng(index)
  x = rng.standard_normal((SHARD_ROWS, width), np.float32)
  return x.astype(ml_dtypes.bfloat16)


def on_disk(directory: pathlib.Path) -> int:
  return sum(
    p.stat().st_blocks * 512 for p in directory.rglob("*") if p.is_file()
  )


def forget(directory: pathlib.Path) -> None:
  """Drops files from the page cache."""
  for path in directory.rglob("*"):
    if path.is_file():
      with path.open("rb") as f:
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_store(directory, x, shards):
  labels = {n: np.arange(SHARD_ROWS, dtype=np.int32) for n in LABELS}
  labels["source"] = np.zeros(SHARD_ROWS, np.int32)
  with Writer(
    directory, sites={SITE: x.shape[1]}, dtype="bfloat16", metadata={}
  ) as writer:
    for _ in range(shards):
      for at in range(0, SHARD_ROWS, APPEND):
        rows = slice(at, at + APPEND)
        batch = {n: label[rows] for n, label in labels.items()}
        writer.append(batch | {SITE: x[rows]})


def write_npy(directory, x, shards):
  directory.mkdir(parents=True)
  for i in range(shards):
    with (directory / f"{i}.npy").open("wb") as f:
      np.save(f, x.view(np.uint16))
      f.flush()
      os.fsync(f.fileno())


def write_npz(directory, x, shards):
  directory.mkdir(parents=True)
  for i in range(shards):
    with (directory / f"{i}.npz").open("wb") as f:
      np.savez_compressed(f, x=x.view(np.uint16))
      f.flush()
      os.fsync(f.fileno())


def checksum(x) -> int:
  """The same for the same rows in any order."""
  bits = x.view(np.uint16)
  return int(bits[:, :8].astype(np.uint64).sum())


def read_store(directory):
  store = ActivationStore.open(directory)
  batches = store.stream(BATCH.value, 0, buffer_rows=BUFFER.value)
  total = 0
  for _ in range(len(store) // BATCH.value):
    total += checksum(next(batches)[SITE])
  batches.close()
  return total


def read_npy(directory, shards):
  return sum(checksum(np.load(directory / f"{i}.npy")) for i in range(shards))


def median(seconds) -> float:
  return statistics.median(seconds)


def main(_):
  row = WIDTH.value * 2
  shards = max(1, round(GIB.value * 2**30 / row / SHARD_ROWS))
  x = shard_of(0, WIDTH.value)
  gigabytes = shards * x.nbytes / 1e9
  root = pathlib.Path(tempfile.mkdtemp(dir=PLACE.value))
  writers = {
    "ours": lambda d: write_store(d, x, shards),
    "np.save": lambda d: write_npy(d, x, shards),
  }
  took = {name: [] for name in [*writers, "np.savez_compressed"]}
  try:
    for _ in range(ROUNDS.value):
      for name, write in writers.items():
        shutil.rmtree(root / name, ignore_errors=True)
        os.sync()
        began = time.perf_counter()
        write(root / name)
        took[name].append(time.perf_counter() - began)
    # It is so slow that one shard tells.
    began = time.perf_counter()
    write_npz(root / "npz", x, 1)
    took["np.savez_compressed"].append((time.perf_counter() - began) * shards)
    rates = {name: gigabytes / median(t) for name, t in took.items()}
    ours = rates.pop("ours")
    overhead = on_disk(root / "ours") / (shards * x.nbytes)
    same = ActivationStore.open(root / "ours")
    equal = np.array_equal(
      same.read(0, SHARD_ROWS, SITE).view(np.uint16), x.view(np.uint16)
    )
    show(
      "store: write", ours, rates, equal, f"disk {overhead:.4f} of raw vectors"
    )
    readers = {
      "ours": lambda: read_store(root / "ours"),
      "np.load": lambda: read_npy(root / "np.save", shards),
    }
    took, found = {name: [] for name in readers}, {}
    for read in readers.values():
      read()
    for _ in range(ROUNDS.value):
      for name, read in readers.items():
        if not WARM.value:
          forget(root)
        began = time.perf_counter()
        found[name] = read()
        took[name].append(time.perf_counter() - began)
    rates = {name: gigabytes / median(t) for name, t in took.items()}
    ours = rates.pop("ours")
    state = "warm" if WARM.value else "cold"
    show(
      f"store: shuffled read, {state}",
      ours,
      rates,
      found["ours"] == found["np.load"],
    )
  finally:
    shutil.rmtree(root)


def show(name, ours, peers, equal, note=""):
  turns.show_rates(
    {
      "name": name,
      "ours": ours,
      "peers": peers,
      "unit": "GB/s",
      "ratio": ours / max(peers.values()),
      "equal": bool(equal),
      "note": note,
    },
    as_json=JSON.value,
  )


if __name__ == "__main__":
  app.run(main)
