"""The order of a stream: every row once an epoch, the same for one seed."""

import collections
import itertools
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.activations import ActivationStore, Stream, Writer
from gemma_jax.activations.store import LABELS
from gemma_jax.activations.stream import CHUNK_ROWS

READ, WRITE = "blocks.1.mlp_in", "blocks.1.mlp_out"


def make_store(path, n, dtype="float32"):
  """A store whose row i reads (i, i) and writes -i, so that rows can tell."""
  number = np.arange(n)
  rows = {
    READ: np.repeat(number[:, None], 2, 1).astype(jnp.dtype(dtype)),
    WRITE: -number[:, None].astype(jnp.dtype(dtype)),
  } | dict.fromkeys(LABELS, number.astype(np.int32))
  with Writer(
    path, rows=n, sites={READ: 2, WRITE: 1}, dtype=dtype, metadata={}
  ) as writer:
    writer.append(rows)
  return ActivationStore.open(path)


# name: (rows, batch size, rows of a buffer)
SHAPES = {
  "one buffer": (2_000, 300, 2**18),
  "a batch is the store": (500, 500, 2**18),
  "several buffers": (5 * CHUNK_ROWS, 512, 2 * CHUNK_ROWS),
  "short last chunk": (4 * CHUNK_ROWS + 77, 256, CHUNK_ROWS),
  "batches straddle buffers": (5 * CHUNK_ROWS + 300, 700, CHUNK_ROWS),
  "a batch is larger than a buffer": (5 * CHUNK_ROWS, 2_500, CHUNK_ROWS),
  "a buffer is smaller than a chunk": (3 * CHUNK_ROWS, 400, 10),
}


@pytest.fixture(scope="module", params=SHAPES)
def shape(request, tmp_path_factory):
  """(store, batch size, rows of a buffer)."""
  n, batch, buffer = SHAPES[request.param]
  store = make_store(tmp_path_factory.mktemp("stream") / "s", n)
  return store, batch, buffer


def take(store, batch, seed, count, **options):
  """`count` batches as row numbers, [count, batch]."""
  stream = store.stream(batch, seed, **options)
  batches = [b[READ][:, 0] for b in itertools.islice(stream, count)]
  stream.close()
  return np.stack(batches).astype(int)


def test_an_epoch_has_every_row_once_up_to_the_remainder(shape):
  store, batch, buffer = shape
  epoch = len(store) // batch
  rows = take(store, batch, 0, 3 * epoch, buffer_rows=buffer)
  for part in np.split(rows, 3):
    assert len(np.unique(part)) == epoch * batch
    assert part.min() >= 0
    assert part.max() < len(store)


def test_the_rows_that_an_epoch_leaves_out_differ(tmp_path):
  store = make_store(tmp_path / "s", 1_300)
  rows = take(store, 1_000, 0, 8)
  left_out = {frozenset(range(1_300)) - frozenset(part) for part in rows}
  assert len(left_out) == 8
  counts = collections.Counter(rows.ravel().tolist())
  assert len(counts) == 1_300


def test_batch_b_is_a_function_of_store_seed_and_b(shape):
  store, batch, buffer = shape
  epoch = len(store) // batch
  total = 3 * epoch + 2
  fresh = take(store, batch, 5, total, buffer_rows=buffer)
  for b in sorted({0, 1, epoch - 1, epoch, 2 * epoch - 1, total - 2}):
    resumed = take(store, batch, 5, 2, start=b, buffer_rows=buffer)
    np.testing.assert_array_equal(resumed[: total - b], fresh[b : b + 2])


def test_every_start_gives_its_batch(tmp_path):
  store = make_store(tmp_path / "s", 3 * CHUNK_ROWS + 50)
  options = {"buffer_rows": CHUNK_ROWS}
  fresh = take(store, 600, 1, 12, **options)
  for b in range(12):
    resumed = take(store, 600, 1, 1, start=b, **options)
    np.testing.assert_array_equal(resumed[0], fresh[b])


def test_seeds_and_epochs_have_their_own_order(shape):
  store, batch, buffer = shape
  epoch = len(store) // batch
  a = take(store, batch, 0, 2 * epoch, buffer_rows=buffer)
  b = take(store, batch, 1, epoch, buffer_rows=buffer)
  assert not np.array_equal(a[:epoch], b)
  assert not np.array_equal(a[:epoch], a[epoch:])


def test_a_store_in_one_buffer_is_shuffled_perfectly(tmp_path):
  store = make_store(tmp_path / "s", 4_000)
  order = take(store, 4_000, 0, 1)[0]
  # A uniform permutation: ranks are uncorrelated, SD 1/sqrt(n) = 0.016.
  assert abs(np.corrcoef(order, np.arange(4_000))[0, 1]) < 0.08
  assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.08


