"""One writer at a time, in order; what does not fit is refused."""

import contextlib
import re
import time

import numpy as np
import pytest

from gemma_jax.activations import ActivationStore, Writer, is_complete
from gemma_jax.activations import writer as writing
from gemma_jax.activations.storage import Location
from tests.activations.rows import (
  DOCUMENT,
  READ,
  SITES,
  SOURCES,
  assert_holds,
  cut,
  digests,
  feed,
  interrupt,
  make_documents,
  make_rows,
  make_writer,
  write,
)

pytestmark = pytest.mark.usefixtures("small")


def test_a_writer_counts_what_has_arrived(tmp_path):
  rows = make_rows(300)
  with make_writer(tmp_path / "s") as writer:
    feed(writer, rows, block=74, stop=74)
    # A shard is on its way; whether it arrived is looked at later.
    assert (writer.committed, writer.documents) == (0, 0)
    feed(writer, rows, block=126, start=74, stop=200)
    # Three shards are full: two are on their way, so the first must be there.
    assert writer.committed == 64
    assert writer.documents == -(-74 // DOCUMENT)
    assert not writer.complete
    assert [writer.needs(*r) for r in [(0, 64), (63, 65), (5, 5)]] == [
      False,
      True,
      False,
    ]
    feed(writer, rows, start=200)
  assert writer.complete
  assert writer.committed == 300
  assert writer.documents == len(make_documents(300))
  assert not writer.needs(0, 10**6)


def test_shards_that_have_arrived_are_committed_at_the_next_append(tmp_path):
  rows = make_rows(300)
  with make_writer(tmp_path / "s") as writer:
    feed(writer, rows, block=200, stop=200)
    assert writer.committed == 64
    until = time.monotonic() + 60
    while writer.committed < 192 and time.monotonic() < until:
      time.sleep(0.01)
      writer.append(cut(rows, 200, 200))  # even one without rows
    assert writer.committed == 192
    assert writer.documents == -(-200 // DOCUMENT)
    feed(writer, rows, start=200)
  assert_holds(ActivationStore.open(tmp_path / "s"), rows)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_any_number_of_shards_in_flight_makes_the_same_bytes(
  shards, tmp_path, monkeypatch
):
  rows = make_rows(600)
  write(tmp_path / "usual", rows)
  monkeypatch.setattr(writing, "IN_FLIGHT", shards)
  with make_writer(tmp_path / "s") as writer:
    writer.append(rows, documents=make_documents(600))
    assert writer.committed == (9 - shards) * 64  # of nine that are full
  arrays = [
    {k: v for k, v in digests(tmp_path / s).items() if "/documents/" not in k}
    for s in ("usual", "s")
  ]
  assert arrays[0] == arrays[1]
  names = ActivationStore.open(tmp_path / "s").documents
  assert names == make_documents(600)


def test_rows_that_are_there_already_are_left_out(tmp_path):
  rows = make_rows(300)
  interrupt(tmp_path / "s", rows, 250)
  wrong = {name: np.zeros_like(x) for name, x in rows.items()}
  with make_writer(tmp_path / "s") as again:
    assert again.committed == 192
    again.append(cut(wrong, 0, 192), documents=make_documents(192))
    again.append(
      cut(rows, 192, 300),
      documents=make_documents(300)[27:],
      first_document=27,
    )
  store = ActivationStore.open(tmp_path / "s")
  assert_holds(store, rows)
  assert store.documents == make_documents(300)


def test_a_complete_store_takes_no_more_and_stays_as_it_is(tmp_path):
  rows = make_rows(100)
  store = write(tmp_path / "s", rows)
  with make_writer(tmp_path / "s") as again:
    feed(again, rows, start=0)
  assert_holds(store, rows)
  assert len(ActivationStore.open(tmp_path / "s")) == 100


def test_state_is_what_it_was_when_the_rows_were_sent(tmp_path):
  rows = make_rows(300)
  covered = 0
  with (
    contextlib.suppress(KeyboardInterrupt),
    make_writer(tmp_path / "s", state=lambda: b"%d" % covered) as writer,
  ):
    for start in (0, 64, 128):
      covered = start
      feed(writer, rows, block=64, start=start, stop=start + 64)
    covered = 200  # before the last shard is committed
    raise KeyboardInterrupt
  with make_writer(tmp_path / "s") as again:
    assert again.committed == 192
    assert again.saved == b"128"
    feed(again, rows)
  # This one takes none, and the first one's is not of all rows.
  assert Location(tmp_path / "s/parts/00000").keys("state/") == []


def test_a_state_of_none_keeps_the_last(tmp_path):
  rows, given = make_rows(300), iter([b"first", None, None])
  interrupt(tmp_path / "s", rows, 222, state=lambda: next(given))
  with make_writer(tmp_path / "s", state=lambda: None) as again:
    assert again.committed == 192
    assert again.saved == b"first"
    feed(again, rows)
  keys = Location(tmp_path / "s/parts/00000").keys("state/")
  assert keys == ["state/000000000064.npz"]


def test_a_complete_part_without_state_is_given_one(tmp_path):
  rows = make_rows(100)
  with make_writer(tmp_path / "s") as writer:
    feed(writer, rows)
    writer.report = {"windows": 3}
  with make_writer(tmp_path / "s", state=lambda: b"measured") as again:
    assert again.complete
    assert again.saved is None
  with make_writer(tmp_path / "s", state=lambda: b"not asked for") as third:
    assert third.saved == b"measured"
    assert third.description["report"] == {"windows": 3}
  assert_holds(ActivationStore.open(tmp_path / "s"), rows)


def test_a_state_that_no_commit_names_is_swept_away(tmp_path):
  rows = make_rows(300)
  interrupt(tmp_path / "s", rows, 200, state=lambda: b"one")
  location = Location(tmp_path / "s/parts/00000")
  location.write("state/000000000999.npz", b"of a writer that was killed")
  with make_writer(tmp_path / "s", state=lambda: b"two") as again:
    assert again.saved == b"one"
    feed(again, rows)
  assert location.keys("state/") == ["state/000000000300.npz"]


def test_the_rate_leaves_the_interruption_out(tmp_path):
  rows = make_rows(300)
  began = time.perf_counter()
  interrupt(tmp_path / "s", rows, 300)
  spent = time.perf_counter() - began
  time.sleep(0.5)
  began = time.perf_counter()
  with make_writer(tmp_path / "s") as again:
    feed(again, rows)
  spent += time.perf_counter() - began
  assert 300 / ActivationStore.open(tmp_path / "s").tokens_per_second <= spent


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
  ("other", "what"),
  [
    ({"metadata": {"model": "another"}}, "metadata.model: 'tiny' there"),
    ({"dtype": "bfloat16"}, "dtype: 'float32' there, 'bfloat16' here"),
    ({"sites": {READ: 4}}, "sites.blocks.1.mlp_out: 3 there, None here"),
    ({"made_by": {"text": "b"}}, "made_by.text: 'a' there, 'b' here"),
    ({"sources": ("mail",)}, "sources: .* there, .* here"),
  ],
)
def test_another_harvests_store_is_refused_and_left_as_it_is(
  other, what, tmp_path
):
  rows = make_rows(100)
  same = {
    "sites": SITES,
    "dtype": "float32",
    "metadata": {"model": "tiny"},
    "made_by": {"text": "a"},
    "sources": SOURCES,
  }
  with Writer(tmp_path / "s", **same) as writer:
    feed(writer, rows)
  with pytest.raises(
    ValueError, match=rf"made by another harvest \(.*{what}.*another place"
  ):
    Writer(tmp_path / "s", **(same | other))
  assert_holds(ActivationStore.open(tmp_path / "s"), rows)
  with Writer(tmp_path / "s", **same) as again:
    assert again.complete


def test_another_number_of_parts_is_refused(tmp_path):
  rows = make_rows(100)
  write(tmp_path / "s", rows)
  with pytest.raises(
    ValueError, match=r"has 1 parts, expected 2\. Run as many"
  ):
    make_writer(tmp_path / "s", parts=2)
  assert_holds(ActivationStore.open(tmp_path / "s"), rows)


def test_metadata_is_compared_as_json_holds_it(tmp_path):
  same = {"metadata": {"shape": (2, 3)}, "made_by": {"range": (0, 1)}}
  write(tmp_path / "s", make_rows(1), **same)
  with make_writer(tmp_path / "s", **same) as again:
    assert again.committed == 1


def test_a_dtype_that_no_store_has_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"'float16'; expected one of .*int8"):
    make_writer(tmp_path / "s", "float16")
  assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda rows: rows.pop("token"), "Expected equally many rows of .*token"),
    (lambda rows: rows.update(extra=rows["token"]), "extra"),
    (lambda rows: rows.update(token=rows["token"][:1]), "equally many"),
    (lambda rows: rows.update({READ: rows[READ][:, :2]}), r"got .*\(3, 2\)"),
    (lambda rows: rows.update({READ: rows["token"]}), "Expected equally many"),
    (lambda rows: rows["source"].fill(3), "counts through .* got 0 to 3"),
    (lambda rows: rows["source"].fill(-1), "counts through .* got -1 to 0"),
  ],
)
def test_rows_that_do_not_fit_the_store_are_refused(change, message, tmp_path):
  rows = make_rows(3)
  change(rows)
  with (
    pytest.raises(ValueError, match=message),
    make_writer(tmp_path / "s") as writer,
  ):
    writer.append(rows)


