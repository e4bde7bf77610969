"""A flipped bit or a missing file is found, named, and nothing else is."""

import pathlib

import numpy as np
import pytest

from gemma_jax.activations.layout import CHECKED, arrays, shard_key
from gemma_jax.activations.reading import damages
from tests.activations.rows import READ, SITES, WRITE, make_rows, write

N, SHARD, CHUNK = 200, 64, 16  # as the fixture `small` has it
# Where its chunk lies in a shard's file: offset and length, little-endian
# uint64, all ones for a chunk that is not there; then their own checksum.
# https://zarr-specs.readthedocs.io, sharding codec, "Binary shard format".
INDEX = SHARD // CHUNK * 16 + 4


@pytest.fixture
def store(tmp_path, small):
  return write(tmp_path / "s", make_rows(N), "int8")


def files(store):
  """(name, shard, path) of every file of data."""
  return [
    (name, shard, store.path / "parts/00000" / shard_key(name, shard, row))
    for name, (row, _, _) in arrays(SITES, "int8").items()
    for shard in range(-(-N // SHARD))
  ]


def rows_behind(data: bytes, shard: int, byte: int) -> list[tuple[int, int]]:
  """The rows of the chunks that a byte of a shard's file is part of."""
  index = np.frombuffer(data[-INDEX:-4], "<u8").reshape(-1, 2)
  there = [i for i, (at, _) in enumerate(index) if at != 2**64 - 1]
  if byte < len(data) - INDEX:
    there = [i for i in there if 0 <= byte - int(index[i, 0]) < index[i, 1]]
    assert len(there) == 1
  starts = [shard * SHARD + i * CHUNK for i in there]
  return [(a, min(a + CHUNK, N)) for a in starts]


def site_of(name):
  """What one reads to get at an array."""
  return "token" if name == "labels" else name.removesuffix(".scale")


def test_two_hundred_flipped_bits_are_each_found_in_their_place(store):
  names = [*SITES, "token"]
  everywhere = {name: store.read(0, N, name) for name in names}
  rng = np.random.default_rng(0)
  there = files(store)
  sizes = np.asarray([path.stat().st_size for _, _, path in there])
  in_index = 0
  for _ in range(200):
    name, shard, path = there[rng.choice(len(there), p=sizes / sizes.sum())]
    whole = path.read_bytes()
    byte = int(rng.integers(len(whole)))
    in_index += byte >= len(whole) - INDEX
    flipped = bytearray(whole)
    flipped[byte] ^= 1 << int(rng.integers(8))
    path.write_bytes(flipped)

    expected = rows_behind(whole, shard, byte)
    found = [d for n in names for d in damages(store, n, 0, N)]
    assert [(d.array, d.start, d.stop) for d in found] == [
      (name, start, stop) for start, stop in expected
    ]
    assert {store.path / d.key for d in found} == {path}
    start, stop = expected[0]
    with pytest.raises(
      OSError,
      match=rf"cannot be read: .*{name}, rows {start} to {stop - 1}: .*"
      rf"`python -m launch.store repair {store.path}`",
    ):
      store.read(start, start + 1, site_of(name))
    path.write_bytes(whole)
  assert 0 < in_index < 200
  for name, x in everywhere.items():
    np.testing.assert_array_equal(store.read(0, N, name), x)


def test_every_array_is_checked_by_a_checksum_of_each_chunk():
  for _, _, codecs in arrays(SITES, "int8").values():
    assert codecs[-1] == CHECKED


@pytest.mark.parametrize("shard", [0, 2, 3])
@pytest.mark.parametrize("name", [READ, f"{READ}.scale", "labels"])
def test_a_missing_file_is_found_in_its_place(name, shard, store):
  place = {(n, s): path for n, s, path in files(store)}[name, shard]
  rows = rows_behind(place.read_bytes(), shard, len(place.read_bytes()) - 1)
  place.unlink()
  found = [d for n in (*SITES, "token") for d in damages(store, n, 0, N)]
  assert [(d.array, d.start, d.stop) for d in found] == [
    (name, start, stop) for start, stop in rows
  ]
  start, stop = shard * SHARD, min(shard * SHARD + SHARD, N)
  with pytest.raises(OSError, match=rf"{name}, rows {start} to .*repair"):
    store.read(start, stop, site_of(name))
  assert len(store.read(0, N, WRITE)) == N


@pytest.mark.parametrize("keep", [0, 1, 100])
def test_a_truncated_file_is_an_error(keep, store):
  path = pathlib.Path(files(store)[0][2])
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(OSError, match=f"{READ}, rows 0 to 15: .*repair"):
    store.read(0, 3, READ)


def test_a_whole_store_has_no_damages(store):
  assert not [d for n in (*SITES, "token") for d in damages(store, n, 0, N)]


def test_a_stream_over_damage_raises_the_same_error(store):
  files(store)[0][2].unlink()
  stream = store.stream(64, 0)
  with pytest.raises(OSError, match=f"{READ}, rows .*launch.store repair"):
    next(stream)
