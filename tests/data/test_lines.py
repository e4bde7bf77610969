import gzip
import json
import subprocess
import sys

import numpy as np
import pytest
import zstandard

from gemma_jax import data
from gemma_jax.data import lines, spool


def _jsonl(path, *records):
  texts = (r if isinstance(r, str) else json.dumps(r) for r in records)
  path.write_text("\n".join(texts), "utf-8")
  return path


def _load(kind, path, **fields):
  return data.load({"kind": kind, "path": path, **fields})


def _columns(corpus):
  return [corpus.source, corpus.key, corpus.group, corpus.size, corpus.where]


RECORDS = [
  {"text": "one", "meta": {"set": "web"}},
  {"text": "  ", "meta": {"set": "web"}},
  {"text": "zwei \u00e4\u6f22", "meta": {"set": "code"}},
]


# ------------------------------------------------------------------- text


def test_text_file_is_one_document(tmp_path):
  path = tmp_path / "notes.txt"
  path.write_bytes("\ufeffHéllo\r\n".encode())
  (document,) = _load("text", path)
  assert (document.text, document.source) == ("Héllo\n", "notes")
  assert document.name == "notes.txt"
  assert _load("text", path, source="mine")[0].source == "mine"


def test_directory_gives_sorted_text_and_markdown_and_drops_blanks(tmp_path):
  (tmp_path / "sub").mkdir()
  (tmp_path / "b.md").write_text("b")
  (tmp_path / "sub" / "a.txt").write_text("a")
  (tmp_path / "blank.txt").write_text(" \n")
  (tmp_path / "skip.py").write_text("x")
  documents = _load("text", tmp_path)
  assert [d.name for d in documents] == ["b.md", "sub/a.txt"]
  assert {d.source for d in documents} == {tmp_path.name}


def test_text_that_is_not_there_says_what_was_expected(tmp_path):
  with pytest.raises(FileNotFoundError, match="expected a text file or"):
    _load("text", tmp_path / "none")
  with pytest.raises(FileNotFoundError, match=r"\*.txt or \*.md files under"):
    _load("text", tmp_path)


def test_bytes_that_are_not_utf8_are_named(tmp_path):
  (tmp_path / "a.txt").write_bytes(b"fine\n\xff\xfe")
  with pytest.raises(ValueError, match=r"a.txt: .* UTF-8, got 0xff at byte 5"):
    _load("text", tmp_path)
  with pytest.raises(ValueError, match=r"a.txt:1: not JSON"):
    _load("jsonl", tmp_path / "a.txt")
  path = tmp_path / "b.jsonl"
  path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "\xe9"}')
  with pytest.raises(ValueError, match=r"b.jsonl:2: .* 0xe9 at byte 27"):
    _load("jsonl", path)


# ------------------------------------------------------------------ jsonl


def test_jsonl_reads_nested_fields_and_names_lines(tmp_path):
  path = _jsonl(tmp_path / "pile.jsonl", RECORDS[0], "", *RECORDS[1:])
  documents = _load("jsonl", path, source_field="meta.set")
  assert [(d.text, d.source, d.name) for d in documents] == [
    ("one", "web", "pile.jsonl:1"),
    ("zwei ä漢", "code", "pile.jsonl:4"),
  ]
  assert {d.source for d in _load("jsonl", path)} == {"pile"}
  assert {d.source for d in _load("jsonl", path, source="x")} == {"x"}
  by_set = _load("jsonl", path, text_field="meta.set")
  assert [d.text for d in by_set] == ["web", "web", "code"]
  with pytest.raises(ValueError, match="got both"):
    _load("jsonl", path, source="x", source_field="meta.set")


