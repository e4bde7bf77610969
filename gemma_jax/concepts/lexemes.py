"""What the tokens of a vocabulary are, as words: spellings and kinds."""

import dataclasses
import functools
import pathlib
import re
import unicodedata
from collections.abc import Container, Iterable
from typing import Any

import numpy as np

from gemma_jax.data import vocabulary

KINDS = ("content", "function", "fragment", "number", "punctuation", "other")
_CONTENT, _FUNCTION, _FRAGMENT, _NUMBER, _PUNCTUATION, _OTHER = range(6)

# Scripts whose words are built of pieces and set off by spaces and case.
_ALPHABETS = tuple(
  vocabulary.SCRIPT_NAMES.index(name) for name in ("Latin", "Greek", "Cyrillic")
)
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_BLANK = ("Zs", "Zl", "Zp", "Cc", "Cf")
# Marks on decomposed Latin, Greek and Cyrillic letters. Elsewhere they carry
# the vowels (Devanagari, Thai) or make another letter (kana).
_ACCENTS = re.compile(
  "(?<=[a-z\u00df-\u02af\u0370-\u03ff\u0400-\u052f])[\u0300-\u036f]+"
)
# In this order: "horses" is of "horse" before "hors", which is French, but
# "boxes" of "box" before "boxe".
_PLURALS = (
  (re.compile("ies$"), "y"),
  (re.compile("(ss|ch|sh|x)es$"), r"\1"),
  (re.compile("(?<![isu])s$"), ""),
  (re.compile("([osz])es$"), r"\1"),
)
_SHORTEST = 3  # letters of a singular; "has" is not of "ha"
# Other words than the one without an s.
_NO_PLURAL = re.compile(
  "alias|always|atlas|bias|bras|canvas|chaos|christmas|corps|cosmos|goods|"
  "james|lens|lunes|mars|moses|news|perhaps|temps|texas|thomas|tres"
)


@dataclasses.dataclass(frozen=True)
class Lexemes:
  """What each of V tokens is.

  Attributes:
    usable: bool [V], False for tokens that are no text: special, added to the
      pieces of the vocabulary (placeholders, tags of turns and of HTML),
      bytes, parts of characters, nothing visible, or ids that the tokenizer
      does not have.
    family: int32 [V]; tokens share a number whose texts differ only in case,
      white space around them, diacritics, or a plural or possessive ending.
      -1 where not usable.
    names: of each family, the text that its tokens have in common.
    kind: int8 [V], into `KINDS`; "other" where not usable.
    script: int8 [V], into `vocabulary.SCRIPT_NAMES`, of the first letter; -1
      without letters or where not usable.
  """

  usable: np.ndarray
  family: np.ndarray
  names: list[str]
  kind: np.ndarray
  script: np.ndarray


def read(tokenizer: Any, size: int) -> Lexemes:
  """Reads the vocabulary of a tokenizer.

  Kinds, the first that fits: "function", a word of `function_words`, in
  whatever language and case; "number", digits of any script; "fragment", a
  single ASCII letter, or lower-case letters of an alphabet without a space
  before them, unless they are commoner as a word, which is when the token
  with the space has the lower id: a BPE numbers its tokens as it merges them;
  "content", the rest that has letters; "punctuation", marks and mathematical
  signs; "other", such as pictographs.

  Args:
    tokenizer: a fast tokenizer of transformers, or a `tokenizers.Tokenizer`.
    size: V, rows of the model's embedding; ids from there on are left out.

  Raises:
    TypeError, ValueError: as `vocabulary.token_bytes`, or a size below 1.
  """
  if size < 1:
    raise ValueError(f"expected the rows of an embedding, got {size}")
  spelled = {i: t for t, i in tokenizer.get_vocab().items() if i < size}
  ids = sorted(spelled)
  entries = vocabulary.entries(tokenizer, ids)
  backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
  added = backend.get_added_tokens_decoder()
  rows = []
  for i, piece, letters, spaced in zip(
    ids, entries.pieces, entries.script, entries.spaced, strict=True
  ):
    text = "" if i in added or _BYTE.fullmatch(spelled[i]) else _text(piece)
    if text:
      rows.append((i, text, normalise(text), int(letters), bool(spaced)))
  words: dict[str, int] = {}
  for i, _, name, _, spaced in rows:
    if spaced:
      words.setdefault(name, i)
  usable = np.zeros(size, bool)
  family = np.full(size, -1, np.int32)
  kind = np.full(size, _OTHER, np.int8)
  script = np.full(size, -1, np.int8)
  numbers: dict[str, int] = {}
  for i, text, name, letters, spaced in rows:
    usable[i] = True
    family[i] = numbers.setdefault(_singular(name, words), len(numbers))
    # "ing" was merged before " ing", which is rare; "dog" after " dog".
    word = spaced or words.get(name, i) < i
    kind[i] = _kind(text, name, letters, word)
    script[i] = letters
  return Lexemes(usable, family, list(numbers), kind, script)


