"""Killed, out of room or refused, a writer leaves what it had committed."""

import os
import random
import shutil
import signal
import time

import pytest

from gemma_jax.activations import ActivationStore, layout
from gemma_jax.activations.writer import Writer
from tests.activations.rows import (
  SITES,
  SOURCES,
  assert_holds,
  digests,
  feed,
  make_rows,
  run_python,
  start_python,
)

KILLS = int(os.environ.get("GEMMA_JAX_KILLS", "3"))
N, BLOCK, SHARD = 6_400, 50, 64


def write_all(where, say=lambda row: None):
  """Goes on with a store to its end; says the number of each row it is at."""
  layout.SHARD_ROWS, layout.CHUNK_ROWS = SHARD, 16
  rows, covered = make_rows(N), 0
  with Writer(
    where,
    sites=SITES,
    dtype="int8",
    metadata={},
    sources=SOURCES,
    state=lambda: b"rows that are in it: %d" % covered,
  ) as writer:
    covered = writer.committed // BLOCK * BLOCK
    for start in range(covered, N, BLOCK):
      say(start)
      feed(writer, rows, block=BLOCK, start=start, stop=start + BLOCK)
      covered = start + BLOCK


WRITES = """
from tests.activations.test_interruption import write_all
write_all({path!r}, lambda row: print(row, flush=True))
"""


def kill_at(path, row, delay):
  """Kills a writer soon after it began a row; False if it ended before."""
  with start_python(WRITES.format(path=str(path))) as process:
    for line in process.stdout:
      if int(line) >= row:
        break
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
  assert process.returncode in (0, -signal.SIGKILL)
  return process.returncode != 0


@pytest.fixture
def small_files(monkeypatch):
  """Undoes what `write_all` sets, which is for processes of its own."""
  monkeypatch.setattr(layout, "SHARD_ROWS", SHARD)
  monkeypatch.setattr(layout, "CHUNK_ROWS", 16)


def test_killed_at_any_moment_it_ends_with_the_same_bytes(
  tmp_path, small_files
):
  write_all(tmp_path / "alone")
  random.seed(time.time_ns())
  moments = [(random.randrange(N), random.random() / 50) for _ in range(KILLS)]
  path, killed = tmp_path / "killed", 0
  for row, delay in sorted(moments):
    while not kill_at(path, row, delay):
      shutil.rmtree(path)  # it was quicker: that was no kill
      row = random.randrange(N // 2)
    killed += 1
    with pytest.raises((ValueError, FileNotFoundError)):
      ActivationStore.open(path)
  assert killed == KILLS
  write_all(path)
  assert digests(path) == digests(tmp_path / "alone"), moments
  store, rows = ActivationStore.open(path), make_rows(N)
  assert_holds(store, {name: rows[name] for name in layout.LABELS})


def test_a_second_process_is_refused_while_the_first_lives(
  tmp_path, small_files
):
  script = WRITES.format(path=str(tmp_path / "s")).replace(
    "flush=True", "flush=True) or row < 640 or input("
  )
  with start_python(script) as process:
    while int(process.stdout.readline()) < 640:
      pass
    with pytest.raises(BlockingIOError, match="Another process is writing"):
      write_all(tmp_path / "s")
    process.kill()
    process.communicate()
  write_all(tmp_path / "s")
  assert len(ActivationStore.open(tmp_path / "s")) == N


FULL = """
import errno, resource, sys
from gemma_jax.activations import layout
from tests.activations import rows as t
layout.SHARD_ROWS, layout.CHUNK_ROWS = 256, 64
rows = t.make_rows(1_500)
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
t.write({path!r} + "/alone", rows)
writer = t.make_writer({path!r} + "/full")
t.feed(writer, rows, stop=600)
# A shard is larger than this and the documents of the store smaller.
resource.setrlimit(resource.RLIMIT_FSIZE, (2_500, most))
try:
  t.feed(writer, rows, start=600)
except OSError as error:
  print(error.errno == errno.ENOSPC, error)
print(writer.committed)
try:
  t.feed(writer, rows, start=1_000)
except ValueError as error:
  print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
with t.make_writer({path!r} + "/full") as again:
  print(again.committed)
  t.feed(again, rows)
print(t.digests({path!r} + "/full") == t.digests({path!r} + "/alone"))
"""


def test_a_full_disk_is_one_error_and_then_it_goes_on(tmp_path):
  said = run_python(FULL.format(path=str(tmp_path)))
  words, committed, stopped, resumed, same = said
  assert words.startswith("True ")
  # Two shards were sent, and may or may not have been on the disk by then.
  shard = {"0": 0, "256": 1, "512": 2}[committed]
  assert f"/full/parts/00000 is full: writing shard {shard} failed" in words
  assert "Make room, then run the same command" in words
  assert resumed == committed
  assert "this writer has stopped" in stopped
  assert same == "True"


REFUSED = """
import os
from tests.activations import rows as t
from gemma_jax.activations import layout
if os.geteuid() == 0:
  os.seteuid(65534)  # whom no permission is given to
try:
  t.make_writer({path!r} + "/s")
except OSError as error:
  print(error)
"""


def test_a_directory_that_one_may_not_write_to_is_one_error(tmp_path):
  tmp_path.chmod(0o500)
  try:
    (said,) = run_python(REFUSED.format(path=str(tmp_path)))
  finally:
    tmp_path.chmod(0o700)
  assert "Permission denied" in said
  assert f"{tmp_path}/s: " in said
  assert "that you may use it" in said


def test_a_place_below_a_file_is_one_error(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError, match=f"{tmp_path}/file/s: .*Check that the"):
    Writer(tmp_path / "file" / "s", sites=SITES, dtype="int8", metadata={})
