"""Everything that the literature calls a reconstruction's quality, by name.

Published numbers follow different formulas under one name; these are the
formulas, so that a number of ours can be held against any of them.
"""

import numpy as np

from gemma_jax.metrics.intervals import DocumentSums, document_interval
from gemma_jax.metrics.reconstruction import RunningFVU, pilot, rows

DEFINITIONS = {
  "fvu": (
    "sum |x - x_hat|^2 / sum |x - mean(x)|^2 over all tokens, mean over the "
    "same tokens; the headline."
  ),
  "fvu_batch": (
    "The same within each batch, about the batch's own mean; mean over "
    "batches, as sparsify logs it. Depends on the batches."
  ),
  "fvu_resid_var": (
    "Summed variance of x - x_hat over summed variance of x, all tokens "
    "(dictionary_learning, there per batch): a constant offset is free."
  ),
  "ev_legacy": (
    "Mean over tokens of 1 - |x - x_hat|^2 / |x - batch mean|^2 (SAEBench's "
    "paper, Neuronpedia, SAELens before #443): a mean of ratios, depends on "
    "the batches."
  ),
  "ev_2025": (
    "1 - E|x - x_hat|^2 / (E|x|^2 - (mean over dims of E[x_d^2])^2) (SAELens "
    "#443 to #665): not a share of variance, only to compare with its numbers."
  ),
  "nmse0": "sum |x - x_hat|^2 / sum |x|^2: about zero, flattered by the mean.",
  "mse": "Mean over tokens of |x - x_hat|^2, summed over dims.",
  "cosine": (
    "Mean over tokens of cos(x, x_hat), 0 where x_hat is zero; tokens whose x "
    "is zero are left out."
  ),
  "l2_ratio": (
    "Mean over tokens of |x_hat| / |x|; tokens whose x is zero are left out."
  ),
  "relative_bias": (
    "sum |x_hat|^2 / sum x.x_hat within each batch, mean over batches "
    "(SAELens's and dictionary_learning's relative reconstruction bias)."
  ),
  "shrinkage": (
    "sum |x_hat|^2 / sum x.x_hat over all tokens (Rajamanoharan et al. 2024, "
    "equation 10): below 1 where reconstructions are too short."
  ),
}


