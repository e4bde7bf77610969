"""Tokens as words: two real vocabularies, and small ones made for a point."""

import unicodedata

import numpy as np
import pytest
import tokenizers

from gemma_jax.concepts import lexemes as lib
from gemma_jax.data import vocabulary


def small(*pieces):
  """A SentencePiece-like tokenizer with these pieces, "▁" for a space."""
  model = tokenizers.models.BPE({p: i for i, p in enumerate(pieces)}, [])
  made = tokenizers.Tokenizer(model)
  made.decoder = tokenizers.decoders.Metaspace()
  return made


def kinds(*pieces):
  found = lib.read(small(*pieces), len(pieces))
  return {p: lib.KINDS[k] for p, k in zip(pieces, found.kind, strict=True)}


@pytest.fixture(scope="module")
def gemmas(gemma):
  """As of the 4b model, whose embedding has 64 rows more than tokens."""
  return lib.read(gemma, 262_208)


@pytest.fixture(scope="module", params=["smollm2", "gemma"])
def tokenizer(request):
  return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def lexemes(tokenizer, request):
  if len(tokenizer) > 200_000:
    return request.getfixturevalue("gemmas")
  return lib.read(tokenizer, len(tokenizer))


def token(tokenizer, text):
  (found,) = tokenizer(text, add_special_tokens=False)["input_ids"]
  return found


def name(tokenizer, lexemes, text):
  return lexemes.names[lexemes.family[token(tokenizer, text)]]


def test_spellings_of_a_word_are_one_family(tokenizer, lexemes):
  for text in ("cat", " cat", " Cat", " cats", " Cats", " CAT"):
    assert name(tokenizer, lexemes, text) == "cat"
  plurals = {
    " boxes": "box",
    " horses": "horse",
    " churches": "church",
    " cities": "city",
    " movies": "movie",
    " classes": "class",
    " sizes": "size",
    " viruses": "virus",
  }
  for text, singular in plurals.items():
    assert name(tokenizer, lexemes, text) == singular


def test_a_word_that_ends_in_s_is_itself(tokenizer, lexemes):
  for text in ("bus", "gas", "news", "class", "has", "this", "its", "always"):
    assert name(tokenizer, lexemes, " " + text) == text


def test_a_singular_has_to_be_a_word_of_the_vocabulary():
  found = lib.read(small("▁cats", "▁dogs", "▁dog", "▁balls", "ball"), 5)
  assert found.names == ["cats", "dog", "balls", "ball"]
  np.testing.assert_array_equal(found.family, [0, 1, 1, 2, 3])


def test_possessives_are_of_their_word():
  pieces = ("▁cat", "▁cat's", "▁cat’s", "▁cats'", "▁cats", "▁it's")
  found = lib.read(small(*pieces), 6)
  np.testing.assert_array_equal(found.family, [0, 0, 0, 0, 0, 1])


def test_marks_count_only_where_they_are_letters():
  assert lib.normalise(" Café ") == "cafe"
  assert lib.normalise("Łódź") == "łodz"
  assert lib.normalise("Ёлка") == "елка"
  assert lib.normalise("Ὀδυσσεύς") == "οδυσσευσ"
  assert lib.normalise("ｆｕｌｌ") == "full"
  for text in ("हिन्दी", "ไม่ได้", "が", "العَرَبية", "한국"):
    assert lib.normalise(text) == unicodedata.normalize("NFC", text)


def test_what_is_no_text_is_not_usable(tokenizer, lexemes):
  backend = tokenizer.backend_tokenizer
  special = list(backend.get_added_tokens_decoder())
  assert not lexemes.usable[special].any()
  for i, text in enumerate(tokenizer.batch_decode(np.arange(len(tokenizer)))):
    # Invalid bytes, by the tokenizer's own decoder.
    if "\N{REPLACEMENT CHARACTER}" in text and text != "\ufffd":
      assert not lexemes.usable[i]
    if not text.strip():
      assert not lexemes.usable[i]
  unusable = ~lexemes.usable
  assert (lexemes.family[unusable] == -1).all()
  assert (lexemes.script[unusable] == -1).all()
  assert (lexemes.family[lexemes.usable] >= 0).all()


def test_gemmas_control_and_byte_tokens_are_not_usable(gemma, gemmas):
  added = gemma.backend_tokenizer.get_added_tokens_decoder()
  control = [i for i, token in added.items() if token.special]
  vocab = gemma.get_vocab()
  unused = [i for t, i in vocab.items() if t.startswith("<unused")]
  single = [i for t, i in vocab.items() if t.startswith("<0x")]
  assert (len(control), len(unused), len(single)) == (6_249, 6_242, 256)
  for ids in (control, unused, single, [vocab["[multimodal]"]]):
    assert not gemmas.usable[ids].any()


def test_rows_beyond_the_tokenizer_and_tokens_beyond_the_rows(gemma, gemmas):
  assert len(gemmas.usable) == len(gemmas.kind) == 262_208
  assert not gemmas.usable[len(gemma) :].any()
  few = lib.read(small("▁cat", "▁dog", "▁cow"), 2)
  assert few.names == ["cat", "dog"]
  assert few.usable.tolist() == [True, True]


def test_kinds_of_real_tokens(tokenizer, lexemes):
  expected = {
    " the": "function",
    " The": "function",
    "ing": "fragment",
    "7": "number",
    ".": "punctuation",
    " =": "punctuation",
    " cat": "content",
    "cat": "content",
    " running": "content",
    " seven": "content",
    " x": "fragment",
  }
  for text, kind in expected.items():
    assert lib.KINDS[lexemes.kind[token(tokenizer, text)]] == kind, text


