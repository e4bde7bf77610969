"""Tokens that end at the same byte, against what tokenizers decode."""

import dataclasses

import numpy as np
import pytest
import tokenizers

from gemma_jax import data
from gemma_jax.alignment.pairing import (
  Coverage,
  byte_ends,
  coverage,
  pair_by_byte_end,
  pair_ends,
  pair_windows,
)
from gemma_jax.alignment.pooling import pool_spans
from gemma_jax.data.document import loose

# Characters of one to four bytes, clusters of several characters, and such as
# one vocabulary or both have no token for.
BITS = (
  *"aeiost.,'09",
  "the",
  " of",
  " ",
  "  ",
  "\n",
  "\r\n",
  "\t",
  "é",
  "e\u0301",
  "Ὀ",
  "ǆ",
  "\u0323\u0307",
  "日本",
  "鿕",
  "한국",
  "ไทย",
  "🙂",
  "👩\u200d🔬",
  "🇩🇪",
  "\U00010080",
  "\U0001d11e",
  "\u200b",
)


def random_text(rng, bits=30):
  return "".join(rng.choice(BITS, rng.integers(1, bits)))


def encode(text, tokenizer):
  return tokenizer.encode(text, add_special_tokens=False)


def decoded(text, tokenizer):
  """What the tokenizer makes of every beginning of the text's tokens."""
  ids = encode(text, tokenizer)
  backend = tokenizer.backend_tokenizer
  return [
    backend.decode(ids[: i + 1], skip_special_tokens=False)
    for i in range(len(ids))
  ]


def at_characters(text):
  """Numbers of bytes at which a character of the text ends."""
  return np.cumsum([len(c.encode()) for c in text])


@pytest.mark.parametrize("name", ["gemma", "smollm2"])
def test_the_same_tokenizer_pairs_every_token_with_itself(name, request):
  tokenizer = request.getfixturevalue(name)
  rng = np.random.default_rng(0)
  for text in ["", " ", "  two", *(random_text(rng) for _ in range(20))]:
    tokens = len(encode(text, tokenizer))
    pairs = pair_by_byte_end(text, tokenizer, tokenizer)
    np.testing.assert_array_equal(pairs, np.arange(tokens)[:, None] * [1, 1])
    assert pairs.dtype == np.int64


def test_pairs_are_all_tokens_after_which_both_have_decoded_the_same(
  gemma, smollm2
):
  """Every token of one against every token of the other."""
  rng = np.random.default_rng(1)
  split = 0
  for text in (random_text(rng) for _ in range(60)):
    known = [decoded(text, t) for t in (gemma, smollm2)]
    expected = {
      (i, j)
      for i, a in enumerate(known[0])
      for j, b in enumerate(known[1])
      if a == b and text.startswith(a)
    }
    pairs = pair_by_byte_end(text, gemma, smollm2)
    ends = byte_ends(encode(text, gemma), gemma, text)[pairs[:, 0]]
    whole = np.isin(ends, at_characters(text))
    assert set(map(tuple, pairs[whole].tolist())) == expected
    split += (~whole).sum()
  # Tokens of both that end inside the same character were among them.
  assert split > 10


def test_ends_are_counted_in_bytes_of_the_text(gemma, smollm2):
  for text in ("  a\r\nb", "né e\u0301", "日本語", "\U00010080"):
    for tokenizer in (gemma, smollm2):
      ids = encode(text, tokenizer)
      ends = byte_ends(ids, tokenizer, text)
      assert ends.dtype == np.int64
      assert ends[-1] == len(text.encode())
      for end, so_far in zip(ends, decoded(text, tokenizer), strict=True):
        if text.startswith(so_far):
          assert end == len(so_far.encode())
  # A character that neither knows: a token for each of its bytes.
  for tokenizer in (gemma, smollm2):
    ids = encode("a\U00010080", tokenizer)
    ends = byte_ends(ids, tokenizer, "a\U00010080")
    np.testing.assert_array_equal(ends, [1, 2, 3, 4, 5])


