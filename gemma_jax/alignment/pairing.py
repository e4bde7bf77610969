"""Tokens of two tokenizers, paired where they end at the same byte.

A causal state at a token that ends at byte b has seen the bytes before b and
no others. Two models have seen the same text where both have a token that
ends there, and nowhere else. Ends are numbers of bytes of the text's UTF-8,
-1 where it is not known at which byte inside a character a token ends.
"""

import dataclasses
import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from gemma_jax.data.tokens import check_tokenizer
from gemma_jax.data.vocabulary import token_bytes
from gemma_jax.data.windows import Windows

log = logging.getLogger("gemma_jax")

FEW, TOO_FEW = 0.5, 0.1  # shares of paired tokens: a warning, an error

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's


@dataclasses.dataclass(frozen=True)
class Coverage:
  """How much of a text is in pairs, from 0 to 1.

  Attributes:
    tokens_a: share of the tokens of a that are paired.
    tokens_b: share of the tokens of b that are paired.
    bytes: share of the bytes that lie in a paired token of both; a token
      after one of unknown end counts from the last known end on.
    one_to_one: share of pairs of which the token before is paired, too, on
      both sides, so that both tokens have the same bytes.
  """

  tokens_a: float
  tokens_b: float
  bytes: float
  one_to_one: float


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
  """P pairs of positions, by document and then by where they end.

  Attributes:
    a: int64 [P, 2], window and position.
    b: int64 [P, 2], window and position.
    document: int64 [P], into the `documents` of the windows of a.
    one_to_one: bool [P], whether both tokens have the same bytes.
    coverage: of the positions that may be paired.
  """

  a: np.ndarray
  b: np.ndarray
  document: np.ndarray
  one_to_one: np.ndarray
  coverage: Coverage


class _Ends(NamedTuple):
  """Ends of tokens in their order, and what `coverage` needs of them."""

  ends: np.ndarray
  before: np.ndarray  # the end of the token before
  counted: np.ndarray  # whether the token may be paired

  def start(self) -> np.ndarray:
    """The last known end before each token."""
    return np.maximum.accumulate(self.before)

  def held(self) -> int:
    """Bytes of the counted tokens."""
    known = self.counted & (self.ends >= 0)
    return int((self.ends - self.start())[known].sum())


def pair_by_byte_end(
  text: str, tokenizer_a: Any, tokenizer_b: Any
) -> np.ndarray:
  """Pairs the tokens of a text that end at the same byte in both tokenizers.

  Args:
    text: any; it is tokenised without the special tokens around it.
    tokenizer_a: a fast tokenizer of transformers, or `tokenizers.Tokenizer`.
    tokenizer_b: likewise.

  Returns:
    int64 [P, 2], indices into `encode(text, add_special_tokens=False)` of a
    and of b, ascending.

  Raises:
    TypeError, ValueError: as `byte_ends`, or a tokenizer that truncates.
  """
  return pair_ends(*(_text_ends(text, t) for t in (tokenizer_a, tokenizer_b)))


def byte_ends(
  token_ids: Iterable[int], tokenizer: Any, text: str
) -> np.ndarray:
  """At which byte of the text each of its tokens ends.

  Cumulative lengths of the tokens' bytes, where these are the text's. They
  are not for a text with SentencePiece's sign for a space, for a vocabulary
  that puts a space in front or lacks bytes: then offsets tell, but not where
  inside a character a token ends.

  Args:
    token_ids: n, all tokens of the text without special tokens around it;
      special tokens that the text spells out are as long as it spells them.
    tokenizer: that made them, as `pair_by_byte_end` takes it.
    text: what they stand for.

  Returns:
    int64 [n], -1 inside a character where only offsets are known.

  Raises:
    TypeError, ValueError: as `vocabulary.token_bytes`.
    ValueError: other tokens than those of the text, or a tokenizer that
      changes more of the text than its spaces.
  """
  ids = [int(i) for i in token_ids]
  pieces = token_bytes(tokenizer, ids)
  backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
  spelled = [
    backend.id_to_token(i).encode() if piece is None else piece
    for i, piece in zip(ids, pieces, strict=True)
  ]
  if b"".join(spelled) == text.encode():
    return np.cumsum([len(piece) for piece in spelled], dtype=np.int64)
  return _ends_of_offsets(ids, backend, text)


