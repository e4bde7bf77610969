"""Queues of tokens, cut into windows, and whose window comes next."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from gemma_jax.data.tokens import Piece

PACKINGS = ("packed", "document")
BOS = ("both", "window", "document", "none")


@dataclasses.dataclass(frozen=True)
class Layout:
  """What a window looks like. See `windows.WindowStream` for the options.

  Attributes:
    context: T, positions per window.
    bos_id: None only where `bos` is "none".
    pad_id: fills up.
    packing: one of `PACKINGS`.
    bos: one of `BOS`.
    stride: new positions per window; None for as many as it has.
    special_ids: never count, nor do BOS and padding.
  """

  context: int
  bos_id: int | None
  pad_id: int
  packing: str = "packed"
  bos: str = "both"
  stride: int | None = None
  special_ids: Sequence[int] = ()

  def __post_init__(self):
    if self.context < 2:
      raise ValueError(
        f"expected context >= 2, a BOS and one token, got {self.context}"
      )
    for name, valid in (("packing", PACKINGS), ("bos", BOS)):
      if (value := getattr(self, name)) not in valid:
        raise ValueError(
          f"expected {name} to be one of {list(valid)}, got {value!r}"
        )
    if self.bos_id is None and self.bos != "none":
      raise ValueError(
        f"expected a bos_id, as bos={self.bos!r} places it, got None: a model"
        ' without BOS takes bos="none"'
      )
    if self.stride is None:
      object.__setattr__(self, "stride", self.body)
    if not 1 <= self.stride <= self.body:
      raise ValueError(
        f"expected stride in [1, {self.body}], the positions of a window of"
        f" context {self.context} that hold text, got {self.stride}"
      )
    special = {self.bos_id, self.pad_id, *self.special_ids} - {None}
    object.__setattr__(self, "special_ids", tuple(sorted(map(int, special))))

  @property
  def body(self) -> int:
    """Positions of a window that hold text."""
    return self.context - self.window_bos

  @property
  def window_bos(self) -> bool:
    """Whether every window starts with BOS."""
    return self.bos in ("both", "window")


@dataclasses.dataclass
class Window:
  """One window; `owner` numbers the documents of its queue, -1 for none."""

  tokens: np.ndarray
  owner: np.ndarray
  begin: np.ndarray
  end: np.ndarray
  mask: np.ndarray

  def cut(self, limit: int, pad_id: int) -> None:
    """Turns what follows the `limit`-th counted position into padding."""
    counts = np.cumsum(self.mask)
    if counts[-1] < limit:
      return
    rest = slice(int(np.searchsorted(counts, limit)) + 1, None)
    self.tokens[rest] = pad_id
    self.mask[rest] = False
    for array in (self.owner, self.begin, self.end):
      array[rest] = -1

  def digest(self) -> int:
    """64 bits of what a model gets to see, and of what counts."""
    hasher = hashlib.blake2b(self.tokens, digest_size=8)
    hasher.update(self.mask)
    return int.from_bytes(hasher.digest(), "little")


class Queue:
  """The windows of one stratum: an iterator.

  Attributes:
    documents: {owner: (id, source, name)}; whoever iterates may delete what
      lies behind it.
    arrived: tokens and BOS so far, each once.
  """

  def __init__(self, layout: Layout, pieces: Iterator[Piece]):
    self.documents: dict[int, tuple[str, str, str]] = {}
    self.arrived = 0
    self._layout = layout
    self._windows = self._cut(pieces)

  def __iter__(self) -> "Queue":
    return self

  def __next__(self) -> Window:
    return next(self._windows)

  def _cut(self, pieces: Iterator[Piece]) -> Iterator[Window]:
    layout = self._layout
    alone = layout.packing == "document"
    starts_document = layout.bos in ("both", "document")
    # Rows: token, owner, begin, end.
    waiting = np.empty((4, 0), np.int32)
    repeated = 0  # Leading positions that an earlier window counted.
    for owner, piece in enumerate(pieces):
      self.documents[owner] = piece.document
      if alone:
        if waiting.shape[1] > repeated:
          yield self._window(waiting, repeated)
        waiting, repeated = waiting[:, :0], 0
      columns = np.empty((4, piece.ids.size), np.int32)
      columns[:] = piece.ids, columns[1], piece.begin, piece.end
      columns[1] = owner
      # At the start of a window the window's own BOS is the boundary.
      if starts_document and (waiting.shape[1] or not layout.window_bos):
        boundary = np.array([[layout.bos_id], [owner], [-1], [-1]], np.int32)
        columns = np.concatenate([boundary, columns], axis=1)
      self.arrived += columns.shape[1]
      waiting = np.concatenate([waiting, columns], axis=1)
      while waiting.shape[1] >= layout.body:
        yield self._window(waiting[:, : layout.body], repeated)
        waiting = waiting[:, layout.stride :]
        repeated = layout.body - layout.stride
    if waiting.shape[1] > repeated:
      yield self._window(waiting, repeated)

  def _window(self, columns: np.ndarray, repeated: int) -> Window:
    layout = self._layout
    first = int(layout.window_bos)
    full = np.full((4, layout.context), -1, np.int32)
    full[0] = layout.pad_id
    full[:, first : first + columns.shape[1]] = columns
    if first:
      full[:2, 0] = layout.bos_id, columns[1, 0]
    tokens, owner, begin, end = full
    mask = ~np.isin(tokens, layout.special_ids) & (owner >= 0)
    mask[: first + repeated] = False
    return Window(tokens, owner, begin, end, mask)


@dataclasses.dataclass
class Tally:
  """What a stratum was to give and gave.

  Attributes:
    wanted: counted tokens; None for all that there are.
    tokens: counted tokens that it gave.
    documents: that are in its windows.
    windows: that it gave.
    duplicates: windows that were dropped.
    ran_out: whether its text ended before its budget.
  """

  wanted: int | None
  tokens: int = 0
  documents: int = 0
  windows: int = 0
  duplicates: int = 0
  ran_out: bool = False


class Seen:
  """A set of 64-bit hashes, of which it keeps 8 bytes each."""

  def __init__(self):
    self._settled = np.empty(0, np.uint64)
    self._recent: set[int] = set()

  def add(self, value: int) -> bool:
    """Whether the value is new."""
    at = np.searchsorted(self._settled, np.uint64(value))
    settled = at < self._settled.size and int(self._settled[at]) == value
    if settled or value in self._recent:
      return False
    self._recent.add(value)
    # A python integer in a set takes ten times the memory.
    if len(self._recent) > 4096 + self._settled.size // 16:
      recent = np.fromiter(self._recent, np.uint64, len(self._recent))
      self._settled = np.sort(np.concatenate([self._settled, recent]))
      self._recent.clear()
    return True


def apportion(total: int, shares: np.ndarray) -> np.ndarray:
  """Whole numbers that sum to `total`, by largest remainders.

  Args:
    total: >= 0.
    shares: float [S], >= 0 with a positive sum.

  Returns:
    int64 [S], each within one of its share.
  """
  exact = total * (shares / shares.sum())
  whole = np.floor(exact).astype(np.int64)
  rest = np.argsort(whole - exact, kind="stable")[: total - whole.sum()]
  whole[rest] += 1
  return whole


def interleave(
  queues: Sequence[Queue],
  shares: np.ndarray,
  tallies: Sequence[Tally],
  *,
  pad_id: int,
  drop_duplicates: bool,
) -> Iterator[tuple[int, Window]]:
  """Windows of all strata: next comes who is furthest behind its share.

  A stratum stops at its budget, `Tally.wanted`, exactly. What a stratum that
  runs out leaves over is shared among the others.

  Args:
    queues: of S strata.
    shares: float [S], positive.
    tallies: filled meanwhile, but for `documents`.
    pad_id: fills the last window of a budget up.
    drop_duplicates: leave out windows that came before.

  Yields:
    (stratum, window).
  """
  seen = Seen()
  # Whoever ran out early gives to those that have more.
  budgets = np.array([-1 if t.wanted is None else t.wanted for t in tallies])
  bounded = all(t.wanted is not None for t in tallies)
  while True:
    open_ = [
      s
      for s, tally in enumerate(tallies)
      if not tally.ran_out and not (bounded and tally.tokens >= budgets[s])
    ]
    if not open_:
      return
    s = min(open_, key=lambda s: tallies[s].tokens / shares[s])
    tally = tallies[s]
    window = next(queues[s], None)
    if window is None:
      tally.ran_out = True
      others = [i for i, t in enumerate(tallies) if not t.ran_out]
      if bounded and others:
        left = int(budgets[s]) - tally.tokens
        budgets[others] += apportion(left, shares[others])
        budgets[s] = tally.tokens
      continue
    if bounded:
      window.cut(int(budgets[s]) - tally.tokens, pad_id)
    if drop_duplicates and not seen.add(window.digest()):
      tally.duplicates += 1
      continue
    tally.tokens += int(window.mask.sum())
    tally.windows += 1
    yield s, window