def normalise(text: str) -> str:
  """A text without what only spells it differently.

  Compatible characters (NFKC), case, white space around it, and marks on
  Latin, Greek and Cyrillic letters; plurals stay.
  """
  text = _folded(text)
  if text.isascii():
    return text
  text = _ACCENTS.sub("", unicodedata.normalize("NFKD", text))
  return unicodedata.normalize("NFKC", text)


def find(words: Iterable[str], lexemes: Lexemes) -> np.ndarray:
  """Families of n words; a plural finds its singular.

  Returns:
    int32 [n]; -1 where no token stands for the word.
  """
  numbers = {name: i for i, name in enumerate(lexemes.names)}
  found = []
  for word in words:
    name = normalise(word)
    there = (n for n in (name, *_singulars(name)) if n in numbers)
    found.append(numbers.get(next(there, None), -1))
  return np.array(found, np.int32)


def families(tokens: np.ndarray, lexemes: Lexemes) -> np.ndarray:
  """Families of tokens: int32 [n, k], -1 for -1 and unusable tokens.

  Args:
    tokens: ids [n, k], -1 for none.
    lexemes: of the vocabulary.

  Raises:
    ValueError: another shape, no whole numbers, or ids beyond the vocabulary.
  """
  tokens = _ids(tokens, lexemes)
  return np.where(tokens >= 0, lexemes.family[tokens], np.int32(-1))


def firsts(families: np.ndarray) -> np.ndarray:
  """Where a row has a family, other than -1, for the first time.

  Args:
    families: int [n, m].

  Returns:
    bool [n, m].
  """
  order = np.argsort(families, axis=1, kind="stable")
  ordered = np.take_along_axis(families, order, axis=1)
  first = ordered >= 0
  first[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
  out = np.empty_like(first)
  np.put_along_axis(out, order, first, axis=1)
  return out


def distinct(tokens: np.ndarray, lexemes: Lexemes, count: int) -> np.ndarray:
  """The first tokens of each row that are of different families.

  Args:
    tokens: ids [n, k], best first, -1 for none.
    lexemes: of the vocabulary; unusable tokens are passed over.
    count: tokens to keep.

  Returns:
    int32 [n, count], in the order of `tokens`; -1 where a row has fewer.

  Raises:
    ValueError: as `families`, or a count below 1.
  """
  if count < 1:
    raise ValueError(f"expected a count of at least 1, got {count}")
  tokens = _ids(tokens, lexemes)
  keep = firsts(families(tokens, lexemes))
  place = keep.cumsum(axis=1) - 1
  keep &= place < count
  rows, columns = np.nonzero(keep)
  out = np.full((len(tokens), count), -1, np.int32)
  out[rows, place[rows, columns]] = tokens[rows, columns]
  return out


def class_shares(tokens: np.ndarray, lexemes: Lexemes) -> np.ndarray:
  """How the tokens of each row divide among the kinds.

  Args:
    tokens: ids [n, m], -1 for none.
    lexemes: of the vocabulary.

  Returns:
    float64 [n, kinds], in the order of `KINDS`; zeros for a row without
    tokens, else of sum 1.

  Raises:
    ValueError: as `families`.
  """
  tokens = _ids(tokens, lexemes)
  there = tokens >= 0
  kinds = lexemes.kind[tokens]
  counts = [(there & (kinds == k)).sum(axis=1) for k in range(len(KINDS))]
  total = np.maximum(there.sum(axis=1), 1)
  return np.stack(counts, axis=1) / total[:, None]


def word_list(path: str | pathlib.Path) -> frozenset[str]:
  """Words of a UTF-8 file, one on a line; lines that begin with # are notes.

  Raises:
    FileNotFoundError: no such file.
    ValueError: another encoding, or no words.
  """
  path = pathlib.Path(path)
  try:
    text = path.read_text("utf-8-sig")
  except FileNotFoundError as error:
    raise FileNotFoundError(
      f"{path}: no such file; expected a text file with a word on each line"
    ) from error
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{path}: expected UTF-8, got other bytes at {error.start}; save the "
      "file as UTF-8"
    ) from error
  lines = (line.strip() for line in text.splitlines())
  words = frozenset(line for line in lines if line and line[0] != "#")
  if not words:
    raise ValueError(f"{path}: expected a word on each line, got no words")
  return words


