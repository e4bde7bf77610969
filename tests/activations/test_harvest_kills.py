"""A harvest killed again and again ends with the bytes of one left alone."""

import hashlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import gemma_jax
from gemma_jax.activations import ActivationStore, layout

ROOT = pathlib.Path(gemma_jax.__file__).parent.parent
KILLS = int(os.environ.get("GEMMA_JAX_KILLS", "2"))
TOKENS = 60_000

JOB = """
import sys
import tokenizers
import jax
from gemma_jax import data, models
from gemma_jax.activations import harvest, layout

layout.SHARD_ROWS, layout.CHUNK_ROWS = 2048, 256
jax.config.update("jax_compilation_cache_dir", sys.argv[2])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
tokenizer = tokenizers.Tokenizer(
  tokenizers.models.BPE({c: i for i, c in enumerate(letters, start=4)}, [])
)
tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
windows = data.WindowStream(
  data.builtin(), tokenizer, context=64, bos_id=2, pad_id=0, seed=0,
  max_tokens=int(sys.argv[3]), document_tokens=2000,
)
mesh = models.make_mesh({"data": 1}, jax.devices()[:1])
model = models.load_model("random:gemma2-tiny", mesh=mesh)
harvest(
  model, windows, ("blocks.0.mlp_in", "blocks.1.mlp_out"), sys.argv[1],
  batch_size=16, keep=0.8,
)
"""


def start(tmp_path, name):
  return subprocess.Popen(
    [
      *(sys.executable, "-c", JOB),
      *(tmp_path / name, tmp_path / "compiled", str(TOKENS)),
    ],
    env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


def finish(process):
  _, err = process.communicate(timeout=300)
  assert process.returncode == 0, err.decode()[-3000:]


def committed(store):
  """Rows that are safely there."""
  part = store / layout.part_name(0) / layout.PART
  return json.loads(part.read_text())["committed"] if part.exists() else 0


def chunk_files(store):
  """Hash of every file but for what tells times and locks."""
  return {
    str(p.relative_to(store)): hashlib.sha256(p.read_bytes()).hexdigest()
    for p in sorted(store.rglob("*"))
    if p.is_file() and p.name not in (layout.PART, ".lock")
  }


@pytest.mark.slow
def test_a_harvest_killed_at_random_moments_ends_as_one_left_alone(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(layout, "SHARD_ROWS", 2_048)
  monkeypatch.setattr(layout, "CHUNK_ROWS", 256)
  finish(start(tmp_path, "warm"))  # compiles
  finish(start(tmp_path, "alone"))
  total = committed(tmp_path / "alone")
  rng = random.Random(0)
  killed = tmp_path / "killed"
  deaths = 0
  for row in sorted(rng.randrange(total) for _ in range(KILLS)):
    process = start(tmp_path, "killed")
    while committed(killed) < row and process.poll() is None:
      time.sleep(0.01)
    time.sleep(rng.random() / 20)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode in (0, -signal.SIGKILL)
    deaths += process.returncode != 0
  assert deaths > 0
  finish(start(tmp_path, "killed"))
  assert chunk_files(killed) == chunk_files(tmp_path / "alone")
  store = ActivationStore.open(killed)
  labels = ("document", "begin", "end", "position")
  rows = np.stack([store.read(0, len(store), name) for name in labels], 1)
  assert len(np.unique(rows, axis=0)) == len(store)
  print(f"{deaths} kills, {len(store)} rows")