class RunningReconstruction:
  """All of `DEFINITIONS` in one pass over batches.

  Residuals and sums are float64, about a pilot mean: a mean of 1000 standard
  deviations costs no digits. How rows fall into batches matters to
  `fvu_batch`, `ev_legacy` and `relative_bias` alone, by their definitions;
  these leave out batches, or tokens, whose denominator is zero.
  """

  def __init__(self):
    self._fvu = RunningFVU()
    self._documents = DocumentSums()
    self._loose = 0  # rows that came without a document
    self._sums = dict.fromkeys(
      (
        "target",
        "reconstruction",
        "dot",
        "cosine",
        "l2_ratio",
        "nonzero",
        "ev_legacy",
        "ev_legacy_count",
        "fvu_batch",
        "fvu_batch_count",
        "relative_bias",
        "relative_bias_count",
      ),
      0.0,
    )

  @property
  def count(self) -> int:
    """Rows so far."""
    return self._fvu.count

  @property
  def mean(self) -> np.ndarray:
    """The target's mean, float64 [E]."""
    return self._fvu.mean

  def update(
    self, x, x_hat, document=None, *, mask=None
  ) -> "RunningReconstruction":
    """Adds one batch.

    Args:
      x: target [..., E].
      x_hat: its reconstruction, the same shape.
      document: whole numbers >= 0, [...]: whose document each row is. Needed
        for intervals; given with all batches or with none.
      mask: bool [...], False for rows that do not count, such as BOS and
        padding, whatever they hold; None counts all.

    Raises:
      ValueError: shapes that do not belong together, a mask that is not bool,
        a counted row of a negative document, or documents in some batches
        only.
      FloatingPointError: a counted value that is not finite.
    """
    shape = np.shape(x)[:-1]
    x, x_hat = rows(x, x_hat)
    document = _flat("document", document, shape)
    mask = _flat("mask", mask, shape)
    if mask is not None:
      if mask.dtype != bool:
        raise ValueError(f"The mask must be bool, got {mask.dtype}.")
      x, x_hat = x[mask], x_hat[mask]
      document = None if document is None else document[mask]
    if not len(x):
      return self
    self._check_documents(document)
    away = self._fvu.add(x, x_hat)
    error = np.square(x - x_hat).sum(1)
    self._add_batch(x, x_hat, away, error)
    if document is None:
      self._loose += len(x)
    else:
      self._documents.add(
        document,
        count=np.ones(len(x)),
        error=error,
        away=away,
        square=np.square(away).sum(1),
      )
    return self

  def compute(self) -> dict[str, float]:
    """The numbers of `DEFINITIONS` so far.

    NaN stands for a number of which every batch, or token, was left out.

    Raises:
      ValueError: no rows yet, or a target that is constant.
    """
    if not self.count:
      raise ValueError("No row has been counted: give rows, or look at masks.")
    error, variance = self._fvu.error, self._fvu.variance
    if variance <= 0:
      raise ValueError(
        f"All {self.count} targets are equal: there is no variance to explain."
      )
    sums = self._sums
    square = sums["target"] / self.count
    # Its mean over dims of E[x_d^2] is this over E.
    wrong = square - (square / len(self.mean)) ** 2
    values = {
      "fvu": error / variance,
      "fvu_batch": _ratio(sums["fvu_batch"], sums["fvu_batch_count"]),
      "fvu_resid_var": self._fvu.error_variance / variance,
      "ev_legacy": _ratio(sums["ev_legacy"], sums["ev_legacy_count"]),
      "ev_2025": 1 - _ratio(error, wrong),
      "nmse0": error / square,
      "mse": error,
      "cosine": _ratio(sums["cosine"], sums["nonzero"]),
      "l2_ratio": _ratio(sums["l2_ratio"], sums["nonzero"]),
      "relative_bias": _ratio(
        sums["relative_bias"], sums["relative_bias_count"]
      ),
      "shrinkage": _ratio(sums["reconstruction"], sums["dot"]),
    }
    return {name: float(value) for name, value in values.items()}

  def interval(
    self, *, level: float = 0.95, resamples: int = 1_000, seed: int = 0
  ) -> tuple[float, float] | None:
    """Bootstrap interval of `fvu` over documents; see `document_interval`.

    The mean that the variance is about stays that of all rows. A resample's
    own mean would lower its denominator by a share of about one over the
    number of documents, which is of second order.

    Returns:
      (low, high); None without documents or with a single one.
    """
    if len(self._documents) < 2:
      return None
    sums, offset = self._documents, self._fvu.offset
    # |a - o|^2 = |a|^2 - 2 a.o + |o|^2, summed over a document's rows.
    spread = (
      sums["square"]
      - 2 * (sums["away"] @ offset)
      + sums["count"] * (offset @ offset)
    )
    return document_interval(
      sums["error"], spread, level=level, resamples=resamples, seed=seed
    )

  def _check_documents(self, document) -> None:
    if document is None:
      if len(self._documents):
        raise ValueError("This batch has no documents, and others had.")
      return
    if self._loose:
      raise ValueError("This batch has documents, and others had none.")
    if not np.issubdtype(document.dtype, np.integer) or document.min() < 0:
      raise ValueError(
        "Documents must be whole numbers >= 0; mask rows that have none."
      )

  def _add_batch(self, x, x_hat, away, error) -> None:
    sums = self._sums
    target = np.square(x).sum(1)
    reconstruction = np.square(x_hat).sum(1)
    dot = np.einsum("ne,ne->n", x, x_hat)
    spread = np.square(away - pilot(away)).sum(1)
    sums["target"] += target.sum()
    sums["reconstruction"] += reconstruction.sum()
    sums["dot"] += dot.sum()

    there = target > 0
    norm, length = np.sqrt(target[there]), np.sqrt(reconstruction[there])
    sums["nonzero"] += there.sum()
    sums["l2_ratio"] += (length / norm).sum()
    both = norm * np.where(length > 0, length, 1)
    sums["cosine"] += (dot[there] / both).sum()

    apart = spread > 0
    sums["ev_legacy"] += (1 - error[apart] / spread[apart]).sum()
    sums["ev_legacy_count"] += apart.sum()
    for name, top, bottom in (
      ("fvu_batch", error.sum(), spread.sum()),
      ("relative_bias", reconstruction.sum(), dot.sum()),
    ):
      if bottom:
        sums[name] += top / bottom
        sums[f"{name}_count"] += 1


def _flat(name, values, shape) -> np.ndarray | None:
  if values is None:
    return None
  values = np.asarray(values)
  if values.shape != shape:
    raise ValueError(
      f"The {name} is {values.shape}; expected an entry per row, {shape}."
    )
  return values.reshape(-1)


def _ratio(top: float, bottom: float) -> float:
  return top / bottom if bottom else float("nan")
