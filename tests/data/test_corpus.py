import collections
import hashlib
import json
import math
import random
import subprocess
import sys

import ml_collections
import pytest

from gemma_jax import data
from gemma_jax.data import corpus


def _documents(count, *, source="s", length=10):
  return [
    data.Document(f"{i:0{length}d}", source, f"{source}{i}", f"{source}/{i}")
    for i in range(count)
  ]


def _passages(document):
  lines = [line.strip() for line in document.text.split("\n") if line.strip()]
  return zip(*(lines[i:] for i in range(8)), strict=False)


def _paragraphs(document):
  for paragraph in document.text.split("\n\n"):
    words = " ".join(paragraph.split())
    if len(words) >= 500:
      yield words


# ---------------------------------------------------------------- builtin


def test_builtin_holds_three_strata_of_real_size(builtin):
  characters = collections.Counter()
  for document in builtin:
    characters[document.source] += len(document.text)
  assert list(characters) == ["reference", "docstrings", "code"]
  assert characters["reference"] > 300_000
  assert characters["docstrings"] > 1_000_000
  assert characters["code"] > 4_000_000


def test_builtin_documents_have_unique_ids_and_text(builtin):
  assert len({d.id for d in builtin}) == len(builtin)
  assert all(d.text.strip() for d in builtin)


def test_no_passage_stands_in_two_strata_or_groups(builtin):
  sources, groups = {}, {}
  for document in builtin:
    for passage in _passages(document):
      assert sources.setdefault(passage, document.source) == document.source
      assert groups.setdefault(passage, document.group) == document.group


def test_no_long_paragraph_stands_in_two_groups(builtin):
  groups = {}
  for document in builtin:
    for paragraph in _paragraphs(document):
      assert groups.setdefault(paragraph, document.group) == document.group


def test_builtin_is_the_same_in_another_process(builtin):
  program = (
    "from gemma_jax import data; import hashlib;"
    "ids = ''.join(d.id for d in data.builtin());"
    "print(hashlib.sha256(ids.encode()).hexdigest())"
  )
  ids = "".join(d.id for d in builtin)
  other = subprocess.run(
    [sys.executable, "-c", program],
    env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)},
    capture_output=True,
    check=True,
    text=True,
  ).stdout.strip()
  assert other == hashlib.sha256(ids.encode()).hexdigest()


def test_copies_are_cut_from_the_later_group_only():
  copy = "\n".join(f"shared line {i}" for i in range(9))
  first = data.Document(f"one\n{copy}", "code", "a", "a")
  same = data.Document(f"two\n{copy}", "code", "a.b", "a")
  other = data.Document(f"three\n\n  {copy}\nfour", "code", "b", "b")
  kept = corpus._cut_repeats([first, same, other])
  assert [d.text for d in kept] == [first.text, same.text, "three\n\nfour"]


# ------------------------------------------------------------------ files


def test_text_file_is_one_document(tmp_path):
  path = tmp_path / "notes.txt"
  path.write_text("\ufeffHéllo\n", "utf-8")
  (document,) = data.read_text(path)
  assert (document.text, document.source) == ("Héllo\n", "notes")
  assert document.name == "notes.txt"
  assert data.read_text(path, source="mine")[0].source == "mine"


def test_directory_gives_sorted_text_and_markdown_and_drops_blanks(tmp_path):
  (tmp_path / "sub").mkdir()
  (tmp_path / "b.md").write_text("b")
  (tmp_path / "sub" / "a.txt").write_text("a")
  (tmp_path / "blank.txt").write_text(" \n")
  (tmp_path / "skip.py").write_text("x")
  documents = data.read_text(tmp_path)
  assert [d.name for d in documents] == ["b.md", "sub/a.txt"]
  assert {d.source for d in documents} == {tmp_path.name}


def test_text_that_is_not_there_says_what_was_expected(tmp_path):
  with pytest.raises(FileNotFoundError, match="expected a text file or"):
    data.read_text(tmp_path / "none")
  with pytest.raises(FileNotFoundError, match=r"\*.txt or \*.md files under"):
    data.read_text(tmp_path)