def pair_ends(ends_a, ends_b) -> np.ndarray:
  """Pairs equal ends.

  Args:
    ends_a: whole numbers [n]; those below 0 are never paired. Of equal ones,
      as of tokens without bytes, the last is.
    ends_b: likewise [m].

  Returns:
    int64 [P, 2], indices into both, ascending by end.
  """
  (a, last_a), (b, last_b) = map(last_of_each, (ends_a, ends_b))
  common, i, j = np.intersect1d(a, b, assume_unique=True, return_indices=True)
  known = common >= 0
  return np.stack([last_a[i[known]], last_b[j[known]]], axis=1)


def coverage(ends_a, ends_b) -> Coverage:
  """How much of one text is in pairs.

  Args:
    ends_a: of all its tokens, as `byte_ends` gives them, [n].
    ends_b: likewise [m].

  Raises:
    ValueError: no tokens.
  """
  a, b = (
    _Ends(ends, np.append(0, ends[:-1]), np.ones(len(ends), bool))
    for ends in (np.asarray(ends, np.int64) for ends in (ends_a, ends_b))
  )
  pairs = pair_ends(a.ends, b.ends)
  return _coverage(a, b, pairs, _one_to_one(a, b, pairs))


def pair_windows(
  windows_a: Windows, windows_b: Windows, *, skip: int = 4
) -> Pairs:
  """Pairs the positions of two tokenisations of the same documents.

  Only tokens that end where a character ends are paired. Windows that begin
  elsewhere in a text still hold less of what is before a pair in one model
  than in the other. What a tokenizer changes in a text cannot be seen in its
  windows: normalise texts before for one that would, as NeoX's does (NFC).

  Args:
    windows_a: made with one tokenizer, of documents in any order.
    windows_b: made with the other.
    skip: positions at the start of every window that are left out, the BOS
      among them: states there are of another kind.

  Raises:
    ValueError: other documents in a than in b (names them), windows without
      byte spans, a block of a stream, or less than a tenth of the tokens of
      one side paired. Less than half is warned of in the log.
  """
  numbers_a, numbers_b = _same_documents(windows_a, windows_b)
  place_a, a = _side(windows_a, numbers_a, skip, "windows_a")
  place_b, b = _side(windows_b, numbers_b, skip, "windows_b")
  pairs = pair_ends(a.ends, b.ends)
  one = _one_to_one(a, b, pairs)
  counted = a.counted[pairs[:, 0]] & b.counted[pairs[:, 1]]
  pairs, one = pairs[counted], one[counted]
  found = _coverage(a, b, pairs, one)
  _check_coverage(found)
  at_a, at_b = place_a[pairs[:, 0]], place_b[pairs[:, 1]]
  document = windows_a.document[*at_a.T].astype(np.int64)
  return Pairs(at_a, at_b, document - windows_a.first_document, one, found)


def _text_ends(text: str, tokenizer: Any) -> np.ndarray:
  backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
  check_tokenizer(backend)
  ids = backend.encode(text, add_special_tokens=False).ids
  return byte_ends(ids, tokenizer, text)


def _ends_of_offsets(ids: list[int], backend: Any, text: str) -> np.ndarray:
  check_tokenizer(backend)
  encoding = backend.encode(text, add_special_tokens=False)
  if encoding.ids != ids:
    raise ValueError(
      f"expected the {len(encoding.ids)} tokens that the tokenizer gives for "
      f"the text, got {len(ids)} others; pass those of encode(text, "
      "add_special_tokens=False)"
    )
  if backend.normalizer is not None:
    # Offsets of what was composed or dropped are wrong by some bytes.
    changed = backend.normalizer.normalize_str(text).replace(_SPACE, " ")
    plain = text.replace(_SPACE, " ")
    if changed not in (plain, " " + plain):
      raise ValueError(
        "expected a tokenizer that leaves the text as it is, got one whose "
        "normalizer changes it, so that its tokens are not of these bytes; "
        "give both tokenizers the text of tokenizer.backend_tokenizer"
        ".normalizer.normalize_str(text)"
      )
  # How many bytes stand before every character.
  bytes_before = np.cumsum([0, *(len(c.encode()) for c in text)])
  offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
  begin, end = bytes_before[offsets].T
  return _whole(begin, end)