@pytest.mark.parametrize("first_row", [1, 64, 65, 200])
def test_rows_and_documents_that_skip_some_are_refused(first_row, tmp_path):
  rows = make_rows(10)
  with make_writer(tmp_path / "s") as writer:
    feed(writer, make_rows(64), start=0, block=64)
    with pytest.raises(ValueError, match=r"document 12 .* 10 is the next"):
      writer.append(rows, documents=[("", "", "")], first_document=12)
    if first_row > 64:
      with pytest.raises(ValueError, match=f"row {first_row} arrived before"):
        writer.append(rows, first_row=first_row)


def test_a_writer_that_was_let_go_of_writes_nothing_more(tmp_path):
  rows = make_rows(300)
  writer = make_writer(tmp_path / "s")
  feed(writer, rows, block=200, stop=200)
  writer.abandon()
  words = re.compile("has stopped. Make another: it goes on from row 64")
  with pytest.raises(ValueError, match=words):
    feed(writer, rows, start=200)
  with pytest.raises(ValueError, match=words):
    writer.close()
  assert not is_complete(tmp_path / "s")


def test_closing_twice_is_closing(tmp_path):
  with make_writer(tmp_path / "s") as writer:
    feed(writer, make_rows(10))
    writer.close()
  with make_writer(tmp_path / "s") as again:
    assert again.complete
