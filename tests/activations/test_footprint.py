"""What a store takes of the disk, and its writer and reader of memory."""

import jax.numpy as jnp
import numpy as np

from gemma_jax.activations import ActivationStore, Writer
from tests.activations.rows import run_python


def realistic_labels(n, rng):
  """Labels of windows of 1,024 tokens, of documents of some 700 each."""
  number = np.arange(n, dtype=np.int32)
  starts = np.unique(np.append(0, rng.integers(0, n, n // 700)))
  document = np.searchsorted(starts, number, "right") - 1
  length = rng.integers(1, 9, n)
  end = np.cumsum(length)
  begin = end - length
  first = begin[starts][document]  # where its document begins
  return {
    "token": (rng.pareto(1.0, n) * 40).clip(max=262_143).astype(np.int32),
    "document": document.astype(np.int32),
    "position": number % 1_024,
    "source": (document % 5).astype(np.int32),
    "begin": (begin - first).astype(np.int32),
    "end": (end - first).astype(np.int32),
  }


def test_a_store_takes_two_percent_more_than_its_vectors(tmp_path):
  n, width = 200_000, 640
  rng = np.random.default_rng(0)
  x = rng.normal(size=(4_096, width)).astype(jnp.bfloat16)
  labels = realistic_labels(n, rng)
  documents = [
    (f"{i:016x}", "web", f"https://example.org/{i}")
    for i in range(labels["document"][-1] + 1)
  ]
  with Writer(
    tmp_path / "s",
    sites={"site": width},
    dtype="bfloat16",
    metadata={"model": "of that width"},
    sources=("a", "b", "c", "d", "web"),
  ) as writer:
    writer.append(
      {name: v[:0] for name, v in labels.items()} | {"site": x[:0]},
      documents=documents,
    )
    for at in range(0, n, len(x)):
      some = {name: v[at : at + len(x)] for name, v in labels.items()}
      writer.append(some | {"site": x[: len(some["token"])]})
  files = [p.stat() for p in (tmp_path / "s").rglob("*") if p.is_file()]
  raw = n * width * 2
  assert sum(file.st_size for file in files) <= 1.02 * raw
  assert sum(file.st_blocks * 512 for file in files) <= 1.02 * raw
  store = ActivationStore.open(tmp_path / "s")
  for name, expected in labels.items():
    np.testing.assert_array_equal(store.read(0, n, name), expected)


# A leak of a tenth of a store of 100 MB would be seen.
PEAKS = """
import resource, sys
import numpy as np
from gemma_jax.activations import ActivationStore, Writer, layout
layout.SHARD_ROWS, layout.CHUNK_ROWS = 4_096, 256
x = np.ones((1_000, 64), np.float32)
labels = dict.fromkeys(layout.LABELS, np.zeros(1_000, np.int32))
def peak():
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
def write(path, n):
  with Writer(path, sites={{"x": 64}}, dtype="float32", metadata={{}}) as w:
    for _ in range(n // 1_000):
      w.append(labels | {{"x": x}})
def stream(path, n):
  batches = ActivationStore.open(path).stream(500, 0, buffer_rows=8_192)
  for _ in range(n // 500):
    next(batches)
  batches.close()
for n in (40_000, 400_000):
  {what}({path!r} + str(n), n)
  print(peak())
"""


def test_memory_does_not_grow_with_the_store(tmp_path):
  for what in ("write", "stream"):
    script = PEAKS.format(what=what, path=str(tmp_path / "s"))
    short, long = map(int, run_python(script))
    assert long - short < 20, f"{what}: {short} MiB, then {long} MiB"
