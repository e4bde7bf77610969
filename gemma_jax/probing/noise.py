"""How far a score is from itself when only the seed changes."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import scipy.stats

LEAST = 5
DEFINITIONS = {
  "value": "Mean over seeds of the score, itself the mean over its units.",
  "reseed_sd": "Standard deviation over seeds (n - 1 in the denominator).",
  "mdd": (
    "Minimum detectable difference, 2.8 x reseed_sd: 1.96 + 0.84, what a "
    "two-sided test at 5 % finds 4 times of 5."
  ),
  "interval": (
    "BCa bootstrap over units (tasks, letters, latents), each averaged over "
    "seeds first; NaN for fewer than 5 units."
  ),
}


@dataclasses.dataclass(frozen=True)
class Reseeded:
  """A score over K seeds, of U units.

  Attributes:
    value: see `DEFINITIONS`.
    reseed_sd: in the units of the score.
    mdd: likewise.
    interval: (low, high) at `confidence`.
    confidence: of the interval.
    seeds: K seeds.
    values: float64 [K, U]; NaN where a unit had no score.
  """

  value: float
  reseed_sd: float
  mdd: float
  interval: tuple[float, float]
  confidence: float
  seeds: tuple[int, ...]
  values: np.ndarray


def reseeded(
  function: Callable[[int], float | np.ndarray],
  seeds: Sequence[int] = range(LEAST),
  *,
  confidence: float = 0.95,
  resamples: int = 2_000,
) -> Reseeded:
  """Runs a score with several seeds and says what its noise is.

  Args:
    function: seed -> a number, or scores of the same U units [U], NaN where
      one has none.
    seeds: at least five different ones, of splits and subsamples.
    confidence: of the interval.
    resamples: of the bootstrap.

  Raises:
    ValueError: fewer than five different seeds, results of different shapes,
      or a seed without any score.
  """
  seeds = tuple(int(seed) for seed in seeds)
  if len(set(seeds)) < LEAST or len(set(seeds)) < len(seeds):
    raise ValueError(
      f"expected at least {LEAST} different seeds, got {list(seeds)}; a "
      "standard deviation of fewer says little"
    )
  results = [np.atleast_1d(function(seed)) for seed in seeds]
  shapes = {r.shape for r in results}
  if len(shapes) > 1 or results[0].ndim > 1:
    raise ValueError(
      f"expected one number, or [U] of the same units for every seed, got "
      f"{sorted(shapes)}"
    )
  values = np.stack(results).astype(np.float64)
  empty = [s for s, v in zip(seeds, values, strict=True) if np.isnan(v).all()]
  if empty:
    raise ValueError(f"no unit has a score with seeds {empty}; give more rows")
  by_seed = np.nanmean(values, axis=1)
  sd = float(by_seed.std(ddof=1))
  units = values[:, ~np.isnan(values).all(0)]
  return Reseeded(
    float(by_seed.mean()),
    sd,
    2.8 * sd,
    _interval(np.nanmean(units, axis=0), confidence, resamples),
    confidence,
    seeds,
    values,
  )


def _interval(units, confidence, resamples) -> tuple[float, float]:
  if len(units) < LEAST:
    return float("nan"), float("nan")
  if np.ptp(units) == 0:  # SciPy has no acceleration for a constant
    return float(units[0]), float(units[0])
  found = scipy.stats.bootstrap(
    (units,),
    np.mean,
    confidence_level=confidence,
    n_resamples=resamples,
    batch=100,
    method="BCa",
    random_state=np.random.default_rng(0),
  ).confidence_interval
  return float(found.low), float(found.high)
