import numpy as np
import pytest

from gemma_jax import data

PAD, BOS = 0, 2


def _stream(corpus, tokenizer, **options):
  options = {"context": 32, "bos_id": BOS, "pad_id": PAD} | options
  return data.WindowStream(corpus, tokenizer, **options)


def _counted(windows, sources):
  per_window = windows.mask.sum(1)
  return {
    source: int(per_window[windows.source == i].sum())
    for i, source in enumerate(sources)
  }


def _texts(count, source, words=40):
  return [
    data.Document(f"{source} {i} " * words, source, f"{source}{i}", f"{i}")
    for i in range(count)
  ]


@pytest.mark.parametrize("packing", ["packed", "document"])
@pytest.mark.parametrize("max_tokens", [9000, 9001])
def test_sources_get_equal_shares_to_the_token(
  corpus, tokenizer, packing, max_tokens
):
  stream = _stream(corpus, tokenizer, max_tokens=max_tokens, packing=packing)
  windows = stream.collect()
  assert stream.sources == ("books", "code", "web")
  counts = _counted(windows, stream.sources)
  assert windows.num_tokens == max_tokens
  assert max(counts.values()) - min(counts.values()) <= 1
  report = stream.report()
  assert {s: r["tokens"] for s, r in report["sources"].items()} == counts
  assert report["windows"] == len(windows.tokens)
  assert report["documents"] == len(windows.documents)
  assert not any(row["ran_out"] for row in report["sources"].values())


def test_every_prefix_follows_the_shares(corpus, tokenizer):
  weights = {"web": 3, "code": 1, "books": 2}
  stream = _stream(corpus, tokenizer, allocation=weights, max_tokens=12_000)
  taken = np.zeros(3)
  wanted = np.array([2, 1, 3]) / 6
  for block in stream:
    for source, count in zip(block.source, block.mask.sum(1), strict=True):
      taken[source] += count
      assert (abs(taken - taken.sum() * wanted) <= 31).all()
  np.testing.assert_array_equal(taken, [4000, 2000, 6000])


def test_proportional_follows_the_bytes(corpus, tokenizer):
  stream = _stream(
    corpus, tokenizer, allocation="proportional", max_tokens=8000
  )
  counts = _counted(stream.collect(), stream.sources)
  size = np.bincount(corpus.source, corpus.size)
  for count, share in zip(counts.values(), size / size.sum(), strict=True):
    assert abs(count - 8000 * share) < 1


def test_a_window_holds_one_source_and_its_documents(corpus, tokenizer):
  stream = _stream(corpus, tokenizer, max_tokens=6000)
  windows = stream.collect()
  for row in range(len(windows.tokens)):
    owners = np.unique(windows.document[row])
    sources = {windows.documents[o][1] for o in owners[owners >= 0]}
    assert sources == {stream.sources[windows.source[row]]}


def test_a_weight_of_zero_leaves_a_source_out(corpus, tokenizer):
  weights = {"web": 1, "code": 0, "books": 1}
  stream = _stream(corpus, tokenizer, allocation=weights, max_tokens=3000)
  counts = _counted(stream.collect(), stream.sources)
  assert counts == {"books": 1500, "code": 0, "web": 1500}
  assert set(stream.report()["sources"]) == {"books", "web"}


def test_a_source_that_runs_out_leaves_the_others_to_go_on(tokenizer):
  documents = [*_texts(3, "a"), *_texts(60, "b"), *_texts(60, "c")]
  stream = _stream(documents, tokenizer, max_tokens=9000)
  counts = _counted(stream.collect(), stream.sources)
  assert sum(counts.values()) == 9000
  assert counts["a"] < 3000
  assert abs(counts["b"] - counts["c"]) <= 1
  rows = stream.report()["sources"]
  assert [rows[s]["ran_out"] for s in "abc"] == [True, False, False]
  assert [rows[s]["wanted"] for s in "abc"] == [3000] * 3
  lines = stream.describe().split("\n")
  assert len(lines) == 3
  assert lines[0].startswith(f"a: {counts['a']:,} tokens of 3,000 wanted, ")
  assert lines[0].endswith("; it ran out")


def test_a_corpus_that_ends_first_gives_all_it_has(tokenizer):
  documents = [*_texts(3, "a"), *_texts(5, "b")]
  limited = _stream(documents, tokenizer, max_tokens=10**6, bos="window")
  everything = _stream(documents, tokenizer, bos="window")
  windows = everything.collect()
  np.testing.assert_array_equal(limited.collect().tokens, windows.tokens)
  counts = [len(tokenizer.encode(d.text).ids) for d in documents]
  assert everything.report()["tokens"] == sum(counts)


@pytest.mark.parametrize(
  ("allocation", "message"),
  [
    ("fair", r"\['equal', 'proportional'\] .*\['books', 'code', 'web'\], got"),
    ({"web": 1}, r"each of the sources \['books', .*got \['web'\]"),
    ({"web": 1, "code": 1, "books": 1, "x": 1}, r"got \['books', .*'x'\]"),
    ({"web": 0, "code": 0, "books": 0}, "at least one positive"),
    ({"web": -1, "code": 1, "books": 1}, "finite weights >= 0"),
  ],
)
def test_an_allocation_that_means_nothing_is_refused(
  corpus, tokenizer, allocation, message
):
  with pytest.raises(ValueError, match=message):
    _stream(corpus, tokenizer, allocation=allocation)
