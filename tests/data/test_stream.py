import dataclasses
import gc
import json
import threading
import tracemalloc

import numpy as np
import pytest

from gemma_jax import data
from gemma_jax.data import lines
from gemma_jax.data import stream as streaming

PAD, EOS, BOS = 0, 1, 2


def _stream(corpus, tokenizer, **options):
  options = {"context": 32, "bos_id": BOS, "pad_id": PAD} | options
  return data.WindowStream(corpus, tokenizer, **options)


def _same(one, other):
  assert one.documents == other.documents
  assert one.first_document == other.first_document
  for name in ("tokens", "mask", "document", "begin", "end", "source"):
    np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def _texts(count, source, words=40):
  return [
    data.Document(f"{source} {i} " * words, source, f"{source}{i}", f"{i}")
    for i in range(count)
  ]


# ----------------------------------------------------------------- choice


def test_workers_and_the_order_of_files_do_not_change_the_choice(
  path, tmp_path, tokenizer, monkeypatch
):
  # So that there is work for four.
  monkeypatch.setattr(lines, "_RANGE_BYTES", 1 << 16)
  records = path.read_text("utf-8").split("\n")
  for name, some in (("a", records[::2]), ("b", records[1::2])):
    (tmp_path / f"{name}.jsonl").write_text("\n".join(some), "utf-8")
  files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
  config = {"kind": "jsonl", "source_field": "meta.set"}
  streams = [
    _stream(
      data.load(config | {"path": p}, workers=w), tokenizer, max_tokens=2000
    )
    for p, w in ((files, 1), (files[::-1], 4), (str(tmp_path), 4))
  ]
  chosen = [stream.collect() for stream in streams]
  assert 10 < len(chosen[0].documents) < len(records) / 2
  for stream, windows in zip(streams, chosen, strict=True):
    _same(windows, chosen[0])
    assert stream.fingerprint == streams[0].fingerprint


def test_the_order_of_the_corpus_does_not_matter(corpus, tokenizer):
  order = np.random.default_rng(0).permutation(len(corpus))
  one = _stream(corpus, tokenizer, max_tokens=2000)
  other = _stream(corpus.select(order), tokenizer, max_tokens=2000)
  assert one.fingerprint == other.fingerprint
  _same(one.collect(), other.collect())


def test_a_seed_decides_which_documents_are_taken(corpus, tokenizer):
  def chosen(seed):
    stream = _stream(corpus, tokenizer, max_tokens=2000, seed=seed)
    return [identity for identity, _, _ in stream.collect().documents]

  assert chosen(0) == chosen(0)
  # 20 of 530: few are in both, if the seeds are independent.
  assert len({*chosen(0)} & {*chosen(1)}) < len(chosen(0)) / 2


def test_every_document_is_as_likely_to_be_taken(tokenizer):
  documents = data.Corpus.of(_texts(40, "a", words=1))
  first = np.zeros(40)
  for seed in range(400):
    order = streaming.shuffled(documents, seed)[0]
    first[order[:10]] += 1
  # Binomial(400, 1/4): five deviations.
  assert abs(first - 100).max() < 5 * np.sqrt(400 * 3 / 16)


# ---------------------------------------------------------------- windows


def test_counted_tokens_lead_back_to_the_text(corpus, tokenizer):
  stream = _stream(
    corpus, tokenizer, max_tokens=5000, stride=20, document_tokens=90
  )
  windows = stream.collect()
  texts = {d.id: d.text.encode() for d in corpus}
  beyond = 0
  for row, column in np.argwhere(windows.mask):
    owner = windows.document[row, column]
    raw = texts[windows.documents[owner][0]]
    begin, end = windows.begin[row, column], windows.end[row, column]
    token = tokenizer.decode([int(windows.tokens[row, column])])
    if "\ufffd" in token:
      assert not raw[begin:end].isascii()
      beyond += 1
    else:
      assert raw[begin:end].decode() == token
  assert beyond > 10
  # Behind one another within a document.
  order = np.lexsort(
    (windows.begin[windows.mask], windows.document[windows.mask])
  )
  owner, begin = windows.document[windows.mask], windows.begin[windows.mask]
  same = owner[order][1:] == owner[order][:-1]
  assert (begin[order][1:] >= begin[order][:-1])[same].all()


def test_a_stride_counts_every_token_once(tokenizer):
  documents = _texts(6, "a")
  # The texts repeat themselves, so windows do.
  options = {"packing": "document", "drop_duplicates": False}
  stream = _stream(documents, tokenizer, stride=7, **options)
  windows = stream.collect()
  for number, (identity, _, _) in enumerate(windows.documents):
    (document,) = [d for d in documents if d.id == identity]
    here = windows.mask & (windows.document == number)
    assert tokenizer.decode(windows.tokens[here].tolist()) == document.text
    assert here.sum(1).max() <= 31
    new = here.sum(1)[here.any(1)]
    assert (new[1:] <= 7).all()
    assert (new[1:-1] == 7).all()


