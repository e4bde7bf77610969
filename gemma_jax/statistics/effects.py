"""How large a difference is, and how well that is known."""

import dataclasses

import numpy as np
from scipy import special, stats

from gemma_jax.statistics import samples


@dataclasses.dataclass(frozen=True)
class Effect:
  """An effect size and its interval.

  Attributes:
    value: of the samples.
    low: lower end of the interval.
    high: upper end.
    level: probability of the interval.
  """

  value: float
  low: float
  high: float
  level: float


def cohens_d(x, y, *, level: float = 0.95) -> Effect:
  """Difference of two independent means over their pooled deviation.

  d = (mean x - mean y) / s, s^2 the pooled variance with n + m - 2 in the
  denominator (Cohen 1988, "Statistical power analysis for the behavioral
  sciences", section 2.5). The interval inverts the noncentral t distribution,
  exact for normal values of equal variance (Steiger and Fouladi 1997,
  "Noncentrality interval estimation and the evaluation of statistical models").

  Args:
    x: one value a prompt, [n].
    y: of other prompts, [m].
    level: probability of the interval.

  Raises:
    ValueError: fewer than two values, one that is not finite, or values that
      do not vary.
  """
  x, y = samples.sample(x, "x"), samples.sample(y, "y")
  samples.varying(x, y)
  freedom = len(x) + len(y) - 2
  squares = np.sum((x - x.mean()) ** 2) + np.sum((y - y.mean()) ** 2)
  root = np.sqrt(len(x) * len(y) / (len(x) + len(y)))
  spread = np.sqrt(squares / freedom)
  return _standardised(x.mean() - y.mean(), spread, root, freedom, level)


def hedges_g(x, y, *, level: float = 0.95) -> Effect:
  """Cohen's d without most of its bias: d (1 - 3 / (4 v - 1)), v = n + m - 2.

  Hedges 1981, "Distribution theory for Glass's estimator of effect size and
  related estimators", Journal of Educational Statistics 6, the approximation of
  c(m). The interval is that of d: it is of the population's effect, which both
  estimate. Arguments and errors as in `cohens_d`.
  """
  d = cohens_d(x, y, level=level)
  factor = 1 - 3 / (4 * (len(x) + len(y) - 2) - 1)
  return dataclasses.replace(d, value=factor * d.value)


def d_z(x, y=None, *, level: float = 0.95) -> Effect:
  """Mean difference of pairs over the deviation of the differences.

  With n - 1 in the deviation's denominator (Cohen 1988, "Statistical power
  analysis for the behavioral sciences", section 2.3); interval as in
  `cohens_d`.

  Args:
    x: one value a prompt, [n]. Without `y`, differences of pairs.
    y: of the same prompts, [n].
    level: probability of the interval.

  Raises:
    ValueError: as `cohens_d`, or different lengths.
  """
  d = samples.differences(x, y)
  samples.varying(d)
  n = len(d)
  return _standardised(d.mean(), d.std(ddof=1), np.sqrt(n), n - 1, level)


def cliffs_delta(x, y, *, level: float = 0.95) -> Effect:
  """P(x > y) - P(x < y) over all pairs of prompts, from -1 to 1.

  Cliff 1993, "Dominance statistics: ordinal analyses to answer ordinal
  questions", Psychological Bulletin 114. The interval is the asymmetric one
  with the unbiased variance and Student's t (Feng and Cliff 2004, "Monte Carlo
  evaluation of ordinal d with improved confidence interval", J. Modern Applied
  Statistical Methods 3), as in the R package effsize (R/CliffDelta.R). Where
  one sample is all above the other, that has no width: there it ends where
  Wilson's interval of k successes in k does, k the smaller number of prompts.
  Arguments and errors as in `cohens_d`, but values need not vary.
  """
  x, y = samples.sample(x, "x"), samples.sample(y, "y")
  samples.probability(level, "level")
  n, m = len(x), len(y)
  t2 = stats.t.isf((1 - level) / 2, n + m - 2) ** 2
  below, above = _ranks(x, y)
  of_x = (below - above) / m
  less, more = _ranks(y, x)
  of_y = (more - less) / n
  delta = float((below - above).sum() / (n * m))
  if abs(delta) == 1:
    k = min(n, m)
    low, high = sorted((delta, delta * float((k - t2) / (k + t2))))
    return Effect(delta, low, high, level)
  untied = (below + above).sum()
  variance = (
    m**2 * np.sum((of_x - delta) ** 2)
    + n**2 * np.sum((of_y - delta) ** 2)
    - (untied - n * m * delta**2)
  ) / (n * m * (n - 1) * (m - 1))
  # The unbiased estimate can be too small, even negative.
  variance = max(variance, (1 - delta**2) / (n * m - 1))
  middle = delta - delta**3
  half = np.sqrt(t2 * variance * ((1 - delta**2) ** 2 + t2 * variance))
  scale = 1 - delta**2 + t2 * variance
  low, high = (middle - half) / scale, (middle + half) / scale
  return Effect(delta, float(low), float(high), level)


def _ranks(x, y) -> tuple[np.ndarray, np.ndarray]:
  """How many of y are below and above each of x: [n], [n]."""
  y = np.sort(y)
  below, above = (np.searchsorted(y, x, side) for side in ("left", "right"))
  return below, len(y) - above


def _standardised(difference, spread, root, freedom, level) -> Effect:
  """Of t = root * difference / spread, its noncentrality being root * d."""
  samples.probability(level, "level")
  d, tail = difference / spread, (1 - level) / 2
  low, high = special.nctdtrinc(freedom, [1 - tail, tail], root * d) / root
  return Effect(float(d), float(low), float(high), level)
