"""What the statistics of a site say, in numbers that JSON can hold."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

OCTAVE = 32  # bins of the histogram of norms in a factor of two
LOWEST, HIGHEST = -40, 40  # log2 of the norms that it spans
BINS = OCTAVE * (HIGHEST - LOWEST)
QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
# Of a normal distribution: standard deviation over median distance.
MAD_TO_DEVIATION = 1.4826
MASSIVE_DIMS = 16
OUTLIER_LABELS = ("row", "document", "position", "token", "source")

DEFINITIONS = {
  "tokens": "Rows without NaN or Inf; everything below is over them.",
  "not_finite": "rows, left out, that hold NaN or Inf; nan and inf count "
  "such values.",
  "dims": "By dimension. variance = mean (x - mean)^2; skew = "
  "m3 / m2^1.5 and kurtosis = m4 / m2^2 - 3, m the central moments, both 0 "
  "for a normal distribution and None where x is constant.",
  "width": "Dimensions of a row.",
  "mean_square": "Mean squared L2 norm of a row.",
  "mean_norm": "Mean L2 norm of a row, activation units.",
  "norm_quantiles": "Quantiles of the L2 norm, from norm_histogram, whose "
  "bins are 1/32 octave (2 %) wide; interpolated within a bin.",
  "norm_histogram": "counts of rows whose log2 norm lies in bin i, from "
  "first + i * width on.",
  "norm_by_position": "L2 norm by position in the window: mean, standard "
  "deviation and count.",
  "norm_by_source": "L2 norm by source of the text.",
  "participation_ratio": "(sum of eigenvalues)^2 / sum of their squares, of "
  "the covariance: between 1 and the width.",
  "largest_eigenvalue_share": "Largest eigenvalue over their sum.",
  "eigenvalues": "Of the covariance, largest first.",
  "massive": "Rows with a massive activation: |x| > 100 and more than 1000 "
  "times the median |x| of the row (Sun et al. 2024, arXiv 2402.17762). "
  "share is of the tokens; dims are where the largest |x| of these rows is.",
  "outliers": "Rows of the largest and of the smallest norm. z is the robust "
  "z of log2 norm: distance from the median over 1.4826 times the median "
  "absolute deviation, both from norm_histogram.",
  "drift": "By chunk of rows. shift: how far its mean is from the mean of "
  "all rows before it, root mean square over the dimensions in units of "
  "their standard deviation over all rows; chance: what independent rows "
  "would give, sqrt(1 / n + 1 / n before); norm_ratio: mean norm over the "
  "mean norm before. A block of rows belongs to the chunk of its first row; "
  "a last chunk of less than half the size is joined to the one before.",
}


def _plain(values) -> Any:
  """Nested lists of Python numbers, None for what is not finite."""
  values = np.asarray(values)
  if values.dtype.kind != "f":
    return values.tolist()
  return np.where(np.isfinite(values), values, None).tolist()


def histogram(norms: np.ndarray) -> np.ndarray:
  """Counts by bins of log2 norm, int64 [BINS]; the last bins take the rest."""
  index = np.floor((_log2(norms) - LOWEST) * OCTAVE).astype(np.int64)
  return np.bincount(np.clip(index, 0, BINS - 1), minlength=BINS)


def _log2(norms) -> np.ndarray:
  norms = np.clip(norms, 2.0**LOWEST, 2.0**HIGHEST)
  return np.log2(norms)


_EDGES = LOWEST + np.arange(BINS + 1) / OCTAVE


def quantile(counts: np.ndarray, share) -> np.ndarray:
  """log2 norm below which `share` of a histogram lies, linear in a bin."""
  below = np.concatenate([[0], np.cumsum(counts)]) / counts.sum()
  # Where empty bins make it flat, the first edge that is reached counts.
  first = np.concatenate([[True], np.diff(below) > 0])
  first[:-1] |= first[1:]  # the lower edge of every bin that holds rows
  return np.interp(share, below[first], _EDGES[first])


def median_and_deviation(counts: np.ndarray) -> tuple[float, float]:
  """Median of log2 norm, and the median distance from it, of a histogram."""
  middle = float(quantile(counts, 0.5))
  below = np.concatenate([[0], np.cumsum(counts)]) / counts.sum()
  low, high = 0.0, float(HIGHEST - LOWEST)
  for _ in range(60):
    radius = (low + high) / 2
    inside = np.interp([middle - radius, middle + radius], _EDGES, below)
    low, high = (radius, high) if inside[1] - inside[0] < 0.5 else (low, radius)
  return middle, high


def _dims(a) -> dict[str, Any]:
  count = max(a["count"], 1)
  mean, *powers = a["moments"]
  m2, m3, m4 = (p / count for p in powers)
  low, high = a["extremes"]
  with np.errstate(divide="ignore", invalid="ignore"):
    numbers = {
      "mean": mean,
      "variance": m2,
      "skew": m3 / m2**1.5,
      "kurtosis": m4 / m2**2 - 3,
      "min": low,
      "max": high,
    }
  if not a["count"]:
    numbers = {name: np.full(len(mean), np.nan) for name in numbers}
  return {name: _plain(x) for name, x in numbers.items()}


def _by(table: np.ndarray) -> dict[str, Any]:
  """Mean, standard deviation and count from rows of sums."""
  count, total, squares = table
  with np.errstate(divide="ignore", invalid="ignore"):
    mean = total / count
    variance = np.maximum(squares / count - mean**2, 0)
  return {
    "mean": _plain(mean),
    "std": _plain(np.sqrt(variance)),
    "count": count.astype(np.int64).tolist(),
  }


def _norms(a, sources) -> dict[str, Any]:
  counts = a["histogram"]
  there = np.flatnonzero(counts)
  first, stop = (there[0], there[-1] + 1) if len(there) else (0, 0)
  shares = quantile(counts, QUANTILES) if len(there) else np.full(9, np.nan)
  by_source = _by(a["by_source"])
  return {
    "mean_norm": _plain(a["by_position"][1].sum() / max(a["count"], 1)),
    "norm_quantiles": dict(
      zip(map(str, QUANTILES), _plain(2**shares), strict=True)
    ),
    "norm_histogram": {
      "first": float(_EDGES[first]),
      "width": 1 / OCTAVE,
      "counts": counts[first:stop].tolist(),
    },
    "norm_by_position": _by(a["by_position"]),
    "norm_by_source": {
      source: {name: values[i] for name, values in by_source.items()}
      for i, source in enumerate(sources)
    },
  }


def _covariance(a) -> dict[str, Any]:
  names = ("participation_ratio", "largest_eigenvalue_share", "eigenvalues")
  if "comoment" not in a or not a["count"]:
    return dict.fromkeys(names)
  values = np.linalg.eigvalsh(a["comoment"] / a["count"])[::-1]
  values = np.maximum(values, 0)
  total, squares = values.sum(), np.sum(values**2)
  with np.errstate(divide="ignore", invalid="ignore"):
    found = total**2 / squares, values[0] / total, values
  return dict(zip(names, map(_plain, found), strict=True))


def _massive(a) -> dict[str, Any]:
  dims = a["massive_dims"]
  order = np.argsort(-dims, kind="stable")[:MASSIVE_DIMS]
  return {
    "count": a["massive"],
    "share": a["massive"] / max(a["count"], 1),
    "dims": [{"dim": int(d), "count": int(dims[d])} for d in order if dims[d]],
  }


def _outliers(a) -> dict[str, Any]:
  if not a["count"]:
    return {"largest": [], "smallest": []}
  middle, deviation = median_and_deviation(a["histogram"])
  deviation *= MAD_TO_DEVIATION
  out = {}
  for name, norms, labels in zip(
    ("largest", "smallest"),
    a["outlier_norms"],
    a["outlier_labels"],
    strict=True,
  ):
    out[name] = [
      dict(zip(OUTLIER_LABELS, label.tolist(), strict=True))
      | {"norm": float(norm), "z": float((_log2(norm) - middle) / deviation)}
      for norm, label in zip(norms, labels, strict=True)
      if label[0] >= 0
    ]
  return out


def _drift(a) -> dict[str, Any]:
  size = int(a["chunk"])
  (index,) = np.nonzero(a["chunk_sums"][:, 0])
  rows, norms = a["chunk_sums"][index].T.copy()
  means = a["chunk_means"][index]
  if len(rows) > 1 and rows[-1] < size / 2:
    last = rows[-1] / (rows[-2] + rows[-1])
    means[-2] += last * (means[-1] - means[-2])
    rows[-2] += rows[-1]
    norms[-2] += norms[-1]
    index, rows, norms, means = (x[:-1] for x in (index, rows, norms, means))
  variance = a["moments"][1] / max(a["count"], 1)
  varies = variance > 0
  shift, chance, ratio = (np.full(len(rows), np.nan) for _ in range(3))
  before, mean = 0.0, np.zeros(len(variance))
  for i in range(len(rows)):
    if i:
      apart = (means[i] - mean)[varies] ** 2 / variance[varies]
      shift[i] = np.sqrt(apart.mean()) if varies.any() else 0.0
      chance[i] = np.sqrt(1 / rows[i] + 1 / before)
      with np.errstate(divide="ignore", invalid="ignore"):
        ratio[i] = norms[i] / rows[i] / (norms[:i].sum() / before)
    before += rows[i]
    mean = mean + rows[i] / before * (means[i] - mean)
  largest = None
  if len(rows) > 1:
    most = int(np.nanargmax(shift))
    largest = {
      "shift": float(shift[most]),
      "first_row": int(index[most]) * size,
    }
  return {
    "chunk": size,
    "first_row": (index * size).tolist(),
    "rows": rows.astype(np.int64).tolist(),
    "shift": _plain(shift),
    "chance": _plain(chance),
    "norm_ratio": _plain(ratio),
    "largest": largest,
  }


def summarise(a: Mapping[str, Any], sources: Sequence[str]) -> dict[str, Any]:
  """The arrays that a `Statistics` keeps, as `DEFINITIONS` explains them.

  Args:
    a: its arrays and its counts, by name.
    sources: names of the sources.

  Returns:
    JSON-able; every number is finite, None stands for what is undefined.
  """
  mean, m2 = a["moments"][:2]
  mean_square = m2.sum() / max(a["count"], 1) + mean @ mean
  out = {
    "tokens": a["count"],
    "not_finite": {
      "rows": a["rows"] - a["count"],
      "nan": a["nan"],
      "inf": a["inf"],
    },
    "width": len(mean),
    "mean_square": _plain(mean_square),
    **_norms(a, sources),
    **_covariance(a),
    "massive": _massive(a),
    "outliers": _outliers(a),
    "drift": _drift(a),
    "dims": _dims(a),
  }
  return out | {"definitions": DEFINITIONS}
