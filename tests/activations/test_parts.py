"""Several writers make one store, at once or one after the other."""

import numpy as np
import pytest

from gemma_jax.activations import ActivationStore, is_complete
from tests.activations.rows import (
  READ,
  SITES,
  SOURCES,
  assert_holds,
  feed,
  interrupt,
  make_documents,
  make_rows,
  make_writer,
  start_python,
  write,
)

FIRST, SECOND = 150, 230
OTHERS = ("web", "mail", "books")  # the second part counts its own sources

WRITES_A_PART = """
from gemma_jax.activations import layout
from tests.activations import rows as t
from tests.activations.test_parts import FIRST, OTHERS, SECOND
layout.SHARD_ROWS, layout.CHUNK_ROWS = 64, 16
part = {part}
writer = t.make_writer(
  {path!r}, part=part, parts=2, sources=OTHERS if part else t.SOURCES
)
print("there", flush=True)
input()
with writer:
  t.feed(writer, t.make_rows(SECOND if part else FIRST, seed=part))
"""


def assert_is_both(store):
  """The store has both parts, counted through."""
  first, second = make_rows(FIRST), make_rows(SECOND, seed=1)
  assert len(store) == FIRST + SECOND
  names = np.asarray(store.sources)[store.read(0, len(store), "source")]
  expected = [
    np.asarray(sources)[rows["source"]]
    for sources, rows in ((SOURCES, first), (OTHERS, second))
  ]
  np.testing.assert_array_equal(names, np.concatenate(expected))
  before = len(make_documents(FIRST))
  second["document"] += before
  assert store.documents == make_documents(FIRST) + make_documents(SECOND)
  both = {
    name: np.concatenate([first[name], second[name]])
    for name in first
    if name != "source"
  }
  assert_holds(store, both)
  for name, x in both.items():
    # Across the border, and parts of either.
    for start, stop in [(140, 160), (149, 151), (FIRST, 151), (1, 379)]:
      np.testing.assert_array_equal(
        store.read(start, stop, name), x[start:stop]
      )
    wanted = np.asarray([379, 0, 150, 149, 151, 20])
    np.testing.assert_array_equal(store.take(wanted, name), x[wanted])
  for source in store.sources:
    np.testing.assert_array_equal(
      store.rows(source), np.flatnonzero(names == source)
    )
  rows = np.concatenate(
    [b["position"] for b in some_batches(store, 38, len(store) // 38)]
  )
  assert len(rows) == len(store)
  np.testing.assert_array_equal(np.sort(rows), np.sort(both["position"]))


def some_batches(store, size, count):
  stream = store.stream(size, 0, sites=("position",), buffer_rows=64)
  batches = [next(stream) for _ in range(count)]
  stream.close()
  return batches


def test_two_processes_at_once_make_one_store(tmp_path, small):
  path = tmp_path / "s"
  processes = [
    start_python(WRITES_A_PART.format(path=str(path), part=part))
    for part in (0, 1)
  ]
  try:
    for process in processes:
      assert process.stdout.readline() == "there\n"
    assert not is_complete(path)
    # Both are there before either has written a row.
    for process in processes:
      process.communicate("go on\n")
      assert process.returncode == 0
  finally:
    for process in processes:
      process.kill()
      process.communicate()
  assert_is_both(ActivationStore.open(path))


def test_a_part_that_has_not_begun_is_named(tmp_path, small):
  write(tmp_path / "0", make_rows(FIRST))
  with make_writer(tmp_path / "s", part=0, parts=2) as writer:
    feed(writer, make_rows(FIRST))
  assert not is_complete(tmp_path / "s")
  with pytest.raises(ValueError, match=r"lacks part 1 of 2: .* not begun"):
    ActivationStore.open(tmp_path / "s")


def test_a_part_that_was_interrupted_is_named(tmp_path, small):
  for part in (0, 1):
    interrupt(tmp_path / "s", make_rows(FIRST), 150, part=part, parts=2)
  with make_writer(tmp_path / "s", part=0, parts=2) as writer:
    feed(writer, make_rows(FIRST))
  with pytest.raises(
    ValueError, match=r"parts/00001.* is incomplete.*128 rows"
  ):
    ActivationStore.open(tmp_path / "s")


def append(path, made_by, rows, stop=None, **options):
  options = {"made_by": made_by, "append": True} | options
  if stop is not None:
    interrupt(path, rows, stop, **options)
    return None
  return write(path, rows, **options)


def test_what_is_appended_is_a_part_of_its_own(tmp_path, small):
  path = tmp_path / "s"
  first, second = make_rows(FIRST), make_rows(SECOND, seed=1)
  append(path, {"text": "a"}, first)
  store = append(path, {"text": "b"}, second, sources=OTHERS)
  assert_is_both(store)
  assert store.parts == [
    {"made_by": {"text": "a"}, "start": 0, "stop": FIRST},
    {"made_by": {"text": "b"}, "start": FIRST, "stop": FIRST + SECOND},
  ]


def test_appending_goes_on_with_what_was_interrupted(tmp_path, small):
  path = tmp_path / "s"
  first, second = make_rows(FIRST), make_rows(SECOND, seed=1)
  write(path, first)  # a store that was not made by appending
  append(path, {"text": "b"}, second, stop=200, sources=OTHERS)
  assert not is_complete(path)
  with make_writer(
    path, made_by={"text": "b"}, append=True, sources=OTHERS
  ) as again:
    assert again.committed == 192
    feed(again, second)
  store = ActivationStore.open(path)
  assert_is_both(store)
  # And once more: it is there already.
  append(path, {"text": "b"}, second, sources=OTHERS)
  assert len(ActivationStore.open(path)) == FIRST + SECOND


@pytest.mark.parametrize(
  ("other", "what"),
  [
    ({"metadata": {"model": "another"}}, r"metadata\.model"),
    ({"sites": {READ: 4}}, "sites.*3 there, None here"),
    ({"sites": SITES | {READ: 5}}, "sites.*4 there, 5 here"),
    ({"dtype": "int8"}, "dtype: 'float32' there"),
  ],
)
def test_appending_what_does_not_fit_is_refused(other, what, tmp_path, small):
  path, rows = tmp_path / "s", make_rows(FIRST)
  append(path, {"text": "a"}, rows, metadata={"model": "tiny"})
  with pytest.raises(ValueError, match=f"another harvest.*{what}"):
    make_writer(
      path,
      **{"metadata": {"model": "tiny"}} | other,
      made_by={"text": "b"},
      append=True,
    )
  assert_holds(ActivationStore.open(path), rows)


def test_a_part_without_rows_is_no_obstacle(tmp_path, small):
  path, rows = tmp_path / "s", make_rows(FIRST)
  for part, some in enumerate([None, rows, None]):
    with make_writer(path, part=part, parts=3) as writer:
      if some is not None:
        feed(writer, some)
  store = ActivationStore.open(path)
  assert_holds(store, rows)
  found = np.concatenate([b["position"] for b in some_batches(store, 50, 3)])
  np.testing.assert_array_equal(np.sort(found), rows["position"])