def test_a_budget_masks_the_rest_of_a_repeating_window(tokenizer):
  stream = _stream(_texts(9, "a"), tokenizer, stride=5, max_tokens=103)
  windows = stream.collect()
  assert windows.num_tokens == 103
  assert windows.mask.any(1).all()


def test_windows_that_repeat_are_dropped_and_counted(tokenizer):
  copies = [
    data.Document("the same text " * 40, "a", f"copy{i}", f"{i}")
    for i in range(5)
  ]
  documents = [*copies, *_texts(20, "b")]
  options = {"packing": "document", "allocation": {"a": 1, "b": 1}}
  kept = _stream(documents, tokenizer, drop_duplicates=False, **options)
  everything = kept.collect()
  stream = _stream(documents, tokenizer, **options)
  windows = stream.collect()
  both = [
    [(t.tobytes(), m.tobytes()) for t, m in zip(w.tokens, w.mask, strict=True)]
    for w in (everything, windows)
  ]
  assert both[1] == list(dict.fromkeys(both[0]))
  report = stream.report()
  assert report["duplicates"] == len(both[0]) - len(both[1])
  assert (
    report["sources"]["a"]["duplicates"]
    == 4 * report["sources"]["a"]["windows"]
  )
  assert report["sources"]["a"]["documents"] == 1
  assert "duplicates dropped" in stream.describe()
  assert kept.report()["duplicates"] == 0


def test_blocks_are_of_fixed_size_and_number_their_documents(corpus, tokenizer):
  stream = _stream(corpus, tokenizer, max_tokens=9000)
  blocks = list(stream)
  sizes = [len(block.tokens) for block in blocks]
  assert len(sizes) > 2
  assert set(sizes[:-1]) == {64}
  assert 0 < sizes[-1] <= 64
  first = 0
  for block in blocks:
    assert block.first_document == first
    first += len(block.documents)
    assert block.document.max() < first
  whole = stream.collect()
  assert whole.first_document == 0
  assert len(whole.documents) == first
  np.testing.assert_array_equal(
    whole.document, np.concatenate([block.document for block in blocks])
  )
  assert set(np.unique(whole.document)) - {-1} == set(range(first))


def test_iterating_again_gives_the_same_whatever_was_read(corpus, tokenizer):
  stream = _stream(corpus, tokenizer, max_tokens=9000)
  some = iter(stream)
  next(some)
  once = list(stream)
  next(some)
  again = list(stream)
  some.close()
  assert len(once) == len(again)
  for one, other in zip(once, again, strict=True):
    _same(one, other)


def test_the_size_of_a_batch_of_texts_changes_nothing(
  corpus, tokenizer, monkeypatch
):
  once = _stream(corpus, tokenizer, max_tokens=3000).collect()
  monkeypatch.setattr(streaming, "BATCH_CHARACTERS", 1)
  monkeypatch.setattr(streaming, "_LEAST_BATCH_CHARACTERS", 1)
  _same(once, _stream(corpus, tokenizer, max_tokens=3000).collect())


def test_one_source_gives_what_make_windows_gives(tokenizer):
  corpus = data.Corpus.of(_texts(12, "a"))
  stream = _stream(corpus, tokenizer, max_tokens=700, seed=3)
  order = data.sample(corpus, seed=3)
  expected = data.make_windows(
    order, tokenizer, context=32, bos_id=BOS, pad_id=PAD, max_tokens=700
  )
  _same(stream.collect(), expected)


# ------------------------------------------------------ thread and memory


def test_closing_early_ends_the_thread(corpus, tokenizer):
  before = threading.active_count()
  windows = iter(_stream(corpus, tokenizer))
  next(windows)
  assert threading.active_count() == before + 1
  windows.close()
  assert threading.active_count() == before
  windows = iter(_stream(corpus, tokenizer))
  next(windows)
  del windows
  gc.collect()
  assert threading.active_count() == before


def test_an_error_while_reading_reaches_the_consumer(tmp_path, tokenizer):
  path = tmp_path / "a.jsonl"
  path.write_text(
    "".join(f'{{"text": "{"abc " * i}"}}\n' for i in range(1, 99))
  )
  stream = _stream(data.load({"kind": "jsonl", "path": path}), tokenizer)
  path.unlink()
  with pytest.raises(FileNotFoundError, match=r"a.jsonl"):
    stream.collect()


