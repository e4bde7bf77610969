"""A path, memory and an S3 server keep a store equally well."""

import numpy as np
import pytest

from gemma_jax.activations import ActivationStore, claim, is_complete
from gemma_jax.activations.layout import LABELS, documents_key, shard_key
from gemma_jax.activations.reading import damages
from gemma_jax.activations.storage import Location
from tests.activations.rows import (
  READ,
  SITES,
  assert_holds,
  digests,
  feed,
  interrupt,
  make_documents,
  make_rows,
  make_writer,
  write,
)

pytestmark = pytest.mark.usefixtures("small")

SHARD = shard_key(READ, 1, (4,))  # of rows 64 to 127


def data_key(name):
  return f"parts/00000/{name}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_written_comes_back_with_its_labels(dtype, place):
  rows = make_rows(200, dtype)
  store = write(place, rows, dtype)
  assert len(store) == 200
  assert_holds(store, rows)
  assert store.documents == make_documents(200)
  assert is_complete(place)


def test_int8_comes_back_within_half_a_step(place):
  rows = make_rows(130)
  store = write(place, rows, "int8")
  step = np.abs(rows[READ]).max(-1, keepdims=True) / 127
  error = np.abs(store.read(0, 130, READ) - rows[READ])
  assert (error <= step / 2 * (1 + 1e-5)).all()


def test_an_interrupted_writer_ends_with_the_bytes_of_one_left_alone(place):
  rows = make_rows(300)
  write(f"{place}/alone", rows)
  interrupt(f"{place}/cut", rows, 222)  # behind a block, as harvests are cut
  assert not is_complete(f"{place}/cut")
  with make_writer(f"{place}/cut") as again:
    # What was on its way is waited for; the fourth shard was not yet full.
    assert again.committed == 192
    feed(again, rows)
  assert_holds(ActivationStore.open(f"{place}/cut"), rows)
  assert digests(f"{place}/cut") == digests(f"{place}/alone")


def test_a_second_writer_is_refused_until_the_first_is_done(place):
  rows = make_rows(100)
  with make_writer(place) as first:
    with pytest.raises(BlockingIOError, match=r"is writing .*Wait for it"):
      make_writer(place)
    feed(first, rows)
  with make_writer(place) as again:
    assert again.complete
  assert_holds(ActivationStore.open(place), rows)


def test_a_writer_whose_lease_ran_out_stops_when_another_took_over(
  place, monkeypatch
):
  if "://" not in place:
    place = f"memory:/{place}"  # a path is locked by the operating system
  rows = make_rows(300)
  monkeypatch.setattr(claim, "LEASE_SECONDS", -1.0)
  slow = make_writer(place)
  feed(slow, rows, stop=100)
  monkeypatch.setattr(claim, "LEASE_SECONDS", 600.0)
  with make_writer(place) as quick:
    with pytest.raises(BlockingIOError, match=r"has taken over .* This one"):
      feed(slow, rows, start=100)
    with pytest.raises(BlockingIOError, match="ends by itself in at most"):
      make_writer(place)
    feed(quick, rows)
  assert_holds(ActivationStore.open(place), rows)


def test_a_flipped_bit_is_found_where_it_is(place):
  rows = make_rows(200)
  store = write(place, rows)
  location, key = Location(place), data_key(SHARD)
  whole = location.read(key)
  flipped = bytearray(whole)
  flipped[0] ^= 4  # in the first chunk: chunks lie in their order
  location.write(key, bytes(flipped))
  with pytest.raises(OSError, match=f"(?s){SHARD}.*{READ}, rows 64 to 79"):
    store.read(0, 200, READ)
  found = list(damages(store, READ, 0, 200))
  assert [(d.array, d.start, d.stop, d.key) for d in found] == [
    (READ, 64, 80, key)
  ]
  location.write(key, whole)
  assert_holds(store, rows)


def test_a_file_that_is_gone_is_an_error_and_not_zeros(place):
  rows = make_rows(200)
  store = write(place, rows)
  Location(place).delete(data_key(SHARD))
  with pytest.raises(OSError, match=r"rows 64 to 79.*launch.store repair"):
    store.read(60, 130, READ)
  found = [(d.start, d.stop) for d in damages(store, READ, 0, 200)]
  assert found == [(64, 80), (80, 96), (96, 112), (112, 128)]
  others = [name for name in (*SITES, *LABELS) if name != READ]
  assert not [d for n in others for d in damages(store, n, 0, 200)]
  np.testing.assert_array_equal(store.read(128, 200, READ), rows[READ][128:])


def test_names_of_documents_that_are_gone_or_damaged_are_an_error(place):
  write(place, make_rows(200))
  location, key = Location(place), data_key(documents_key(0))
  location.write(key, location.read(key)[:-9])
  with pytest.raises(OSError, match=f"{key} holds documents that are damaged"):
    ActivationStore.open(place).documents  # noqa: B018
  location.delete(key)
  with pytest.raises(OSError, match=f"{key} is missing.*launch.store repair"):
    ActivationStore.open(place).documents  # noqa: B018


def test_two_writers_make_two_parts_of_one_store(place):
  rows, more = make_rows(150), make_rows(80, seed=1)
  both = {"made_by": {"text": "t"}, "parts": 2}
  with (
    make_writer(place, part=0, **both) as first,
    make_writer(place, part=1, **both) as second,
  ):
    feed(second, more)
    feed(first, rows)
  store = ActivationStore.open(place)
  assert len(store) == 230
  assert_holds(store, rows)
  behind = len(make_documents(150))
  more["document"] += behind
  assert_holds(store, more, start=150)
  assert store.documents[behind:] == make_documents(80)


def test_a_place_without_a_store_says_so(place):
  with pytest.raises(FileNotFoundError, match="is no activation store"):
    ActivationStore.open(place)
  assert not is_complete(place)


def test_a_bucket_that_does_not_exist_is_one_clear_error(bucket):
  with pytest.raises(OSError, match="Check that the place exists"):
    make_writer("s3://another-bucket/store")
