"""From texts to tokens, each with the bytes that it stands for."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from gemma_jax.data.document import Document, key

# What one call of the tokenizer gets: enough to keep its threads busy, little
# enough that a small token budget does not tokenise a large corpus.
BATCH_CHARACTERS = 1 << 18


@dataclasses.dataclass(frozen=True)
class Piece:
  """Tokens of one document; n of them, at least one.

  Attributes:
    document: (id, source, name).
    ids: int32 [n].
    begin: int32 [n], the token's first byte in the document's UTF-8 text.
    end: int32 [n], one behind its last byte; -1, as `begin`, where the
      tokenizer gives no offsets.
  """

  document: tuple[str, str, str]
  ids: np.ndarray
  begin: np.ndarray
  end: np.ndarray


def tokenise(
  documents: Iterable[Document],
  tokenizer: Any,
  document_tokens: int | None = None,
  batch_characters: int = BATCH_CHARACTERS,
) -> Iterator[Piece]:
  """Tokenises documents in their order, in batches of about equal length.

  Args:
    documents: loaded as they are needed.
    tokenizer: see `check_tokenizer`.
    document_tokens: take at most so many tokens of a document, in one piece
      that starts where its id decides.
    batch_characters: of text in one call of the tokenizer, or one document.

  Yields:
    A piece of every document that has tokens.
  """
  batch: list[Document] = []
  characters = 0
  for document in documents:
    batch.append(document)
    characters += len(document.text)
    if characters >= batch_characters:
      yield from _encode(batch, tokenizer, document_tokens)
      batch, characters = [], 0
  if batch:
    yield from _encode(batch, tokenizer, document_tokens)


def _encode(batch, tokenizer, document_tokens) -> Iterator[Piece]:
  texts = [document.text for document in batch]
  encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
  for document, encoding in zip(batch, encoded, strict=True):
    ids = np.asarray(encoding.ids, np.int32)
    if not ids.size:
      continue
    begin, end = _spans(document, encoding, ids.size)
    if document_tokens is not None and ids.size > document_tokens:
      start = key(document) % (ids.size - document_tokens + 1)
      cut = slice(start, start + document_tokens)
      ids, begin, end = ids[cut], begin[cut], end[cut]
    name = (document.id, document.source, document.name)
    yield Piece(name, ids, begin, end)


def _spans(document, encoding, count) -> tuple[np.ndarray, np.ndarray]:
  offsets = getattr(encoding, "offsets", None)
  if offsets is None:
    nothing = np.full(count, -1, np.int32)
    return nothing, nothing
  spans = np.asarray(offsets, np.int64)
  text = document.text
  if not text.isascii():
    # How many bytes stand before every character.
    points = np.frombuffer(text.encode("utf-32-le"), "<u4")
    widths = 1 + sum((points >= least) for least in (0x80, 0x800, 0x10000))
    before = np.concatenate([[0], np.cumsum(widths)])
    spans = before[spans]
  if spans[-1, 1] > np.iinfo(np.int32).max:
    raise ValueError(
      f"document {document.name!r} has {spans[-1, 1]} bytes, more than the"
      " 2 GiB that a byte span can hold: split it into several"
    )
  return spans[:, 0].astype(np.int32), spans[:, 1].astype(np.int32)


def check_tokenizer(tokenizer: Any) -> None:
  """Refuses what would lose text without a word.

  Args:
    tokenizer: a `tokenizers.Tokenizer`, or anything with `encode_batch(texts,
      add_special_tokens=False)` whose results have `.ids`, and `.offsets` in
      characters for byte spans.

  Raises:
    TypeError: it cannot `encode_batch`.
    ValueError: it truncates or pads.
  """
  if not hasattr(tokenizer, "encode_batch"):
    raise TypeError(
      "expected a tokenizer with encode_batch, as tokenizers.Tokenizer has,"
      f" got {type(tokenizer).__name__}; a fast tokenizer of transformers"
      " keeps one in .backend_tokenizer"
    )
  # Some tokenizer.json files ask for it, and transformers switches it on in
  # passing. Text would go missing, or padding would count, without a word.
  for setting in ("truncation", "padding"):
    if value := getattr(tokenizer, setting, None):
      raise ValueError(
        f"expected a tokenizer without {setting}, got {value}: call its"
        f" no_{setting}() first"
      )
