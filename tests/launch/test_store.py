"""The commands that look after a store, as a user runs them."""

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from gemma_jax.activations import ActivationStore, Writer
from gemma_jax.activations.layout import CHUNK_ROWS, LABELS, SHARD_ROWS
from launch import doctor

ROOT = pathlib.Path(doctor.__file__).parent.parent
SITES = {"blocks.1.mlp_in": 8, "blocks.1.mlp_out": 4}
SITE = "blocks.1.mlp_in"
ROWS = 2 * SHARD_ROWS + 1_000
DAMAGED = f"parts/00000/{SITE}/c/0/0"


def run(*args, status=0):
  done = subprocess.run(
    [sys.executable, "-m", "launch.store", *map(str, args)],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == status, done.stdout + done.stderr
  assert "Traceback" not in done.stderr
  return done.stdout if status < 2 else done.stderr


def write(path, text=0, *, stop=None):
  """A store of two sources; position 0 of every window has a large norm."""
  rng = np.random.default_rng(text)
  number = np.arange(ROWS, dtype=np.int32)
  rows = {s: rng.normal(size=(ROWS, d)).astype("f4") for s, d in SITES.items()}
  rows |= dict.fromkeys(LABELS, number)
  rows |= {"document": number // 1_000, "position": number % 100}
  rows |= {"source": np.where(number < 4_000, 0, 1).astype(np.int32)}
  rows[SITE][5_000] = 900
  documents = [(str(i), "", f"poem {i}") for i in range(ROWS // 1_000 + 1)]
  with (
    contextlib.suppress(KeyboardInterrupt),
    Writer(
      path,
      sites=SITES,
      dtype="float32",
      metadata={"model": "tiny"},
      made_by={"text": text},
      sources=("prose", "verse"),
      append=True,
    ) as writer,
  ):
    writer.append(
      {n: x[:stop] for n, x in rows.items()}, first_row=0, documents=documents
    )
    if stop is not None:
      raise KeyboardInterrupt
    writer.report = {"windows": 338}
  return rows


def damage(path):
  data = bytearray((path / DAMAGED).read_bytes())
  data[3 * CHUNK_ROWS * 32 + 99] ^= 1
  (path / DAMAGED).write_bytes(data)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
  """(path, rows) of a sound store; copy it before changing it."""
  path = tmp_path_factory.mktemp("original") / "store"
  return path, write(path)


@pytest.fixture
def path(original, tmp_path):
  """A copy to change."""
  return pathlib.Path(shutil.copytree(original[0], tmp_path / "store"))


def test_damage_is_told_repaired_and_written_again(path, original):
  damage(path)
  said = run("verify", path, status=1)
  rows = f"{SITE}, rows {3 * CHUNK_ROWS} to {4 * CHUNK_ROWS - 1}"
  assert f"{DAMAGED}: {rows}: DATA_LOSS" in said
  command = f"python -m launch.store repair {path}"
  assert f"`{command}`" in said
  (found,) = json.loads(run("verify", "--json", path, status=1))
  assert (found["array"], found["key"]) == (SITE, DAMAGED)
  assert (found["start"], found["stop"]) == (3 * CHUNK_ROWS, 4 * CHUNK_ROWS)
  said = run(*command.split()[3:])
  assert f"{DAMAGED}: {rows}" in said
  assert f"rows 0 to {SHARD_ROWS - 1} are to be harvested again" in said
  assert "Run the same harvest" in said
  # Until that is done, the hole is told again, and nothing else is.
  again = json.loads(run("repair", path, "--json"))
  assert again == {"damages": [], "missing": [[0, SHARD_ROWS]]}
  write(path)
  assert "is sound" in run("verify", path)
  assert (path / DAMAGED).read_bytes() == (original[0] / DAMAGED).read_bytes()


def test_info_says_what_a_store_is(original):
  path, _ = original
  facts = json.loads(run("info", path, "--json"))
  assert facts["complete"] is True
  assert (facts["rows"], facts["dtype"]) == (ROWS, "float32")
  assert facts["sites"] == SITES
  assert facts["sources"] == {"prose": 4_000, "verse": ROWS - 4_000}
  assert facts["documents"] == ROWS // 1_000 + 1
  assert facts["metadata"] == {"model": "tiny"}
  assert facts["bytes"]["vectors"] == ROWS * 12 * 4
  on_disk = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
  assert facts["bytes"]["stored"] == on_disk
  (part,) = facts["parts"]
  assert part["made_by"] == {"text": 0}
  assert part["report"] == {"windows": 338}
  assert facts["tokens_per_second"] == pytest.approx(
    ActivationStore.open(path).tokens_per_second
  )
  said = run("info", path)
  for words in (f"{ROWS:,} in 1 part, complete", "verse", '{"windows": 338}'):
    assert words in said


def test_info_of_an_interrupted_store_counts_what_is_committed(tmp_path):
  path = tmp_path / "cut"
  write(path, stop=2 * SHARD_ROWS + 10)
  # Two shards are full; the rows of the third were not sent.
  facts = json.loads(run("info", path, "--json"))
  assert facts["complete"] is False
  assert facts["rows"] == 2 * SHARD_ROWS
  assert facts["sources"] == {"prose": 4_000, "verse": 2 * SHARD_ROWS - 4_000}
  assert "INCOMPLETE" in run("info", path)
  assert "is sound" in run("verify", path)


def test_stats_are_measured_written_and_drawn(path, original, tmp_path):
  rows = original[1]
  out = tmp_path / "pictures"
  said = json.loads(
    run("stats", path, "--covariance", f"--out={out}", "--json")
  )
  x = rows[SITE].astype(np.float64)
  norms = np.linalg.norm(x, axis=1)
  found = said["sites"][SITE]
  assert found["tokens"] == ROWS
  assert found["mean norm"] == pytest.approx(norms.mean(), rel=1e-6)
  assert found["mean square"] == pytest.approx((norms**2).mean(), rel=1e-6)
  values = np.linalg.eigvalsh(np.cov(x.T))
  ratio = values.sum() ** 2 / (values**2).sum()
  assert found["participation ratio"] == pytest.approx(ratio, rel=1e-5)
  assert found["outliers"][0]["name"] == "poem 5"
  assert found["outliers"][0]["norm"] == pytest.approx(norms[5_000], rel=1e-6)
  stored = json.loads((path / "stats.json").read_text())
  assert stored.keys() == SITES.keys()
  assert stored[SITE]["mean_norm"] == found["mean norm"]
  pictures = {pathlib.Path(p).name for p in said["pictures"]}
  assert pictures == {p.name for p in out.iterdir()}
  assert {"norms.png", "spectrum.png"} <= pictures


def test_stats_of_a_plain_store_go_to_its_plots(path):
  said = run("stats", path)
  assert "mean norm" in said
  assert "participation ratio  -" in said
  assert "at position 0 of poem 5" in said
  assert (path / "plots/norms.png").stat().st_size > 1_000


def test_merge_joins_stores_and_refuses_to_do_it_twice(path, tmp_path):
  write(tmp_path / "second", 1)
  said = run("merge", tmp_path / "all", path, tmp_path / "second")
  assert f"{2 * ROWS:,} rows in 2 parts" in said
  assert len(ActivationStore.open(tmp_path / "all")) == 2 * ROWS
  said = run("merge", tmp_path / "all", path, status=2)
  assert said.startswith("error: ")
  assert "would count twice" in said


def test_where_no_store_is_the_commands_say_so(tmp_path):
  for command in ("verify", "repair"):
    said = run(command, tmp_path, status=2)
    assert said.startswith("error: ")
    assert "is no activation store" in said
  assert os.listdir(tmp_path) == []


def test_a_command_that_is_none_shows_how_it_is_meant():
  said = run("check", "a", status=2)
  assert "Expected one of verify, info, stats, repair, merge" in said
  assert "Expected merge TARGET SOURCE..." in run("merge", "a", status=2)


def test_pictures_of_a_store_elsewhere_need_a_place():
  assert "--out=DIR" in run("stats", "memory://nowhere", status=2)
