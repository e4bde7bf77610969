"""Windows of a corpus, made while they are used: stratified, exact, flat."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_jax.data import windows as bundling
from gemma_jax.data.ahead import ahead
from gemma_jax.data.corpus import Corpus, resolve_weights, shuffled
from gemma_jax.data.document import Document
from gemma_jax.data.packing import (
  Layout,
  Queue,
  Tally,
  apportion,
  interleave,
)
from gemma_jax.data.tokens import BATCH_CHARACTERS, check_tokenizer, tokenise
from gemma_jax.data.windows import Windows

ALLOCATIONS = ("equal", "proportional")

# Changes whenever the same options give other windows: caches hold on to it.
_FORMAT = 1

# Blocks that wait for their consumer.
_DEPTH = 2

_LEAST_BATCH_CHARACTERS = 1 << 14


class WindowStream:
  """Lazily tokenised windows of a corpus, stratified by source.

  Within a source documents come in the order of a hash of seed and document:
  a sample without replacement that depends neither on the order of the corpus
  nor on how many workers read it. Every source has a queue of its own, so a
  window holds one source only. The next window is always of the source that
  is furthest behind its share of the counted tokens, and a source stops at
  its budget exactly: the rest of its last window becomes padding. What a
  source that runs out leaves over goes to the others.

  Iterating gives `Windows` of 64 windows, the last of fewer, tokenised in a
  background thread; every iteration starts from the front and gives the same.
  The thread ends with the iterator (`close()` ends both). Memory does not grow
  with the windows, but for 8 bytes each where duplicates are dropped.

  Attributes:
    sources: the strata, to which `Windows.source` points.

  Args:
    corpus: a corpus, or documents in memory.
    tokenizer: see `make_windows`.
    context: T, positions per window.
    bos_id: the BOS; None only with `bos="none"`.
    pad_id: fills up. Like BOS it never counts.
    seed: of the documents' order.
    max_tokens: counted tokens of all sources; None for all that there are.
    allocation: "equal" shares of the tokens for all sources, "proportional" to
      their bytes, or {source: weight} for every source; 0 leaves one out.
    packing: "packed" or "document", see `make_windows`.
    bos: "both", "window", "document" or "none", see `make_windows`.
    stride: new positions per window, see `make_windows`.
    special_ids: further tokens that never count, e.g. EOS.
    document_tokens: take at most so many tokens of a document.
    drop_duplicates: leave out windows of the same tokens and mask, and count
      them; they use up no budget.

  Raises:
    ValueError: no documents, an argument out of range, weights for other
      sources; while iterating: too little text for one window.
    TypeError: the tokenizer cannot `encode_batch`.
  """

  def __init__(
    self,
    corpus: Sequence[Document],
    tokenizer: Any,
    *,
    context: int,
    bos_id: int | None,
    pad_id: int,
    seed: int = 0,
    max_tokens: int | None = None,
    allocation: str | Mapping[str, float] = "equal",
    packing: str = "packed",
    bos: str = "both",
    stride: int | None = None,
    special_ids: Sequence[int] = (),
    document_tokens: int | None = None,
    drop_duplicates: bool = True,
  ):
    bundling.check_documents(corpus)
    self._layout = Layout(
      context, bos_id, pad_id, packing, bos, stride, special_ids
    )
    bundling.check_budgets(max_tokens, document_tokens)
    check_tokenizer(tokenizer)
    self._corpus = Corpus.of(corpus)
    self._tokenizer = tokenizer
    self._seed = seed
    self._max_tokens = max_tokens
    self._document_tokens = document_tokens
    self._drop_duplicates = drop_duplicates
    self.sources = self._corpus.sources
    self._shares = _shares(self._corpus, allocation)
    self._order = shuffled(self._corpus, seed)
    self._report: dict[str, Any] | None = None

  def __iter__(self) -> Iterator[Windows]:
    return ahead(self._blocks, _DEPTH)

  def collect(self) -> Windows:
    """All windows, in memory."""
    windows = bundling.gather(self, self._max_tokens)
    return dataclasses.replace(windows, sources=self.sources)

  @property
  def fields(self) -> dict[str, Any]:
    """Every option as it was resolved: JSON."""
    layout = self._layout
    shares = zip(self.sources, self._shares.tolist(), strict=True)
    return {
      "format": _FORMAT,
      "sources": list(self.sources),
      "allocation": dict(shares),
      "context": layout.context,
      "bos_id": layout.bos_id,
      "pad_id": layout.pad_id,
      "special_ids": list(layout.special_ids),
      "seed": self._seed,
      "max_tokens": self._max_tokens,
      "packing": layout.packing,
      "bos": layout.bos,
      "stride": layout.stride,
      "document_tokens": self._document_tokens,
      "drop_duplicates": self._drop_duplicates,
    }

  @functools.cached_property
  def fingerprint(self) -> str:
    """Hash of what decides about the windows (sha256, 64 hex).

    Of the fields, the tokenizer (serialised if it has `to_str`, else its type)
    and the documents in their order of use. Nothing is tokenised.
    """
    hasher = hashlib.sha256(json.dumps(self.fields, sort_keys=True).encode())
    kind = type(self._tokenizer)
    to_str = getattr(self._tokenizer, "to_str", None)
    text = to_str() if to_str else f"{kind.__module__}.{kind.__qualname__}"
    hasher.update(hashlib.sha256(text.encode()).digest())
    for stratum in np.flatnonzero(self._shares):
      keys = self._corpus.key[self._order[stratum]].astype("<u8")
      hasher.update(b"%d:" % len(keys))
      hasher.update(keys.data)
    return hasher.hexdigest()

  def report(self) -> dict[str, Any]:
    """What came of it: JSON; after an iteration to the end.

    Returns:
      `sources`, with `wanted` and `tokens` (counted), `documents`, `windows`,
      `duplicates` (windows that were dropped) and `ran_out` for each that was
      not left out, and the sums of all but the last.

    Raises:
      RuntimeError: the stream was not read to its end.
    """
    if self._report is None:
      raise RuntimeError(
        "expected a stream that was read to its end: iterate over it, or"
        " collect() it, before report()"
      )
    return self._report

  def describe(self) -> str:
    """The report as a line per source."""
    lines = []
    for source, row in self.report()["sources"].items():
      wanted = "" if row["wanted"] is None else f" of {row['wanted']:,} wanted"
      line = (
        f"{source}: {row['tokens']:,} tokens{wanted}, {row['windows']:,}"
        f" windows of {row['documents']:,} documents"
      )
      if row["duplicates"]:
        line += f", {row['duplicates']:,} duplicates dropped"
      if row["ran_out"] and row["wanted"] is not None:
        line += "; it ran out"
      lines.append(line)
    return "\n".join(lines)

  def _blocks(self) -> Iterator[Windows]:
    strata = np.flatnonzero(self._shares)
    shares = self._shares[strata]
    budgets: Sequence[int | None] = [None] * len(strata)
    if self._max_tokens is not None:
      budgets = apportion(self._max_tokens, shares).tolist()
    tallies = [Tally(budget) for budget in budgets]
    queues = [Queue(self._layout, self._pieces(s, len(strata))) for s in strata]
    windows = interleave(
      queues,
      shares,
      tallies,
      pad_id=self._layout.pad_id,
      drop_duplicates=self._drop_duplicates,
    )
    yield from bundling.blocks(windows, queues, tallies, strata.tolist())
    bundling.check_enough(self._layout, queues, tallies, self._max_tokens)
    self._report = self._summary(strata, tallies)

  def _pieces(self, stratum: int, strata: int):
    # Every source has a batch of tokens waiting.
    characters = max(_LEAST_BATCH_CHARACTERS, BATCH_CHARACTERS // strata)
    return tokenise(
      (self._corpus[int(i)] for i in self._order[stratum]),
      self._tokenizer,
      self._document_tokens,
      characters,
    )

  def _summary(self, strata, tallies: Sequence[Tally]) -> dict[str, Any]:
    rows = {
      self.sources[stratum]: {
        "wanted": tally.wanted,
        "tokens": tally.tokens,
        "documents": tally.documents,
        "windows": tally.windows,
        "duplicates": tally.duplicates,
        "ran_out": tally.ran_out,
      }
      for stratum, tally in zip(strata.tolist(), tallies, strict=True)
    }
    totals = {
      name: sum(row[name] for row in rows.values())
      for name in ("tokens", "documents", "windows", "duplicates")
    }
    return {"sources": rows, "wanted": self._max_tokens, **totals}


def _shares(corpus: Corpus, allocation: str | Mapping[str, float]):
  if isinstance(allocation, str):
    if allocation not in ALLOCATIONS:
      raise ValueError(
        f"expected allocation to be one of {list(ALLOCATIONS)} or a weight for"
        f" each of the sources {list(corpus.sources)}, got {allocation!r}"
      )
    weights = np.ones(len(corpus.sources))
    if allocation == "proportional":
      weights = np.bincount(
        corpus.source, corpus.size, minlength=len(corpus.sources)
      )
    allocation = dict(zip(corpus.sources, weights.tolist(), strict=True))
  return resolve_weights(corpus.sources, allocation)