def test_a_tokenizer_of_tokenizers_does_as_well_as_one_of_transformers(
  gemma, smollm2
):
  text = "one 日本 🙂"
  np.testing.assert_array_equal(
    pair_by_byte_end(text, gemma.backend_tokenizer, smollm2.backend_tokenizer),
    pair_by_byte_end(text, gemma, smollm2),
  )


def test_the_sign_for_a_space_in_a_text_is_told_from_a_space(gemma, smollm2):
  """Gemma's tokens are the same for both, three bytes or one."""
  text = "▁a \U00010080▁▁ b"
  ids = encode(text, gemma)
  assert ids == encode(text.replace("▁", " "), gemma)
  ends = byte_ends(ids, gemma, text)
  known = ends[ends >= 0]
  assert set(known) == {4, 5, 9, 16, 17}
  # Three of the four bytes that the sign between is written with.
  assert (ends < 0).sum() == 3
  pairs = pair_by_byte_end(text, gemma, smollm2)
  others = byte_ends(encode(text, smollm2), smollm2, text)
  np.testing.assert_array_equal(ends[pairs[:, 0]], others[pairs[:, 1]])
  assert set(known) & set(others) == set(ends[pairs[:, 0]])


def test_a_byte_that_is_no_token_moves_no_end(smollm2):
  text = "a\x04b c"
  ids = encode(text, smollm2)
  ends = byte_ends(ids, smollm2, text)
  assert smollm2.decode(ids) == "ab c"
  assert ends[-1] == 5
  assert set(ends) <= {1, 3, 5}


def test_special_tokens_in_a_text_are_as_long_as_it_spells_them(gemma, smollm2):
  text = "a<eos> b<|im_end|>c"
  for tokenizer, special in ((gemma, "<eos>"), (smollm2, "<|im_end|>")):
    ids = encode(text, tokenizer)
    ends = byte_ends(ids, tokenizer, text)
    here = ids.index(tokenizer.convert_tokens_to_ids(special))
    assert ends[here] == text.index(special) + len(special)
    assert ends[-1] == len(text)


