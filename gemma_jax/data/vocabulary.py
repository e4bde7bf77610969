"""What single entries of a vocabulary are: bytes, letters, casing, script."""

import json
import re
import string
import unicodedata
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

LETTERS = tuple(string.ascii_lowercase)
CASINGS = ("lower", "Capitalised", "UPPER")
# By the first word of a character's Unicode name.
SCRIPTS = {
  "LATIN": "Latin",
  "GREEK": "Greek",
  "CYRILLIC": "Cyrillic",
  "HEBREW": "Hebrew",
  "ARABIC": "Arabic",
  "DEVANAGARI": "Devanagari",
  "THAI": "Thai",
  "CJK": "Han",
  "HIRAGANA": "kana",
  "KATAKANA": "kana",
  "HANGUL": "Hangul",
}
SCRIPT_NAMES = (*dict.fromkeys(SCRIPTS.values()), "other")
NOTHING, WORD, APOSTROPHE = 0, 1, 2  # what a token ends with

_PARTIAL = "\N{REPLACEMENT CHARACTER}"  # bytes that are no whole character
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# GPT-2's letters for bytes: themselves where they print, else 256 and on.
_PLAIN = (*range(33, 127), *range(161, 173), *range(174, 256))
_BYTES = {chr(b): b for b in _PLAIN} | {
  chr(256 + i): b
  for i, b in enumerate(b for b in range(256) if b not in _PLAIN)
}


class Entries(NamedTuple):
  """Properties of U vocabulary entries; integers are -1 where undefined.

  Attributes:
    pieces: their bytes; None for special tokens.
    letter: int [U], 0-25 where the first character behind white space is an
      ASCII letter.
    casing: int [U], into `CASINGS`, where all characters are letters that
      have a case; a single capital is undecided between two classes: -1.
    digit: int [U], 1 where all characters are digits, else 0.
    script: int [U], into `SCRIPT_NAMES`, of the first letter, if any.
    non_ascii: int [U], 1 where a byte is not ASCII, else 0.
    spaced: bool [U], begins with white space.
    alphabetic: int [U], 1 where the first character behind white space is a
      letter, else 0; -1 where it is a part of a character.
    ends: int [U], with `NOTHING` of a word, inside a `WORD`, or with an
      `APOSTROPHE` whose left neighbour is in another token.
  """

  pieces: list[bytes | None]
  letter: np.ndarray
  casing: np.ndarray
  digit: np.ndarray
  script: np.ndarray
  non_ascii: np.ndarray
  spaced: np.ndarray
  alphabetic: np.ndarray
  ends: np.ndarray


def entries(tokenizer: Any, ids: Iterable[int]) -> Entries:
  """The properties of some entries.

  Args:
    tokenizer: a fast tokenizer of transformers, or a `tokenizers.Tokenizer`.
    ids: U token ids.

  Raises:
    TypeError, ValueError: as `token_bytes`.
  """
  pieces = token_bytes(tokenizer, ids)
  rows = [_properties(piece or b"") for piece in pieces]
  columns = np.array(rows, np.int16).reshape(len(pieces), 8).T
  return Entries(pieces, *columns[:5], columns[5] > 0, *columns[6:])


def token_bytes(tokenizer: Any, ids: Iterable[int]) -> list[bytes | None]:
  """What tokens stand for in a text: UTF-8 bytes, None for special tokens.

  Byte-level BPE (GPT-2, SmolLM2, NeoX) and SentencePiece-like vocabularies
  (Gemma, Llama) are told apart by the tokenizer's decoder.

  Args:
    tokenizer: a fast tokenizer of transformers, or a `tokenizers.Tokenizer`.
    ids: token ids.

  Raises:
    TypeError: a tokenizer without a backend of `tokenizers`.
    ValueError: another kind of decoder, or an id outside the vocabulary.
  """
  backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
  if not hasattr(backend, "id_to_token"):
    raise TypeError(
      "expected a fast tokenizer of transformers or a tokenizers.Tokenizer, "
      f"got {type(tokenizer).__name__}"
    )
  byte_level = _is_byte_level(backend)
  added = backend.get_added_tokens_decoder()
  special = {i for i, token in added.items() if token.special}
  special |= set(getattr(tokenizer, "all_special_ids", ()))
  out = []
  for i in map(int, ids):
    token = backend.id_to_token(i)
    if token is None:
      raise ValueError(
        f"token id {i} is not in the tokenizer's vocabulary of "
        f"{backend.get_vocab_size()}; pass the tokenizer that made the tokens"
      )
    if i in special:
      out.append(None)
    elif byte_level and i not in added:
      out.append(bytes(_BYTES[c] for c in token))
    elif not byte_level and (byte := _BYTE.fullmatch(token)):
      out.append(bytes([int(byte[1], 16)]))
    else:
      out.append(token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode())
  return out


def words(tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
  """Vocabulary entries that are words: a space, then ASCII letters only.

  Single letters are left out. These are the rows of a first-letter test that
  needs nothing but the tokenizer.

  Args:
    tokenizer: as `token_bytes` takes it.

  Returns:
    int64 [U] token ids, ascending, and int64 [U] first letters, 0-25.
  """
  backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
  size = backend.get_vocab_size()
  pieces = token_bytes(tokenizer, range(size))
  word = re.compile(rb" [A-Za-z]{2,}")
  ids = [i for i, p in enumerate(pieces) if p and word.fullmatch(p)]
  letters = [pieces[i][1:2].lower()[0] - ord("a") for i in ids]
  return np.array(ids, np.int64), np.array(letters, np.int64)


def _is_byte_level(backend) -> bool:
  decoder = backend.decoder
  state = json.loads(decoder.__getstate__()) if decoder else {"type": None}
  parts = state.get("decoders", [state])
  kinds = {part["type"] for part in parts}
  if "ByteLevel" in kinds:
    return True
  if kinds & {"Metaspace", "ByteFallback"}:
    return False
  raise ValueError(
    "expected the decoder of a byte-level BPE (ByteLevel) or of SentencePiece "
    f"(Metaspace, or ByteFallback), got {state['type']}; labels need to know "
    "which bytes a token stands for"
  )


def _properties(piece: bytes) -> tuple[int, ...]:
  """letter, casing, digit, script, non_ascii, spaced, alphabetic, ends."""
  text = piece.decode("utf-8", "replace")
  body = text.strip()
  first = body[:1]
  letter, casing, script = -1, -1, -1
  if first.isascii() and first.isalpha():
    letter = ord(first.lower()) - ord("a")
  if body.isalpha():
    if body.islower():
      casing = 0
    elif len(body) > 1 and body.isupper():
      casing = 2
    elif len(body) > 1 and first.isupper() and body[1:].islower():
      casing = 1
  some = next((c for c in body if c.isalpha()), None)
  if some:
    name = SCRIPTS.get(unicodedata.name(some, "").split(" ")[0], "other")
    script = SCRIPT_NAMES.index(name)
  return (
    letter,
    casing,
    int(body.isdecimal()),
    script,
    int(not piece.isascii()),
    int(text[:1].isspace()),
    -1 if first == _PARTIAL else int(first.isalpha()),
    _ending(text),
  )


def _ending(text: str) -> int:
  if not text.endswith(("'", "’")):
    return WORD if _in_word(text[-1:]) else NOTHING
  if len(text) == 1:
    return APOSTROPHE
  return WORD if _in_word(text[-2]) else NOTHING


def _in_word(character: str) -> bool:
  return character.isalnum() or character in ("_", _PARTIAL)
