"""A store gives back what was written, or says why it cannot."""

import json
import shutil

import numpy as np
import pytest

from gemma_jax.activations import ActivationStore, measure
from gemma_jax.activations.layout import FORMAT, LABELS, SHARD_ROWS, TOGETHER
from gemma_jax.activations.records import save_statistics, write_statistics
from tests.activations.rows import (
  READ,
  SITES,
  SOURCES,
  WRITE,
  assert_holds,
  feed,
  interrupt,
  make_documents,
  make_rows,
  make_writer,
  write,
)

N = 200


@pytest.fixture
def store(tmp_path, small):
  """A store of four small shards."""
  return write(tmp_path / "s", make_rows(N), metadata={"model": "tiny"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", [1, SHARD_ROWS, SHARD_ROWS + 1])
def test_what_was_written_comes_back_to_the_bit(dtype, n, tmp_path):
  rows = make_rows(n, dtype)
  assert_holds(write(tmp_path / "s", rows, dtype, block=5_000), rows)


@pytest.mark.parametrize("n", [1, SHARD_ROWS, SHARD_ROWS + 1])
def test_int8_comes_back_within_half_a_step_as_float32(n, tmp_path):
  rows = make_rows(n)
  rows[READ] *= np.logspace(-30, 30, n, dtype=np.float32)[:, None]
  rows[READ][n // 2] = 0
  store = write(tmp_path / "s", rows, "int8", block=5_000)
  got = store.read(0, n, READ)
  assert got.dtype == np.float32
  step = np.abs(rows[READ]).max(-1, keepdims=True) / 127
  # Division and product round in float32.
  assert (np.abs(got - rows[READ]) <= step / 2 * (1 + 1e-4)).all()
  assert not got[n // 2].any()
  for name in LABELS:
    np.testing.assert_array_equal(store.read(0, n, name), rows[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("block", [1, 17, 64, 1_000])
def test_blocks_of_any_size_make_the_same_rows(block, dtype, tmp_path, small):
  rows = make_rows(N, "float32" if dtype == "int8" else dtype)
  whole = write(tmp_path / "whole", rows, dtype, block=N)
  store = write(tmp_path / "s", rows, dtype, block=block)
  for name in rows:
    np.testing.assert_array_equal(
      store.read(0, N, name), whole.read(0, N, name)
    )
  assert store.documents == whole.documents == make_documents(N)


def test_rows_that_are_zero_are_data_like_any_other(tmp_path, small):
  rows = {name: np.zeros_like(x) for name, x in make_rows(N).items()}
  assert_holds(write(tmp_path / "s", rows), rows)


def test_a_store_without_rows_can_be_read(tmp_path):
  with make_writer(tmp_path / "s"):
    pass
  store = ActivationStore.open(tmp_path / "s")
  assert len(store) == 0
  assert store.read(0, 0, READ).shape == (0, 4)
  assert store.documents == []


@pytest.mark.parametrize("start", [0, 1, 15, 16, 63, 64, 130])
@pytest.mark.parametrize("count", [0, 1, 16, 70])
def test_a_range_is_that_slice(start, count, store):
  rows = make_rows(N)
  for name in (READ, "token"):
    got = store.read(start, start + count, name)
    np.testing.assert_array_equal(got, rows[name][start : start + count])


def test_rows_are_taken_in_the_order_asked_for(store):
  wanted = np.random.default_rng(0).integers(0, N, 90)
  for name in (WRITE, "position"):
    expected = make_rows(N)[name][wanted]
    np.testing.assert_array_equal(store.take(wanted, name), expected)
  assert store.take([], READ).shape == (0, 4)


@pytest.mark.parametrize("outside", [-1, N])
def test_taking_a_row_outside_the_store_is_refused(outside, store):
  with pytest.raises(IndexError, match=f"outside a store of {N} rows"):
    store.take([3, outside], READ)


def test_the_rows_of_a_source_are_those_that_bear_its_label(tmp_path, small):
  unsorted = ("web", "books", "code")
  rows = make_rows(N)
  store = write(tmp_path / "s", rows, sources=unsorted)
  for number, name in enumerate(unsorted):
    expected = np.flatnonzero(rows["source"] == number)
    np.testing.assert_array_equal(store.rows(name), expected)
  names = np.asarray(store.sources)[store.read(0, N, "source")]
  np.testing.assert_array_equal(names, np.asarray(unsorted)[rows["source"]])


def test_an_unknown_source_lists_those_there(store):
  with pytest.raises(KeyError, match=r"no source 'mail'.*books, code, web"):
    store.rows("mail")


def test_a_store_describes_itself(store, tmp_path):
  assert store.metadata == {"model": "tiny"}
  assert store.sites == SITES
  assert store.dtype == "float32"
  assert store.sources == SOURCES
  assert store.parts == [{"made_by": {}, "start": 0, "stop": N}]
  assert store.documents == make_documents(N)
  assert store.path == tmp_path / "s"
  assert store.tokens_per_second > 0


def test_an_unknown_site_lists_those_there(store):
  for read in (lambda s: store.read(0, 1, s), store.statistics):
    with pytest.raises(KeyError, match=f"(?s){READ}, {WRITE}.*token"):
      read("blocks.7.mlp_in")


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (5, 4), (0, N + 1)])
def test_rows_outside_the_store_are_refused(start, stop, store):
  with pytest.raises(IndexError, match=f"{start}:{stop} of a store of {N}"):
    store.read(start, stop, READ)


# ------------------------------------------------------------- not a store


def test_an_incomplete_store_says_to_run_the_harvest_again(tmp_path, small):
  interrupt(tmp_path / "s", make_rows(N), 150)
  with pytest.raises(
    ValueError, match=r"first 128 rows.*interrupted.*same harvest again"
  ):
    ActivationStore.open(tmp_path / "s")


@pytest.mark.parametrize("name", ["manifest.json", "parts/00000/part.json"])
@pytest.mark.parametrize("contents", ["", '{"format": 3, "ro', "[1, 2]", "{}"])
def test_a_damaged_document_says_to_repair_the_store(contents, name, store):
  (store.path / name).write_text(contents)
  words = rf"{name} is damaged .*launch\.store repair`.*harvest then writes it"
  with pytest.raises(ValueError, match=words):
    ActivationStore.open(store.path)


def test_a_manifest_that_somebody_edited_is_refused(store):
  path = store.path / "manifest.json"
  manifest = json.loads(path.read_text())
  path.write_text(json.dumps(manifest | {"dtype": "bfloat16"}))
  with pytest.raises(ValueError, match="checksum does not fit"):
    ActivationStore.open(store.path)


def test_a_store_of_another_version_says_so(store, monkeypatch):
  monkeypatch.setattr("gemma_jax.activations.layout.FORMAT", FORMAT + 1)
  with pytest.raises(
    ValueError, match=f"format {FORMAT}, expected {FORMAT + 1}"
  ):
    ActivationStore.open(store.path)


@pytest.mark.parametrize("name", [READ, TOGETHER])
def test_a_missing_array_is_named(name, store):
  shutil.rmtree(store.path / "parts" / "00000" / name)
  with pytest.raises(
    ValueError, match=f"{name} is missing or damaged.*launch.store repair"
  ):
    ActivationStore.open(store.path)


def test_an_array_of_another_length_is_refused(store, tmp_path):
  write(tmp_path / "other", make_rows(50))
  here, other = (
    p / "parts/00000" / READ for p in (store.path, tmp_path / "other")
  )
  shutil.rmtree(here)
  shutil.copytree(other, here)
  with pytest.raises(ValueError, match=rf"\({N}, 4\).*launch.store repair"):
    ActivationStore.open(store.path)


# --------------------------------------------------------------- statistics


def test_a_store_without_statistics_has_none(store):
  assert store.statistics(READ) is None
  assert write_statistics(store) == {}


def test_statistics_of_the_parts_are_those_of_the_store(tmp_path, small):
  parts = [make_rows(N), make_rows(90, seed=1)]
  for part in parts:
    part["position"] = np.arange(len(part["token"]), dtype=np.int32) % 16
  alone = [
    write(tmp_path / str(i), part, sources=sources)
    for i, (part, sources) in enumerate(
      zip(
        parts, [("web", "books", "code"), ("mail", "web", "code")], strict=True
      )
    )
  ]
  for i, (part, store) in enumerate(zip(parts, alone, strict=True)):
    found = {READ: measure(store, READ)}
    # As the part itself counts its sources.
    with make_writer(
      tmp_path / "s",
      sources=store.sources,
      part=i,
      parts=2,
      state=lambda found=found: save_statistics(found, covered=1),
    ) as writer:
      labels = {"source": store.read(0, len(store), "source")}
      feed(writer, part | labels)
  store = ActivationStore.open(tmp_path / "s")
  assert store.sources == ("books", "code", "mail", "web")
  got, expected = (
    store.statistics(READ).summary(),
    measure(store, READ).summary(),
  )
  assert json.dumps(got["outliers"]) == json.dumps(expected["outliers"])
  np.testing.assert_allclose(
    store.statistics(READ).mean,
    np.concatenate([p[READ] for p in parts]).astype(np.float64).mean(0),
    atol=1e-6,
  )
  assert store.statistics(WRITE) is None

  written = write_statistics(store)
  assert json.loads((tmp_path / "s" / "stats.json").read_text()) == written
  assert set(written) == {READ}
  for row in written[READ]["outliers"]["largest"]:
    names = (row["id"], row["source"], row["name"])
    assert names == store.documents[row["document"]]


def test_damaged_statistics_are_an_error(tmp_path, small):
  write(tmp_path / "s", make_rows(N), state=lambda: b"not statistics")
  with pytest.raises(OSError, match="statistics that are damaged"):
    ActivationStore.open(tmp_path / "s").statistics(READ)
