"""Can a short rule on tokens say when a latent fires? No language model asked.

A rule is learned on half of the documents and scored on the other half, by
how well it ranks tokens and by how short it makes their code.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse

from gemma_jax.probing import logistic, rules
from gemma_jax.probing.labels import Labels
from gemma_jax.probing.random import random_latents
from gemma_jax.probing.sparse import check_latents
from gemma_jax.probing.split import split

BIGRAM = 32  # bits that the token has in the code of a bigram
DEFINITIONS = {
  "auroc": (
    "Area under the ROC curve of the rule's probability against firing, on "
    "the other half of the documents; 0.5 is chance."
  ),
  "bits": (
    "Bits per token to say where the latent fires on the other half: those of "
    "the rule, once, and -log2 of its probabilities."
  ),
  "base_bits": "The same without a rule, from the base rate alone.",
  "random": "Random directions that fire as often as each latent.",
  "shuffled": "The latents, dealt to other tokens at random.",
}


class Rule(NamedTuple):
  """Where `kind` has `value`, and no earlier rule holds.

  Attributes:
    kind: name of a candidate; "token", "previous", "bigram", or a label.
    value: a token id, a label's class, or previous << 32 | token.
    fired: how many of the examples that it decides fired,
    silent: and how many did not.
  """

  kind: str
  value: int
  fired: int
  silent: int


@dataclasses.dataclass(frozen=True)
class Explained:
  """Scores of J latents; NaN where one fires too rarely in either half.

  Attributes:
    auroc: float64 [J], see `DEFINITIONS`.
    bits: float64 [J], per token of the sample, half of which fire.
    base_bits: float64 [J].
    rules: of each latent, in the order in which they apply.
  """

  auroc: np.ndarray
  bits: np.ndarray
  base_bits: np.ndarray
  rules: tuple[tuple[Rule, ...], ...]

  def summary(self) -> dict[str, float]:
    """How the scores are spread over the latents that have one."""
    scored = np.isfinite(self.auroc)
    out = {"scored": float(scored.sum()), "unscored": float((~scored).sum())}
    if not scored.any():
      return out
    auroc, bits = self.auroc[scored], self.bits[scored]
    base = self.base_bits[scored]
    for q in (10, 50, 90):
      out[f"auroc_p{q}"] = float(np.percentile(auroc, q))
    return out | {
      "auroc_mean": float(auroc.mean()),
      "bits_mean": float(bits.mean()),
      "base_bits_mean": float(base.mean()),
      "shorter": float(np.mean(bits < base)),
    }


def candidates(
  tokens: np.ndarray, mask: np.ndarray, labels: Mapping[str, Labels]
) -> dict[str, np.ndarray]:
  """What rules may speak of, for the R masked positions: int64 [R], -1 none.

  Args:
    tokens: int [N, T]; a window's first token has no previous one.
    mask: bool [N, T] with R true positions.
    labels: values [N, T], from `labels.label`.
  """
  tokens, mask = np.asarray(tokens, np.int64), np.asarray(mask, bool)
  previous = np.full_like(tokens, -1)
  previous[:, 1:] = tokens[:, :-1]
  bigram = np.where(previous < 0, -1, previous << BIGRAM | tokens)
  kinds = {"token": tokens, "previous": previous, "bigram": bigram}
  kinds |= {name: label.values for name, label in labels.items()}
  return {name: v[mask].astype(np.int64) for name, v in kinds.items()}


def explain_latents(
  latents: scipy.sparse.csr_matrix,
  kinds: Mapping[str, np.ndarray],
  documents: np.ndarray,
  chosen: Sequence[int],
  *,
  top: int = 100,
  minimum: int = 10,
  max_rules: int = 16,
  seed: int = 0,
) -> Explained:
  """Scores a list of rules for each chosen latent.

  The sample of each half of the documents is the latent's `top` largest
  activations there, and as many tokens on which it is silent, at random.
  The rules are those of `rules.learn` on the first half's sample; one costs
  the choice of its kind, of its value among those in the data, and one bit to
  go on.

  Args:
    latents: activations [R, M], CSR; firing is > 0.
    kinds: name -> int64 [R], from `candidates`; -1 never makes a rule.
    documents: int [R].
    chosen: J latents.
    top: firing tokens taken of each half, at most.
    minimum: a latent that fires on fewer tokens of a half is not scored.
    max_rules: of one latent.
    seed: of the halves and the silent tokens.

  Raises:
    ValueError: shapes that differ, latents that do not exist, or fewer than
      two documents.
    FloatingPointError: latents that are not finite.
  """
  rows = check_latents(latents, len(documents))
  wrong = {n: v.shape for n, v in kinds.items() if v.shape != (rows,)}
  chosen = np.asarray(chosen, np.int64)
  if wrong or not kinds:
    raise ValueError(f"expected kinds of shape [{rows}], got {wrong or 'none'}")
  if chosen.size and not 0 <= chosen.min() <= chosen.max() < latents.shape[1]:
    raise ValueError(
      f"expected latents below {latents.shape[1]}, got {chosen.min()} to "
      f"{chosen.max()}"
    )
  names = tuple(kinds)
  codes = np.stack([kinds[name] for name in names])
  distinct = [len(np.unique(c[c >= 0])) for c in codes]
  # One bit says that there is another rule.
  cost = 1 + np.log2(len(names)) + np.log2(np.maximum(distinct, 1))
  second = split(documents, fraction=0.5, seed=seed)
  rng = np.random.default_rng((seed, 1))
  columns = latents.tocsc()
  scores, found = np.full((3, len(chosen)), np.nan), []
  for i, j in enumerate(chosen):
    span = slice(*columns.indptr[j : j + 2])
    where, acts = columns.indices[span], columns.data[span]
    where, acts = where[acts > 0], acts[acts > 0]
    samples = [
      _sample(where, acts, half, top, rng) for half in (~second, second)
    ]
    if any(y.sum() < minimum or y.all() for _, y in samples):
      found.append(())
      continue
    (fit_rows, fit_y), (test_rows, test_y) = samples
    learned, rest = rules.learn(codes[:, fit_rows], fit_y, cost, max_rules)
    p = rules.predict(codes[:, test_rows], learned, rest)
    spent = sum(cost[c] for c, *_ in learned) + 1
    base = (fit_y.sum() + 1) / (len(fit_y) + 2)
    scores[:, i] = (
      logistic.auc(p, test_y),
      (spent + rules.bits(p, test_y)) / len(test_y),
      rules.bits(np.full(len(test_y), base), test_y) / len(test_y),
    )
    found.append(tuple(Rule(names[c], *r) for c, *r in learned))
  return Explained(*scores, tuple(found))


def explain_with_baselines(
  latents: scipy.sparse.csr_matrix,
  kinds: Mapping[str, np.ndarray],
  documents: np.ndarray,
  chosen: Sequence[int],
  x: np.ndarray,
  *,
  seed: int = 0,
  **options,
) -> dict[str, Explained]:
  """`explain_latents` of "latents", "random" directions, "shuffled" latents.

  Args:
    latents: as in `explain_latents`.
    kinds: as in `explain_latents`.
    documents: as in `explain_latents`.
    chosen: as in `explain_latents`.
    x: [R, D] activations at the dictionary's site.
    seed: as in `explain_latents`; of the baselines too.
    **options: further arguments of `explain_latents`.

  Raises:
    As `explain_latents` and `random.random_latents`.
  """
  check_latents(latents, len(documents))
  own = latents.tocsc()[:, np.asarray(chosen, np.int64)].tocsr()
  rows = own.shape[0]
  density = np.asarray((own > 0).sum(0)).ravel() / rows
  rng = np.random.default_rng((seed, 2))
  sets = {
    "latents": own,
    "random": random_latents(x, np.minimum(density, 1 - 1 / rows), seed=seed),
    "shuffled": own[rng.permutation(rows)],
  }
  return {
    name: explain_latents(
      z, kinds, documents, range(own.shape[1]), seed=seed, **options
    )
    for name, z in sets.items()
  }


def _sample(where, acts, half, top, rng):
  """Rows of one half and whether the latent fires there."""
  inside = half[where]
  order = np.argsort(-acts[inside], kind="stable")[:top]
  firing = where[inside][order]
  silent = half.copy()
  silent[where] = False
  silent = np.flatnonzero(silent)
  others = rng.choice(
    silent, min(len(firing), len(silent)), replace=False, shuffle=False
  )
  y = np.arange(len(firing) + len(others)) < len(firing)
  return np.concatenate([firing, others]), y
