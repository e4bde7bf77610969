"""Does damage hit a concept's prompts and spare the others?"""

import dataclasses

import numpy as np

from gemma_jax import statistics

DEFINITIONS = {
  "effect": (
    "Log-probability of the answer, clean less changed, nats per byte of the "
    "answer; mean over the concept's prompts."
  ),
  "control": "The same, over control prompts of like clean log-probability.",
  "general": "The same, over prompts of the text at large.",
  "difference": (
    "effect - control, with its 95 % BCa interval over prompts (independent)."
  ),
  "ratio": (
    "effect / (|control| + s_control / sqrt(n_control)), a specificity that a "
    "control of almost nothing cannot blow up."
  ),
  "auroc": "Chance that a concept's prompt loses more than a control prompt.",
  "cliffs_delta": "2 auroc - 1.",
  "d_z": "effect over the standard deviation of the concept's prompts.",
  "p": (
    "One-sided permutation of which prompts are the concept's, add-one; the "
    "difference of means."
  ),
  "q": "p, adjusted by Benjamini and Hochberg over the vectors tested.",
}


@dataclasses.dataclass(frozen=True)
class Specificity:
  """See `DEFINITIONS`.

  Attributes:
    effect: nats per byte.
    control: nats per byte.
    general: nats per byte, NaN without such prompts.
    difference: nats per byte.
    low: of the difference.
    high: of the difference.
    ratio: of effect to control.
    auroc: between 0 and 1.
    cliffs_delta: between -1 and 1.
    d_z: in standard deviations.
    p: one-sided.
  """

  effect: float
  control: float
  general: float
  difference: float
  low: float
  high: float
  ratio: float
  auroc: float
  cliffs_delta: float
  d_z: float
  p: float


def assess(
  concept: np.ndarray,
  control: np.ndarray,
  general: np.ndarray | None = None,
  *,
  draws: int = 9_999,
  resamples: int = 2_000,
  seed: int = 0,
) -> Specificity:
  """Compares what prompts lost.

  Args:
    concept: nats per byte that a concept's prompts lost, [n].
    control: that control prompts lost, [m].
    general: that other text lost, if it was measured.
    draws: permutations, if all are more than 20,000.
    resamples: of the bootstrap.
    seed: of both.

  Raises:
    ValueError: fewer than two prompts on a side, losses that are not finite.
  """
  tested = statistics.permutation_test(
    concept,
    control,
    design="independent",
    alternative="greater",
    draws=draws,
    seed=seed,
  )
  interval = statistics.bootstrap_ci(
    concept, control, design="independent", resamples=resamples, seed=seed
  )
  delta = statistics.cliffs_delta(concept, control)
  delta = float(getattr(delta, "value", delta))
  spread = float(np.std(concept, ddof=1))
  effect = float(np.mean(concept))
  return Specificity(
    effect=effect,
    control=float(np.mean(control)),
    general=float(np.mean(general)) if general is not None else float("nan"),
    difference=interval.value,
    low=interval.low,
    high=interval.high,
    ratio=specificity_ratio(concept, control),
    auroc=(delta + 1) / 2,
    cliffs_delta=delta,
    d_z=effect / spread if spread > 0 else 0.0,
    p=tested.p,
  )


def specificity_ratio(concept: np.ndarray, control: np.ndarray) -> float:
  """What concept prompts lose over what control prompts do; see DEFINITIONS."""
  error = np.std(control, ddof=1) / len(control) ** 0.5
  below = abs(np.mean(control)) + error
  return float(np.mean(concept) / below) if below > 0 else 0.0
