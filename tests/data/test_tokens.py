import dataclasses

import numpy as np
import pytest

from gemma_jax import data
from gemma_jax.data import tokens

TEXTS = [
  "Ünïcode, 漢字 and 😀 emoji; naïve café. " * 3,
  "plain ASCII only",
  "ß",
]


def _byte_of():
  """The byte of every letter of a byte-level vocabulary (GPT-2's)."""
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [b for b in range(256) if b not in plain]
  letters = {chr(b): b for b in plain}
  return letters | {chr(256 + i): b for i, b in enumerate(others)}


def _documents(texts):
  return [data.Document(t, "s", f"d{i}", f"d{i}") for i, t in enumerate(texts)]


def test_byte_spans_hold_the_tokens_bytes_in_order(tokenizer):
  letters = _byte_of()
  pieces = list(tokens.tokenise(_documents(TEXTS), tokenizer))
  whole = 0
  for text, piece in zip(TEXTS, pieces, strict=True):
    raw = text.encode()
    for i, begin, end in zip(piece.ids, piece.begin, piece.end, strict=True):
      expected = bytes(letters[c] for c in tokenizer.id_to_token(int(i)))
      assert expected in raw[begin:end]
      # A part of a character gets the character.
      if "\ufffd" not in expected.decode("utf-8", "replace"):
        assert raw[begin:end] == expected
        whole += 1
    assert (np.diff(piece.begin) >= 0).all()
    assert (np.diff(piece.end) >= 0).all()
    assert (piece.begin[0], piece.end[-1]) == (0, len(raw))
    assert (piece.begin[1:] <= piece.end[:-1]).all()
  assert whole > 50


def test_a_piece_of_a_long_document_keeps_its_spans(tokenizer):
  (document,) = _documents(TEXTS[:1])
  (whole,) = tokens.tokenise([document], tokenizer)
  (piece,) = tokens.tokenise([document], tokenizer, document_tokens=9)
  start = int(document.id, 16) % (whole.ids.size - 8)
  for name in ("ids", "begin", "end"):
    expected = getattr(whole, name)[start : start + 9]
    np.testing.assert_array_equal(getattr(piece, name), expected)


def test_the_size_of_a_batch_changes_nothing(tokenizer):
  documents = _documents(TEXTS * 4)
  one = list(tokens.tokenise(documents, tokenizer, batch_characters=1))
  all_ = list(tokens.tokenise(documents, tokenizer))
  assert len(one) == len(all_) == 12
  for a, b in zip(one, all_, strict=True):
    assert a.document == b.document
    np.testing.assert_array_equal(a.ids, b.ids)
    np.testing.assert_array_equal(a.begin, b.begin)


def test_a_document_beyond_the_range_of_a_span_is_refused():
  @dataclasses.dataclass
  class Encoding:
    ids: list
    offsets: list

  class Far:
    def encode_batch(self, texts, add_special_tokens):
      return [Encoding([1], [(0, 2**31)]) for _ in texts]

  with pytest.raises(ValueError, match=r"'d0' has 2147483648 bytes.*split it"):
    list(tokens.tokenise(_documents(["x"]), Far()))
