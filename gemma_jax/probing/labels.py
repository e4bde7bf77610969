"""Labels for every token, made from the text itself: no data set, no judge."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from gemma_jax.data import vocabulary
from gemma_jax.data.vocabulary import Entries

DEFINITIONS = {
  "starts_word": (
    "A letter comes first behind the token's white space, and no letter, "
    "digit, underscore or inner apostrophe stands directly before it."
  ),
  "first_letter": "First letter of tokens that start a word, a-z, any case.",
  "casing": "Of tokens that are letters only; single capitals are undecided.",
  "digit": "The token is digits only, white space aside.",
  "script": "Of the token's first letter.",
  "non_ascii": "A byte of the token is not ASCII.",
  "code": "The line of text reads as code or as prose; others are undecided.",
  "bracket_depth": "Open ( [ {, of any kind, behind the token.",
  "in_quotes": 'Behind the token, a " or “ of this paragraph is open.',
  "repeated": "The same token came earlier in the window.",
  "position": "Column in the window, buckets by powers of four.",
}
DEPTHS = ("0", "1", "2+")
_STATEMENT = re.compile(
  r"""\s*(?:
    (?:async\ )?def\ \w+\( | class\ \w+\s*[(:{] | import\ [\w.]+$ |
    import\ [\w.]+\ as\ | from\ [\w.]+\ import\ | return(?:\ \S+){0,2}$ |
    (?:if|elif|while|with|except)\ .*:$ | for\ .*\ in\ .*:$ |
    (?:else|try|finally):$ | \#include\b | // | >>>\  | @\w+[\w.]*(?:\(.*)?$
  )""",
  re.VERBOSE,
)
_SYMBOLS = re.compile(r"[{}\[\]<>=_;|\\@#$^&*+~]|\w\(|\w\.\w|::")
_WORD = re.compile(r"[\"'“(]?[A-Za-z][A-Za-z'’-]*[.,;:!?)\"”']*")


class Labels(NamedTuple):
  """One label of every token.

  Attributes:
    values: int16, of any shape, usually [N, T]; -1 where undefined.
    classes: names of the values 0, 1, ...
  """

  values: np.ndarray
  classes: tuple[str, ...]


def label(
  tokens: np.ndarray,
  mask: np.ndarray,
  tokenizer: Any,
  *,
  documents: np.ndarray | None = None,
) -> dict[str, Labels]:
  """All labels of `DEFINITIONS`, for N windows of T tokens.

  What a label looks back at (brackets, quotes, repeats, the line) is the text
  of the window, masked tokens included; special tokens are no text.

  Args:
    tokens: int [N, T].
    mask: bool [N, T]; labels are undefined where it is False.
    tokenizer: the fast tokenizer of transformers (or `tokenizers.Tokenizer`)
      that made the tokens: byte-level BPE or SentencePiece-like.
    documents: int [N, T], the document of each position, negative for
      padding; brackets, quotes and words end with their document. None: only
      special tokens separate documents.

  Raises:
    ValueError: shapes that differ, an unknown id or kind of tokenizer.
    TypeError: a tokenizer that is not a fast one.
  """
  tokens, mask = np.asarray(tokens), np.asarray(mask, bool)
  if documents is None:
    documents = np.zeros(tokens.shape, np.int64)
  documents = np.asarray(documents)
  if tokens.ndim != 2 or not tokens.shape == mask.shape == documents.shape:
    raise ValueError(
      "expected tokens, mask and documents of one shape [N, T], got "
      f"{tokens.shape}, {mask.shape} and {documents.shape}"
    )
  unique, at = np.unique(tokens, return_inverse=True)
  at = at.reshape(tokens.shape)
  table = vocabulary.entries(tokenizer, unique.tolist())
  text = np.array([piece is not None for piece in table.pieces], bool)[at]
  text &= documents >= 0
  window, column = np.nonzero(text)
  entry = at[window, column]
  # A new segment wherever the text does not simply go on.
  follows = (np.diff(window, prepend=-1) == 0) & (
    np.diff(column, prepend=-2) == 1
  )
  follows[1:] &= np.diff(documents[window, column]) == 0
  first = np.diff(window, prepend=-1) != 0
  starts = _starts_word(table, entry, follows, first)
  flat = {
    "starts_word": (starts, ("no", "yes")),
    "first_letter": (
      np.where(starts == 1, table.letter[entry], -1),
      vocabulary.LETTERS,
    ),
    "casing": (table.casing[entry], vocabulary.CASINGS),
    "digit": (table.digit[entry], ("no", "yes")),
    "script": (table.script[entry], vocabulary.SCRIPT_NAMES),
    "non_ascii": (table.non_ascii[entry], ("no", "yes")),
    **_textual(table, entry, follows),
    "repeated": (_repeated(window, entry), ("no", "yes")),
    "position": _positions(column, tokens.shape[1]),
  }
  out = {}
  for name in DEFINITIONS:
    values, classes = flat[name]
    grid = np.full(tokens.shape, -1, np.int16)
    grid[window, column] = values
    out[name] = Labels(np.where(mask, grid, np.int16(-1)), classes)
  return out


def rows(labels: Mapping[str, Labels], mask: np.ndarray) -> dict[str, Labels]:
  """Labels of the masked positions, [N, T] -> [R], in the order of a store.

  Args:
    labels: from `label`.
    mask: bool [N, T] with R true positions.
  """
  mask = np.asarray(mask, bool)
  return {
    name: Labels(values[mask], classes)
    for name, (values, classes) in labels.items()
  }


def _starts_word(table: Entries, entry, follows, first) -> np.ndarray:
  ends = table.ends[entry]
  before = np.where(follows, np.roll(ends, 1), vocabulary.NOTHING)
  # An apostrophe on its own joins if what stands before it is in a word.
  inner = (ends == vocabulary.APOSTROPHE) & (before == vocabulary.WORD)
  joined = (before == vocabulary.WORD) | (follows & np.roll(inner, 1))
  spaced = table.spaced[entry]
  out = np.where(spaced | ~joined, table.alphabetic[entry], 0)
  # A window may begin inside a word, whose begin is not known.
  return np.where(first & ~spaced & (out == 1), -1, out)


def _repeated(window, entry) -> np.ndarray:
  out = np.ones(len(entry), np.int16)
  pairs = np.stack([window, entry], axis=1)
  if len(pairs):
    _, first = np.unique(pairs, axis=0, return_index=True)
    out[first] = 0
  return out


def _positions(column, length) -> tuple[np.ndarray, tuple[str, ...]]:
  edges = [4**i for i in range(1, 32) if 4**i < length]
  lows, highs = [0, *edges], [*edges, length]
  names = (f"{a}-{b - 1}" for a, b in zip(lows, highs, strict=True))
  return np.searchsorted(edges, column, side="right"), tuple(names)


def _textual(table: Entries, entry, follows):
  """Labels that need the bytes: lines, brackets, quotes."""
  joined = b"".join(table.pieces[i] for i in entry.tolist())
  sizes = np.array([len(piece or b"") for piece in table.pieces], np.int64)
  stops = np.cumsum(sizes[entry])
  # Somebody's vocabulary may hold an empty token; it takes its neighbour's.
  last = np.maximum(stops - 1, 0)
  raw = np.frombuffer(joined, np.uint8)
  segment = np.repeat(np.cumsum(~follows), sizes[entry])
  undefined = np.full(len(entry), -1)
  if not len(raw):
    depth = quoted = code = undefined
  else:
    depth = np.minimum(_depth(raw, segment), 2)[last]
    quoted = _quoted(joined, raw, segment)[last]
    code = _code(joined, raw, segment)[last]
  return {
    "code": (code, ("prose", "code")),
    "bracket_depth": (depth, DEPTHS),
    "in_quotes": (quoted, ("no", "yes")),
  }


def _depth(raw, segment) -> np.ndarray:
  """Open brackets behind every byte; closing what is not open is ignored."""
  change = np.isin(raw, list(b"([{")).astype(np.int64)
  change -= np.isin(raw, list(b")]}"))
  level = np.cumsum(change)
  # Falling by more than any level between segments makes the minimum start
  # over in each.
  fall = segment * (2 * len(raw) + 1)
  lowest = np.minimum.accumulate(np.minimum(level - change, level) - fall)
  return level - (lowest + fall)


def _quoted(joined, raw, segment) -> np.ndarray:
  """1 behind an odd number of ", or an open “, since the paragraph began."""
  breaks = np.diff(segment, prepend=segment[0]) != 0
  for blank in re.finditer(rb"\n[ \t\r]*\n", joined):
    breaks[min(blank.end(), len(raw) - 1)] = True
  begin = np.maximum.accumulate(np.where(breaks, np.arange(len(raw)), 0))

  def since(marks):
    total = np.cumsum(marks)
    return total - (total - marks)[begin]

  curly = np.zeros(len(raw), np.int64)
  for mark, step in (("“", 1), ("”", -1)):
    for found in re.finditer(mark.encode(), joined):
      curly[found.end() - 1] = step
  straight = (raw == ord('"')).astype(np.int64)
  return ((since(straight) % 2 == 1) | (since(curly) > 0)).astype(np.int16)


def _code(joined, raw, segment) -> np.ndarray:
  """1 in lines of code, 0 in prose, -1 in neither; per byte."""
  ends = raw == ord("\n")
  ends[:-1] |= np.diff(segment) != 0
  ends[-1] = True
  stops = np.flatnonzero(ends) + 1
  starts = np.concatenate([[0], stops[:-1]])
  kinds = [
    _kind(joined[a:b].decode("utf-8", "replace").rstrip())
    for a, b in zip(starts.tolist(), stops.tolist(), strict=True)
  ]
  return np.repeat(np.array(kinds, np.int16), stops - starts)


def _kind(line: str) -> int:
  parts = line.split()
  if not parts:
    return -1
  if _STATEMENT.match(line):
    return 1
  symbols = len(_SYMBOLS.findall(line)) / sum(map(len, parts))
  plain = sum(bool(_WORD.fullmatch(part)) for part in parts)
  if symbols >= 0.08 and plain <= 0.75 * len(parts):
    return 1
  if plain >= max(4, 0.75 * len(parts)) and symbols < 0.03:
    return 0
  return -1
