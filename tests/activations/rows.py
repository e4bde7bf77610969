"""Rows that differ from each other, and stores of them."""

import contextlib
import hashlib
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np

from gemma_jax.activations import ActivationStore, Writer
from gemma_jax.activations.layout import LABELS
from gemma_jax.activations.storage import Location

READ, WRITE = "blocks.1.mlp_in", "blocks.1.mlp_out"
SITES = {READ: 4, WRITE: 3}
SOURCES = ("books", "code", "web")
DOCUMENT = 7  # rows of a document
ROOT = pathlib.Path(__file__).parents[2]


def make_rows(n, dtype="float32", seed=0):
  """Random vectors, and labels of which no two rows have the same."""
  rng = np.random.default_rng(seed)
  number = np.arange(n, dtype=np.int32)
  at = dict(zip(LABELS, range(2, 8), strict=True))
  return (
    {
      site: rng.normal(size=(n, width)).astype(jnp.dtype(dtype))
      for site, width in SITES.items()
    }
    | {name: number * at[name] + seed for name in LABELS}
    | {"document": number // DOCUMENT, "source": number % 5 % len(SOURCES)}
  )


def make_documents(n, prefix=""):
  """(id, source, name) of the documents of so many rows."""
  return [
    (f"{prefix}{i}", SOURCES[i % 3], f"the {prefix}{i}th")
    for i in range(-(-n // DOCUMENT))
  ]


def cut(rows, start, stop):
  return {name: x[start:stop] for name, x in rows.items()}


def make_writer(where, dtype="float32", *, metadata=None, **options):
  return Writer(
    where,
    **{"sites": SITES, "sources": SOURCES} | options,
    dtype=dtype,
    metadata=metadata or {},
  )


def feed(writer, rows, *, block=37, start=None, stop=None):
  """Appends rows in blocks; by default all that the store lacks."""
  n = len(rows["token"]) if stop is None else stop
  first_row = writer.committed // block * block if start is None else start
  documents = make_documents(len(rows["token"]))
  for start in range(first_row, n, block):
    some = cut(rows, start, min(start + block, n))
    first, last = -(-start // DOCUMENT), some["document"][-1] + 1
    writer.append(
      some,
      first_row=start,
      documents=documents[first:last],
      first_document=first,
    )


def write(where, rows, dtype="float32", *, block=37, **options):
  """Writes rows and the documents that they are of, and opens the store."""
  with make_writer(where, dtype, **options) as writer:
    feed(writer, rows, block=block)
  return ActivationStore.open(where)


def interrupt(where, rows, stop, **options):
  """Writes the rows before `stop`, then breaks off."""
  with (
    contextlib.suppress(KeyboardInterrupt),
    make_writer(where, **options) as writer,
  ):
    feed(writer, rows, stop=stop)
    raise KeyboardInterrupt


def assert_holds(store, rows, start=0):
  """The store has these rows to the bit, `start` being the first."""
  n = len(rows["token"])
  for name, x in rows.items():
    got = store.read(start, start + n, name)
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(got, x, name)


def digests(where):
  """Key -> SHA-256 of all data below a store: arrays, documents, state."""
  location = Location(where)
  return {
    key: hashlib.sha256(location.read(key)).hexdigest()
    for key in location.keys("")
    # These two have times in them.
    if not key.endswith(("part.json", "writer.json", ".lock"))
  }


def start_python(script, **options):
  """A process that runs a script which can import these tests."""
  environment = os.environ | {
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
  }
  return subprocess.Popen(
    [sys.executable, "-c", script],
    env=environment,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    **options,
  )


def run_python(script):
  """What a script prints, line by line; it must succeed."""
  with start_python(script, stderr=subprocess.PIPE) as process:
    out, error = process.communicate(timeout=300)
  assert process.returncode == 0, error
  return out.splitlines()
