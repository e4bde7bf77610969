import collections
import gc
import json
import math
import random
import tracemalloc

import numpy as np
import pytest

from gemma_jax import data


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


# ----------------------------------------------------------------- corpus


def test_a_corpus_of_a_list_gives_back_its_documents():
  documents = [*_documents(3, source="b"), *_documents(2, source="a")]
  corpus = data.Corpus.of(documents)
  assert list(corpus) == documents
  assert (corpus[-1], corpus[1:3][0]) == (documents[-1], documents[1])
  assert corpus.sources == ("a", "b")
  assert corpus.source.tolist() == [1, 1, 1, 0, 0]
  assert [f"{key:016x}" for key in corpus.key] == [d.id for d in documents]
  assert corpus.size.tolist() == [10] * 5
  assert data.Corpus.of(corpus) is corpus
  with pytest.raises(IndexError):
    corpus[5]


def test_columns_have_their_types_and_sizes_count_bytes():
  corpus = data.Corpus.of([data.Document("h\u00e9\u6f22", "s", "n", "g")])
  assert corpus.size.tolist() == [6]
  types = [getattr(corpus, n).dtype for n in ("source", "key", "group", "size")]
  assert types == [np.int32, np.uint64, np.uint64, np.int64]


def test_select_takes_indices_and_masks():
  corpus = data.Corpus.of(_documents(5))
  assert [d.name for d in corpus.select([3, 0])] == ["s3", "s0"]
  assert [d.name for d in corpus.select(corpus.key == corpus.key[2])] == ["s2"]
  assert list(corpus.select([])) == []


def test_keep_narrows_the_strata_and_names_the_unknown():
  documents = [*_documents(2, source="c"), *_documents(2, source="a")]
  corpus = data.Corpus.of(documents).keep(["c"])
  assert corpus.sources == ("c",)
  assert list(corpus) == documents[:2]
  assert corpus.source.tolist() == [0, 0]
  with pytest.raises(ValueError, match=r"no sources \['b'\]; .*\['c'\]"):
    corpus.keep("b")


def test_an_index_does_not_grow_with_the_text(tmp_path):
  path = tmp_path / "long.jsonl"
  with path.open("w") as file:
    for i in range(2000):
      file.write(json.dumps({"text": f"{i} {'x' * 5000}"}) + "\n")
  data.load({"kind": "jsonl", "path": path})  # What is allocated once.
  gc.collect()
  tracemalloc.start()
  corpus = data.load({"kind": "jsonl", "path": path})
  gc.collect()
  held, _ = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert len(corpus) == 2000
  assert held < 2000 * 60 + 50_000


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


def test_a_split_of_files_equals_that_of_their_documents(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text("".join(f'{{"text": "{i // 2}"}}\n' for i in range(400)))
  corpus = data.load({"kind": "jsonl", "path": path})
  lazy = data.split(corpus, heldout_fraction=0.3, seed=0)
  here = data.split(list(corpus), heldout_fraction=0.3, seed=0)
  for one, other in zip(lazy, here, strict=True):
    assert one.key.tolist() == other.key.tolist()
  # Copies stay together.
  assert not {d.text for d in lazy[0]} & {d.text for d in lazy[1]}


def test_another_seed_gives_another_split():
  documents = _documents(200)
  _, one = data.split(documents, heldout_fraction=0.5, seed=0)
  _, two = data.split(documents, heldout_fraction=0.5, seed=1)
  assert set(one) != set(two)


def test_split_refuses_an_empty_side_but_allows_no_held_out():
  assert data.split(_documents(1), heldout_fraction=0, seed=0)[1].key.size == 0
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
  one = data.sample(documents, seed=0).key.tolist()
  assert data.sample(documents[::-1], seed=0).key.tolist() == one
  other = data.sample(documents, seed=1).key.tolist()
  assert other != one
  assert sorted(other) == sorted(one)


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
  assert not len(data.sample([], seed=0))
