"""Statistics of one site, merged on the host in float64.

`block` sums over rows on the device while they are harvested; `Statistics`
merges such sums, whatever the order and the size of the blocks, and can be
saved and gone on with.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from gemma_jax import progress
from gemma_jax.activations import summary
from gemma_jax.activations.moments import Moments, combine, of_sums
from gemma_jax.activations.sums import block

__all__ = ["Statistics", "block", "measure"]

FORMAT = 1
OUTLIERS = 16  # rows kept at either end of the norms
CHUNKS = 32  # most chunks whose means are kept for the drift
LABELS = ("document", "position", "token", "source")
_COUNTS = ("rows", "count", "nan", "inf", "massive")

_block = jax.jit(block, static_argnames="covariance")


class Statistics:
  """Running statistics of the rows of one site.

  Rows that hold NaN or Inf are counted and left out of everything else.

  Args:
    width: D.
    positions: T, one more than the largest position.
    sources: names that the label `source` counts through.
    covariance: whether the [D, D] covariance is kept too.
    chunk: rows whose means are compared for the drift. It doubles whenever a
      store outgrows `CHUNKS` of them, so that the state stays small.
  """

  def __init__(
    self,
    width: int,
    *,
    positions: int,
    sources: Sequence[str],
    covariance: bool = False,
    chunk: int = 65_536,
  ):
    self.width = width
    self.sources = tuple(sources)
    self._a = {
      "format": np.int64(FORMAT),
      "counts": np.zeros(len(_COUNTS), np.int64),
      "moments": np.zeros((4, width)),
      "extremes": np.repeat([[np.inf], [-np.inf]], width, axis=1),
      "histogram": np.zeros(summary.BINS, np.int64),
      # Rows: count, sum of the norms, sum of their squares.
      "by_position": np.zeros((3, positions)),
      "by_source": np.zeros((3, len(self.sources))),
      "massive_dims": np.zeros(width, np.int64),
      # Largest norms first, then smallest first; row -1 where there is none.
      "outlier_norms": np.zeros((2, OUTLIERS)),
      "outlier_labels": np.full((2, OUTLIERS, 1 + len(LABELS)), -1, np.int64),
      "chunk": np.int64(chunk),
      "chunk_sums": np.zeros((0, 2)),  # count, sum of the norms
      "chunk_means": np.zeros((0, width)),
    }
    if covariance:
      self._a["comoment"] = np.zeros((width, width))

  def state(self) -> dict[str, np.ndarray]:
    """Everything, as arrays that `np.savez` takes; see `from_state`."""
    names = np.array(self.sources, dtype=np.str_)
    return {k: np.array(v) for k, v in self._a.items()} | {"sources": names}

  @classmethod
  def from_state(cls, state: Mapping[str, np.ndarray]) -> "Statistics":
    """What gave this `state`, to the bit.

    Raises:
      ValueError: the state is of another format or incomplete.
    """
    found = int(state["format"]) if "format" in state else None
    if found != FORMAT:
      raise ValueError(
        f"Statistics of format {found}, expected {FORMAT}. They come from "
        "another version: measure the store again."
      )
    new = cls(
      state["moments"].shape[1],
      positions=state["by_position"].shape[1],
      sources=[str(name) for name in state["sources"]],
      covariance="comoment" in state,
    )
    missing = sorted(set(new._a) - set(state))
    if missing:
      raise ValueError(
        f"Statistics without {', '.join(missing)}: the state is damaged. "
        "Measure the store again."
      )
    new._a = {name: np.array(state[name]) for name in new._a}
    return new

  @property
  def rows(self) -> int:
    """Valid rows, with those that hold NaN or Inf."""
    return int(self._a["counts"][0])

  @property
  def count(self) -> int:
    """Rows that the moments are of."""
    return int(self._a["counts"][1])

  @property
  def mean(self) -> np.ndarray:
    """Mean, float64 [D]; zeros without rows."""
    return self._a["moments"][0].copy()

  @property
  def variance(self) -> np.ndarray:
    """Mean squared distance from the mean, float64 [D]."""
    return self._a["moments"][1] / max(self.count, 1)

  @property
  def covariance(self) -> np.ndarray | None:
    """Float64 [D, D], or None where it was not kept."""
    kept = self._a.get("comoment")
    return None if kept is None else kept / max(self.count, 1)

  @property
  def mean_norm(self) -> float:
    """Mean L2 norm of a row, activation units."""
    return float(self._a["by_position"][1].sum() / max(self.count, 1))

  @property
  def mean_square(self) -> float:
    """Mean squared L2 norm of a row."""
    return float(self.variance.sum() + self.mean @ self.mean)

  def update(
    self,
    sums: Mapping[str, np.ndarray],
    *,
    first_row: int,
    position: np.ndarray,
    source: np.ndarray,
    document: np.ndarray,
    token: np.ndarray,
  ) -> None:
    """Adds a block of rows.

    Args:
      sums: what `block` returned for it.
      first_row: the store's number of its first valid row.
      position: int [n] of the valid rows, in their order.
      source: the same, an index into `sources`.
      document: the same.
      token: the same.

    Raises:
      ValueError: labels of another length, or outside their range.
    """
    a = self._a
    sums = {name: np.asarray(x) for name, x in sums.items()}
    labels = dict(zip(LABELS, (document, position, token, source), strict=True))
    labels = {name: np.asarray(x) for name, x in labels.items()}
    norm = sums["norm"][sums["valid"]].astype(np.float64)
    self._check(sums, labels, len(norm))
    massive = sums["massive"]
    new = {name: sums[name] for name in ("nan", "inf")} | {
      "rows": len(norm),
      "count": sums["count"],
      "massive": massive.sum(),
    }
    good = np.isfinite(norm)
    if good.any():
      norm = norm[good]
      row = first_row + np.flatnonzero(good)
      labels = {name: x[good] for name, x in labels.items()}
      part = of_sums(sums)
      outer = None
      if "comoment" in a:
        # About the mean of the block instead of its shift.
        off = part.mean - sums["shift"]
        outer = sums["outer"] - part.count * np.outer(off, off)
      self._add_moments(part, (sums["min"], sums["max"]), outer)
      np.add.at(a["massive_dims"], sums["peak_dim"][massive], 1)
      a["histogram"] += summary.histogram(norm)
      for name in ("position", "source"):
        into = a[f"by_{name}"]
        for line, weight in zip(into, (None, norm, norm**2), strict=True):
          line += np.bincount(labels[name], weight, minlength=len(line))
      table = np.stack([row, *labels.values()], axis=1).astype(np.int64)
      self._add_outliers(np.stack([norm, norm]), np.stack([table, table]))
      self._add_chunks(
        np.array([first_row // int(a["chunk"])]),
        np.array([[part.count, norm.sum()]]),
        part.mean[None],
      )
    a["counts"] += np.array([new[name] for name in _COUNTS], np.int64)

  def merge(self, other: "Statistics") -> None:
    """Adds the rows of another one, in place; they must be other rows.

    Raises:
      ValueError: the two are not of the same kind.
    """
    mine, theirs = (
      {
        "width": s.width,
        "positions": s._a["by_position"].shape[1],
        "sources": s.sources,
        "covariance": "comoment" in s._a,
      }
      for s in (self, other)
    )
    if mine != theirs:
      raise ValueError(
        f"Statistics of {mine} cannot take in those of {theirs}. Merge those "
        "of one site, made with the same arguments."
      )
    a, b = self._a, other._a
    ratio = max(a["chunk"], b["chunk"]) / min(a["chunk"], b["chunk"])
    if ratio not in 2.0 ** np.arange(64):
      raise ValueError(
        f"Statistics with chunks of {a['chunk']} and of {b['chunk']} rows "
        "cannot be merged. Make both with the same `chunk`."
      )
    part = Moments(other.count, *b["moments"])
    self._add_moments(part, b["extremes"], b.get("comoment"))
    for name in ("counts", "histogram", "by_position", "by_source"):
      a[name] += b[name]
    a["massive_dims"] += b["massive_dims"]
    self._add_outliers(b["outlier_norms"], b["outlier_labels"])
    while a["chunk"] < b["chunk"]:
      self._double_chunks()
    index = np.arange(len(b["chunk_sums"])) // int(a["chunk"] // b["chunk"])
    self._add_chunks(index, b["chunk_sums"], b["chunk_means"])

  def moved(
    self, rows: int, documents: int, sources: Sequence[str]
  ) -> "Statistics":
    """The same rows as a part of something longer.

    Args:
      rows: before them.
      documents: before theirs.
      sources: names of all its sources, these among them.
    """
    new = Statistics(
      self.width,
      positions=self._a["by_position"].shape[1],
      sources=sources,
      covariance="comoment" in self._a,
      chunk=int(self._a["chunk"]),
    )
    place = [new.sources.index(name) for name in self.sources]
    new._a |= {k: np.array(v) for k, v in self._a.items() if k != "by_source"}
    new._a["by_source"][:, place] = self._a["by_source"]
    labels = new._a["outlier_labels"]
    there = labels[..., 0] >= 0
    labels[..., 0] += rows * there
    labels[..., 1] += documents * there
    source = labels[..., 1 + LABELS.index("source")]
    source[there] = np.asarray(place, np.int64)[source[there]]
    sums, means = new._a["chunk_sums"], new._a["chunk_means"]
    new._a["chunk_sums"], new._a["chunk_means"] = sums[:0], means[:0]
    first = np.arange(len(sums)) + rows // int(new._a["chunk"])
    new._add_chunks(first, sums, means)
    return new

  def summary(self) -> dict[str, Any]:
    """What `summary.summarise` tells of these rows; every number is finite.

    With covariance this takes the eigenvalues of a [D, D] matrix: seconds at
    a few thousand dims.
    """
    named = dict(zip(_COUNTS, self._a["counts"].tolist(), strict=True))
    return summary.summarise(self._a | named, self.sources)

  def _check(self, sums, labels, rows) -> None:
    wrong = {name: len(x) for name, x in labels.items() if len(x) != rows}
    if wrong:
      raise ValueError(
        f"update expects labels of the {rows} valid rows, received {wrong}; "
        "select them with the mask that `block` got."
      )
    if sums["shift"].shape != (self.width,):
      raise ValueError(
        f"update expects sums over {self.width} dims, received "
        f"{sums['shift'].shape[0]}; keep one Statistics for each site."
      )
    if "comoment" in self._a and "outer" not in sums:
      raise ValueError(
        "These statistics keep the covariance and the block has no outer "
        "products; call block(..., covariance=True)."
      )
    for name in ("position", "source"):
      most = self._a[f"by_{name}"].shape[1]
      label = labels[name]
      if rows and (label.min() < 0 or label.max() >= most):
        raise ValueError(
          f"{name}s from {label.min()} to {label.max()}, expected 0 to "
          f"{most - 1}; make Statistics with as many as there are."
        )

  def _add_moments(self, part, extremes, comoment) -> None:
    a = self._a
    if not part.count:
      return
    before = Moments(self.count, *a["moments"])
    total = combine(before, part)
    a["moments"] = np.stack(total[1:])
    low, high = a["extremes"]
    a["extremes"] = np.stack(
      [np.minimum(low, extremes[0]), np.maximum(high, extremes[1])]
    )
    if comoment is not None:
      apart = part.mean - before.mean
      weight = before.count * part.count / total.count
      a["comoment"] += comoment + weight * np.outer(apart, apart)

  def _add_outliers(self, norms, labels) -> None:
    """Keeps the first of [2, n] norms and [2, n, 5] labels at either end."""
    a = self._a
    for end, sign in enumerate((-1, 1)):
      norm = np.concatenate([a["outlier_norms"][end], norms[end]])
      label = np.concatenate([a["outlier_labels"][end], labels[end]])
      # Ties go to the earlier row, so that no order of blocks matters.
      there = label[:, 0] >= 0
      order = np.lexsort((label[:, 0], sign * norm, ~there))[:OUTLIERS]
      a["outlier_norms"][end] = norm[order]
      a["outlier_labels"][end] = label[order]

  def _add_chunks(self, index, sums, means) -> None:
    a = self._a
    while len(index) and index.max() >= CHUNKS:
      self._double_chunks()
      index = index // 2
    missing = index.max(initial=-1) + 1 - len(a["chunk_sums"])
    if missing > 0:
      for name in ("chunk_sums", "chunk_means"):
        a[name] = np.pad(a[name], ((0, missing), (0, 0)))
    for i, new, mean in zip(index, sums, means, strict=True):
      a["chunk_sums"][i] += new
      share = new[0] / max(a["chunk_sums"][i, 0], 1)
      a["chunk_means"][i] += share * (mean - a["chunk_means"][i])

  def _double_chunks(self) -> None:
    a = self._a
    sums, means = a["chunk_sums"], a["chunk_means"]
    a["chunk"] = np.int64(2 * a["chunk"])
    a["chunk_sums"], a["chunk_means"] = sums[:0], means[:0]
    self._add_chunks(np.arange(len(sums)) // 2, sums, means)


class _Rows(Protocol):
  """What `measure` reads: an `ActivationStore`, or what behaves like one."""

  sites: Mapping[str, int]
  sources: Sequence[str]

  def __len__(self) -> int: ...
  def read(self, start: int, stop: int, name: str) -> np.ndarray: ...


def measure(
  store: _Rows,
  site: str,
  *,
  covariance: bool = False,
  start: int = 0,
  stop: int | None = None,
  batch: int = 4096,
) -> Statistics:
  """Statistics of a site of a store that is already there.

  Args:
    store: rows and labels.
    site: name.
    covariance: whether the [D, D] covariance is kept too.
    start: first row.
    stop: row after the last; None goes to the end.
    batch: rows that are read and summed at once.
  """
  stop = len(store) if stop is None else stop
  rows = stop - start
  largest = max(
    (
      int(store.read(at, min(at + 2**20, stop), "position").max())
      for at in range(start, stop, 2**20)
    ),
    default=-1,
  )
  width = store.sites[site]
  out = Statistics(
    width,
    positions=largest + 1,
    sources=store.sources,
    covariance=covariance,
  )
  batch = min(batch, max(rows, 1))
  with progress.bar(rows, f"statistics of {site}", unit="tokens") as bar:
    for at in range(start, stop, batch):
      end = min(at + batch, stop)
      x = store.read(at, end, site)
      # One shape for all blocks compiles one program.
      short = batch - len(x)
      x = np.pad(x, ((0, short), (0, 0)))
      valid = np.arange(batch) < end - at
      sums = jax.device_get(_block(x, valid, covariance=covariance))
      labels = {name: store.read(at, end, name) for name in LABELS}
      out.update(sums, first_row=at, **labels)
      bar.update(end - at)
  return out
