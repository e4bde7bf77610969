"""Whether two are as good as equal, and how many prompts it takes to tell.

A difference that is not significant is no evidence that there is none.
"""

import dataclasses
import math

import numpy as np
from scipy import optimize, stats
from statsmodels.stats import power as statsmodels_power

from gemma_jax.statistics import samples


@dataclasses.dataclass(frozen=True)
class Equivalence:
  """Two one-sided tests.

  Attributes:
    value: mean difference.
    low: lower end of its interval, of probability 1 - 2 alpha.
    high: upper end. The interval is within the bounds where p < alpha.
    p: that the difference is outside the bounds.
  """

  value: float
  low: float
  high: float
  p: float


def tost(
  x,
  y=None,
  *,
  low: float,
  high: float,
  design: str = "paired",
  alpha: float = 0.05,
) -> Equivalence:
  """Whether the mean difference lies between `low` and `high`.

  The larger p of two one-sided t-tests (Schuirmann 1987, "A comparison of the
  two one-sided tests procedure and the power approach", J. Pharmacokinetics
  and Biopharmaceutics 15). Independent samples may differ in variance (Welch
  1947, "The generalization of Student's problem when several different
  population variances are involved", Biometrika 34).

  Args:
    x: one value a prompt or document, [n]. Without `y`, differences of pairs.
    y: [n] of the same prompts if paired, [m] of others if independent.
    low: least difference x - y that counts as equal, in the unit of x.
    high: largest one.
    design: "paired" or "independent".
    alpha: of each of the two tests, for the interval.

  Raises:
    ValueError: bounds that are not low < high, alpha of .5 or more, fewer than
      two values, one that is not finite, different lengths of pairs, or no
      variation.
  """
  samples.choice(design, samples.DESIGNS, "design")
  if not 0 < alpha < 0.5:
    raise ValueError(f"expected alpha between 0 and .5, got {alpha}")
  if not -math.inf < low < high < math.inf:
    raise ValueError(f"expected low < high, both finite, got {low} and {high}")
  if design == "paired":
    d = samples.differences(x, y)
    samples.varying(d)
    value, error, freedom = d.mean(), stats.sem(d), len(d) - 1
  else:
    x, y = samples.sample(x, "x"), samples.sample(y, "y")
    samples.varying(x, y)
    value = x.mean() - y.mean()
    of_x, of_y = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)
    error = np.sqrt(of_x + of_y)
    freedom = error**4 / (of_x**2 / (len(x) - 1) + of_y**2 / (len(y) - 1))
  nearest = min(value - low, high - value)
  half = stats.t.isf(alpha, freedom) * error
  return Equivalence(
    float(value),
    float(value - half),
    float(value + half),
    float(stats.t.sf(nearest / error, freedom)),
  )


def minimum_n(
  effect: float,
  *,
  alpha: float = 0.05,
  power: float = 0.8,
  design: str = "paired",
) -> int:
  """The fewest prompts with which a two-sided t-test finds an effect.

  Power as in `statsmodels.stats.power`, from the noncentral t distribution.

  Args:
    effect: to be found, d_z if paired and Cohen's d if independent; its sign
      does not matter.
    alpha: of the test.
    power: how often it is to find the effect, above alpha.
    design: "paired", or "independent" with as many prompts in both groups.

  Returns:
    Pairs, or prompts in each group; at least 2.

  Raises:
    ValueError: an effect of 0 or not finite, or a power not above alpha.
  """
  _plausible(alpha, power, design)
  if not 0 < abs(effect) < math.inf:
    raise ValueError(f"expected an effect that is finite, not 0, got {effect}")
  enough = 2
  while _power(effect, enough, alpha, design) < power:
    enough *= 2
  few = enough // 2
  while enough - few > 1:
    middle = (few + enough) // 2
    if _power(effect, middle, alpha, design) < power:
      few = middle
    else:
      enough = middle
  return enough


def minimum_detectable_difference(
  sd: float,
  n: int,
  *,
  alpha: float = 0.05,
  power: float = 0.8,
  design: str = "paired",
) -> float:
  """The least mean difference that a two-sided t-test finds with n prompts.

  The inverse of `minimum_n`.

  Args:
    sd: standard deviation of the differences if paired, within a group if
      independent.
    n: pairs, or prompts in each group, at least 2.
    alpha: of the test.
    power: how often it is to find the difference, above alpha.
    design: "paired" or "independent".

  Returns:
    In the unit of `sd`.

  Raises:
    ValueError: sd not positive, n below 2, or a power not above alpha.
  """
  _plausible(alpha, power, design)
  samples.count(n, "n")
  if not 0 < sd < math.inf or n < 2:
    raise ValueError(f"expected sd > 0 and n of at least 2, got {sd} and {n}")
  high = 1.0
  while _power(high, n, alpha, design) < power:
    high *= 2
  effect = optimize.brentq(
    lambda effect: _power(effect, n, alpha, design) - power, 0, high
  )
  return float(sd * effect)


def _plausible(alpha, power, design):
  samples.choice(design, samples.DESIGNS, "design")
  if not 0 < alpha < power < 1:
    raise ValueError(
      f"expected 0 < alpha < power < 1, got alpha {alpha} and power {power}"
    )


def _power(effect, n, alpha, design) -> float:
  if design == "paired":
    solver = statsmodels_power.TTestPower()
  else:
    solver = statsmodels_power.TTestIndPower()
  found = solver.power(abs(effect), n, alpha)
  if np.isnan(found):
    # SciPy has no value for the tail of the wrong sign where that is beneath
    # what a float can hold: what is left is the other tail.
    found = solver.power(abs(effect), n, alpha / 2, alternative="larger")
  return float(found)