def byte_level(normalizer=None):
  """A byte-level BPE without merges, its offsets trimmed as NeoX's are."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocab = {c: i for i, c in enumerate(alphabet)}
  made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  made.post_processor = tokenizers.processors.ByteLevel(
    add_prefix_space=False, trim_offsets=True
  )
  made.decoder = tokenizers.decoders.ByteLevel()
  if normalizer:
    made.normalizer = normalizer
  return made


def test_trimmed_offsets_and_cut_characters_do_not_matter(gemma):
  text = "  é 🙂"
  pairs = pair_by_byte_end(text, gemma, byte_level())
  ends = byte_ends(encode(text, gemma), gemma, text)
  np.testing.assert_array_equal(pairs[:, 0], np.arange(len(ends)))
  np.testing.assert_array_equal(pairs[:, 1], ends - 1)


def test_a_tokenizer_that_composes_characters_is_told_to_get_them_composed(
  gemma,
):
  tokenizer = byte_level(tokenizers.normalizers.NFC())
  pairs = pair_by_byte_end("n\u00e9", gemma, tokenizer)
  assert pairs[-1, 1] == 2
  with pytest.raises(ValueError, match="normalize_str"):
    pair_by_byte_end("ne\u0301", gemma, tokenizer)


def test_other_tokens_than_the_texts_are_an_error(gemma):
  ids = encode("one two", gemma)
  for other in ([gemma.bos_token_id, *ids], ids[1:]):
    with pytest.raises(ValueError, match="add_special_tokens=False"):
      byte_ends(other, gemma, "one two")


def test_a_tokenizer_that_truncates_is_refused(gemma):
  tokenizer = byte_level()
  tokenizer.enable_truncation(4)
  with pytest.raises(ValueError, match="no_truncation"):
    pair_by_byte_end("one two", gemma, tokenizer)


def test_equal_ends_are_paired_by_their_last_tokens():
  rng = np.random.default_rng(2)
  for _ in range(50):
    ends = [np.sort(rng.integers(-2, 20, rng.integers(0, 15))) for _ in "ab"]
    expected = [
      (i, j)
      for i, a in enumerate(ends[0])
      for j, b in enumerate(ends[1])
      if a == b >= 0 and a not in ends[0][i + 1 :] and b not in ends[1][j + 1 :]
    ]
    pairs = pair_ends(*ends)
    assert pairs.shape == (len(expected), 2)
    assert list(map(tuple, pairs.tolist())) == expected


def test_coverage_is_that_by_hand():
  # foo| bar| baz and foo| b|ar| b|az
  found = coverage([3, 7, 11], [3, 5, 7, 9, 11])
  expected = Coverage(
    tokens_a=1, tokens_b=3 / 5, bytes=7 / 11, one_to_one=1 / 3
  )
  assert found == expected
  # ab|c|de|fgh and a|bc|de|fg|h
  found = coverage([2, 3, 5, 8], [1, 3, 5, 7, 8])
  assert found == Coverage(3 / 4, 3 / 5, 4 / 8, 1 / 3)
  # The same with a token of unknown end: of |de|, it is not known where the
  # token before it ends.
  found = coverage([2, -1, 5, 8], [1, 3, 5, 7, 8])
  assert found == Coverage(2 / 4, 2 / 5, 3 / 8, 0)
  assert coverage([1, 2], [1, 2]) == Coverage(1, 1, 1, 1)
  assert coverage([1, 3], [2, 4]) == Coverage(0, 0, 0, 0)
  with pytest.raises(ValueError, match="got 0 and 2"):
    coverage([], [1, 2])


@pytest.mark.parametrize("how", ["last", "mean", "max"])
def test_spans_are_pooled_as_one_by_one(how):
  rng = np.random.default_rng(3)
  pool = {"last": lambda x: x[-1], "mean": np.mean, "max": np.max}[how]
  for _ in range(20):
    ends = np.unique(rng.integers(0, 40, 20))
    ends[rng.random(len(ends)) < 0.2] = -1
    common = ends[(rng.random(len(ends)) < 0.5) & (ends >= 0)]
    values = rng.normal(size=(len(ends), 3)).astype(np.float32)
    found = pool_spans(values, ends, common, how=how)
    assert found.shape == (len(common), 3)
    assert found.dtype == np.float32
    first = 0
    for row, end in zip(found, common, strict=True):
      last = ends.tolist().index(end)
      for column in range(3):
        span = values[first : last + 1, column]
        assert row[column] == pytest.approx(pool(span), abs=1e-6)
      first = last + 1


@pytest.mark.parametrize(
  ("ends", "common", "how", "message"),
  [
    ([1, 2, 3], [2], "sum", "one of"),
    ([1, 2], [2], "last", "same tokens"),
    ([1, 2, 4], [2, 3], "last", "got 1 others of 2, such as 3"),
    ([1, -1, 4], [-1, 4], "last", "such as -1"),
    ([1, 2, 3], [3, 2], "last", "ascend"),
    ([3, 2, 1], [2, 3], "last", "ascend"),
  ],
)
def test_spans_that_do_not_fit_are_errors(ends, common, how, message):
  with pytest.raises(ValueError, match=message):
    pool_spans(np.zeros((3, 2)), ends, common, how=how)


@pytest.fixture(scope="module")
def documents():
  rng = np.random.default_rng(4)
  texts = ["".join(random_text(rng) for _ in range(6)) for _ in range(12)]
  return [loose(text, "s", f"d{i}") for i, text in enumerate(texts)]


def make(documents, tokenizer, **options):
  options = {"context": 24, "bos_id": 2, "pad_id": 0} | options
  return data.make_windows(documents, tokenizer.backend_tokenizer, **options)


def whole_texts(documents, windows_a, gemma, windows_b, smollm2, skip):
  """Pairs of the texts' tokens at characters' ends, as places in windows."""

  def places(windows, document):
    index = [d[0] for d in windows.documents].index(document.id)
    here = windows.mask & (windows.document == index)
    return np.argwhere(here).tolist()

  expected = []
  for document in documents:
    place_a, place_b = (places(w, document) for w in (windows_a, windows_b))
    ends = byte_ends(encode(document.text, gemma), gemma, document.text)
    for i, j in pair_by_byte_end(document.text, gemma, smollm2):
      at = (*place_a[i], *place_b[j])
      if ends[i] in at_characters(document.text) and min(at[1::2]) >= skip:
        expected.append((document.id, *at))
  return expected


@pytest.mark.parametrize(
  ("options_a", "options_b", "skip"),
  [
    ({}, {}, 4),
    ({"packing": "document"}, {}, 0),
    ({"stride": 7}, {"context": 40, "bos": "document", "stride": 11}, 4),
  ],
)
def test_windows_are_paired_as_the_whole_texts_are(
  documents, gemma, smollm2, options_a, options_b, skip
):
  a = make(documents, gemma, **options_a)
  b = make(documents[::-1], smollm2, **options_b)
  pairs = pair_windows(a, b, skip=skip)
  names = [a.documents[d][0] for d in pairs.document]
  found = [
    (name, *i, *j)
    for name, i, j in zip(
      names, pairs.a.tolist(), pairs.b.tolist(), strict=True
    )
  ]
  expected = whole_texts(documents, a, gemma, b, smollm2, skip)
  assert len(found) > 500
  assert sorted(found) == sorted(expected)


def test_windows_of_one_tokenizer_are_paired_one_to_one(documents, smollm2):
  """But for tokens inside characters, and those that follow them."""
  a = make(documents, smollm2)
  b = make(documents, smollm2, context=31)
  pairs = pair_windows(a, b, skip=0)
  np.testing.assert_array_equal(a.tokens[*pairs.a.T], b.tokens[*pairs.b.T])
  ends = a.end[*pairs.a.T]
  assert (np.diff(ends) > 0).sum() == len(ends) - len(documents)
  inside = sum(
    (
      ~np.isin(
        byte_ends(encode(d.text, smollm2), smollm2, d.text),
        at_characters(d.text),
      )
    ).sum()
    for d in documents
  )
  assert len(ends) == a.num_tokens - inside
  assert pairs.coverage.tokens_a == len(ends) / a.num_tokens
  assert pairs.coverage.tokens_b == len(ends) / b.num_tokens
  assert pairs.coverage.bytes == 1
  assert pairs.coverage.one_to_one == pairs.one_to_one.mean()
  # In a plain text there are none.
  plain = [loose("one two three " * 9, "s", "plain")]
  pairs = pair_windows(make(plain, smollm2), make(plain, smollm2), skip=0)
  assert pairs.coverage == Coverage(1, 1, 1, 1)


@pytest.mark.parametrize("context", [16, 23])
def test_windows_with_trimmed_offsets_are_paired_as_others(
  documents, gemma, context, caplog
):
  """All of Gemma's tokens end where one of a single byte does."""
  texts = {d.id: d.text for d in documents}
  a = make(documents, gemma, context=context)
  b = data.make_windows(
    documents, byte_level(), context=30, bos_id=300, pad_id=301
  )
  pairs = pair_windows(a, b, skip=0)
  whole = 0
  for identity, text in texts.items():
    ends = byte_ends(encode(text, gemma), gemma, text)
    whole += np.isin(ends, at_characters(text)).sum()
    here = pairs.document == [d[0] for d in a.documents].index(identity)
    ends = ends[np.isin(ends, at_characters(text))]
    np.testing.assert_array_equal(b.end[*pairs.b[here].T], ends)
    np.testing.assert_array_equal(a.end[*pairs.a[here].T], ends)
  assert pairs.coverage.tokens_a == whole / a.num_tokens
  assert len(caplog.records) == 1


