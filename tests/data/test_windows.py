import dataclasses

import numpy as np
import pytest

from gemma_jax import data

PAD, EOS, BOS = 0, 1, 2


class Words:
  """One token per word, its number; keeps what it was asked to encode."""

  def __init__(self):
    self.seen = []

  def encode_batch(self, texts, add_special_tokens):
    assert not add_special_tokens
    self.seen += texts
    return [Encoding([int(word) for word in text.split()]) for text in texts]


@dataclasses.dataclass
class Encoding:
  ids: list[int]


def _documents(*texts):
  return [
    data.Document(text, "s", f"d{i}", f"d{i}") for i, text in enumerate(texts)
  ]


def _make(documents, tokenizer=None, **options):
  options = {"context": 4, "bos_id": BOS, "pad_id": PAD} | options
  return data.make_windows(documents, tokenizer or Words(), **options)


def test_packed_windows_look_as_drawn():
  windows = _make(_documents("10 11 12 13", "20 21 22 23", "30"))
  np.testing.assert_array_equal(
    windows.tokens,
    [
      [BOS, 10, 11, 12],
      [BOS, 13, BOS, 20],
      [BOS, 21, 22, 23],
      [BOS, 30, PAD, PAD],
    ],
  )
  np.testing.assert_array_equal(
    windows.document,
    [[0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1], [2, 2, -1, -1]],
  )
  np.testing.assert_array_equal(windows.mask, windows.tokens >= 10)
  assert windows.num_tokens == 9
  assert [name for _, _, name in windows.documents] == ["d0", "d1", "d2"]


def test_document_windows_look_as_drawn():
  windows = _make(_documents("10 11 12 13", "20", "30"), packing="document")
  np.testing.assert_array_equal(
    windows.tokens,
    [
      [BOS, 10, 11, 12],
      [BOS, 13, PAD, PAD],
      [BOS, 20, PAD, PAD],
      [BOS, 30, PAD, PAD],
    ],
  )
  np.testing.assert_array_equal(
    windows.document,
    [[0, 0, 0, 0], [0, 0, -1, -1], [1, 1, -1, -1], [2, 2, -1, -1]],
  )


@pytest.mark.parametrize("packing", ["packed", "document"])
def test_detokenised_windows_give_back_the_text(builtin, tokenizer, packing):
  documents = data.sample(builtin, seed=0)[:12]
  windows = _make(documents, tokenizer, context=64, packing=packing)
  assert windows.tokens.dtype == windows.document.dtype == np.int32
  assert windows.mask.dtype == bool
  assert (windows.tokens[:, 0] == BOS).all()
  assert not windows.mask[:, 0].any()
  for index, document in enumerate(documents):
    here = (windows.document == index) & windows.mask
    assert tokenizer.decode(windows.tokens[here].tolist()) == document.text
    assert windows.documents[index][0] == document.id


def test_only_the_last_packed_window_is_padded(builtin, tokenizer):
  windows = _make(builtin[:20], tokenizer, context=64)
  assert (windows.document[:-1] >= 0).all()
  assert (windows.tokens[windows.document < 0] == PAD).all()


def test_special_tokens_in_the_text_do_not_count(tokenizer):
  text = "one <eos> two <bos> three <pad> four" * 5
  windows = _make(_documents(text), tokenizer, context=16, special_ids=[EOS])
  assert {PAD, EOS, BOS} <= set(windows.tokens.ravel().tolist())
  assert not np.isin(windows.tokens[windows.mask], [PAD, EOS, BOS]).any()


@pytest.mark.parametrize("packing", ["packed", "document"])
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5, 6, 7, 8])
def test_max_tokens_is_exact(packing, max_tokens):
  documents = _documents("10 11 1 12 13", "20 1 21 22 23", "30 31 32")
  windows = _make(
    documents, packing=packing, max_tokens=max_tokens, special_ids=[EOS]
  )
  assert windows.num_tokens == max_tokens
  counted = windows.tokens[windows.mask].tolist()
  assert counted == [10, 11, 12, 13, 20, 21, 22, 23][:max_tokens]
  assert windows.mask.any(axis=1).all()
  assert windows.document.max() + 1 == len(windows.documents)


def test_a_corpus_shorter_than_max_tokens_gives_what_it_has():
  assert _make(_documents("10 11 12 13"), max_tokens=99).num_tokens == 4


def test_a_budget_tokenises_no_more_than_it_needs():
  tokenizer = Words()
  documents = _documents(*["10 " * 50_000] * 20)
  _make(documents, tokenizer, max_tokens=60_000, context=512)
  assert len(tokenizer.seen) == 2


def test_documents_without_tokens_are_not_listed():
  windows = _make(_documents("10 11", " ", "20 21"))
  assert [name for _, _, name in windows.documents] == ["d0", "d2"]


def test_fingerprint_follows_tokens_mask_and_documents():
  windows = _make(_documents("10 11 12", "20 21"))
  same = _make(_documents("10 11 12", "20 21"))
  assert data.fingerprint(windows) == data.fingerprint(same)
  assert len(data.fingerprint(windows)) == 64
  others = [
    dataclasses.replace(windows, tokens=windows.tokens + 1),
    dataclasses.replace(windows, mask=~windows.mask),
    dataclasses.replace(windows, document=windows.document + 1),
    dataclasses.replace(windows, documents=windows.documents[:1]),
    _make(_documents("10 11 12", "20 21"), context=7),
  ]
  prints = {data.fingerprint(other) for other in [windows, *others]}
  assert len(prints) == 6


@pytest.mark.parametrize(
  ("texts", "options", "message"),
  [
    ((), {}, "at least one document, got none"),
    (("10",), {"context": 1}, "context >= 2.*got 1"),
    (("10",), {"max_tokens": 0}, "max_tokens >= 1 or None, got 0"),
    (("10",), {"packing": "tight"}, r"\['packed', 'document'\], got 'tight'"),
    (
      ("10", "11"),
      {"context": 8},
      "corpus too short: 2 tokens arrived, .* context 8 needs 7; bring more",
    ),
    (("10",), {"max_tokens": 2}, "corpus too short: 1 tokens arrived"),
    ((" ",), {"packing": "document"}, "corpus too short: 0 tokens arrived"),
  ],
)
def test_errors_say_what_to_change(texts, options, message):
  with pytest.raises(ValueError, match=message):
    _make(_documents(*texts), **options)


def test_a_budget_below_one_window_is_enough():
  assert _make(_documents("10 11 12"), context=9, max_tokens=2).num_tokens == 2


def test_a_tokenizer_of_another_kind_is_refused():
  with pytest.raises(TypeError, match=r"encode_batch.*\.backend_tokenizer"):
    _make(_documents("10"), tokenizer=object())


def test_a_tokenizer_that_truncates_or_pads_is_refused(tokenizer):
  tokenizer.enable_truncation(8)
  with pytest.raises(ValueError, match=r"without truncation.*no_truncation"):
    _make(_documents("10"), tokenizer)
  tokenizer.no_truncation()
  tokenizer.enable_padding()
  with pytest.raises(ValueError, match=r"without padding.*no_padding"):
    _make(_documents("10"), tokenizer)
  tokenizer.no_padding()


def test_windows_without_spans_and_strata_say_that_they_have_none():
  made = _make(_documents("10 11 12"))
  assert (made.begin == -1).all()
  assert made.source.tolist() == [0]
  plain = data.Windows(made.tokens, made.mask, made.document, made.documents)
  assert plain.begin.shape == plain.end.shape == made.tokens.shape
  assert (plain.end == -1).all()
  assert plain.source.tolist() == [0]
  assert plain.first_document == 0
