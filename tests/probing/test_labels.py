import pydoc_data.topics
import re

import numpy as np
import pytest

from gemma_jax.data import vocabulary
from gemma_jax.probing import labels

# Both tokenizers cut these words out whole.
TEXT = (
  'He said "Don\'t (go [now])!" to NASA.\n'
  "    total = count[1] + 7\n"
  "\n"
  "The “cat and 漢字 saw it’s a cat.\n"
)
WORDS = {  # token -> of the labels that are defined, what they are
  " said": {
    "starts_word": "yes",
    "first_letter": "s",
    "casing": "lower",
    "digit": "no",
    "script": "Latin",
    "non_ascii": "no",
    "bracket_depth": "0",
    "in_quotes": "no",
  },
  "Don": {
    "starts_word": "yes",
    "first_letter": "d",
    "casing": "Capitalised",
    "in_quotes": "yes",
  },
  " NASA": {"first_letter": "n", "casing": "UPPER", "in_quotes": "no"},
  "go": {"starts_word": "yes", "bracket_depth": "1"},
  "now": {"starts_word": "yes", "bracket_depth": "2+"},
  " total": {"first_letter": "t", "bracket_depth": "0"},
  "total": {"first_letter": "t", "bracket_depth": "0"},
  "7": {"digit": "yes", "starts_word": "no", "casing": None, "script": None},
  "The": {"starts_word": "yes", "casing": "Capitalised", "in_quotes": "no"},
  "漢字": {"script": "Han", "non_ascii": "yes", "first_letter": None},
  " and": {"in_quotes": "yes", "code": "prose"},
}


@pytest.fixture(params=["smollm2", "gemma"])
def tokenizer(request):
  return request.getfixturevalue(request.param)


def _ids(tokenizer, text):
  ids = tokenizer(text, add_special_tokens=False)["input_ids"]
  return np.array(ids)[None]


def _named(label, at):
  value = label.values[at]
  return None if value < 0 else label.classes[value]


def _classes(tokenizer, text, name):
  """[(token's text, class)] of one label."""
  ids = _ids(tokenizer, text)
  found = labels.label(ids, np.ones(ids.shape, bool), tokenizer)[name]
  pieces = vocabulary.token_bytes(tokenizer, ids[0])
  return [
    (p.decode("utf-8", "replace"), _named(found, (0, i)))
    for i, p in enumerate(pieces)
  ]


def test_words_have_the_labels_that_a_reader_gives_them(tokenizer):
  ids = _ids(tokenizer, TEXT)
  found = labels.label(ids, np.ones(ids.shape, bool), tokenizer)
  assert found.keys() == labels.DEFINITIONS.keys()
  pieces = vocabulary.token_bytes(tokenizer, ids[0])
  pieces = [piece.decode("utf-8", "replace") for piece in pieces]
  seen = 0
  for word, expected in WORDS.items():
    for i in (i for i, piece in enumerate(pieces) if piece == word):
      got = {name: _named(found[name], (0, i)) for name in expected}
      assert got == expected, word
      seen += 1
  assert seen >= 9


def test_word_starts_are_those_of_a_regular_expression(tokenizer):
  text = pydoc_data.topics.topics["strings"] + " naïve café it’s 3rd a_b 'x'"
  encoded = tokenizer(
    text, add_special_tokens=False, return_offsets_mapping=True
  )
  ids = np.array(encoded["input_ids"])[None]
  found = labels.label(ids, np.ones(ids.shape, bool), tokenizer)
  got = found["starts_word"].values[0]
  starts = {m.start() for m in re.finditer(r"\w+(?:['’]\w+)*", text)}
  for i, (a, b) in enumerate(encoded["offset_mapping"]):
    piece = text[a:b]
    at = a + len(piece) - len(piece.lstrip())
    expected = at in starts and text[at].isalpha() and at < b
    if got[i] >= 0:
      assert got[i] == expected, (i, piece)
    else:  # a part of a character, or the window's first token
      assert i == 0 or not piece.isascii()
  assert (got == 1).sum() > 300
  letters = found["first_letter"]
  for i in np.flatnonzero(letters.values[0] >= 0):
    a, b = encoded["offset_mapping"][i]
    assert text[a:b].strip()[0].lower() == letters.classes[letters.values[0, i]]


def test_a_word_that_starts_with_half_a_character_is_undecided(smollm2):
  got = _classes(smollm2, "The Привет", "starts_word")
  half = [c for piece, c in got if piece == " \N{REPLACEMENT CHARACTER}"]
  assert half == [None]
  assert [c for _, c in got[2:]] == ["no"] * (len(got) - 2)


def test_bracket_depth_is_that_of_a_counter(tokenizer):
  text = ") a (b [c {d}] e) f)) g ((h\ni" + pydoc_data.topics.topics["lambda"]
  ids = _ids(tokenizer, text)
  found = labels.label(ids, np.ones(ids.shape, bool), tokenizer)
  pieces = vocabulary.token_bytes(tokenizer, ids[0])
  depth, expected = 0, []
  for piece in pieces:
    for byte in piece.decode("utf-8", "replace"):
      if byte in "([{":
        depth += 1
      elif byte in ")]}":
        depth = max(depth - 1, 0)
    expected.append(min(depth, 2))
  np.testing.assert_array_equal(found["bracket_depth"].values[0], expected)
  assert set(expected) == {0, 1, 2}


def test_quotes_end_with_their_paragraph(tokenizer):
  text = 'He said "no\nand went.\n\nA new one; "yes" it is.'
  inside = [
    piece.strip()
    for piece, c in _classes(tokenizer, text, "in_quotes")
    if c == "yes" and piece.strip()
  ]
  assert inside == ['"', "no", "and", "went", ".", '"', "yes"]