def _whole(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
  """Ends of tokens of one text, -1 for those inside a character.

  All tokens that share a character span the whole of it; it ends with the
  last of them, which is the one that the next token does not overlap.
  """
  if not len(end):
    return end
  return np.where(end <= np.append(begin[1:], end[-1]), end, -1)


def last_of_each(ends) -> tuple[np.ndarray, np.ndarray]:
  """Different ends, ascending, and the last index of each."""
  ends = np.asarray(ends, np.int64)
  different, first = np.unique(ends[::-1], return_index=True)
  return different, len(ends) - 1 - first


def _one_to_one(a: _Ends, b: _Ends, pairs: np.ndarray) -> np.ndarray:
  before = a.before[pairs[:, 0]]
  return (before == b.before[pairs[:, 1]]) & (before >= 0)


def _coverage(a: _Ends, b: _Ends, pairs: np.ndarray, one) -> Coverage:
  tokens = int(a.counted.sum()), int(b.counted.sum())
  if not all(tokens):
    raise ValueError(
      f"expected tokens on both sides, got {tokens[0]} and {tokens[1]}"
    )
  i, j = pairs.T
  # A byte in paired tokens of both is in tokens of the same pair: there is
  # an end of both sides between any others.
  both = a.ends[i] - np.maximum(a.start()[i], b.start()[j])
  return Coverage(
    len(pairs) / tokens[0],
    len(pairs) / tokens[1],
    float(both.sum() / max(a.held(), b.held(), 1)),
    float(one.mean()) if len(one) else 0.0,
  )


def _check_coverage(found: Coverage) -> None:
  least = min(found.tokens_a, found.tokens_b)
  shares = f"{found.tokens_a:.1%} of the tokens of a and {found.tokens_b:.1%}"
  if least < TOO_FEW:
    raise ValueError(
      f"expected at least {TOO_FEW:.0%} of the tokens to end at the same byte "
      f"in both, got {shares} of those of b; were the windows made of the same "
      "parts of the documents, without document_tokens?"
    )
  if least < FEW:
    log.warning(
      "Only %s of those of b are paired: what is said of pairs need not hold "
      "for the other tokens.",
      shares,
    )


def _same_documents(windows_a: Windows, windows_b: Windows):
  """Numbers of the documents of a and of b, equal for equal ones."""
  numbers = {d: i for i, d in enumerate(windows_a.documents)}
  there = set(windows_b.documents)
  only_a = [d[2] for d in numbers if d not in there]
  only_b = [d[2] for d in there if d not in numbers]
  if only_a or only_b:
    raise ValueError(
      "expected windows of the same documents, got "
      f"{_some(only_a)} in a only and {_some(only_b)} in b only; make both of "
      "the same documents and without max_tokens, which ends elsewhere in each"
    )
  return (
    np.array([numbers[d] for d in windows.documents], np.int64)
    for windows in (windows_a, windows_b)
  )


def _some(names: list[str]) -> str:
  dots = ", ..." if len(names) > 3 else ""
  return f"{len(names)} ({', '.join(sorted(names)[:3])}{dots})"


def _side(windows: Windows, numbers: np.ndarray, skip: int, name: str):
  """(window, position) [n, 2] of a side's tokens in their order, and `_Ends`.

  Ends of different documents, which `numbers` numbers, are kept apart by
  multiples of 2^32.
  """
  text = (windows.document >= 0) & (windows.end >= 0)
  if not text[windows.mask].any():
    raise ValueError(
      f"expected {name} with byte spans, got none; make them with a tokenizer "
      "that gives offsets, such as tokenizers.Tokenizer"
    )
  # What repeats the window before, as context, leads and does not count.
  text &= np.maximum.accumulate(windows.mask, axis=1)
  document = windows.document[text].astype(np.int64) - windows.first_document
  if document.min() < 0:
    raise ValueError(
      f"expected {name} that name all their documents, got a later block of a "
      "stream; make_windows gives all in one"
    )
  document = numbers[document]
  order = np.argsort(document, kind="stable")
  place, document = np.argwhere(text)[order], document[order]
  begin, end = (
    (document << 32) + array[*place.T] for array in (windows.begin, windows.end)
  )
  ends = _whole(begin, end)
  starts = np.diff(document, prepend=-1) != 0
  before = np.where(starts, begin, np.roll(ends, 1))
  counted = windows.mask[*place.T] & (place[:, 1] >= skip)
  return place, _Ends(ends, before, counted)