@functools.cache
def function_words() -> frozenset[str]:
  """Words of closed classes in fourteen languages, lower case, with accents."""
  path = pathlib.Path(__file__).with_name("function_words.txt")
  return frozenset(map(_folded, word_list(path)))


def _ids(tokens, lexemes: Lexemes) -> np.ndarray:
  tokens = np.asarray(tokens)
  size = len(lexemes.usable)
  most = tokens.max(initial=-1)
  if tokens.dtype.kind not in "iu" or tokens.ndim != 2 or most >= size:
    raise ValueError(
      f"expected token ids [n, k], whole numbers below {size}, got "
      f"{tokens.dtype} {tokens.shape} up to {most}; `read` the vocabulary "
      "with as many rows as the embedding has"
    )
  return tokens


def _folded(text: str) -> str:
  if text.isascii():
    return text.strip().lower()
  text = unicodedata.normalize("NFKC", text).strip().casefold()
  return text.replace("’", "'")


def _text(piece: bytes | None) -> str:
  """Empty unless the bytes are whole characters, and something is to see."""
  try:
    text = (piece or b"").decode()
  except UnicodeDecodeError:
    return ""
  seen = any(unicodedata.category(c) not in _BLANK for c in text)
  return text if seen else ""


def _singulars(name: str) -> list[str]:
  """What a name may be a plural or possessive of, the likeliest first."""
  if not name.isascii() or name in function_words():
    return []
  if name.endswith(("'s", "s'")):
    stems = [name.removesuffix("'s").removesuffix("'")]
  elif name.isalpha() and not _NO_PLURAL.fullmatch(name):
    stems = [e.sub(other, name) for e, other in _PLURALS if e.search(name)]
    stems = [stem for stem in stems if len(stem) >= _SHORTEST]
  else:
    return []
  return [stem for stem in stems if stem not in function_words()]


def _singular(name: str, words: Container[str]) -> str:
  stem = next((s for s in _singulars(name) if s in words), None)
  return name if stem is None else _singular(stem, words)


def _kind(text: str, name: str, script: int, word: bool) -> int:
  if _folded(text) in function_words():
    return _FUNCTION
  if name.isdigit():
    return _NUMBER
  if script >= 0:
    piece = script in _ALPHABETS and text.isalpha() and text.islower()
    letter = len(name) == 1 and name.isascii()
    return _FRAGMENT if letter or (piece and not word) else _CONTENT
  # Pictographs, emoji among them, are symbols of category So.
  categories = {unicodedata.category(c) for c in name}
  marks = all(c[0] in "PS" and c != "So" for c in categories)
  return _PUNCTUATION if marks else _OTHER
