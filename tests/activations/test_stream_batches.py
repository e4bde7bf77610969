"""What batches hold and where, and how a stream ends."""

import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gemma_jax import models
from gemma_jax.activations import Stream
from gemma_jax.activations.layout import LABELS
from tests.activations.rows import READ, SITES, WRITE, make_rows, write

N, SHARD = 500, 64

pytestmark = pytest.mark.usefixtures("small")


@pytest.fixture
def store(tmp_path):
  return write(tmp_path / "s", make_rows(N), block=N)


def some(stream, count):
  batches = list(itertools.islice(stream, count))
  stream.close()
  return batches


def test_what_belongs_to_a_row_stays_together(store):
  rows = make_rows(N)
  order = np.argsort(rows["position"])
  stream = store.stream(90, 3, sites=(*SITES, *LABELS), buffer_rows=64)
  for batch in some(stream, 2 * N // 90):
    assert set(batch) == set(rows)
    at = order[np.searchsorted(rows["position"], batch["position"])]
    for name, x in batch.items():
      assert x.shape == (90, *rows[name].shape[1:])
      np.testing.assert_array_equal(x, rows[name][at])


@pytest.mark.parametrize(
  ("kept", "streamed"),
  [("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "float32")],
)
def test_batches_have_the_sites_asked_for_as_a_store_reads_them(
  kept, streamed, tmp_path
):
  at_rest = "float32" if kept == "int8" else kept
  store = write(tmp_path / "s", make_rows(N, at_rest), kept)
  (batch,) = some(store.stream(N, 0, sites=(WRITE, "position")), 1)
  assert set(batch) == {WRITE, "position"}
  assert batch[WRITE].dtype == jnp.dtype(streamed)
  order = np.argsort(batch["position"])
  np.testing.assert_array_equal(batch[WRITE][order], store.read(0, N, WRITE))


def test_all_sites_and_no_labels_come_by_default(store):
  (batch,) = some(store.stream(8, 0), 1)
  assert set(batch) == set(SITES)


def test_a_batch_is_the_consumers_to_change(store):
  kept = [b[READ].copy() for b in some(store.stream(64, 0, buffer_rows=64), 20)]
  stream = store.stream(64, 0, buffer_rows=64)
  for expected in kept:
    batch = next(stream)[READ]
    np.testing.assert_array_equal(batch, expected)
    batch[:] = 0
  stream.close()


@pytest.mark.parametrize("n", [1, 2, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_number_of_devices_gets_the_same_batches(n, dtype, tmp_path):
  store = write(tmp_path / "s", make_rows(N, dtype), dtype)
  mesh = models.make_mesh({"data": n}, jax.devices()[:n])
  sharding = NamedSharding(mesh, P("data"))
  options = {"sites": (READ, "token"), "buffer_rows": 64}
  expected = some(iter(Stream(store, 64, 0, **options)), 12)
  got = some(iter(Stream(store, 64, 0, sharding=sharding, **options)), 12)
  for here, there in zip(got, expected, strict=True):
    assert set(here) == {READ, "token"}
    for name, x in here.items():
      assert x.sharding.is_equivalent_to(sharding, x.ndim)
      assert {s.data.shape[0] for s in x.addressable_shards} == {64 // n}
      assert x.dtype == there[name].dtype
      np.testing.assert_array_equal(x, there[name])


# ------------------------------------------------------------------ refusals


def test_a_store_shorter_than_a_batch_says_so(store):
  with pytest.raises(ValueError, match="500 rows, fewer than one batch of 501"):
    store.stream(501, 0)


@pytest.mark.parametrize("batch", [0, -3])
def test_a_batch_without_rows_is_refused(batch, store):
  with pytest.raises(ValueError, match=f"batch_size={batch}"):
    store.stream(batch, 0)


def test_an_unknown_site_lists_those_there(store):
  with pytest.raises(KeyError, match=f"has no site 'mlp'.*{READ}"):
    store.stream(8, 0, sites=("mlp",))


# -------------------------------------------------------------------- ending


def reader_threads():
  return [t for t in threading.enumerate() if t.name == "ahead"]


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_the_iterator_ends_its_thread(taken, store):
  stream = store.stream(8, 0)
  before = len(reader_threads())
  for _ in range(taken):
    next(stream)
  assert len(reader_threads()) == before + (taken > 0)
  stream.close()
  assert len(reader_threads()) == before
  assert list(stream) == []


def test_an_error_of_the_reader_reaches_the_consumer_in_its_turn(store):
  path = store.path / "parts/00000" / READ / "c"
  for file in path.rglob("*"):
    if file.is_file() and file.parent.name == "5":
      file.unlink()
  before = len(reader_threads())
  stream = store.stream(16, 0, sites=(READ,), buffer_rows=16)
  # In this order the chunks come, one at a time.
  whole = store.stream(16, 0, sites=("position",), buffer_rows=16)
  shards = [int(b["position"][0] // 4 // SHARD) for b in some(whole, N // 16)]
  for _ in range(shards.index(5)):
    next(stream)
  with pytest.raises(OSError, match=f"{READ}, rows .*launch.store repair"):
    next(stream)
  assert len(reader_threads()) == before
  assert list(stream) == []


def test_a_stream_can_be_iterated_again_from_its_start(store):
  stream = Stream(store, 8, 0, start=3)
  first, second = iter(stream), iter(stream)
  for _ in range(100):
    np.testing.assert_array_equal(next(first)[READ], next(second)[READ])
  first.close()
  second.close()
