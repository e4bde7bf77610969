"""A merged store is its parts, whatever happened on the way."""

import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from gemma_jax.activations import ActivationStore, Writer
from gemma_jax.activations.layout import LABELS, SHARD_ROWS
from gemma_jax.activations.merge import merge
from gemma_jax.activations.repair import verify

SITE = "blocks.1.mlp_in"
ROOT = pathlib.Path(__file__).parents[2]


def write(where, number, n=3_000, *, model="tiny", complete=True):
  rng = np.random.default_rng(number)
  rows = {SITE: rng.normal(size=(n, 4)).astype("f4")}
  rows |= {name: rng.integers(0, 9, n, np.int32) for name in LABELS}
  rows["source"] = np.zeros(n, np.int32)
  writer = Writer(
    where,
    sites={SITE: 4},
    dtype="float32",
    metadata={"model": model},
    made_by={"text": number},
    sources=(f"source {number}",),
    append=True,
  )
  documents = [(f"{number}.{i}", "", f"text {i}") for i in range(9)]
  writer.append(rows, documents=documents)
  writer.close() if complete else writer.abandon()
  return where


def facts(where, start=0, stop=None):
  """Rows and names of a store, in a form that can be compared."""
  store = ActivationStore.open(where)
  stop = len(store) if stop is None else stop
  names = [store.documents[i][0] for i in store.read(start, stop, "document")]
  sources = [store.sources[i] for i in store.read(start, stop, "source")]
  arrays = [store.read(start, stop, n).tobytes() for n in (SITE, "token")]
  return arrays, names, sources


def joined(*wheres):
  arrays, *lists = zip(*map(facts, wheres), strict=True)
  return (
    [b"".join(x) for x in zip(*arrays, strict=True)],
    *(list(itertools.chain(*x)) for x in lists),
  )


@pytest.fixture
def sources(tmp_path):
  """Three stores, the last one of two parts."""
  found = [write(tmp_path / str(i), i, 3_000 + i) for i in range(3)]
  write(found[2], 7, SHARD_ROWS + 5)
  return found


def test_rows_documents_and_sources_follow_one_another(sources, tmp_path):
  expected = joined(*sources)
  store = merge(tmp_path / "all", sources)
  assert facts(tmp_path / "all") == expected
  assert len(store.parts) == 4
  assert store.metadata == {"model": "tiny"}
  assert verify(tmp_path / "all") == []
  assert not (tmp_path / "all/merge.json").exists()


def test_a_store_grows_behind_what_it_has(sources):
  expected = joined(*sources[:2])
  (sources[0] / "stats.json").write_text("{}")
  merge(sources[0], sources[1:2])
  assert facts(sources[0]) == expected
  # It told of fewer rows.
  assert not (sources[0] / "stats.json").exists()


def test_files_and_memory_are_merged_either_way(sources, tmp_path):
  expected = joined(*sources[:2])
  merge("memory://merge/one", sources[:1])
  merge("memory://merge/all", ["memory://merge/one", sources[1]])
  assert facts("memory://merge/all") == expected
  merge(tmp_path / "back", ["memory://merge/all"])
  assert facts(tmp_path / "back") == expected


@pytest.mark.parametrize("again", [0, 1])
def test_no_rows_come_twice(sources, tmp_path, again):
  merge(tmp_path / "all", sources[:2])
  before = facts(tmp_path / "all")
  with pytest.raises(ValueError, match="would count twice"):
    merge(tmp_path / "all", [sources[2], sources[again]])
  with pytest.raises(ValueError, match="would count twice"):
    merge(tmp_path / "other", [sources[again]] * 2)
  with pytest.raises(ValueError, match="would count twice"):
    merge(tmp_path / "all", [tmp_path / "all"])
  assert facts(tmp_path / "all") == before
  assert not (tmp_path / "other").exists()


def test_other_models_and_incomplete_stores_are_refused(sources, tmp_path):
  other = write(tmp_path / "other", 0, model="large")
  with pytest.raises(ValueError, match=r"metadata.model: 'large' there, 'tiny"):
    merge(sources[0], [other])
  half = write(tmp_path / "half", 5, complete=False)
  with pytest.raises(ValueError, match="half is incomplete in part 0"):
    merge(sources[0], [half])
  with pytest.raises(ValueError, match="half is incomplete in part 0"):
    merge(half, sources)
  with pytest.raises(FileNotFoundError, match="no activation store"):
    merge(sources[0], [tmp_path / "nowhere"])
  assert len(ActivationStore.open(sources[0]).parts) == 1


# Dies when the second part is copied and the manifest does not know it yet.
DIES = """
import os, sys
from gemma_jax.activations import merge, storage
replace = storage.Document.replace
def die(self, value):
  if self.name == "manifest.json" and value["parts"] == 3:
    os._exit(9)
  replace(self, value)
storage.Document.replace = die
merge(sys.argv[1], sys.argv[2:])
"""


def test_a_merge_that_was_killed_is_gone_on_with(sources, tmp_path):
  target, *others = sources
  expected, before = joined(*sources), joined(*sources[:2])
  done = subprocess.run(
    [sys.executable, "-c", DIES, target, *others], cwd=ROOT, check=False
  )
  assert done.returncode == 9
  assert (target / "parts/00002/part.json").exists()
  # One part is in, and the target can be read.
  assert facts(target) == before
  with pytest.raises(ValueError, match="has an unfinished merge of"):
    merge(target, others[1:])
  stray = target / "parts/00002/stray"
  stray.write_text("")
  merge(target, others)
  assert facts(target) == expected
  assert not stray.exists()
  with pytest.raises(ValueError, match="would count twice"):
    merge(target, others)


def test_a_file_that_is_missing_stops_the_merge_until_it_is_there(
  sources, tmp_path
):
  expected, before = joined(*sources), facts(sources[0])
  lost = sources[1] / f"parts/00000/{SITE}/c/0/0"
  shutil.move(lost, tmp_path / "lost")
  with pytest.raises(OSError, match=rf"{SITE}/c/0/0 is missing.*verify"):
    merge(sources[0], sources[1:])
  assert facts(sources[0]) == before
  shutil.move(tmp_path / "lost", lost)
  merge(sources[0], sources[1:])
  assert facts(sources[0]) == expected


def test_a_part_that_somebody_else_adds_is_not_written_over(sources):
  writer = Writer(
    sources[0],
    sites={SITE: 4},
    dtype="float32",
    metadata={"model": "tiny"},
    made_by={"text": "new"},
    append=True,
  )
  with pytest.raises(ValueError, match="incomplete in part 1"):
    merge(sources[0], sources[1:])
  writer.close()
  merge(sources[0], sources[1:2])
  there = json.loads((sources[0] / "manifest.json").read_text())
  assert there["parts"] == 3
  assert os.listdir(sources[0] / "parts/00001")