def test_text_that_is_not_utf8_names_the_file(tmp_path):
  (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
  with pytest.raises(ValueError, match=r"a.txt: expected UTF-8"):
    data.read_text(tmp_path)
  with pytest.raises(ValueError, match=r"a.txt: expected UTF-8"):
    data.read_jsonl(tmp_path / "a.txt")


def _jsonl(tmp_path, *lines):
  path = tmp_path / "pile.jsonl"
  texts = (s if isinstance(s, str) else json.dumps(s) for s in lines)
  path.write_text("\n".join(texts), "utf-8")
  return path


def test_jsonl_reads_nested_fields_and_names_lines(tmp_path):
  path = _jsonl(
    tmp_path,
    {"text": "one", "meta": {"set": "web"}},
    "",
    {"text": "  ", "meta": {"set": "web"}},
    {"text": "two", "meta": {"set": "code"}},
  )
  documents = data.read_jsonl(path, source_field="meta.set")
  assert [(d.text, d.source, d.name) for d in documents] == [
    ("one", "web", "pile.jsonl:1"),
    ("two", "code", "pile.jsonl:4"),
  ]
  assert {d.source for d in data.read_jsonl(path)} == {"pile"}
  by_set = data.read_jsonl(path, text_field="meta.set")
  assert [d.text for d in by_set] == ["web", "web", "code"]


def test_copies_in_a_file_share_a_group(tmp_path):
  path = _jsonl(tmp_path, {"text": "a  b"}, {"text": "a b\n"}, {"text": "c"})
  a, copy, c = data.read_jsonl(path)
  assert a.group == copy.group != c.group
  assert a.id != copy.id


def test_half_a_surrogate_pair_does_not_stop_a_corpus(tmp_path):
  path = _jsonl(tmp_path, '{"text": "a\\ud800b"}')
  (document,) = data.read_jsonl(path)
  assert document.text == "a?b"
  assert document.id


@pytest.mark.parametrize(
  ("line", "fields", "message"),
  [
    ("{", {}, r"pile.jsonl:2: not JSON"),
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
  good = {"text": "fine", "meta": {"set": "web"}}
  with pytest.raises(ValueError, match=message):
    data.read_jsonl(_jsonl(tmp_path, good, line), **fields)


def test_a_missing_jsonl_says_what_was_expected(tmp_path):
  with pytest.raises(FileNotFoundError, match="found nothing"):
    data.read_jsonl(tmp_path / "none.jsonl")
  with pytest.raises(FileNotFoundError, match="found a directory"):
    data.read_jsonl(tmp_path)


# ------------------------------------------------------------------- load


def test_load_takes_a_config_with_empty_fields(tmp_path):
  path = _jsonl(tmp_path, {"body": "x", "set": "a"}, {"body": "y", "set": "b"})
  config = ml_collections.ConfigDict(
    {
      "kind": "jsonl",
      "path": str(path),
      "text_field": "body",
      "source_field": "set",
      "source": ml_collections.config_dict.placeholder(str),
      "sources": ("b",),
    }
  )
  assert [d.text for d in data.load(config)] == ["y"]
  del config.source_field
  config.sources = None
  assert [d.text for d in data.load(config)] == ["x", "y"]


def test_load_builtin_restricts_the_strata(monkeypatch, builtin):
  monkeypatch.setattr(corpus, "_KINDS", {"builtin": (lambda: builtin, (), ())})
  documents = data.load({"kind": "builtin", "sources": "reference"})
  assert {d.source for d in documents} == {"reference"}


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({}, r"unknown corpus kind None; .*\['builtin', 'text', 'jsonl'\]"),
    ({"kind": "pile"}, "unknown corpus kind 'pile'"),
    (
      {"kind": "text", "path": ".", "text_field": "x"},
      r"'text' has no fields \['text_field'\]; it takes \['path', 'source', 's",
    ),
    ({"kind": "jsonl"}, r"'jsonl' needs the fields \['path'\]"),
  ],
)
def test_load_names_what_is_valid(config, message):
  with pytest.raises(ValueError, match=message):
    data.load(config)


def test_load_lists_the_strata_that_are_there(tmp_path):
  path = _jsonl(tmp_path, {"text": "x"})
  with pytest.raises(ValueError, match=r"no sources \['web'\]; .*\['pile'\]"):
    data.load({"kind": "jsonl", "path": path, "sources": ["web"]})


def test_load_refuses_a_corpus_without_text(tmp_path):
  with pytest.raises(ValueError, match="holds no text"):
    data.load({"kind": "jsonl", "path": _jsonl(tmp_path, {"text": ""})})


# ------------------------------------------------------------------ split


def test_split_keeps_a_modules_docstrings_and_code_together(builtin):
  train, heldout = data.split(builtin, heldout_fraction=0.3, seed=0)
  packages = [{d.name.split(".")[0] for d in side} for side in (train, heldout)]
  assert not packages[0] & packages[1]
  assert {d.source for d in heldout} == {"reference", "docstrings", "code"}
  assert len(train) + len(heldout) == len(builtin)


def test_held_out_text_does_not_stand_in_the_training_text(builtin):
  train, heldout = data.split(builtin, heldout_fraction=0.2, seed=1)
  seen = {passage for document in train for passage in _passages(document)}
  assert not any(p in seen for document in heldout for p in _passages(document))
  seen = {p for document in train for p in _paragraphs(document)}
  held = [p for document in heldout for p in _paragraphs(document)]
  assert held
  assert not any(p in seen for p in held)


def test_split_is_stable_when_documents_are_added_or_reordered():
  documents = _documents(300)
  _, heldout = data.split(documents[:200], heldout_fraction=0.2, seed=0)
  random.Random(0).shuffle(documents)
  _, more = data.split(documents, heldout_fraction=0.2, seed=0)
  old = {d.id for d in heldout}
  assert {d.id for d in more if int(d.text) < 200} == old


def test_a_larger_fraction_holds_out_a_superset():
  documents = _documents(500)
  _, small = data.split(documents, heldout_fraction=0.1, seed=0)
  _, large = data.split(documents, heldout_fraction=0.2, seed=0)
  assert set(small) < set(large)


@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_split_holds_out_about_the_fraction(fraction):
  count = 4000
  _, heldout = data.split(_documents(count), heldout_fraction=fraction, seed=3)
  deviation = math.sqrt(count * fraction * (1 - fraction))
  assert abs(len(heldout) - count * fraction) < 4 * deviation


def test_another_seed_gives_another_split():
  documents = _documents(200)
  _, one = data.split(documents, heldout_fraction=0.5, seed=0)
  _, two = data.split(documents, heldout_fraction=0.5, seed=1)
  assert set(one) != set(two)


def test_split_refuses_an_empty_side_but_allows_no_held_out():
  assert data.split(_documents(1), heldout_fraction=0, seed=0)[1] == []
  with pytest.raises(ValueError, match="all 1 groups of documents fell on one"):
    data.split(_documents(1), heldout_fraction=0.5, seed=0)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, math.nan])
