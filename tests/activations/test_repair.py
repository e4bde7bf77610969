"""Damage is found, taken out, and written again to the same bytes."""

import contextlib
import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from gemma_jax import models
from gemma_jax.activations import (
  ActivationStore,
  Statistics,
  Writer,
  harvest,
  layout,
)
from gemma_jax.activations.layout import CHUNK_ROWS, LABELS, SHARD_ROWS
from gemma_jax.activations.records import load_statistics, save_statistics
from gemma_jax.activations.repair import repair, verify
from tests.activations.windows import make_windows

READ, WRITE = "blocks.1.mlp_in", "blocks.1.mlp_out"
SITES = {READ: 4, WRITE: 3}
ROWS = 2 * SHARD_ROWS + 2_500  # of part 0; the last shard is short
MORE = 3_000  # of part 1
PART = "parts/00000/"
STATE = f"{PART}state/{ROWS:012d}.npz"


def make_rows(n, seed):
  rng = np.random.default_rng(seed)
  rows = {s: rng.normal(size=(n, d)).astype("f4") for s, d in SITES.items()}
  rows |= {name: rng.integers(0, 99, n, np.int32) for name in LABELS}
  return rows | {"source": np.zeros(n, np.int32)}


def save():
  found = {
    s: Statistics(d, positions=8, sources=("",)) for s, d in SITES.items()
  }
  return save_statistics(found, covered=7)


def write(path, part, dtype="float32", *, stop=None):
  """What a harvest does, up to a row; a document begins every 1,000 rows."""
  n = (ROWS, MORE)[part]
  rows = make_rows(n, part)
  with (
    contextlib.suppress(KeyboardInterrupt),
    Writer(
      path,
      sites=SITES,
      dtype=dtype,
      metadata={"model": "tiny"},
      made_by={"text": part},
      append=True,
      state=save,
    ) as writer,
  ):
    for i, start in enumerate(range(0, n, 1_000)):
      if stop is not None and start >= stop:
        raise KeyboardInterrupt
      batch = {name: x[start : start + 1_000] for name, x in rows.items()}
      writer.append(
        batch,
        first_row=start,
        documents=[(f"{part}.{i}", "", f"text {i}")],
        first_document=i,
      )


def write_both(path, dtype="float32"):
  write(path, 0, dtype)
  write(path, 1, dtype)


def tree(path):
  """Every file's bytes, without the clock and the locks."""
  found = {}
  for file in sorted(pathlib.Path(path).rglob("*")):
    if file.is_file() and file.name != ".lock":
      data = file.read_bytes()
      if file.name == "part.json":
        data = json.loads(data)
        del data["seconds"], data["checksum"]
      found[str(file.relative_to(path))] = data
  return found


def flip(file, at):
  data = bytearray(file.read_bytes())
  data[at] ^= 4
  file.write_bytes(data)


@pytest.fixture(scope="module", params=["float32", "int8"])
def original(request, tmp_path_factory):
  """(path, dtype) of a store of two parts; copy it before damaging it."""
  path = tmp_path_factory.mktemp("original") / "store"
  write_both(path, request.param)
  return path, request.param


@pytest.fixture
def copy(original, tmp_path):
  """(path, dtype) of a copy to damage."""
  return pathlib.Path(shutil.copytree(original[0], tmp_path / "s")), original[1]


@pytest.fixture
def plain(tmp_path):
  """A float32 store to damage."""
  write_both(tmp_path / "s")
  return tmp_path / "s"


def test_a_sound_store_is_left_as_it_is_to_the_byte(copy):
  path, _ = copy
  files = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
  assert verify(path) == repair(path) == []
  assert files == {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
  ("name", "key", "at", "chunk"),
  [
    (READ, f"{PART}{READ}/c/1/0", 5 * (CHUNK_ROWS * 16 + 4) + 9, (1, 5)),
    (WRITE, f"{PART}{WRITE}/c/2/0", 2 * (CHUNK_ROWS * 12 + 4) + 1, (2, 2)),
    ("labels", f"{PART}labels/c/0/0", 100, (0, 0)),
  ],
)
def test_a_flipped_bit_is_found_with_its_chunk(name, key, at, chunk, plain):
  flip(plain / key, at)
  (found,) = verify(plain)
  start = chunk[0] * SHARD_ROWS + chunk[1] * CHUNK_ROWS
  assert found[:4] == (name, start, min(start + CHUNK_ROWS, ROWS), key)
  assert "Digest mismatch" in found.reason
  assert f"{key}: {name}, rows {start} to " in str(found)


def test_rows_of_a_later_part_count_through_the_store(plain):
  key = f"parts/00001/{READ}/c/0/0"
  flip(plain / key, (CHUNK_ROWS * 16 + 4) + 3)
  (found,) = verify(plain)
  start = ROWS + CHUNK_ROWS
  assert found[:4] == (READ, start, start + CHUNK_ROWS, key)