def test_a_byte_order_mark_and_windows_line_ends_are_no_text(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
  found = [(d.text, d.name) for d in _load("jsonl", path)]
  assert found == [("a", "a.jsonl:1"), ("b", "a.jsonl:3")]


def test_a_list_a_pattern_and_a_directory_give_the_same_corpus(tmp_path):
  (tmp_path / "d" / "sub").mkdir(parents=True)
  one = _jsonl(tmp_path / "d" / "b.jsonl", {"text": "b"})
  two = _jsonl(tmp_path / "d" / "sub" / "a.jsonl", {"text": "a"})
  (tmp_path / "d" / "info.json").write_text("{}")
  paths = [
    str(tmp_path / "d"),
    [two, str(one)],
    (one, two, one),
    str(tmp_path / "d" / "**" / "*.jsonl"),
  ]
  corpora = [_load("jsonl", path) for path in paths]
  for corpus in corpora:
    assert [d.name for d in corpus] == ["b.jsonl:1", "sub/a.jsonl:1"]
    assert corpus.sources == ("d",)
    assert corpus.key.tolist() == corpora[0].key.tolist()


def test_compressed_lines_equal_plain_ones_and_are_unpacked_once(tmp_path):
  plain = _jsonl(tmp_path / "a.jsonl", *RECORDS)
  raw = plain.read_bytes()
  (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(raw))
  frames = [zstandard.compress(part) for part in (raw[:20], raw[20:])]
  (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
  expected = _load("jsonl", plain)
  for name in ("a.jsonl.gz", "a.jsonl.zst"):
    corpus = _load("jsonl", tmp_path / name)
    assert [d.text for d in corpus] == [d.text for d in expected]
    assert corpus.group.tolist() == expected.group.tolist()
    assert [d.name for d in corpus] == [f"{name}:1", f"{name}:3"]
    assert corpus.sources == ("a",)
    (file,) = corpus.shelf.files
    before = spool.identity(file.path)
    _load("jsonl", tmp_path / name)
    assert spool.identity(file.path) == before
  mixed = _load("jsonl", tmp_path)
  assert len(mixed) == 6


def test_copies_in_a_file_share_a_group(tmp_path):
  path = _jsonl(
    tmp_path / "a.jsonl", {"text": "a  b"}, {"text": "a b\n"}, {"text": "c"}
  )
  corpus = _load("jsonl", path)
  a, copy, c = corpus
  assert a.group == copy.group != c.group
  assert corpus.group[0] == corpus.group[1] != corpus.group[2]
  assert a.id != copy.id


def test_half_a_surrogate_pair_does_not_stop_a_corpus(tmp_path):
  path = _jsonl(tmp_path / "a.jsonl", '{"text": "a\\ud800b"}')
  (document,) = _load("jsonl", path)
  assert document.text == "a?b"
  assert document.id


@pytest.mark.parametrize(
  ("line", "fields", "message"),
  [
    ("{", {}, r"pile.jsonl:2: not JSON"),
    ("[" * 100_000, {}, r"pile.jsonl:2: nested too deeply"),
    ("[1]", {}, r"pile.jsonl:2: expected an object .* got list"),
    ({"body": "x"}, {}, r"pile.jsonl:2: no field 'text' .*\['body'\]"),
    ({"text": 3}, {}, r"pile.jsonl:2: expected a string in 'text', got int"),
    (
      {"text": "x", "meta": {"a": "b"}},
      {"source_field": "meta.set"},
      r"pile.jsonl:2: no field 'set' of 'meta.set'; there are \['a'\]",
    ),
    (
      {"text": "x", "meta": "y"},
      {"source_field": "meta.set"},
      r"pile.jsonl:2: expected an object with the field 'set' .* got str",
    ),
  ],
)
def test_a_bad_line_is_named(tmp_path, line, fields, message):
  path = _jsonl(tmp_path / "pile.jsonl", RECORDS[0], line)
  with pytest.raises(ValueError, match=message):
    _load("jsonl", path, **fields)


def test_a_bad_line_of_a_compressed_file_is_named_by_that_file(tmp_path):
  path = tmp_path / "a.jsonl.gz"
  path.write_bytes(gzip.compress(b'{"text": "a"}\n{"body": 1}\n'))
  with pytest.raises(ValueError, match=r"a.jsonl.gz:2: no field 'text'"):
    _load("jsonl", path)


def test_paths_that_lead_nowhere_say_what_was_expected(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"JSON lines .*found nothing"):
    _load("jsonl", tmp_path / "none.jsonl")
  with pytest.raises(FileNotFoundError, match=r"\*.jsonl.gz .*found none"):
    _load("jsonl", tmp_path)
  with pytest.raises(FileNotFoundError, match="look at the pattern"):
    _load("jsonl", tmp_path / "*.jsonl")
  with pytest.raises(FileNotFoundError, match="empty list"):
    _load("jsonl", [])


def test_a_file_that_changed_after_it_was_indexed_is_noticed(tmp_path):
  path = _jsonl(tmp_path / "a.jsonl", {"text": "abc"}, {"text": "def"})
  corpus = _load("jsonl", path)
  _jsonl(path, {"text": "abx"}, {"text": "def"})
  assert corpus[1].text == "def"
  with pytest.raises(ValueError, match=r"a.jsonl:1.*changed since"):
    corpus[0]
  path.write_text("")
  with pytest.raises(ValueError, match=r"a.jsonl:2.*changed since"):
    corpus[1]


# ---------------------------------------------------------------- workers


def test_any_number_of_workers_gives_the_same_index(tmp_path, monkeypatch):
  long = tmp_path / "long.jsonl"
  with long.open("w") as file:
    for i in range(300):
      # One line is longer than a range.
      file.write(json.dumps({"text": f"{i} " * (999 if i == 7 else i % 9)}))
      file.write("\n\n" if i % 5 else "\n")
  _jsonl(tmp_path / "short.jsonl", *RECORDS)
  config = {"kind": "jsonl", "path": tmp_path}
  whole = data.load(config)
  monkeypatch.setattr(lines, "_RANGE_BYTES", 1000)
  one = data.load(config, workers=1)
  three = data.load(config, workers=3)
  assert [d.name for d in one] == [d.name for d in whole]
  assert {d.name for d in one} >= {"long.jsonl:8", "short.jsonl:3"}
  for corpus in (one, three):
    for column, expected in zip(_columns(corpus), _columns(whole), strict=True):
      assert column.dtype == expected.dtype
      np.testing.assert_array_equal(column, expected)


def test_an_error_in_a_worker_reaches_the_caller(tmp_path):
  for name in ("a", "b", "c"):
    _jsonl(tmp_path / f"{name}.jsonl", "{" if name > "a" else RECORDS[0])
  with pytest.raises(ValueError, match=r"b.jsonl:1: not JSON"):
    data.load({"kind": "jsonl", "path": tmp_path}, workers=2)


def test_less_than_one_worker_is_refused(tmp_path):
  with pytest.raises(ValueError, match="workers >= 1 or None, got 0"):
    data.load({"kind": "jsonl", "path": tmp_path}, workers=0)


def test_indexing_needs_neither_jax_nor_the_optional_packages():
  program = (
    "import sys, gemma_jax.data.lines, gemma_jax.data.spool;"
    "print({'jax', 'datasets', 'pyarrow', 'zstandard'} & {*sys.modules})"
  )
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, check=True, text=True
  )
  assert done.stdout.strip() == "set()"
