"""A store gives back what was written, or says why it cannot."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.activations import ActivationStore, Writer
from gemma_jax.activations.store import FORMAT, LABELS, SHARD_ROWS

READ, WRITE = "blocks.1.mlp_in", "blocks.1.mlp_out"


def make_rows(n, dtype="float32", seed=0):
  """Random sites of widths 4 and 3, and labels that differ in every row."""
  rng = np.random.default_rng(seed)
  rows = {
    READ: rng.normal(size=(n, 4)).astype(jnp.dtype(dtype)),
    WRITE: rng.normal(size=(n, 3)).astype(jnp.dtype(dtype)),
  }
  return rows | {
    name: np.arange(n, dtype=np.int32) * (i + 1)
    for i, name in enumerate(LABELS)
  }


def part(rows, start, stop):
  return {name: x[start:stop] for name, x in rows.items()}


def make_writer(path, n, dtype="float32", **metadata):
  return Writer(
    path, rows=n, sites={READ: 4, WRITE: 3}, dtype=dtype, metadata=metadata
  )


def write(path, rows, dtype="float32", *, block=5_000, **metadata):
  n = len(rows["token"])
  with make_writer(path, n, dtype, **metadata) as writer:
    for start in range(0, n, block):
      writer.append(part(rows, start, start + block))
  return ActivationStore.open(path)


def assert_holds(store, rows):
  n = len(rows["token"])
  assert len(store) == n
  for name, x in rows.items():
    got = store.read(0, n, name)
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(got, x)


def interrupt(path, n, rows):
  """Appends some of the rows, then breaks off."""
  with contextlib.suppress(KeyboardInterrupt), make_writer(path, n) as writer:
    writer.append(rows)
    raise KeyboardInterrupt


def shard_files(path, name):
  return sorted(p for p in (path / name / "c").rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def original(tmp_path_factory):
  """(path, rows) of a store of two shards; copy it before damaging it."""
  path = tmp_path_factory.mktemp("original") / "store"
  rows = make_rows(SHARD_ROWS + 3_000)
  write(path, rows, model="tiny")
  return path, rows


@pytest.fixture
def damaged(original, tmp_path):
  """A copy to damage."""
  return pathlib.Path(shutil.copytree(original[0], tmp_path / "copy"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", [1, SHARD_ROWS, SHARD_ROWS + 1])
def test_what_was_written_comes_back_to_the_bit(dtype, n, tmp_path):
  rows = make_rows(n, dtype)
  assert_holds(write(tmp_path / "s", rows, dtype), rows)


def test_one_append_of_several_shards_equals_many_small_ones(tmp_path):
  rows = make_rows(2 * SHARD_ROWS + 7)
  assert_holds(write(tmp_path / "one", rows, block=10**6), rows)
  assert_holds(write(tmp_path / "many", rows, block=4_099), rows)


def test_a_range_that_crosses_a_shard_is_that_slice(original):
  path, rows = original
  start, stop = SHARD_ROWS - 5, SHARD_ROWS + 9
  got = ActivationStore.open(path).read(start, stop, WRITE)
  np.testing.assert_array_equal(got, rows[WRITE][start:stop])


def test_a_store_describes_itself(original):
  store = ActivationStore.open(original[0])
  assert store.metadata == {"model": "tiny"}
  assert store.sites == {READ: 4, WRITE: 3}
  assert store.tokens_per_second > 0


def test_the_length_is_the_manifests_and_not_a_count_of_files(damaged):
  store = ActivationStore.open(damaged)
  shutil.rmtree(damaged / READ / "c")
  (damaged / "stray").write_text("")
  assert len(store) == len(ActivationStore.open(damaged)) == SHARD_ROWS + 3_000


def test_rows_that_are_zero_are_data_like_any_other(tmp_path):
  rows = {name: np.zeros_like(x) for name, x in make_rows(3_000).items()}
  assert_holds(write(tmp_path / "s", rows), rows)


def test_an_interrupted_writer_goes_on_from_its_last_shard(tmp_path):
  rows = make_rows(2 * SHARD_ROWS + 500)
  n = len(rows["token"])
  interrupt(tmp_path / "s", n, part(rows, 0, 2 * SHARD_ROWS + 300))
  with make_writer(tmp_path / "s", n) as again:
    # The first shard is settled when the second is handed over.
    assert again.committed == SHARD_ROWS
    again.append(part(rows, again.committed, n))
  assert_holds(ActivationStore.open(tmp_path / "s"), rows)


WRITES_UNTIL_KILLED = """
import time
from tests.activations import test_store as t
rows = t.make_rows(3 * t.SHARD_ROWS)
writer = t.make_writer({path!r}, 3 * t.SHARD_ROWS)
for start in range(0, 2 * t.SHARD_ROWS, 1_000):
  writer.append(t.part(rows, start, start + 1_000))