@pytest.mark.parametrize("what", ["gone", "empty", "short", "index"])
def test_a_shard_that_is_gone_or_cut_has_all_its_chunks_damaged(what, plain):
  key = f"{PART}labels/c/1/0"
  file = plain / key
  if what == "gone":
    file.unlink()
  elif what == "index":
    flip(file, -2)
  else:
    file.write_bytes(file.read_bytes()[: 0 if what == "empty" else 1_000])
  found = verify(plain)
  assert {(d.array, d.key) for d in found} == {("labels", key)}
  at = [SHARD_ROWS + i * CHUNK_ROWS for i in range(16)]
  assert [(d.start, d.stop) for d in found] == [(a, a + CHUNK_ROWS) for a in at]


def contents(path):
  """What the files say that no row is in."""
  states = [
    {k: v if k == "covered" else v.state() for k, v in found.items()}
    for found in (
      load_statistics(p.read_bytes(), str(p))
      for p in sorted(path.rglob("state/*.npz"))
    )
  ]
  return repr(states), ActivationStore.open(path).documents


def test_no_bit_of_any_file_changes_what_is_read_unseen(plain):
  before = contents(plain)
  rng = np.random.default_rng(0)
  files = sorted(
    p for p in plain.rglob("*") if p.is_file() and p.name != ".lock"
  )
  assert len({p.parent.name for p in files}) > 5
  missed = []
  for file in files:
    data = file.read_bytes()
    for _ in range(2):
      at = int(rng.integers(len(data)))
      flip(file, at)
      key = str(file.relative_to(plain))
      if {d.key for d in verify(plain)} != {key}:
        missed.append(key)
        # As of the time stamps in a container.
        assert contents(plain) == before, (key, at)
      file.write_bytes(data)
  assert all("/documents/" in k or "/state/" in k for k in missed), missed
  assert verify(plain) == []


def test_what_a_repair_takes_out_is_written_again_to_the_same_bytes(
  copy, original
):
  path, dtype = copy
  flip(path / f"{PART}{READ}/c/0/0", 77)
  flip(path / f"{PART}{WRITE}/c/2/0", 3)
  flip(path / f"{PART}labels/c/2/0", -1)
  (path / f"parts/00001/{READ}/c/0/0").unlink()
  (path / f"{PART}{WRITE}/zarr.json").write_text("{")
  flip(path / "parts/00001/labels/zarr.json", 40)
  found = verify(path)
  assert repair(path) == found
  assert verify(path) == []
  part = json.loads((path / f"{PART}part.json").read_text())
  assert part["holes"] == [[0, SHARD_ROWS], [2 * SHARD_ROWS, ROWS]]
  once = tree(path)
  assert repair(path) == []
  assert tree(path) == once
  with pytest.raises(ValueError, match="incomplete: it has holes"):
    ActivationStore.open(path)
  write_both(path, dtype)
  assert verify(path) == []
  assert tree(path) == tree(original[0])


def test_every_scale_of_an_int8_store_is_checked(tmp_path):
  write_both(tmp_path / "s", "int8")
  key = f"{PART}{READ}.scale/c/0"
  flip(tmp_path / "s" / key, (4 * CHUNK_ROWS + 4) + 1)
  (found,) = repair(tmp_path / "s")
  assert found[:4] == (f"{READ}.scale", CHUNK_ROWS, 2 * CHUNK_ROWS, key)


def test_damaged_metadata_are_written_anew_without_touching_a_row(plain):
  before = tree(plain)
  for name in (READ, "labels"):
    flip(plain / f"{PART}{name}/zarr.json", 60)
  (plain / f"{PART}{WRITE}/zarr.json").unlink()
  assert len(repair(plain)) == 3
  assert tree(plain) == before


def test_documents_are_named_again_by_the_same_harvest(plain):
  before = ActivationStore.open(plain)
  names, n = before.documents, len(before)
  rows = {name: before.read(0, n, name) for name in (READ, "token")}
  key = f"{PART}documents/000001.jsonl.gz"
  flip(plain / key, 30)
  (found,) = repair(plain)
  assert (found.array, found.key) == ("documents", key)
  assert verify(plain) == []
  with pytest.raises(ValueError, match="incomplete"):
    ActivationStore.open(plain)
  write_both(plain)
  store = ActivationStore.open(plain)
  assert store.documents == names
  for name, x in rows.items():
    np.testing.assert_array_equal(store.read(0, n, name), x)


def test_damaged_statistics_are_dropped_and_the_rows_stay(plain):
  rows = tree(plain)
  flip(plain / STATE, 2_000)
  (found,) = repair(plain)
  assert found[:4] == ("statistics", 0, ROWS, STATE)
  store = ActivationStore.open(plain)
  assert store.statistics(READ) is None
  assert not (plain / STATE).exists()
  changed = {k for k, v in tree(plain).items() if v != rows[k]}
  assert changed == {f"{PART}part.json"}
  # The same harvest, which measures, gives the part its statistics again.
  write_both(plain)
  assert tree(plain) == rows