def test_split_refuses_a_fraction_that_is_none(fraction):
  with pytest.raises(ValueError, match=r"heldout_fraction in \[0, 1\), got"):
    data.split(_documents(3), heldout_fraction=fraction, seed=0)


# ----------------------------------------------------------------- sample


def test_every_prefix_of_a_sample_follows_the_mixture():
  documents = [
    *_documents(300, source="a", length=30),
    *_documents(400, source="b", length=7),
    *_documents(300, source="c", length=90),
  ]
  weights = {"a": 3.0, "b": 1.0, "c": 2.0}
  taken = collections.Counter()
  for document in data.sample(documents, seed=0, weights=weights):
    taken[document.source] += len(document.text)
    if taken["b"] == 400 * 7:
      break
    total = taken.total()
    for source, weight in weights.items():
      assert abs(taken[source] - total * weight / 6) <= 90


def test_a_source_that_runs_out_leaves_the_others_to_go_on():
  documents = [*_documents(3, source="a"), *_documents(9, source="b")]
  order = data.sample(documents, seed=0)
  assert sorted(d.id for d in order) == sorted(d.id for d in documents)
  assert {d.source for d in order[-6:]} == {"b"}


def test_a_sample_depends_on_the_seed_and_not_on_the_order():
  documents = [*_documents(20, source="a"), *_documents(20, source="b")]
  one = data.sample(documents, seed=0)
  assert data.sample(documents[::-1], seed=0) == one
  assert data.sample(documents, seed=1) != one


def test_a_weight_of_zero_leaves_a_source_out():
  documents = [*_documents(3, source="a"), *_documents(3, source="b")]
  order = data.sample(documents, seed=0, weights={"a": 1, "b": 0})
  assert {d.source for d in order} == {"a"}


@pytest.mark.parametrize(
  ("weights", "message"),
  [
    ({"x": 1.0}, r"each of the sources \['s'\], got \['x'\]"),
    ({"s": 0.0}, "at least one positive"),
    ({"s": -1.0}, "finite weights >= 0"),
    ({"s": math.inf}, "finite weights >= 0"),
    ({"s": math.nan}, "finite weights >= 0"),
  ],
)
def test_sample_refuses_weights_that_mean_nothing(weights, message):
  with pytest.raises(ValueError, match=message):
    data.sample(_documents(2), seed=0, weights=weights)


def test_a_sample_of_nothing_is_empty():
  assert data.sample([], seed=0) == []
