"""Several stores in one stream: each batch holds its share of each."""

import itertools

import numpy as np
import pytest

from gemma_jax.activations import Stream, Writer
from gemma_jax.activations.layout import LABELS
from gemma_jax.activations.store import ActivationStore
from tests.activations.rows import SITES, make_rows, write

SIZES = (700, 300, 150)
MANY = 1_000_000  # the number of a row is that of its store times this

pytestmark = pytest.mark.usefixtures("small")


def make_store(path, n, first, *, width=2, dtype="float32"):
  """A store whose row i has the token and the vector first + i."""
  number = np.arange(first, first + n)
  rows = {"x": np.repeat(number[:, None], width, 1).astype(np.float32)}
  rows |= dict.fromkeys(LABELS, number.astype(np.int32))
  rows["source"] = np.zeros(n, np.int32)
  with Writer(path, sites={"x": width}, dtype=dtype, metadata={}) as writer:
    writer.append(rows)
  return ActivationStore.open(path)


@pytest.fixture
def stores(tmp_path):
  return [
    make_store(tmp_path / str(i), n, i * MANY) for i, n in enumerate(SIZES)
  ]


def take(stores, batch, count, seed=0, **options):
  """`count` batches of the rows' numbers, [count, batch]."""
  options = {"sites": ("x", "token"), "buffer_rows": 64} | options
  stream = iter(Stream(stores, batch, seed, **options))
  batches = list(itertools.islice(stream, count))
  stream.close()
  for b in batches:
    np.testing.assert_array_equal(b["x"][:, 0], b["token"])
  return np.stack([b["token"] for b in batches])


def shares(batches, stores):
  """Rows of each store in each batch, [count, stores]."""
  return np.stack(
    [(batches // MANY == i).sum(1) for i in range(len(stores))], 1
  )


@pytest.mark.parametrize(
  ("weights", "batch", "expected"),
  [
    ((5, 3, 2), 100, (50, 30, 20)),
    ((0.5, 0.25, 0.25), 64, (32, 16, 16)),
    # In floating point 0.29 * 100 is less than 29.
    ((0.29, 0.71), 100, (29, 71)),
    ((0.1, 0.2, 0.7), 10, (1, 2, 7)),
    ((1, 1, 1), 99, (33, 33, 33)),
  ],
)
def test_every_batch_holds_exactly_the_share_of_each_store(
  weights, batch, expected, stores
):
  stores = stores[: len(weights)]
  found = shares(take(stores, batch, 200, weights=weights), stores)
  np.testing.assert_array_equal(found, [expected] * 200)


def test_shares_that_are_no_whole_rows_come_out_right_in_the_long_run(stores):
  found = shares(take(stores, 10, 700, weights=(1, 2, 4)), stores)
  assert found.sum(0).tolist() == [1_000, 2_000, 4_000]
  # Never off by a row or more, at any time.
  so_far = found.cumsum(0) - np.outer(np.arange(1, 701) * 10, [1, 2, 4]) / 7
  assert np.abs(so_far).max() < 1


def test_by_default_a_store_has_the_share_of_its_rows(stores):
  found = shares(take(stores, 23, 50), stores)
  np.testing.assert_array_equal(found, [[14, 6, 3]] * 50)


def test_each_stores_rows_come_once_in_each_of_its_epochs(stores):
  batches = take(stores, 100, 60, weights=(5, 3, 2))
  for i, n in enumerate(SIZES):
    rows = batches[batches // MANY == i] - i * MANY
    # Within a batch the order is shuffled; epochs end within one.
    counts = np.bincount(rows, minlength=n)
    assert counts.max() - counts.min() <= 1
  share = 50  # of the first store: 14 batches are an epoch of it
  first = [b[b // MANY == 0] for b in batches[: 4 * SIZES[0] // share]]
  for epoch in np.concatenate(first).reshape(4, SIZES[0]):
    np.testing.assert_array_equal(np.sort(epoch), np.arange(SIZES[0]))


def test_stores_do_not_lie_one_behind_the_other_in_a_batch(stores):
  batches = take(stores, 100, 40, weights=(5, 3, 2))
  where = [np.flatnonzero(b // MANY == 0).mean() for b in batches]
  # Each is the mean of 50 of 100 places: SD 2.9, of the mean of all 0.46.
  assert abs(np.mean(where) - 49.5) < 2.5
  assert len({tuple(b // MANY) for b in batches}) == 40


@pytest.mark.parametrize("weights", [(5, 3, 2), (1, 2, 4), None])
def test_every_start_gives_its_batch(weights, stores):
  fresh = take(stores, 100, 30, weights=weights)
  for start in (0, 1, 7, 13, 14, 29):
    again = take(stores, 100, 30 - start, weights=weights, start=start)
    np.testing.assert_array_equal(again, fresh[start:])


def test_seeds_have_their_own_order_and_repeat_it(stores):
  a, b, again = (take(stores, 100, 10, seed=seed) for seed in (0, 1, 0))
  np.testing.assert_array_equal(a, again)
  assert not np.array_equal(a, b)


def test_two_stores_alike_are_not_read_in_one_order(tmp_path):
  twins = [make_store(tmp_path / str(i), 640, i * MANY) for i in range(2)]
  rows = take(twins, 1_280 // 2, 1)[0]
  here, there = (rows[rows // MANY == i] % MANY for i in range(2))
  assert set(here) != set(there)


def test_one_store_in_a_list_is_that_store(stores):
  np.testing.assert_array_equal(
    take(stores[:1], 50, 20), take(stores[0], 50, 20)
  )


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
  "weights",
  [(1, 1), (1, 1, 0), (1, 2, -1), (1, 1, float("nan")), (50, 50, 0.5)],
)
def test_weights_that_leave_a_store_out_are_refused(weights, stores):
  with pytest.raises(ValueError, match=r"weights=.*expected one each"):
    Stream(stores, 100, 0, weights=weights)


def test_the_shortest_store_must_have_a_batch(stores):
  with pytest.raises(ValueError, match="2 has 150 rows, fewer than one batch"):
    Stream(stores, 200, 0)


def test_stores_of_other_widths_or_dtypes_are_refused(stores, tmp_path):
  wide = make_store(tmp_path / "wide", 200, 0, width=3)
  with pytest.raises(ValueError, match=r"\[2\] in .*\[3\] in .*one width"):
    Stream([stores[0], wide], 10, 0)
  half = make_store(tmp_path / "half", 200, 0, dtype="bfloat16")
  with pytest.raises(ValueError, match=r"float32.* in .*bfloat16.* in "):
    Stream([stores[0], half], 10, 0)
  # int8 is read as float32.
  small = make_store(tmp_path / "int8", 200, 0, dtype="int8")
  stream = iter(Stream([stores[0], small], 10, 0))
  assert next(stream)["x"].dtype == np.float32
  stream.close()


def test_a_site_that_one_store_lacks_is_named_with_that_store(stores, tmp_path):
  other = write(tmp_path / "other", make_rows(200))
  with pytest.raises(KeyError, match="other has no site 'x'"):
    Stream([stores[0], other], 10, 0)
  assert set(other.sites) == set(SITES)
