"""Whether rows cluster more than rows without clusters: the gap statistic."""

import dataclasses
from collections.abc import Callable

import numpy as np

from gemma_jax import progress

NULLS = ("permuted", "gaussian")


@dataclasses.dataclass(frozen=True)
class Gap:
  """The gap of one C.

  Tibshirani et al. choose the smallest C whose gap is at least that of C + 1
  less the standard error there.

  Attributes:
    gap: mean of `null_log_inertia`, less `log_inertia`, in nats: positive
      where the rows cluster more than the null's.
    standard_error: of the gap, from the null's draws alone.
    log_inertia: natural logarithm, of the rows.
    null_log_inertia: float64 [draws], of each draw.
  """

  gap: float
  standard_error: float
  log_inertia: float
  null_log_inertia: np.ndarray


def gap_statistic(
  x: np.ndarray,
  fit: Callable[[np.ndarray], float],
  *,
  null: str,
  draws: int = 10,
  seed: int = 0,
) -> Gap:
  """Compares the inertia of rows with that of rows that have no clusters.

  Gap = mean_b log W*_b - log W, with W the inertia of the rows and W*_b of
  draw b (Tibshirani, Walther and Hastie 2001, "Estimating the number of
  clusters in a data set via the gap statistic", eq. 3), and its standard
  error sd_b(log W*_b) sqrt(1 + 1 / draws), sd with `draws` in the denominator
  (ibid., the computation's step 3).

  Args:
    x: rows [N, D]; one draw of the same size is in memory beside them.
    fit: clusters rows [N, D] into some fixed C and returns the inertia.
    null: "permuted", every dim shuffled by itself: same margins, independent;
      or "gaussian", of the same mean and covariance.
    draws: of the null, at least 2.
    seed: of the draws.

  Raises:
    ValueError: rows that are not [N, D], another null, fewer than 2 draws, or
      an inertia that is not positive.
    FloatingPointError: a row that is not finite.
  """
  x = np.asarray(x, np.float32)
  if x.ndim != 2 or not x.size:
    raise ValueError(f"expected rows [N, D], got {x.shape}")
  if null not in NULLS or draws < 2:
    raise ValueError(
      f"expected one of the nulls {NULLS} and at least 2 draws, got {null!r} "
      f"and {draws}"
    )
  if not np.isfinite(x).all():
    bad = np.flatnonzero(~np.isfinite(x).all(1))
    raise FloatingPointError(
      f"Row {bad[0]} is not finite ({len(bad)} such rows). Leave them out."
    )
  rng = np.random.default_rng(seed)
  if null == "permuted":

    def draw():
      return rng.permuted(x, axis=0)
  else:
    draw = _gaussian(x, rng)
  logs = np.empty(draws + 1)
  with progress.bar(draws + 1, "gap statistic", unit="fits") as bar:
    for i in range(draws + 1):
      logs[i] = _log_inertia(fit(draw() if i else x))
      bar.update(1)
  log_inertia, nulls = float(logs[0]), logs[1:]
  return Gap(
    float(nulls.mean()) - log_inertia,
    float(nulls.std() * np.sqrt(1 + 1 / draws)),
    log_inertia,
    nulls,
  )


def _log_inertia(inertia: float) -> float:
  if not 0 < inertia < np.inf:
    raise ValueError(
      f"expected a positive inertia of fit, got {inertia}; it is 0 with as "
      "many clusters as different rows"
    )
  return np.log(inertia)


def _gaussian(x, rng, block=2**12) -> Callable[[], np.ndarray]:
  """Draws of x's shape, mean and covariance, also a singular one."""
  mean = x.mean(0, dtype=np.float64)
  covariance = np.zeros((x.shape[1], x.shape[1]))
  for start in range(0, len(x), block):
    part = x[start : start + block] - mean
    covariance += part.T @ part / len(x)
  variance, axes = np.linalg.eigh(covariance)
  root = (axes * np.sqrt(np.maximum(variance, 0))).T.astype(np.float32)

  def draw():
    out = rng.standard_normal(x.shape, np.float32) @ root
    out += mean.astype(np.float32)
    return out

  return draw
