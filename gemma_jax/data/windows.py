"""From documents to token windows that a forward pass can take."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tqdm

from gemma_jax.data.corpus import Document

PACKINGS = ("packed", "document")

# What one call of the tokenizer gets: enough to keep its threads busy, little
# enough that a small token budget does not tokenise a large corpus.
_BATCH_CHARACTERS = 1 << 18


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
  """Windows of tokens, and which document every position came from.

  W counts windows, T positions.

  Attributes:
    tokens: int32 [W, T]; every window starts with BOS.
    mask: bool [W, T], true where a position may enter training or metrics:
      not BOS, not padding, no other special token.
    document: int32 [W, T], the position's index into `documents`; a BOS
      belongs to the document that follows it, padding is -1.
    documents: (id, source, name) of every document that is in the windows.
  """

  tokens: np.ndarray
  mask: np.ndarray
  document: np.ndarray
  documents: tuple[tuple[str, str, str], ...]

  @property
  def num_tokens(self) -> int:
    """How many positions count: the sum of the mask."""
    return int(self.mask.sum())


def make_windows(
  documents: Sequence[Document],
  tokenizer: Any,
  *,
  context: int,
  max_tokens: int | None = None,
  bos_id: int,
  pad_id: int,
  packing: str = "packed",
  special_ids: Sequence[int] = (),
  document_tokens: int | None = None,
) -> Windows:
  """Tokenises documents, in their order, into windows of equal length.

  Args:
    documents: see `corpus.sample` for an order that suits a token budget.
    tokenizer: a `tokenizers.Tokenizer`, or anything with `encode_batch(texts,
      add_special_tokens=False)` whose results have `.ids`. It is called for as
      many documents as the budget needs.
    context: T, positions per window with the BOS.
    max_tokens: stop when exactly this many positions count; the rest of the
      last window becomes padding. A corpus that ends sooner gives fewer.
    bos_id: starts every window, and in packed windows every document.
    pad_id: fills up. Like BOS it never counts, even where a text holds it.
    packing: "packed" fills windows with document after document, so that only
      the last one is padded, and attention reaches into earlier documents;
      "document" starts a window with every document and pads after it. A long
      document goes on in the next window, after its BOS, either way.
    special_ids: further tokens that never count, e.g. EOS.
    document_tokens: take at most so many tokens of a document, in one piece
      that starts where its id decides, so that a budget covers more documents.

  Returns:
    The windows, W as large as needed.

  Raises:
    ValueError: there are no documents, or too little text for one window, or
      an argument is out of range.
    TypeError: the tokenizer cannot `encode_batch`.
  """
  _check(documents, tokenizer, context, max_tokens, packing)
  body = context - 1  # Every window gives its first position to BOS.
  special = np.unique([bos_id, pad_id, *special_ids])
  tokens: list[np.ndarray] = []
  owners: list[np.ndarray] = []
  used: list[tuple[str, str, str]] = []
  length = counted = 0

  def put(ids, owner):
    nonlocal length
    tokens.append(np.asarray(ids, np.int32))
    owners.append(np.full(len(ids), owner, np.int32))
    length += len(ids)

  with tqdm.tqdm(
    total=max_tokens, desc="tokenise", unit="tok", leave=False, disable=None
  ) as bar:
    for document, ids in _tokenise(documents, tokenizer):
      if not ids.size:
        continue
      if document_tokens is not None and ids.size > document_tokens:
        start = int(document.id, 16) % (ids.size - document_tokens + 1)
        ids = ids[start : start + document_tokens]
      counts = np.cumsum(~np.isin(ids, special))
      if max_tokens is not None and counted + counts[-1] >= max_tokens:
        last = np.searchsorted(counts, max_tokens - counted)
        ids, counts = ids[: last + 1], counts[: last + 1]
      # At the start of a window the window's own BOS is the boundary.
      if length % body and packing == "packed":
        put([bos_id], len(used))
      elif length % body:
        put([pad_id] * (-length % body), -1)
      put(ids, len(used))
      used.append((document.id, document.source, document.name))
      counted += int(counts[-1])
      bar.update(int(counts[-1]))
      if counted == max_tokens:
        break
  needed = body if packing == "packed" else 1
  if counted != max_tokens and (length < needed or not counted):
    raise ValueError(
      f"corpus too short: {counted} tokens arrived, and one window of context"
      f" {context} needs {needed}; bring more text, or lower the context"
    )
  put([pad_id] * (-length % body), -1)
  flat, owner = np.concatenate(tokens), np.concatenate(owners)
  flat, owner = flat.reshape(-1, body), owner.reshape(-1, body)
  flat = np.pad(flat, ((0, 0), (1, 0)), constant_values=bos_id)
  owner = np.concatenate([owner[:, :1], owner], axis=1)
  mask = ~np.isin(flat, special) & (owner >= 0)
  return Windows(flat, mask, owner, tuple(used))


def fingerprint(windows: Windows) -> str:
  """Hashes what a window holds and where it came from (sha256, 64 hex).

  Args:
    windows: W windows of T positions.

  Returns:
    The same string for the same tokens, mask and documents on every machine:
    a key for caches.
  """
  hasher = hashlib.sha256(str(windows.tokens.shape).encode())
  for array, dtype in (
    (windows.tokens, "<i4"),
    (windows.mask, "?"),
    (windows.document, "<i4"),
  ):
    hasher.update(np.ascontiguousarray(array, dtype).data)
  for identity, _, _ in windows.documents:
    hasher.update(identity.encode())
  return hasher.hexdigest()


def _tokenise(
  documents: Sequence[Document], tokenizer: Any
) -> Iterator[tuple[Document, np.ndarray]]:
  batch, characters = [], 0
  for index, document in enumerate(documents):
    batch.append(document)
    characters += len(document.text)
    if characters >= _BATCH_CHARACTERS or index + 1 == len(documents):
      texts = [d.text for d in batch]
      encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
      for one, encoding in zip(batch, encoded, strict=True):
        yield one, np.asarray(encoding.ids, np.int32)
      batch, characters = [], 0


def _check(documents, tokenizer, context, max_tokens, packing) -> None:
  if not len(documents):
    raise ValueError(
      "expected at least one document, got none: look at what the corpus,"
      " its split and its sources leave over"
    )
  if context < 2:
    raise ValueError(
      f"expected context >= 2, a BOS and one token, got {context}"
    )
  if max_tokens is not None and max_tokens < 1:
    raise ValueError(f"expected max_tokens >= 1 or None, got {max_tokens}")
  if packing not in PACKINGS:
    raise ValueError(
      f"expected packing to be one of {list(PACKINGS)}, got {packing!r}"
    )
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