print(writer.committed, flush=True)
time.sleep(60)
"""


def test_a_killed_process_loses_only_what_it_had_not_committed(tmp_path):
  path = tmp_path / "s"
  script = WRITES_UNTIL_KILLED.format(path=str(path))
  root = pathlib.Path(__file__).parents[2]
  environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
  with subprocess.Popen(
    [sys.executable, "-c", script],
    stdout=subprocess.PIPE,
    text=True,
    env=environment,
  ) as process:
    assert int(process.stdout.readline()) == SHARD_ROWS
    with pytest.raises(BlockingIOError, match="Another process is writing"):
      make_writer(path, 3 * SHARD_ROWS)
    process.send_signal(signal.SIGKILL)
  rows = make_rows(3 * SHARD_ROWS)
  with make_writer(path, 3 * SHARD_ROWS) as writer:
    assert writer.committed == SHARD_ROWS
    writer.append(part(rows, SHARD_ROWS, 3 * SHARD_ROWS))
  assert_holds(ActivationStore.open(path), rows)


def test_the_rate_leaves_the_interruption_out(tmp_path):
  rows = make_rows(2 * SHARD_ROWS)
  n = len(rows["token"])
  began = time.perf_counter()
  interrupt(tmp_path / "s", n, rows)
  spent = time.perf_counter() - began
  time.sleep(0.5)
  began = time.perf_counter()
  with make_writer(tmp_path / "s", n) as again:
    again.append(part(rows, again.committed, n))
  spent += time.perf_counter() - began
  assert n / ActivationStore.open(tmp_path / "s").tokens_per_second <= spent


def test_an_incomplete_store_says_to_run_the_harvest_again(tmp_path):
  rows = make_rows(SHARD_ROWS + 500)
  writer = make_writer(tmp_path / "s", SHARD_ROWS + 500)
  writer.append(part(rows, 0, SHARD_ROWS))
  with pytest.raises(ValueError, match=r"(?s)0 of 16884.*goes on from there"):
    ActivationStore.open(tmp_path / "s")
  with pytest.raises(ValueError, match="16384 rows arrived of 16884"):
    writer.close()
  with pytest.raises(ValueError, match=r"holds 16384 of 16884 rows"):
    ActivationStore.open(tmp_path / "s")


def test_a_directory_without_a_store_says_so(tmp_path):
  with pytest.raises(FileNotFoundError, match="is no activation store"):
    ActivationStore.open(tmp_path)


@pytest.mark.parametrize(
  ("contents", "message"),
  [
    ("", "damaged or of another version"),
    ('{"format": 2, "rows": 3', "damaged or of another version"),
    ("[1, 2]", "damaged or of another version"),
    ('{"format": 999}', f"format 999, expected {FORMAT}"),
    (f'{{"format": {FORMAT}, "rows": 3}}', "it lacks committed, dtype"),
  ],
)
def test_a_damaged_manifest_says_to_delete_the_store(
  contents, message, damaged
):
  (damaged / "manifest.json").write_text(contents)
  with pytest.raises(ValueError, match=f"(?s){message}.*Delete .*harvest"):
    ActivationStore.open(damaged)


def test_a_manifest_that_disagrees_with_the_arrays_is_refused(damaged):
  manifest = json.loads((damaged / "manifest.json").read_text())
  manifest["rows"] = manifest["committed"] = 5
  (damaged / "manifest.json").write_text(json.dumps(manifest))
  with pytest.raises(ValueError, match="has 19384 rows and the manifest says"):
    ActivationStore.open(damaged)


@pytest.mark.parametrize("name", [READ, "document"])
def test_a_missing_array_is_named(name, damaged):
  shutil.rmtree(damaged / name)
  with pytest.raises(ValueError, match=f"{name} is missing or damaged"):
    ActivationStore.open(damaged)


@pytest.mark.parametrize("where", [0.0, 0.3, 0.999])
def test_a_flipped_bit_fails_its_checksum_and_is_not_returned(where, damaged):
  path = shard_files(damaged, READ)[0]
  data = bytearray(path.read_bytes())
  data[int(where * len(data))] ^= 1
  path.write_bytes(data)
  store = ActivationStore.open(damaged)
  with pytest.raises(OSError, match=f"(?s){READ}.*cannot be read.*Delete"):
    store.read(0, len(store), READ)
  assert len(store.read(0, len(store), WRITE)) == len(store)


def test_a_shard_that_is_gone_is_an_error_and_not_zeros(damaged, original):
  shard_files(damaged, READ)[0].unlink()
  store = ActivationStore.open(damaged)
  with pytest.raises(OSError, match="missing"):
    store.read(0, 3, READ)
  got = store.read(SHARD_ROWS, len(store), READ)
  np.testing.assert_array_equal(got, original[1][READ][SHARD_ROWS:])


def test_a_truncated_shard_is_an_error(damaged):
  path = shard_files(damaged, WRITE)[0]
  path.write_bytes(path.read_bytes()[:1_000])
  with pytest.raises(OSError, match="cannot be read"):
    ActivationStore.open(damaged).read(0, 3, WRITE)


def test_a_stream_over_a_damaged_shard_raises_the_same_error(damaged):
  path = shard_files(damaged, READ)[0]
  path.write_bytes(path.read_bytes()[:1_000])
  stream = ActivationStore.open(damaged).stream(64, 0)
  with pytest.raises(OSError, match=f"(?s){READ}.*cannot be read"):
    next(stream)


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path):
  with make_writer(tmp_path / "s", 3) as writer:
    with pytest.raises(BlockingIOError, match="Wait for it"):
      make_writer(tmp_path / "s", 3)
    writer.append(make_rows(3))
  with make_writer(tmp_path / "s", 3) as again:
    assert again.committed == 3


@pytest.mark.parametrize(
  "other",
  [
    {"metadata": {"model": "another"}},
    {"rows": 4},
    {"dtype": "bfloat16"},
    {"sites": {READ: 4}},
  ],
)
def test_another_harvests_store_is_refused_and_left_as_it_is(other, tmp_path):
  rows = make_rows(3)
  store = write(tmp_path / "s", rows, model="tiny")
  same = {
    "rows": 3,
    "sites": {READ: 4, WRITE: 3},
    "dtype": "float32",
    "metadata": {"model": "tiny"},
  }
  with pytest.raises(ValueError, match="made by another harvest"):
    Writer(tmp_path / "s", **(same | other))
  assert_holds(store, rows)
  with Writer(tmp_path / "s", **same):
    pass


def test_metadata_is_compared_as_json_holds_it(tmp_path):
  with make_writer(tmp_path / "s", 1, shape=(2, 3)) as writer:
    writer.append(make_rows(1))
  with make_writer(tmp_path / "s", 1, shape=(2, 3)) as again:
    assert again.committed == 1


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda rows: rows.pop("token"), "Expected rows of .*token"),
    (lambda rows: rows.update(extra=rows["token"]), "extra"),
    (lambda rows: rows.update(token=rows["token"][:1]), "equally many"),
  ],
)
def test_rows_that_do_not_fit_the_store_are_refused(change, message, tmp_path):
  rows = make_rows(3)
  change(rows)
  with (
    pytest.raises(ValueError, match=message),
    make_writer(tmp_path / "s", 3) as writer,
  ):
    writer.append(rows)


def test_more_rows_than_announced_are_refused(tmp_path):
  with make_writer(tmp_path / "s", 5) as writer:
    writer.append(make_rows(3))
    with pytest.raises(ValueError, match="6 rows arrived of 5"):
      writer.append(make_rows(3))
    writer.append(make_rows(2))
  assert len(ActivationStore.open(tmp_path / "s")) == 5


def test_an_unknown_site_lists_those_there(original):
  store = ActivationStore.open(original[0])
  with pytest.raises(KeyError, match=f"(?s){READ}, {WRITE}.*token"):
    store.read(0, 1, "blocks.7.mlp_in")


@pytest.mark.parametrize(
  ("start", "stop"), [(-1, 3), (5, 4), (0, SHARD_ROWS + 3_001)]
)
def test_rows_outside_the_store_are_refused(start, stop, original):
  store = ActivationStore.open(original[0])
  with pytest.raises(IndexError, match=f"{start}:{stop} of a store of 19384"):
    store.read(start, stop, READ)


def test_no_rows_are_an_empty_array(original):
  assert ActivationStore.open(original[0]).read(7, 7, READ).shape == (0, 4)