class Words:
  """One token per word: little work, so that many windows cost little."""

  def encode_batch(self, texts, add_special_tokens):
    return [Encoding([int(word) for word in text.split()]) for text in texts]


@dataclasses.dataclass
class Encoding:
  ids: list[int]


def test_memory_does_not_grow_with_the_windows(tmp_path):
  path = tmp_path / "a.jsonl"
  generator = np.random.default_rng(0)
  with path.open("w") as file:
    for _ in range(800):
      words = " ".join(map(str, generator.integers(9, 10**6, 100)))
      file.write(json.dumps({"text": words}) + "\n")
  corpus = data.load({"kind": "jsonl", "path": path})

  def peak(max_tokens):
    stream = _stream(
      corpus, Words(), context=8, max_tokens=max_tokens, bos="window"
    )
    tracemalloc.start()
    count = sum(len(block.tokens) for block in stream)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return count, most

  count, low = peak(8_000)
  more, high = peak(80_000)
  assert more >= 9.9 * count
  # Ten thousand more windows of 8 positions of 17 bytes would be 1.4 MB; some
  # thousand hashes wait in a set until they take 8 bytes each.
  assert high - low < 700_000


# ------------------------------------------------------ fields and refusals


def test_fields_are_json_and_resolved(corpus, tokenizer):
  stream = _stream(corpus, tokenizer, special_ids=[EOS], max_tokens=100)
  assert json.loads(json.dumps(stream.fields)) == stream.fields
  assert stream.fields == {
    "format": 1,
    "sources": ["books", "code", "web"],
    "allocation": {"books": 1 / 3, "code": 1 / 3, "web": 1 / 3},
    "context": 32,
    "bos_id": BOS,
    "pad_id": PAD,
    "special_ids": [PAD, EOS, BOS],
    "seed": 0,
    "max_tokens": 100,
    "packing": "packed",
    "bos": "both",
    "stride": 31,
    "document_tokens": None,
    "drop_duplicates": True,
  }


def test_the_fingerprint_follows_everything_that_decides(corpus, tokenizer):
  class Silent:
    """Fails if anything is tokenised."""

    def __init__(self, text):
      self.to_str = lambda: text

    def encode_batch(self, texts, add_special_tokens):
      raise AssertionError

  def fingerprint(documents=corpus, text="t", **options):
    return _stream(documents, Silent(text), **options).fingerprint

  assert fingerprint() == fingerprint()
  assert len(fingerprint()) == 64
  others = [
    fingerprint(text="other"),
    fingerprint(corpus.select(np.arange(len(corpus) - 1))),
    fingerprint(corpus.keep(["web", "code"])),
    fingerprint(context=31),
    fingerprint(bos_id=9),
    fingerprint(pad_id=9),
    fingerprint(seed=1),
    fingerprint(max_tokens=9),
    fingerprint(allocation="proportional"),
    fingerprint(packing="document"),
    fingerprint(bos="window"),
    fingerprint(stride=9),
    fingerprint(special_ids=[7]),
    fingerprint(document_tokens=9),
    fingerprint(drop_duplicates=False),
  ]
  assert len({fingerprint(), *others}) == 16
  assert _stream(corpus, tokenizer).fingerprint not in others


def test_a_report_needs_an_iteration_to_the_end(corpus, tokenizer):
  stream = _stream(corpus, tokenizer)
  windows = iter(stream)
  next(windows)
  windows.close()
  with pytest.raises(RuntimeError, match="read to its end"):
    stream.report()


def test_a_corpus_too_short_for_a_window_says_so(tokenizer):
  documents = [data.Document("hi", "a", "n", "g")]
  with pytest.raises(ValueError, match=r"corpus too short: .*context 32 needs"):
    _stream(documents, tokenizer).collect()
  assert _stream(documents, tokenizer, max_tokens=1).collect().num_tokens == 1


@pytest.mark.parametrize(
  ("documents", "tokenizer_", "options", "error", "message"),
  [
    ([], Words(), {}, ValueError, "at least one document, got none"),
    (None, object(), {}, TypeError, "encode_batch"),
    (None, Words(), {"context": 1}, ValueError, "context >= 2"),
    (None, Words(), {"max_tokens": 0}, ValueError, "max_tokens >= 1"),
    (None, Words(), {"stride": 32}, ValueError, "stride in"),
  ],
)
def test_bad_arguments_are_refused_at_once(
  corpus, documents, tokenizer_, options, error, message
):
  with pytest.raises(error, match=message):
    _stream(corpus if documents is None else documents, tokenizer_, **options)