def test_buffers_are_dealt_from_all_over_the_store(tmp_path):
  store = make_store(tmp_path / "s", 16 * CHUNK_ROWS)
  rows = take(store, CHUNK_ROWS, 0, 32, buffer_rows=4 * CHUNK_ROWS)
  firsts = [set((part[:4] // CHUNK_ROWS).ravel()) for part in (rows, rows[16:])]
  assert all(len(chunks) == 4 for chunks in firsts)
  assert firsts[0] != firsts[1]
  assert not any(chunks == {0, 1, 2, 3} for chunks in firsts)


def test_the_sites_of_a_row_stay_together(shape):
  store, batch, buffer = shape
  stream = store.stream(batch, 3, buffer_rows=buffer)
  for b in itertools.islice(stream, len(store) // batch + 1):
    assert b[READ].shape == (batch, 2)
    assert b[WRITE].shape == (batch, 1)
    np.testing.assert_array_equal(b[READ][:, 0], -b[WRITE][:, 0])
    np.testing.assert_array_equal(b[READ][:, 1], b[READ][:, 0])
  stream.close()


def test_batches_have_the_sites_asked_for_in_the_stores_dtype(tmp_path):
  store = make_store(tmp_path / "s", 64, "bfloat16")
  stream = store.stream(8, 0, sites=(WRITE, "token"))
  batch = next(stream)
  stream.close()
  assert set(batch) == {WRITE, "token"}
  assert batch[WRITE].dtype == jnp.bfloat16
  np.testing.assert_array_equal(batch[WRITE][:, 0], -batch["token"])


def test_all_sites_and_no_labels_come_by_default(tmp_path):
  stream = make_store(tmp_path / "s", 64).stream(8, 0)
  assert set(next(stream)) == {READ, WRITE}
  stream.close()


def test_the_order_does_not_depend_on_the_sites_that_are_read(shape):
  store, batch, buffer = shape
  both = take(store, batch, 2, 3, buffer_rows=buffer)
  one = take(store, batch, 2, 3, buffer_rows=buffer, sites=(READ,))
  np.testing.assert_array_equal(both, one)


def test_a_store_shorter_than_a_batch_says_so(tmp_path):
  store = make_store(tmp_path / "s", 5)
  with pytest.raises(ValueError, match="5 rows, fewer than one batch of 6"):
    store.stream(6, 0)


@pytest.mark.parametrize("batch", [0, -3])
def test_a_batch_without_rows_is_refused(batch, tmp_path):
  store = make_store(tmp_path / "s", 5)
  with pytest.raises(ValueError, match=f"batch_size={batch}"):
    store.stream(batch, 0)


def test_an_unknown_site_is_raised_where_the_batches_are_taken(tmp_path):
  stream = make_store(tmp_path / "s", 64).stream(8, 0, sites=("mlp",))
  with pytest.raises(KeyError, match="has no site 'mlp'"):
    next(stream)


def reader_threads():
  return [t for t in threading.enumerate() if t.name == "activations"]


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_the_iterator_ends_its_thread(taken, tmp_path):
  stream = make_store(tmp_path / "s", 64).stream(8, 0)
  before = len(reader_threads())
  for _ in range(taken):
    next(stream)
  assert len(reader_threads()) == before + (taken > 0)
  stream.close()
  assert len(reader_threads()) == before
  assert list(stream) == []


def test_an_error_in_the_reader_reaches_the_consumer_in_its_turn(tmp_path):
  store = make_store(tmp_path / "s", 3 * CHUNK_ROWS)
  finish, calls = store.finish, []

  def breaks_at_the_third(future, site):
    calls.append(site)
    if len(calls) == 3:
      raise OSError("the disk is gone")
    return finish(future, site)

  store.finish = breaks_at_the_third
  before = len(reader_threads())
  stream = store.stream(512, 0, sites=(READ,), buffer_rows=CHUNK_ROWS)
  for _ in range(4):
    next(stream)
  with pytest.raises(OSError, match="the disk is gone"):
    next(stream)
  assert len(reader_threads()) == before


def test_a_stream_can_be_iterated_again_from_its_start(tmp_path):
  stream = Stream(make_store(tmp_path / "s", 64), 8, 0, start=3)
  first, second = iter(stream), iter(stream)
  for _ in range(10):
    np.testing.assert_array_equal(next(first)[READ], next(second)[READ])
  first.close()
  second.close()
