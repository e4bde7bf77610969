"""Debiased CKA of two models streamed from their stores, against NumPy.

  python benchmarks/cka.py [--rows=100000] [--widths=640,1152] [--json]

Two stores of float32 rows that share a part. Ours reads both in batches and
keeps (D + E)^2 numbers. The peer reads both whole into memory and takes the
three products of the plain formula, biased and debiased, in float64 blocks.
Each runs in a process of its own, whose peak memory beyond its imports is
printed; both must give the same number, and on the first 2,000 rows that of
Gram matrices.
"""

import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import app, flags

from gemma_jax.activations import ActivationStore, Writer
from gemma_jax.activations.layout import LABELS
from gemma_jax.metrics import similarity

ROWS = flags.DEFINE_integer("rows", 100_000, "n.")
WIDTHS = flags.DEFINE_list("widths", ["640", "1152"], "D and E.")
DIR = flags.DEFINE_string("dir", None, "Of the stores, for the two processes.")
ONLY = flags.DEFINE_enum("only", None, ["ours", "numpy"], "Of a process.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")

SITE, BATCH, FEW = "blocks.0.resid_post", 8_192, 2_000


def write(directory: pathlib.Path) -> None:
  """Two stores whose rows have 32 of their dims in common, and offsets."""
  rng = np.random.default_rng(0)
  widths = [int(width) for width in WIDTHS.value]
  maps = [rng.normal(size=(32, width)) for width in widths]
  writers = [
    Writer(directory / str(i), sites={SITE: w}, dtype="float32", metadata={})
    for i, w in enumerate(widths)
  ]
  for start in range(0, ROWS.value, BATCH):
    n = min(BATCH, ROWS.value - start)
    shared = rng.normal(size=(n, 32))
    labels = {name: np.zeros(n, np.int32) for name in LABELS}
    for writer, into, width in zip(writers, maps, widths, strict=True):
      x = shared @ into + 4 * rng.normal(size=(n, width)) + 10
      writer.append(labels | {SITE: x.astype(np.float32)})
  for writer in writers:
    writer.close()


def streamed(stores) -> float:
  total = similarity.StreamedCKA()
  for start in range(0, ROWS.value, BATCH):
    stop = min(start + BATCH, ROWS.value)
    total.update(*(store.read(start, stop, SITE) for store in stores))
  return total.compute()


def whole(stores) -> float:
  """HSIC_1 by features: the formula at the head of `similarity/cka.py`."""
  x, y = (np.asarray(store.read(0, len(store), SITE)) for store in stores)
  n = len(x)
  rows = [z - z.mean(0, dtype=np.float64).astype(np.float32) for z in (x, y)]
  q = [np.sum(np.square(z, dtype=np.float64), axis=1) for z in rows]

  def hsic(i, j):
    product = np.zeros((rows[i].shape[1], rows[j].shape[1]))
    for at in range(0, n, BATCH):
      part = slice(at, at + BATCH)
      product += rows[i][part].astype(np.float64).T @ rows[j][part]
    found = np.sum(product**2) - n / (n - 2) * q[i] @ q[j]
    return found + q[i].sum() * q[j].sum() / ((n - 1) * (n - 2))

  return hsic(0, 1) / np.sqrt(hsic(0, 0) * hsic(1, 1))


def one(directory: str) -> None:
  """In a process of its own: the number, seconds, bytes beyond the start."""
  stores = [
    ActivationStore.open(pathlib.Path(directory) / str(i)) for i in range(2)
  ]
  few = [store.read(0, 4, SITE) for store in stores]  # starts what reads
  del few
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  began = time.perf_counter()
  value = (streamed if ONLY.value == "ours" else whole)(stores)
  seconds = time.perf_counter() - began
  after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  print(json.dumps([value, seconds, (after - before) * 1024]))


def main(_):
  if ONLY.value:
    one(DIR.value)
    return
  with tempfile.TemporaryDirectory(dir=DIR.value) as directory:
    write(pathlib.Path(directory))
    found = {}
    for name in ("ours", "numpy"):
      found[name] = json.loads(
        subprocess.run(
          [
            sys.executable,
            __file__,
            f"--only={name}",
            f"--dir={directory}",
            f"--rows={ROWS.value}",
          ],
          stdout=subprocess.PIPE,
          text=True,
          check=True,
        ).stdout.splitlines()[-1]
      )
    stores = [
      ActivationStore.open(pathlib.Path(directory) / str(i)) for i in range(2)
    ]
    x, y = (np.asarray(s.read(0, FEW, SITE), np.float64) for s in stores)
    x, y = x - x.mean(0), y - y.mean(0)
    gram = similarity.kernel_cka(x @ x.T, y @ y.T)
    few = similarity.StreamedCKA().update(x, y).compute()
  ours, theirs = (found[name] for name in ("ours", "numpy"))
  equal = abs(ours[0] - theirs[0]) < 1e-6 and abs(gram - few) < 1e-9
  out = {
    "name": f"debiased CKA, {ROWS.value} x {' and '.join(WIDTHS.value)}",
    "ours": ours[1],
    "peers": {"numpy, all in memory": theirs[1]},
    "unit": "s",
    "ratio": theirs[1] / ours[1],
    "equal": equal,
    "cka": ours[0],
    "peak_bytes": {"ours": ours[2], "numpy": theirs[2]},
  }
  if JSON.value:
    print(json.dumps(out))
    return
  print(f"{out['name']}: {ours[0]:.6f} and {theirs[0]:.6f} (equal: {equal})")
  for name, (_, seconds, size) in found.items():
    print(f"{name:>6}: {seconds:6.2f} s, {size / 2**20:8.0f} MiB at most")
  print(f"ratio {out['ratio']:.2f}")


if __name__ == "__main__":
  app.run(main)