def test_kinds_and_scripts_of_other_languages(gemma, gemmas):
  expected = {
    "狗": ("content", "Han"),
    "的": ("function", "Han"),
    " рука": ("content", "Cyrillic"),
    " или": ("function", "Cyrillic"),
    "です": ("function", "kana"),
    " perro": ("content", "Latin"),
    " und": ("function", "Latin"),
    " كتاب": ("content", "Arabic"),
    "٣": ("number", None),
    "🙂": ("other", None),
  }
  for text, (kind, script) in expected.items():
    i = token(gemma, text)
    assert lib.KINDS[gemmas.kind[i]] == kind, text
    where = vocabulary.SCRIPT_NAMES.index(script) if script else -1
    assert gemmas.script[i] == where, text


def test_kinds_by_hand():
  assert kinds("▁7", "٣", "²", "1,", "seven") == {
    "▁7": "number",
    "٣": "number",
    "²": "number",
    "1,": "other",
    "seven": "fragment",
  }
  # A piece is judged as a word that was merged before it.
  assert kinds("▁dog", "dog", "ation", "▁x", "q", "ность", "犬") == {
    "▁dog": "content",
    "dog": "content",
    "ation": "fragment",
    "▁x": "fragment",
    "q": "fragment",
    "ность": "fragment",
    "犬": "content",
  }
  assert kinds("ing", "▁ing", "▁ING") == {
    "ing": "fragment",
    "▁ing": "content",
    "▁ING": "content",
  }
  assert kinds("camelCase", "Name", "'s", "::", "€", "▁→", "🙂") == {
    "camelCase": "content",
    "Name": "content",
    "'s": "function",
    "::": "punctuation",
    "€": "punctuation",
    "▁→": "punctuation",
    "🙂": "other",
  }


def test_words_are_found_as_their_tokens_are():
  lexemes = lib.read(small("▁cat", "▁dogs", "▁bus", "▁Café"), 4)
  words = ["Cats", "cat", "dogs", "dog", "buses", "bus", "cafe", "cow"]
  found = lib.find(words, lexemes)
  np.testing.assert_array_equal(found, [0, 0, 1, -1, 2, 2, 3, -1])


def test_distinct_tokens_are_those_of_a_loop(tokenizer, lexemes):
  rng = np.random.default_rng(0)
  # A narrow range of ids, so that families come up again.
  first = token(tokenizer, " cat")
  tokens = rng.integers(first - 30, first + 30, (200, 50))
  tokens[rng.random(tokens.shape) < 0.1] = -1
  tokens[0] = -1
  count = 28
  expected = np.full((200, count), -1)
  for row, line in enumerate(tokens):
    seen, kept = set(), []
    for t in line:
      family = lexemes.family[t]
      if t >= 0 and lexemes.usable[t] and family not in seen:
        seen.add(family)
        kept.append(t)
    kept = kept[:count]
    expected[row, : len(kept)] = kept
  found = lib.distinct(tokens, lexemes, count)
  np.testing.assert_array_equal(found, expected)
  assert found.dtype == np.int32
  assert (found == -1).any()
  wide = lib.distinct(tokens, lexemes, 60)
  np.testing.assert_array_equal(wide[:, :count], expected)
  assert (wide[:, 50:] == -1).all()


def test_shares_of_kinds_are_those_by_hand():
  lexemes = lib.read(small("▁cat", "▁the", "▁dog", "ing", "7", ".", "🙂"), 7)
  tokens = [[0, 1, 2, 3], [0, -1, 4, -1], [5, 6, -1, 0], [-1, -1, -1, -1]]
  np.testing.assert_allclose(
    lib.class_shares(np.array(tokens), lexemes),
    [
      [1 / 2, 1 / 4, 1 / 4, 0, 0, 0],
      [1 / 2, 0, 0, 1 / 2, 0, 0],
      [1 / 3, 0, 0, 0, 1 / 3, 1 / 3],
      [0, 0, 0, 0, 0, 0],
    ],
  )


def test_what_are_no_tokens_of_the_vocabulary_is_refused():
  lexemes = lib.read(small("▁cat", "▁dog"), 2)
  with pytest.raises(ValueError, match=r"below 2, got int64 \(1, 2\) up to 2"):
    lib.distinct(np.array([[0, 2]]), lexemes, 1)
  with pytest.raises(ValueError, match="got float64"):
    lib.class_shares(np.array([[0.0]]), lexemes)
  with pytest.raises(ValueError, match=r"\[n, k\], .* got int64 \(1,\)"):
    lib.class_shares(np.array([0]), lexemes)
  with pytest.raises(ValueError, match="a count of at least 1, got 0"):
    lib.distinct(np.array([[0]]), lexemes, 0)
  with pytest.raises(ValueError, match="rows of an embedding, got 0"):
    lib.read(small("▁cat"), 0)


def test_a_list_of_words_is_a_word_a_line(tmp_path):
  path = tmp_path / "pets.txt"
  path.write_text("\ufeff# mine\ncat\n\n  C#  \n#dog\nice cream\n", "utf-8")
  assert lib.word_list(path) == {"cat", "C#", "ice cream"}


def test_bad_lists_of_words_are_refused(tmp_path):
  path = tmp_path / "pets.txt"
  with pytest.raises(FileNotFoundError, match=r"pets.txt: no such file"):
    lib.word_list(path)
  path.write_text("# nothing\n\n")
  with pytest.raises(ValueError, match="got no words"):
    lib.word_list(path)
  path.write_bytes("caf\xe9\n".encode("latin-1"))
  with pytest.raises(ValueError, match="expected UTF-8, got other bytes at 3"):
    lib.word_list(path)
