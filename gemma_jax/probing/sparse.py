"""k-sparse probing: can a few latents tell what a token is?"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.sparse

from gemma_jax.probing import logistic
from gemma_jax.probing.labels import Labels
from gemma_jax.probing.random import random_latents
from gemma_jax.probing.split import split

DEFINITIONS = {
  "auc": "Area under the ROC curve on test rows; ties count half.",
  "balanced_accuracy": (
    "Mean of sensitivity and specificity on test rows, of a logistic probe "
    "that weighs both classes alike."
  ),
  "f1": "On test rows, at the threshold with the best F1 on the training rows.",
  "latents_k*": (
    "Probe on the k latents with the largest |mean over positives - mean over "
    "negatives| of the training rows."
  ),
  "raw": "Probe on all dimensions of the activations, L2 penalty validated.",
  "raw_k*": "The k dimensions with the largest difference, standardised.",
  "random_k*": "As latents_k*, of random features of the latents' densities.",
  "constant": "No probe: one score for every row; F1 of calling all positive.",
}
METRICS = ("balanced_accuracy", "f1", "auc")


@dataclasses.dataclass(frozen=True)
class Probing:
  """Scores of S tasks.

  Attributes:
    tasks: names, "label=class".
    scores: method -> metric -> float64 [S], see `DEFINITIONS`; NaN where a
      task was dropped.
    latents: k -> int64 [S, k], the latents chosen, best first; -1 likewise.
    counts: int64 [S, 4], positives and negatives of training and test rows.
    dropped: name -> why a task was dropped.
  """

  tasks: tuple[str, ...]
  scores: dict[str, dict[str, np.ndarray]]
  latents: dict[int, np.ndarray]
  counts: np.ndarray
  dropped: dict[str, str]


def probe(
  latents: scipy.sparse.csr_matrix,
  labels: Mapping[str, Labels],
  documents: np.ndarray,
  *,
  raw: np.ndarray | None = None,
  ks: Sequence[int] = (1, 2, 5),
  seed: int = 0,
  test_fraction: float = 0.3,
  min_count: int = 20,
  l2: float = 1e-3,
) -> Probing:
  """Probes every label one class against the rest, on rows of other documents.

  The definition is SAEBench's k-sparse probing (Karvonen et al. 2025, arXiv
  2503.09532), on single tokens and labels made from the text.

  Args:
    latents: activations [R, M], CSR.
    labels: name -> values [R], -1 where undefined (those rows take no part in
      the label's tasks). A label of two classes is one task.
    documents: int [R], which no split divides.
    raw: activations [R, D] at the dictionary's site, for the baselines; None
      leaves them out. All of it is brought to float64.
    ks: numbers of latents.
    seed: of the split and of the random features.
    test_fraction: share of the rows to test on.
    min_count: a class with fewer positives or negatives on either side of the
      split is dropped.
    l2: penalty of the probes on k latents; see `logistic.fit`.

  Raises:
    ValueError: shapes that differ, a k above M, fewer than two documents, or
      no task with enough rows of both classes.
    FloatingPointError: latents or activations that are not finite.
  """
  documents = np.asarray(documents)
  rows = check_latents(latents, len(documents))
  if min(ks) < 1 or max(ks) > latents.shape[1]:
    raise ValueError(
      f"expected every k in [1, {latents.shape[1]}], the number of latents; "
      f"got {tuple(ks)}"
    )
  names, y, valid = tasks(labels, rows)
  test = split(documents, fraction=test_fraction, seed=seed)
  counts = np.stack(
    [(valid & c & s).sum(1) for s in (~test, test) for c in (y, ~y)], axis=1
  )
  few = counts.min(1) < min_count
  dropped = {
    name: "{} positives and {} negatives to train, {} and {} to test; "
    "needs {} of each".format(*map(int, count), min_count)
    for name, count in zip(names, counts, strict=True)
    if count.min() < min_count
  }
  if few.all():
    shown = "; ".join(f"{n}: {w}" for n, w in list(dropped.items())[:4])
    raise ValueError(
      "expected a task with both classes in training and test documents, got "
      f"none of {len(names)} ({shown}). Give more text, or documents that "
      "hold both classes."
    )
  y, valid = y[~few], valid[~few]
  run = _Run(y, valid, test, documents, seed, l2)
  found, chosen = run.sparse("latents", latents, ks)
  if raw is not None:
    raw = np.asarray(raw)
    if raw.ndim != 2 or len(raw) != rows:
      raise ValueError(f"expected raw [{rows}, D], got {raw.shape}")
    if not np.isfinite(raw).all():
      raise FloatingPointError("Raw activations that are not finite.")
    found["raw"] = run.dense(raw)
    scaled = raw / np.maximum(raw[~test].std(0), 1e-12)
    most = [k for k in ks if k <= raw.shape[1]]
    found |= run.sparse("raw", scaled, most)[0]
    density = np.asarray((latents > 0).sum(0)).ravel() / rows
    density = np.minimum(density, 1 - 1 / rows)
    control = random_latents(raw, density, seed=seed)
    found |= run.sparse("random", control, ks)[0]
  found["constant"] = run.constant()
  kept = np.flatnonzero(~few)
  scores = {
    method: {
      m: _spread(v, kept, len(few), np.nan) for m, v in by_metric.items()
    }
    for method, by_metric in found.items()
  }
  where = {k: _spread(v, kept, len(few), -1) for k, v in chosen.items()}
  return Probing(names, scores, where, counts, dropped)


def tasks(
  labels: Mapping[str, Labels], rows: int
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
  """One class against the rest: names [S], targets and validity bool [S, R].

  Args:
    labels: name -> values [R].
    rows: R.

  Raises:
    ValueError: no labels, or values of another shape.
  """
  names, y, valid = [], [], []
  for label, (values, classes) in labels.items():
    if values.shape != (rows,):
      raise ValueError(
        f"expected labels {label!r} of shape [{rows}], got {values.shape}"
      )
    # Of two classes, one is the other's negation.
    for c in range(1 if len(classes) == 2 else 0, len(classes)):
      names.append(f"{label}={classes[c]}")
      y.append(values == c)
      valid.append(values >= 0)
  if not names:
    raise ValueError("expected at least one label with classes, got none")
  return tuple(names), np.array(y), np.array(valid)


def check_latents(latents: scipy.sparse.csr_matrix, rows: int) -> int:
  """R, if latents are [R, M], sparse, and finite; else raises.

  Raises:
    TypeError: not a sparse matrix.
    ValueError: another number of rows.
    FloatingPointError: NaN or infinity; names the latents.
  """
  if not scipy.sparse.issparse(latents):
    raise TypeError(
      "expected latents as scipy.sparse.csr_matrix [R, M], got "
      f"{type(latents).__name__}"
    )
  if latents.shape[0] != rows:
    raise ValueError(
      f"expected latents of {rows} rows, one for each of the documents, got "
      f"{latents.shape[0]}"
    )
  bad = ~np.isfinite(latents.data)
  if bad.any():
    which = np.unique(latents.tocsr().indices[bad])
    raise FloatingPointError(
      f"{bad.sum()} activations are not finite, of latents "
      f"{which[:8].tolist()}{' ...' if len(which) > 8 else ''}."
    )
  return rows


def mean_difference(features, y, valid) -> np.ndarray:
  """Mean over positives less mean over negatives, float64 [S, M].

  Args:
    features: [R, M], sparse or dense.
    y: bool [S, R].
    valid: bool [S, R].
  """
  sides = []
  for side in (valid & y, valid & ~y):
    share = side / np.maximum(side.sum(1, keepdims=True), 1)
    sides.append(np.asarray(features.T @ share.T).T)
  return sides[0] - sides[1]


def gather(features, columns: np.ndarray) -> np.ndarray:
  """Columns [S, K] of features [R, M], sparse or dense: float64 [S, R, K]."""
  unique, at = np.unique(columns, return_inverse=True)
  if scipy.sparse.issparse(features):
    table = features.tocsc()[:, unique].toarray()
  else:
    table = features[:, unique]
  table = np.asarray(table, np.float64)
  return np.moveaxis(table[:, at.reshape(columns.shape)], 1, 0)


@dataclasses.dataclass(frozen=True)
class _Run:
  y: np.ndarray
  valid: np.ndarray
  test: np.ndarray
  documents: np.ndarray
  seed: int
  l2: float

  def sparse(self, name, features, ks):
    train = ~self.test
    y, valid = self.y[:, train], self.valid[:, train]
    difference = np.abs(mean_difference(features[train], y, valid))
    best = np.argsort(-difference, axis=1, kind="stable")[:, : max(ks)]
    picked = gather(features, best)
    weight = logistic.balanced(y, valid)
    out, chosen = {}, {}
    for k in ks:
      own = picked[..., :k]
      fitted = logistic.fit(own[:, train], y, weight, l2=self.l2)
      out[f"{name}_k{k}"] = self._score(fitted(own))
      chosen[k] = best[:, :k]
    return out, chosen

  def dense(self, raw):
    train = ~self.test
    y, valid = self.y[:, train], self.valid[:, train]
    weight = logistic.balanced(y, valid)
    groups = self.documents[train]
    if len(np.unique(groups)) < 2:
      fitted = logistic.fit(raw[train], y, weight, l2=self.l2)
    else:
      inner = split(groups, fraction=0.25, seed=self.seed)
      fitted = logistic.fit_validated(raw[train], y, weight, inner)
    return self._score(fitted(raw))

  def constant(self):
    return self._score(np.zeros(self.y.shape))

  def _score(self, logits):
    values = []
    for z, y, valid in zip(logits, self.y, self.valid, strict=True):
      learned, tested = valid & ~self.test, valid & self.test
      cut = logistic.best_threshold(z[learned], y[learned])
      z, y = z[tested], y[tested]
      values.append(
        (
          logistic.balanced_accuracy(z > 0, y),
          logistic.f1(z >= cut, y),
          logistic.auc(z, y),
        )
      )
    return dict(zip(METRICS, np.array(values).T, strict=True))


def _spread(values, kept, length, fill) -> np.ndarray:
  out = np.full((length, *values.shape[1:]), fill, values.dtype)
  out[kept] = values
  return out