LINES = {
  "def f(x, *, y=2):": "code",
  "    return x": "code",
  "import numpy as np": "code",
  "for i in range(10):": "code",
  "  values[i] += self.count(x)": "code",
  "#include <stdio.h>": "code",
  "if (a == b) { return; }": "code",
  ">>> print(2)": "code",
  "The cat sat on the mat, and nobody cared.": "prose",
  "It was, he said, the best of times (or the worst).": "prose",
  "return to the town where nobody lives any more": "prose",
  "for example the cat and the dog were friends": "prose",
  "Notes": None,
  "------": None,
}


@pytest.mark.parametrize(("line", "expected"), LINES.items())
def test_a_line_is_code_or_prose(smollm2, line, expected):
  text = f"{line}\n"
  assert {c for _, c in _classes(smollm2, text, "code")} == {expected}


def test_every_line_has_a_label_of_its_own(tokenizer):
  text = (
    "The cat sat on the mat today.\n"
    "x = y[0] + z(1)\n"
    "\n"
    "More words of plain prose here."
  )
  got = [c for _, c in _classes(tokenizer, text, "code")]
  runs = [c for i, c in enumerate(got) if i == 0 or got[i - 1] != c]
  assert runs == ["prose", "code", None, "prose"]


def test_repeats_are_counted_within_a_window(smollm2):
  tokens = np.array([[5000, 5001, 5000, 5000], [5000, 5002, 5002, 5001]])
  mask = np.ones((2, 4), bool)
  found = labels.label(tokens, mask, smollm2)
  np.testing.assert_array_equal(
    found["repeated"].values, [[0, 0, 1, 1], [0, 0, 1, 0]]
  )
  # A masked token is still there to be repeated.
  mask[1, 1] = False
  found = labels.label(tokens, mask, smollm2)
  np.testing.assert_array_equal(found["repeated"].values[1], [0, -1, 1, 0])


def test_positions_are_columns_of_the_window(smollm2):
  tokens = np.full((1, 20), 5000)
  tokens[0, 0] = smollm2.all_special_ids[0]
  found = labels.label(tokens, np.ones((1, 20), bool), smollm2)["position"]
  assert found.classes == ("0-3", "4-15", "16-19")
  np.testing.assert_array_equal(
    found.values[0], [-1] + [0] * 3 + [1] * 12 + [2] * 4
  )


def test_nothing_is_defined_at_masked_and_special_tokens(gemma):
  ids = _ids(gemma, "one two <bos> three")
  assert gemma.bos_token_id in ids
  mask = np.ones(ids.shape, bool)
  mask[0, 1] = False
  found = labels.label(ids, mask, gemma)
  hidden = (ids[0] == gemma.bos_token_id) | ~mask[0]
  assert hidden.sum() == 2
  for values, _ in found.values():
    assert (values[0, hidden] == -1).all()
  assert (found["position"].values[0, ~hidden] >= 0).all()


def test_documents_do_not_reach_into_each_other(smollm2):
  first, second = _ids(smollm2, 'foo ("x'), _ids(smollm2, "bar baz")
  tokens = np.concatenate([first, second], axis=1)
  documents = np.repeat([[0, 1]], [first.size, second.size], axis=1)
  mask = np.ones(tokens.shape, bool)
  together = labels.label(tokens, mask, smollm2)
  apart = labels.label(tokens, mask, smollm2, documents=documents)
  n = first.size
  for name, joined, separate in (
    ("bracket_depth", 1, 0),
    ("in_quotes", 1, 0),
    ("starts_word", 0, 1),  # "xbar" or "bar"
  ):
    assert together[name].values[0, n] == joined, name
    assert apart[name].values[0, n] == separate, name
  documents[0, -1] = -1  # padding is no text
  padded = labels.label(tokens, mask, smollm2, documents=documents)
  assert padded["position"].values[0, -1] == -1


def test_a_windows_first_token_may_be_inside_a_word(smollm2):
  for text, expected in (("ing", -1), (" ing", 1), (".", 0)):
    ids = _ids(smollm2, text)
    assert ids.size == 1
    found = labels.label(ids, np.ones(ids.shape, bool), smollm2)
    assert found["starts_word"].values[0, 0] == expected


def test_rows_are_the_masked_positions_in_order(smollm2):
  tokens = np.array([[5000, 5001, 5002], [5003, 5000, 5000]])
  mask = np.array([[0, 1, 1], [1, 0, 1]], bool)
  found = labels.label(tokens, mask, smollm2)
  rows = labels.rows(found, mask)
  for name, (values, classes) in found.items():
    expected = [values[0, 1], values[0, 2], values[1, 0], values[1, 2]]
    np.testing.assert_array_equal(rows[name].values, expected)
    assert rows[name].classes == classes
  np.testing.assert_array_equal(rows["repeated"].values, [0, 0, 0, 1])


def test_windows_without_text_have_no_labels(smollm2):
  tokens = np.full((2, 3), smollm2.all_special_ids[0])
  found = labels.label(tokens, np.ones((2, 3), bool), smollm2)
  assert all((values == -1).all() for values, _ in found.values())


def test_shapes_that_differ_are_refused(smollm2):
  tokens = np.full((2, 3), 5000)
  with pytest.raises(ValueError, match=r"\(2, 3\), \(3, 2\)"):
    labels.label(tokens, np.ones((3, 2), bool), smollm2)
  with pytest.raises(ValueError, match=r"expected tokens, mask"):
    labels.label(tokens[0], np.ones(3, bool), smollm2)
