"""The order of a stream: every row once an epoch, the same for one seed."""

import itertools

import numpy as np
import pytest

from gemma_jax.activations import ActivationStore, Writer
from gemma_jax.activations.layout import CHUNK_ROWS, LABELS
from tests.activations.rows import run_python

ROW = "row"  # a site that holds the number of its row


def make_store(path, n, *, parts=1):
  """A store whose row i is the vector (i, -i); ten rows are a document."""
  number = np.arange(n)
  rows = {ROW: np.stack([number, -number], 1).astype(np.float32)}
  rows |= dict.fromkeys(LABELS, number.astype(np.int32))
  rows |= {"source": np.zeros(n, np.int32)}
  cuts = np.linspace(0, n, parts + 1).astype(int)
  for part, (start, stop) in enumerate(itertools.pairwise(cuts)):
    with Writer(
      path,
      sites={ROW: 2},
      dtype="float32",
      metadata={},
      part=part,
      parts=parts,
    ) as writer:
      writer.append({name: x[start:stop] for name, x in rows.items()})
  return ActivationStore.open(path)


# name: (rows, parts, batch size, rows of a buffer)
SHAPES = {
  "one buffer": (2_000, 1, 300, 2**18),
  "a batch is the store": (500, 1, 500, 2**18),
  "several buffers": (5 * CHUNK_ROWS, 1, 512, 2 * CHUNK_ROWS),
  "short last chunk": (4 * CHUNK_ROWS + 77, 1, 256, CHUNK_ROWS),
  "batches straddle buffers": (5 * CHUNK_ROWS + 300, 1, 700, CHUNK_ROWS),
  "a batch is larger than a buffer": (5 * CHUNK_ROWS, 1, 2_500, CHUNK_ROWS),
  "a buffer is smaller than a chunk": (3 * CHUNK_ROWS, 1, 400, 10),
  "parts that end within a chunk": (4 * CHUNK_ROWS, 3, 500, CHUNK_ROWS),
  "parts in one buffer": (1_999, 2, 300, 2**18),
}


@pytest.fixture(scope="module", params=SHAPES)
def shape(request, tmp_path_factory):
  """(store, batch size, rows of a buffer)."""
  n, parts, batch, buffer = SHAPES[request.param]
  path = tmp_path_factory.mktemp("stream") / "s"
  return make_store(path, n, parts=parts), batch, buffer


def take(store, batch, seed, count, **options):
  """`count` batches as row numbers, [count, batch]."""
  stream = store.stream(batch, seed, **options)
  batches = [b[ROW][:, 0] for b in itertools.islice(stream, count)]
  stream.close()
  return np.stack(batches).astype(int)


def test_every_epoch_is_a_permutation_and_follows_without_a_gap(shape):
  store, batch, buffer = shape
  n = len(store)
  rows = take(store, batch, 0, -(-3 * n // batch), buffer_rows=buffer)
  for epoch in rows.ravel()[: 3 * n].reshape(3, n):
    np.testing.assert_array_equal(np.sort(epoch), np.arange(n))


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


RESUMES = """
from gemma_jax.activations import ActivationStore
from tests.activations.test_stream import take
store = ActivationStore.open({path!r})
print(take(store, 600, 1, 2, start={start}, buffer_rows=1_024).tolist())
"""


def test_another_process_goes_on_with_the_same_batches(tmp_path):
  store = make_store(tmp_path / "s", 3 * CHUNK_ROWS + 50)
  fresh = take(store, 600, 1, 9, buffer_rows=1_024)
  (said,) = run_python(RESUMES.format(path=str(tmp_path / "s"), start=7))
  assert said == str(fresh[7:].tolist())


def test_seeds_and_epochs_have_their_own_order(shape):
  store, batch, buffer = shape
  n = len(store)
  a = take(store, batch, 0, -(-2 * n // batch), buffer_rows=buffer).ravel()
  again = take(store, batch, 0, n // batch, buffer_rows=buffer).ravel()
  b = take(store, batch, 1, n // batch, buffer_rows=buffer).ravel()
  np.testing.assert_array_equal(a[: len(again)], again)
  assert not np.array_equal(a[: len(b)], b)
  assert not np.array_equal(a[:n], a[n : 2 * n])


def correlation(a, b):
  return np.corrcoef(a, b)[0, 1]


def test_a_store_in_one_buffer_is_shuffled_perfectly(tmp_path):
  store = make_store(tmp_path / "s", 4_000)
  order = take(store, 4_000, 0, 1)[0]
  # A uniform permutation: ranks are uncorrelated, SD 1/sqrt(n) = 0.016.
  assert abs(correlation(order, np.arange(4_000))) < 0.08
  assert abs(correlation(order[1:], order[:-1])) < 0.08


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_neighbours_in_a_batch_are_of_unrelated_documents(
  seed, tmp_path, small
):
  chunk, rows = 16, 16 * 1_000
  store = make_store(tmp_path / "s", rows)
  # A tenth of the store at a time. Of k chunks that were dealt at random, the
  # mean differs from block to block by 1/k of the variance: 1 %.
  batches = take(store, 500, seed, rows // 500, buffer_rows=100 * chunk)
  document = batches // 10
  near = correlation(document[:, 1:].ravel(), document[:, :-1].ravel())
  assert abs(near) < 0.05
  # As they lie in the store they are all but the same.
  assert correlation(np.arange(1, rows) // 10, np.arange(rows - 1) // 10) > 0.99


def test_buffers_are_dealt_from_all_over_the_store(tmp_path):
  store = make_store(tmp_path / "s", 16 * CHUNK_ROWS)
  rows = take(store, CHUNK_ROWS, 0, 32, buffer_rows=4 * CHUNK_ROWS)
  firsts = [set((part[:4] // CHUNK_ROWS).ravel()) for part in (rows, rows[16:])]
  assert all(len(chunks) == 4 for chunks in firsts)
  assert firsts[0] != firsts[1]
  assert not any(chunks == {0, 1, 2, 3} for chunks in firsts)


def test_the_order_does_not_depend_on_the_sites_that_are_read(shape):
  store, batch, buffer = shape
  alone = take(store, batch, 2, 3, buffer_rows=buffer)
  sites = ("token", ROW, "position")
  more = take(store, batch, 2, 3, buffer_rows=buffer, sites=sites)
  np.testing.assert_array_equal(alone, more)