def windows_of(ends, name="d", begin=None):
  """One window of one document, without BOS."""
  end = np.array([ends], np.int32)
  begin = (
    np.append(0, end[0, :-1])[None] if begin is None else np.array([begin])
  )
  return data.Windows(
    tokens=np.zeros_like(end),
    mask=np.ones(end.shape, bool),
    document=np.zeros_like(end),
    documents=((name, "s", name),),
    begin=begin.astype(np.int32),
    end=end,
  )


def test_coverage_of_windows_is_that_of_their_ends():
  ends_a, ends_b = [2, 3, 5, 8, 9, 12], [1, 3, 5, 7, 8, 12]
  a, b = windows_of(ends_a), windows_of(ends_b)
  pairs = pair_windows(a, b, skip=0)
  assert pairs.coverage == coverage(ends_a, ends_b)
  np.testing.assert_array_equal(pairs.a, [[0, 1], [0, 2], [0, 3], [0, 5]])
  np.testing.assert_array_equal(pairs.b, [[0, 1], [0, 2], [0, 4], [0, 5]])
  np.testing.assert_array_equal(pairs.one_to_one, [0, 1, 0, 0])
  # From the fourth position on.
  pairs = pair_windows(a, b, skip=3)
  np.testing.assert_array_equal(pairs.a, [[0, 3], [0, 5]])
  np.testing.assert_array_equal(pairs.one_to_one, [0, 0])
  assert pairs.coverage.tokens_a == pairs.coverage.tokens_b == 2 / 3


