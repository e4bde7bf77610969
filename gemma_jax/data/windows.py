"""Windows of tokens that a forward pass can take, and whose they are."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from gemma_jax import progress
from gemma_jax.data import packing as cutting
from gemma_jax.data.document import Document
from gemma_jax.data.packing import Layout, Queue, Tally, Window
from gemma_jax.data.tokens import check_tokenizer, tokenise

BLOCK_WINDOWS = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
  """Windows of tokens, and which document every position came from.

  W counts windows, T positions. A block of a stream numbers its documents as
  the stream does: the first that it names is `first_document`, and positions
  may belong to documents that earlier blocks named.

  Attributes:
    tokens: int32 [W, T].
    mask: bool [W, T], true where a position may enter training or metrics:
      not BOS, not padding, no other special token, and not counted by another
      window.
    document: int32 [W, T], the running index of the position's document; a
      BOS belongs to the document that follows it, padding is -1.
    documents: (id, source, name) of the documents that come up first here.
    begin: int32 [W, T], the token's first byte in the UTF-8 text of its
      document, -1 for BOS and padding. A token that holds a part of a
      character has the span of the whole character.
    end: int32 [W, T], one behind the token's last byte, -1 likewise.
    source: int32 [W], the window's index into the sources of its stream; 0
      where there are no strata.
    first_document: running index of `documents[0]`.
    sources: names that `source` counts through.
  """

  tokens: np.ndarray
  mask: np.ndarray
  document: np.ndarray
  documents: tuple[tuple[str, str, str], ...]
  begin: np.ndarray | None = None
  end: np.ndarray | None = None
  source: np.ndarray | None = None
  first_document: int = 0
  sources: tuple[str, ...] = ("",)

  def __post_init__(self):
    # Windows that somebody else made know nothing of bytes and strata.
    for name in ("begin", "end"):
      if getattr(self, name) is None:
        nowhere = np.full(self.tokens.shape, -1, np.int32)
        object.__setattr__(self, name, nowhere)
    if self.source is None:
      zeros = np.zeros(len(self.tokens), np.int32)
      object.__setattr__(self, "source", zeros)

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
  bos_id: int | None,
  pad_id: int,
  packing: str = "packed",
  special_ids: Sequence[int] = (),
  document_tokens: int | None = None,
  bos: str = "both",
  stride: int | None = None,
  drop_duplicates: bool = False,
) -> Windows:
  """Tokenises documents, in their order, into windows of equal length.

  Args:
    documents: a list or a corpus, taken as it comes; `WindowStream` mixes
      strata.
    tokenizer: a `tokenizers.Tokenizer`, or anything with `encode_batch(texts,
      add_special_tokens=False)` whose results have `.ids`, and `.offsets` for
      byte spans. It is called for as many documents as the budget needs.
    context: T, positions per window with the BOS.
    max_tokens: stop when exactly this many positions count; the rest of the
      last window becomes padding. A corpus that ends sooner gives fewer.
    bos_id: the BOS; None only with `bos="none"`.
    pad_id: fills up. Like BOS it never counts, even where a text holds it.
    packing: "packed" fills windows with document after document, so that only
      the last one is padded, and attention reaches into earlier documents;
      "document" starts a window with every document and pads after it. A long
      document goes on in the next window either way.
    special_ids: further tokens that never count, e.g. EOS.
    document_tokens: take at most so many tokens of a document, in one piece
      that starts where its id decides, so that a budget covers more documents.
    bos: what starts with BOS: every "window", every "document", "both", or
      "none". Without a window's BOS all T positions hold text.
    stride: new positions per window, after the first of a queue or document;
      those before them repeat the end of the window before, as context, and
      do not count. None: nothing repeats.
    drop_duplicates: leave out windows of the same tokens and mask.

  Returns:
    The windows, W as large as needed.

  Raises:
    ValueError: there are no documents, or too little text for one window, or
      an argument is out of range.
    TypeError: the tokenizer cannot `encode_batch`.
  """
  check_documents(documents)
  layout = Layout(context, bos_id, pad_id, packing, bos, stride, special_ids)
  check_budgets(max_tokens, document_tokens)
  check_tokenizer(tokenizer)
  queue = Queue(layout, tokenise(documents, tokenizer, document_tokens))
  tally = Tally(max_tokens)
  windows = cutting.interleave(
    [queue], np.ones(1), [tally], pad_id=pad_id, drop_duplicates=drop_duplicates
  )
  made = gather(blocks(windows, [queue], [tally], [0]), max_tokens)
  check_enough(layout, [queue], [tally], max_tokens)
  return made


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


def blocks(
  windows: Iterator[tuple[int, Window]],
  queues: Sequence[Queue],
  tallies: Sequence[Tally],
  sources: Sequence[int],
) -> Iterator[Windows]:
  """Bundles windows, `BLOCK_WINDOWS` at a time, and numbers their documents.

  Args:
    windows: (stratum, window), see `packing.interleave`.
    queues: of the strata.
    tallies: of the strata; their `documents` are counted here.
    sources: what a window of each stratum has as `source`.
  """
  # Of the documents that may still come: what is behind is forgotten.
  running: list[dict[int, int]] = [{} for _ in queues]
  count = 0
  while bundle := list(itertools.islice(windows, BLOCK_WINDOWS)):
    first, new, owners = count, [], []
    for stratum, window in bundle:
      numbers, names = running[stratum], queues[stratum].documents
      present = np.unique(window.owner[window.owner >= 0])
      for owner in present.tolist():
        if owner not in numbers:
          numbers[owner] = count
          new.append(names[owner])
          tallies[stratum].documents += 1
          count += 1
      table = np.array([numbers[owner] for owner in present.tolist()], np.int32)
      place = np.searchsorted(present, window.owner)
      owners.append(np.where(window.owner < 0, np.int32(-1), table[place]))
      _forget(numbers, int(present[0]))
      _forget(names, int(present[0]))
    yield Windows(
      np.stack([window.tokens for _, window in bundle]),
      np.stack([window.mask for _, window in bundle]),
      np.stack(owners),
      tuple(new),
      np.stack([window.begin for _, window in bundle]),
      np.stack([window.end for _, window in bundle]),
      np.array([sources[stratum] for stratum, _ in bundle], np.int32),
      first,
    )


def _forget(known: dict[int, Any], before: int) -> None:
  """Deletes the keys below `before`; they were put in in their order."""
  for owner in list(itertools.takewhile(before.__gt__, known)):
    del known[owner]


def gather(parts: Iterable[Windows], max_tokens: int | None) -> Windows | None:
  """All blocks of a stream as one, with a bar; None if there are none.

  Args:
    parts: in their order.
    max_tokens: for the bar.
  """
  kept = []
  with progress.bar(max_tokens, "tokenise", unit="tokens") as bar:
    for part in parts:
      kept.append(part)
      bar.update(part.num_tokens)
  if not kept:
    return None
  arrays = {
    name: np.concatenate([getattr(part, name) for part in kept])
    for name in ("tokens", "mask", "document", "begin", "end", "source")
  }
  documents = tuple(d for part in kept for d in part.documents)
  return Windows(documents=documents, **arrays)


def check_documents(documents: Sequence[Document]) -> None:
  """Raises ValueError if there are none."""
  if not len(documents):
    raise ValueError(
      "expected at least one document, got none: look at what the corpus,"
      " its split and its sources leave over"
    )


def check_budgets(max_tokens: int | None, document_tokens: int | None) -> None:
  """Raises ValueError for a budget of nothing."""
  for name, value in (
    ("max_tokens", max_tokens),
    ("document_tokens", document_tokens),
  ):
    if value is not None and value < 1:
      raise ValueError(f"expected {name} >= 1 or None, got {value}")


def check_enough(
  layout: Layout,
  queues: Sequence[Queue],
  tallies: Sequence[Tally],
  max_tokens: int | None,
) -> None:
  """Raises ValueError if all text together does not fill one window."""
  counted = sum(tally.tokens for tally in tallies)
  arrived = sum(queue.arrived for queue in queues)
  needed = layout.body if layout.packing == "packed" else 1
  if counted != max_tokens and (arrived < needed or not counted):
    raise ValueError(
      f"corpus too short: {counted} tokens arrived, and one window of context"
      f" {layout.context} needs {needed}; bring more text, or lower the context"
    )
