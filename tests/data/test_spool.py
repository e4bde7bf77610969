import errno
import gzip
import pathlib

import pytest
import zstandard

from gemma_jax import cache
from gemma_jax.data import spool


@pytest.fixture
def own(tmp_path, monkeypatch):
  monkeypatch.setenv("GEMMA_JAX_CACHE", str(tmp_path / "cache"))
  return tmp_path


def _spooled():
  return sorted(cache.directory("corpora").glob("*"))


def test_a_file_that_changes_is_unpacked_again(own):
  path = own / "a.gz"
  path.write_bytes(gzip.compress(b"one"))
  first = spool.decompress(str(path))
  assert pathlib.Path(first).read_bytes() == b"one"
  assert spool.decompress(str(path)) == first
  path.write_bytes(gzip.compress(b"three"))
  second = spool.decompress(str(path))
  assert pathlib.Path(second).read_bytes() == b"three"
  assert pathlib.Path(first).read_bytes() == b"one"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("how", ["cut", "garbage"])
def test_a_broken_file_is_refused_and_leaves_nothing(own, suffix, how):
  pack = gzip.compress if suffix == ".gz" else zstandard.compress
  whole = pack(bytes(range(256)) * 50)
  path = own / f"a{suffix}"
  path.write_bytes(whole[: len(whole) // 2] if how == "cut" else b"garbage")
  with pytest.raises(ValueError, match=rf"a{suffix}: cannot be decompressed"):
    spool.decompress(str(path))
  assert _spooled() == []


def test_many_frames_and_chunks_of_zstd_come_out_whole(own, monkeypatch):
  monkeypatch.setattr(spool, "_ZSTD_CHUNK", 7)
  parts = [bytes([i]) * 100 * i for i in range(1, 9)]
  path = own / "a.zst"
  path.write_bytes(b"".join(zstandard.compress(part) for part in parts))
  done = []
  plain = spool.decompress(str(path), report=done.append)
  assert pathlib.Path(plain).read_bytes() == b"".join(parts)
  assert sum(done) == path.stat().st_size


def test_an_interrupted_spool_is_not_used(own):
  path = own / "a.gz"
  path.write_bytes(gzip.compress(b"text"))

  def interrupt(_):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    spool.decompress(str(path), report=interrupt)
  assert _spooled() == []
  plain = spool.decompress(str(path))
  assert pathlib.Path(plain).read_bytes() == b"text"


def test_a_full_disk_says_so_and_leaves_nothing(own, monkeypatch):
  path = own / "a.gz"
  path.write_bytes(gzip.compress(b"text"))

  def full(_):
    # The kernel's own device for this.
    with open("/dev/full", "wb", buffering=0) as device:
      device.write(b"x")

  with pytest.raises(OSError, match=r"no space left .*a.gz.*--cache") as caught:
    spool.decompress(str(path), report=full)
  assert caught.value.errno == errno.ENOSPC
  assert _spooled() == []