def test_a_token_with_parts_of_two_characters_ends_neither():
  """Two characters of three bytes; a cuts them into 2 + 2 + 2 bytes."""
  a = windows_of([3, 6, 6], begin=[0, 0, 3])
  b = windows_of([3, 6])
  pairs = pair_windows(a, b, skip=0)
  np.testing.assert_array_equal(pairs.a, [[0, 2]])
  np.testing.assert_array_equal(pairs.b, [[0, 1]])
  assert not pairs.one_to_one.any()


def test_few_pairs_are_warned_of_and_next_to_none_refused(caplog):
  single = windows_of(np.arange(1, 41))
  for width, warned in ((2, False), (4, True)):
    caplog.clear()
    pairs = pair_windows(
      single, windows_of(np.arange(width, 41, width)), skip=0
    )
    assert pairs.coverage.tokens_a == 1 / width
    assert pairs.coverage.tokens_b == 1
    assert bool(caplog.records) == warned
  assert "25.0% of the tokens of a and 100.0%" in caplog.text
  with pytest.raises(ValueError, match=r"got 5\.0% of the tokens of a"):
    pair_windows(single, windows_of([20, 40]), skip=0)


def test_different_documents_are_refused_by_name(documents, gemma):
  windows = make(documents, gemma)
  fewer = make(documents[2:], gemma)
  with pytest.raises(ValueError, match=r"2 \(d0, d1\) in a only and 0 "):
    pair_windows(windows, fewer)
  other = loose("Another text. " * 9, "s", "new")
  with pytest.raises(ValueError, match=r"in a only and 1 \(new\) in b only"):
    pair_windows(fewer, make([other], gemma))


def test_windows_that_do_not_know_their_bytes_or_documents_are_refused():
  windows = windows_of(np.arange(1, 20))
  nowhere = dataclasses.replace(windows, begin=None, end=None)
  with pytest.raises(ValueError, match="windows_b with byte spans"):
    pair_windows(windows, nowhere)
  later = dataclasses.replace(windows, first_document=1)
  with pytest.raises(ValueError, match="windows_a that name all"):
    pair_windows(later, windows)