@pytest.mark.parametrize("key", [f"{PART}part.json", "manifest.json"])
def test_a_damaged_description_is_set_aside_and_harvested_again(key, plain):
  before = tree(plain)
  flip(plain / key, 30)
  damaged = (plain / key).read_bytes()
  (found,) = repair(plain)
  assert found.key == key
  assert (plain / f"{key}.damaged").read_bytes() == damaged
  write_both(plain)
  (plain / f"{key}.damaged").unlink()
  assert tree(plain) == before


def test_an_incomplete_store_is_checked_as_far_as_it_goes(tmp_path, plain):
  path = tmp_path / "cut"
  write(path, 0, stop=2 * SHARD_ROWS + 1_000)
  part = json.loads((path / f"{PART}part.json").read_text())
  assert (part["committed"], part["complete"]) == (2 * SHARD_ROWS, False)
  assert verify(path) == []
  key = f"{PART}{READ}/c/0/0"
  flip(path / key, 3)
  flip(path / f"{PART}{WRITE}/zarr.json", 60)
  found = repair(path)
  assert {d.key for d in found} == {key, f"{PART}{WRITE}/zarr.json"}
  assert verify(path) == []
  write_both(path)
  arrays = [
    {k: v for k, v in tree(p).items() if "/c/" in k or "zarr" in k}
    for p in (path, plain)
  ]
  assert arrays[0] == arrays[1]
  assert ActivationStore.open(path).documents == (
    ActivationStore.open(plain).documents
  )


@pytest.mark.usefixtures("quick_compiles")
def test_the_same_harvest_fills_what_a_repair_took_out(
  tmp_path, monkeypatch, one_device
):
  monkeypatch.setattr(layout, "SHARD_ROWS", 20)
  monkeypatch.setattr(layout, "CHUNK_ROWS", 10)
  model = models.load_model("random:gemma2-tiny", mesh=one_device)
  windows = make_windows(14)

  def run():
    return harvest(model, windows, [READ], tmp_path, batch_size=3)

  store = run()
  before, names = tree(tmp_path), store.documents
  stats = json.loads((tmp_path / "stats.json").read_text())
  last = (len(store) - 1) // 20
  damaged = {
    PART + key
    for key in (
      f"{READ}/c/1/0",
      f"labels/c/{last}/0",
      "documents/000000.jsonl.gz",
      f"state/{len(store):012d}.npz",
    )
  }
  for key in damaged:
    flip(tmp_path / key, 50)
  assert {d.key for d in repair(tmp_path)} == damaged
  (tmp_path / "stats.json").unlink()
  store = run()
  assert verify(tmp_path) == []
  assert store.documents == names
  assert json.loads((tmp_path / "stats.json").read_text()) == stats
  after = tree(tmp_path)
  assert {k: v for k, v in after.items() if "/c/" in k} == {
    k: v for k, v in before.items() if "/c/" in k
  }
  assert after.keys() == before.keys()


def test_a_part_that_is_being_written_is_not_repaired(tmp_path):
  path = tmp_path / "s"
  write(path, 0, stop=2 * SHARD_ROWS + 1_000)
  flip(path / f"{PART}{READ}/c/0/0", 3)
  before = tree(path)
  writer = Writer(
    path,
    sites=SITES,
    dtype="float32",
    metadata={"model": "tiny"},
    made_by={"text": 0},
    append=True,
  )
  with pytest.raises(BlockingIOError, match="Another process is writing"):
    repair(path)
  assert tree(path) == before
  writer.abandon()
  assert len(repair(path)) == 1


def test_what_cannot_be_read_for_another_reason_is_not_taken_out(plain):
  file = plain / f"{PART}{READ}/c/0/0"
  file.unlink()
  os.symlink(file, file)  # a loop
  with pytest.raises(OSError, match="does not tell whether it is damaged"):
    repair(plain)
  assert file.is_symlink()


def test_a_store_in_memory_is_repaired_too():
  where = "memory://repair/store"
  write_both(where)
  store = ActivationStore.open(where)
  root, key = store.root, f"{PART}labels/c/1/0"
  good = root.read(key)
  root.write(key, good[:50] + b"?" + good[51:])
  assert {d.key for d in repair(where)} == {key}
  write_both(where)
  assert verify(where) == []
  assert root.read(key) == good


def test_another_version_is_refused_and_not_repaired(tmp_path):
  with pytest.raises(FileNotFoundError, match="no activation store"):
    verify(tmp_path)
  (tmp_path / "manifest.json").write_text('{"format": 2, "rows": 9}')
  with pytest.raises(ValueError, match="has format 2, expected 3"):
    repair(tmp_path)
  assert os.listdir(tmp_path) == ["manifest.json"]
