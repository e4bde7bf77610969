"""A corpus: an index of documents in columns, an honest split, an order.

The texts stay where they are, on a disk as a rule, and are loaded one by one.
What is in memory per document does not depend on how long it is.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np

from gemma_jax.data.document import Document, draw, group_key, key


class Shelf(Protocol):
  """Where a corpus' texts are."""

  def read(self, where: np.ndarray) -> Document:
    """The document at a place, int64 [C], of the column `Corpus.where`."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Corpus(Sequence[Document]):
  """Documents that are loaded when they are asked for: `corpus[i]`.

  About 44 bytes of memory for each of N documents, whatever their length.

  Attributes:
    sources: the strata, sorted. A part of a corpus keeps all of them.
    source: int32 [N], the document's index into `sources`.
    key: uint64 [N], `Document.id` as a number.
    group: uint64 [N], hash of `Document.group`, by which `split` decides.
    size: int64 [N], bytes of the text in UTF-8.
    where: int64 [N, C], the document's place on the shelf.
    shelf: loads the texts.
  """

  sources: tuple[str, ...]
  source: np.ndarray
  key: np.ndarray
  group: np.ndarray
  size: np.ndarray
  where: np.ndarray
  shelf: Shelf

  @classmethod
  def of(cls, documents: Sequence[Document]) -> "Corpus":
    """A corpus of documents in memory; a corpus is returned as it is."""
    if isinstance(documents, Corpus):
      return documents
    documents = tuple(documents)
    part = Part.of(documents, [(i,) for i in range(len(documents))])
    return join([part], _Memory(documents))

  def __len__(self) -> int:
    return len(self.key)

  def __iter__(self) -> Iterator[Document]:
    # Not by IndexError, which would end here without a word wherever it rose.
    for index in range(len(self)):
      yield self[index]

  def __repr__(self) -> str:
    count, size = len(self), int(self.size.sum())
    return f"Corpus({count} documents, {size} bytes, sources {self.sources})"

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.select(np.arange(len(self))[index])
    document = self.shelf.read(self.where[index])
    if key(document) != int(self.key[index]):
      raise ValueError(
        f"document {document.name!r} is not the one that was indexed: its"
        " file has changed since. Load the corpus again"
      )
    return document

  def select(self, indices: np.ndarray) -> Self:
    """The documents at these indices, in their order; texts are shared.

    Args:
      indices: integers, or a bool for every document.
    """
    rows = np.asarray(indices)
    if not rows.size and rows.dtype != bool:
      rows = rows.astype(np.int64)
    names = ("source", "key", "group", "size", "where")
    columns = {name: getattr(self, name)[rows] for name in names}
    return dataclasses.replace(self, **columns)

  def keep(self, sources: str | Sequence[str]) -> Self:
    """The documents of these strata only.

    Raises:
      ValueError: there is no such stratum.
    """
    wanted = {sources} if isinstance(sources, str) else set(sources)
    if unknown := sorted(wanted - set(self.sources)):
      raise ValueError(
        f"this corpus has no sources {unknown}; it has {list(self.sources)}"
      )
    kept = np.array([name in wanted for name in self.sources], bool)
    part = self.select(kept[self.source])
    renumbered = (np.cumsum(kept) - 1).astype(np.int32)
    return dataclasses.replace(
      part,
      sources=tuple(s for s in self.sources if s in wanted),
      source=renumbered[part.source],
    )


@dataclasses.dataclass(frozen=True)
class _Memory:
  documents: tuple[Document, ...]

  def read(self, where: np.ndarray) -> Document:
    return self.documents[where[0]]


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
  """The index of a piece of a corpus; the columns are those of `Corpus`."""

  sources: tuple[str, ...]
  source: np.ndarray
  key: np.ndarray
  group: np.ndarray
  size: np.ndarray
  where: np.ndarray

  @classmethod
  def of(cls, documents, places: Sequence[tuple[int, ...]]) -> "Part":
    """Indexes documents, which may be a generator, at their places.

    Args:
      documents: taken one by one; `places` may grow meanwhile.
      places: of every document.
    """
    numbers: dict[str, int] = {}
    rows = [
      (
        numbers.setdefault(document.source, len(numbers)),
        key(document),
        group_key(document),
        len(document.text.encode()),
      )
      for document in documents
    ]
    columns = tuple(zip(*rows, strict=True)) or ((), (), (), ())
    return cls(
      tuple(numbers),
      np.array(columns[0], np.int32),
      np.array(columns[1], np.uint64),
      np.array(columns[2], np.uint64),
      np.array(columns[3], np.int64),
      np.array(places, np.int64).reshape(len(rows), -1 if rows else 1),
    )


def join(parts: Sequence[Part], shelf: Shelf) -> Corpus:
  """One corpus of the parts' documents, in order.

  Args:
    parts: at least one; their places are those of the shelf.
    shelf: holds all of them.
  """
  parts = [part for part in parts if part.key.size] or list(parts[:1])
  sources = tuple(sorted({s for part in parts for s in part.sources}))
  number = {source: i for i, source in enumerate(sources)}
  renumbered = [
    np.array([number[s] for s in part.sources], np.int32)[part.source]
    for part in parts
  ]
  columns = {
    name: np.concatenate([getattr(part, name) for part in parts])
    for name in ("key", "group", "size", "where")
  }
  return Corpus(sources, np.concatenate(renumbered), shelf=shelf, **columns)


def split(
  documents: Sequence[Document], *, heldout_fraction: float, seed: int
) -> tuple[Corpus, Corpus]:
  """Parts a corpus into training and held-out documents, by group.

  A group's side depends on the seed and its name alone: adding, removing or
  reordering documents moves no other document, and a larger fraction holds
  out a superset.

  Args:
    documents: a corpus, or documents in memory, in any order.
    heldout_fraction: the chance of a group to be held out, in [0, 1).
    seed: another seed gives an independent split.

  Returns:
    (train, heldout), both in the order of `documents`.

  Raises:
    ValueError: the fraction is out of range, or one side would be empty.
  """
  if not 0 <= heldout_fraction < 1:
    raise ValueError(
      f"expected heldout_fraction in [0, 1), got {heldout_fraction}"
    )
  corpus = Corpus.of(documents)
  # Whole numbers: a draw as a float may round up to 1.
  threshold = np.uint64(int(heldout_fraction * 2**64))
  held = draw(corpus.group, "split", seed) < threshold
  if len(corpus) and heldout_fraction and held.all() == held.any():
    raise ValueError(
      f"all {np.unique(corpus.group).size} groups of documents fell on one"
      f" side of the split (heldout_fraction {heldout_fraction}, seed {seed}):"
      " bring more documents, or take another fraction or seed"
    )
  return corpus.select(~held), corpus.select(held)


def shuffled(corpus: Corpus, seed: int) -> list[np.ndarray]:
  """For every source, the indices of its documents in a seeded order.

  The order is that of a hash of seed and key: the documents of a prefix are a
  sample without replacement (a reservoir by random keys), which depends
  neither on the order of the corpus nor on how it was read.
  """
  order = np.lexsort((draw(corpus.key, "order", seed), corpus.source))
  counts = np.bincount(corpus.source, minlength=len(corpus.sources))
  ends = np.cumsum(counts)
  return [order[end - n : end] for n, end in zip(counts, ends, strict=True)]


def resolve_weights(
  sources: Sequence[str], weights: Mapping[str, Any]
) -> np.ndarray:
  """Shares that sum to 1, float64, in the order of `sources`.

  Raises:
    ValueError: weights that are not finite, not positive, or for other
      sources.
  """
  weights = dict(weights)
  if set(weights) != set(sources):
    raise ValueError(
      f"expected one weight for each of the sources {sorted(sources)}, got"
      f" {sorted(weights)}; 0 leaves a source out"
    )
  values = list(weights.values())
  if not all(0 <= v < math.inf for v in values) or (values and not any(values)):
    raise ValueError(
      f"expected finite weights >= 0, at least one positive, got {weights}"
    )
  shares = np.array([weights[source] for source in sources], np.float64)
  return shares / shares.sum() if values else shares


def sample(
  documents: Sequence[Document],
  *,
  seed: int,
  weights: Mapping[str, float] | None = None,
) -> Corpus:
  """Orders documents so that every prefix follows the mixture.

  Each source is shuffled by a seeded hash; then the source that is furthest
  behind its share of the bytes goes next. A source that runs out leaves the
  others to go on. A prefix is off by less than the longest document.

  Args:
    documents: a corpus, or documents in memory; their order does not matter.
    seed: of the shuffle.
    weights: share of the bytes for every source, e.g. {"code": 2.0,
      "reference": 1.0}; 0 leaves a source out. Equal by default.

  Returns:
    The documents, whole, each once.

  Raises:
    ValueError: weights that are not finite, not positive, or for other sources.
  """
  corpus = Corpus.of(documents)
  present = dict.fromkeys(corpus.sources, 1.0)
  shares = resolve_weights(
    corpus.sources, present if weights is None else weights
  )
  orders = [o for o, w in zip(shuffled(corpus, seed), shares, strict=True) if w]
  if not orders:
    return corpus
  # Taking whoever is furthest behind is to sort by how far a source has come
  # when a document of it starts.
  starts = [
    (np.cumsum(corpus.size[order]) - corpus.size[order]) / share
    for order, share in zip(orders, shares[shares > 0], strict=True)
  ]
  numbers = [np.full(len(order), i) for i, order in enumerate(orders)]
  place = np.lexsort((np.concatenate(numbers), np.concatenate(starts)))
  return corpus.select(np.concatenate(orders)[place])
