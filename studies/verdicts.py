"""From what prompts say to what may be claimed.

A similarity says little by itself: texts are alike, architectures are alike.
So each is placed between a floor, unrelated prompts or a model whose weights
were drawn anew, and what a model has with itself. The share of that way is
what is tested, prompt by prompt.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma_jax import metrics, statistics

# Of a measure without null, or without room above the floor.
UNKNOWN = ("null", "null_p", "floor", "share", "share_low", "share_high")
UNKNOWN += ("p", "p_equivalent", "p_corrected")
DEFINITIONS = {
  "value": "Mean over prompts, with its 95 % bootstrap interval over prompts.",
  "null": "The same of unrelated prompts of the same capability.",
  "null_p": "That the pairing of prompts does not matter, by exchange.",
  "floor": (
    "The nearest of three: the null, and the same after all matrices of one "
    "or of the other model were drawn anew, which leaves what text and "
    "architecture have in common."
  ),
  "share": (
    "(value - floor) / (identity - floor): 0 is no nearer than unrelated "
    "prompts or random weights, 1 is the model itself."
  ),
  "p": "That the share is at most the margin, by sign flips over prompts.",
  "p_equivalent": "That the share is at most 1 less the margin, likewise.",
  "p_corrected": (
    "p after Holm over all pairs and levels where it decides, else after "
    "Benjamini and Hochberg over all other rows."
  ),
  "verdict": (
    "equivalent: the share is above 1 less the margin; convergent: above the "
    "margin; not shown: neither, which is no evidence of difference."
  ),
}


def row(
  values: np.ndarray,
  *,
  identity: float,
  floor: np.ndarray,
  null: np.ndarray | None,
  chance: tuple[float, float] | None,
  margin: float,
  resamples: int,
  seed: int = 0,
) -> dict[str, Any]:
  """Numbers of one measure of one pair.

  Args:
    values: [N], by prompt.
    identity: what a model has with itself.
    floor: [N], of the redrawn model.
    null: [N], of unrelated prompts, or None.
    chance: (mean, p) of permuted prompts, in the place of `null`.
    margin: of the verdict, in shares.
    resamples: of the bootstrap.
    seed: of draws.

  Returns:
    The fields of `DEFINITIONS` but for those that need all rows.
  """
  interval = statistics.bootstrap_ci(values, resamples=resamples, seed=seed)
  out = {
    "prompts": len(values),
    "identity": identity,
    "value": interval.value,
    "low": interval.low,
    "high": interval.high,
    **dict.fromkeys(UNKNOWN),
  }
  # Distances are smaller where models are nearer.
  sign = 1 if identity else -1
  if null is not None:
    test = statistics.permutation_test(
      sign * (values - null), alternative="greater", seed=seed
    )
    out |= {"null": float(null.mean()), "null_p": test.p}
  elif chance is not None:
    out |= {"null": chance[0], "null_p": chance[1]}
  out["floor"] = float(floor.mean())
  gain, room = sign * (values - floor), sign * (identity - floor)
  if room.mean() <= 0:
    return out
  interval = metrics.document_interval(
    gain, room, resamples=resamples, seed=seed
  )
  out["share"] = float(gain.sum() / room.sum())
  out["share_low"], out["share_high"] = interval or (None, None)
  for name, least in (("p", margin), ("p_equivalent", 1 - margin)):
    out[name] = statistics.permutation_test(
      gain - least * room, alternative="greater", seed=seed
    ).p
  return out


def decide(rows: Sequence[dict[str, Any]], alpha: float) -> None:
  """Corrects p over rows, and sets `p_corrected` and `verdict`.

  Args:
    rows: of `row`, with `primary` and `capability`.
    alpha: of every verdict.
  """
  for one in rows:
    one["verdict"] = "not shown"
  tested = [one for one in rows if one["p"] is not None]
  leading = [
    one for one in tested if one["primary"] and one["capability"] == "all"
  ]
  others = [one for one in tested if one not in leading]
  for some, correct in (
    (leading, statistics.holm),
    (others, statistics.benjamini_hochberg),
  ):
    if not some:
      continue
    above = correct([one["p"] for one in some])
    equal = correct([one["p_equivalent"] for one in some])
    for one, p, same in zip(some, above, equal, strict=True):
      one["p_corrected"] = float(p)
      if p <= alpha:
        one["verdict"] = "equivalent" if same <= alpha else "convergent"
