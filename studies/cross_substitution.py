"""What is lost when codes come from another model's latents."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from gemma_jax.metrics.ablation import Given
from studies import cross_places
from studies.cross_places import Side

CODES = ("matched", "dealt", "mean", "zero")

DEFINITIONS = {
  "substitution.matched": (
    "Codes of b predicted from those of the matched latents of a, each by a "
    "line fitted on training text, in place of b's own at paired places."
  ),
  "substitution.dealt": (
    "Codes predicted from another match's latent of a, by a line of its own."
  ),
  "substitution.mean": "Codes set to their training means.",
  "substitution.zero": "Codes set to 0.",
  "substitution.kl": "KL(clean || changed), nats per token.",
  "substitution.recovered": (
    "1 - KL / KL of mean, no cross-entropy: 1 is b's own codes; ratio of sums."
  ),
}


class CodeSums(NamedTuple):
  """Sums over n training places of the codes of K matches; these add up.

  Attributes:
    count: n.
    a: float64 [K], codes of a.
    b: float64 [K], codes of b.
    aa: float64 [K], squares.
    ab: float64 [K, K], products of match i's code of a and j's of b.
  """

  count: int
  a: np.ndarray
  b: np.ndarray
  aa: np.ndarray
  ab: np.ndarray


def code_sums(codes_a, codes_b) -> CodeSums:
  """Of the codes of K matches at n training places, [n, K] each."""
  a, b = np.asarray(codes_a, np.float64), np.asarray(codes_b, np.float64)
  return CodeSums(len(a), a.sum(0), b.sum(0), np.square(a).sum(0), a.T @ b)


def predict(sums: CodeSums, codes_a: np.ndarray, source) -> np.ndarray:
  """Codes of b from those of a, each by a line of least squares.

  Args:
    sums: of the training places.
    codes_a: [P, K].
    source: int [C], which match's latent of a each of the first C latents of
      b is predicted from.

  Returns:
    [P, C]; the training mean where a latent of a does not vary.
  """
  source = np.asarray(source)
  n, mean_b = sums.count, sums.b[: len(source)] / sums.count
  mean_a = sums.a[source] / n
  square = sums.aa[source] - n * mean_a**2
  product = sums.ab[source, np.arange(len(source))] - n * mean_a * mean_b
  varies = square > 1e-12 * sums.aa[source]
  slope = np.divide(product, square, out=np.zeros(len(source)), where=varies)
  return (codes_a[:, source] - mean_a) * slope + mean_b


def substitute(
  side: Side,
  latents,
  sums: CodeSums,
  codes_a: np.ndarray,
  codes_b: np.ndarray,
  config: Mapping[str, Any],
  seed: int,
) -> list[dict[str, Any]]:
  """Puts other codes in place of a side's own; see `DEFINITIONS`.

  At every paired place x becomes x + sum_k (other - own) * W_dec[k]: what the
  dictionary leaves over stays.

  Args:
    side: of b.
    latents: int [K], of its dictionary, best matches first.
    sums: of training places, of these matches in this order.
    codes_a: [P, K], of a's matched latents at the side's places.
    codes_b: [P, K], of b's.
    config: of `FIELDS`.
    seed: of the dealing and of resamples.

  Returns:
    For each number of matches and each of `CODES` {"count", "codes", "kl",
    "kl_low", "kl_high", "recovered", "low", "high"}; None where there is no
    interval, or where even means cost nothing.

  Raises:
    ValueError: codes of other places or latents, or a number of matches that
      cannot be dealt.
  """
  decoder = side.decoder(latents)
  shape = len(side.at), len(decoder)
  if not codes_a.shape == codes_b.shape == shape or len(sums.a) != shape[1]:
    raise ValueError(
      f"expected codes {shape} of the side's places and latents, got "
      f"{codes_a.shape} and {codes_b.shape}, and sums of {len(sums.a)}; cut "
      "says which places are left"
    )
  counts = sorted({min(c, shape[1]) for c in (*config["counts"], shape[1])})
  if counts[0] < 2:
    raise ValueError(f"expected 2 matches or more to deal, got {counts[0]}")
  x, owner = (
    cross_places.values(side, config),
    cross_places.owners(side, side.document),
  )
  rng, rows = np.random.default_rng(seed), []
  for count in counts:
    others = {
      "matched": predict(sums, codes_a, np.arange(count)),
      "dealt": predict(sums, codes_a, cross_places.dealt(count, rng)),
      "mean": sums.b[:count] / sums.count,
      "zero": np.zeros(count),
    }
    given = {}
    for name in CODES:
      change = others[name] - codes_b[:, :count]
      values = x.copy()
      values[*side.at.T] += change @ decoder[:count]
      given[name] = Given(values)
    _, tokens, sums_of = cross_places.divergence(side, given, owner, config)
    worst = sums_of["mean"]
    for name in CODES:
      kl = sums_of[name]
      ends = cross_places.ends(kl, tokens, config, seed)
      rows.append(
        {
          "count": count,
          "codes": name,
          "kl": float(kl.sum() / tokens.sum()),
          "kl_low": ends["low"],
          "kl_high": ends["high"],
          "recovered": (
            float(1 - kl.sum() / worst.sum()) if worst.sum() > 0 else None
          ),
          **cross_places.ends(worst - kl, worst, config, seed),
        }
      )
  return rows
