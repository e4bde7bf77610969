"""First-letter absorption: who speaks when the letter's own latent is silent?

Karvonen et al. 2025 (SAEBench, arXiv 2503.09532), after Chanin et al. 2024.
A dictionary's latent for "starts with c" may stay silent on some words,
because a latent for those words has taken its direction in.
"""

import dataclasses

import numpy as np
import scipy.sparse

from gemma_jax.data.vocabulary import LETTERS
from gemma_jax.probing import logistic
from gemma_jax.probing.sparse import check_latents, gather, mean_difference
from gemma_jax.probing.split import split

UNIT = 1e-3  # how far a decoder row's norm may be from 1
DEFINITIONS = {
  "full": (
    "Share of test words, of those that the probe gets right, on which all "
    "main latents are silent and the top latent by projection (activation x "
    "cosine with the probe) has cosine >= 0.025 and >= 0.4 of the probe "
    "projection."
  ),
  "fraction": (
    "Mean over the same words of A / (A + main): A is the projection of at "
    "most 3 other latents with cosine >= 0.1, cut at what the main latents "
    "leave; 0 where they give < 0.4 of the probe projection, or the main "
    "latents give all of it."
  ),
  "probe_f1": "F1 of the ground-truth probe on test words at logit 0.",
}


@dataclasses.dataclass(frozen=True)
class Absorption:
  """Absorption of the 26 letters; NaN where a letter was left out.

  Attributes:
    full: float64 [26], see `DEFINITIONS`.
    fraction: float64 [26].
    probe_f1: float64 [26].
    words: int64 [26], test rows that the probe gets right.
    main: letter -> its main latents, the best first.
    rows: int64 [A], rows with full absorption,
    absorbers: int64 [A], and the latent that absorbed each.
    dropped: letter -> why it was left out.
  """

  full: np.ndarray
  fraction: np.ndarray
  probe_f1: np.ndarray
  words: np.ndarray
  main: dict[str, tuple[int, ...]]
  rows: np.ndarray
  absorbers: np.ndarray
  dropped: dict[str, str]

  @property
  def mean_full(self) -> float:
    """Mean of `full` over the letters that have one."""
    return float(np.nanmean(self.full))

  @property
  def mean_fraction(self) -> float:
    """Mean of `fraction` over the letters that have one."""
    return float(np.nanmean(self.fraction))


def measure_absorption(
  latents: scipy.sparse.csr_matrix,
  decoder: np.ndarray,
  x: np.ndarray,
  letters: np.ndarray,
  groups: np.ndarray,
  *,
  read: str,
  write: str,
  bias: np.ndarray | None = None,
  seed: int = 0,
  test_fraction: float = 0.5,
  min_count: int = 10,
  max_latents: int = 10,
  min_gain: float = 0.03,
  full_cosine: float = 0.025,
  fraction_cosine: float = 0.1,
  proportion: float = 0.4,
  max_absorbers: int = 3,
  silent: float = 1e-8,
) -> Absorption:
  """Absorption of every letter, by SAEBench's definitions.

  A probe is fitted on the training groups, its penalty chosen on a quarter of
  them. Main latents: of the `max_latents` with the largest mean over
  positives less mean over negatives, in that order, the first and each that
  raises the F1 of a logistic probe on that quarter by more than `min_gain`.
  Absorption is counted on the test groups.

  Args:
    latents: activations [R, M] of an SAE, CSR, one row per word.
    decoder: [M, D], rows of norm 1; see `unit_rows`.
    x: [R, D] activations at the SAE's site.
    letters: int [R], first letters 0-25; rows with -1 take no part.
    groups: int [R] that no split divides. Token ids (and few rows of each, see
      `split.subsample` and `vocabulary.words`), or else a latent for one
      frequent word passes for a main latent.
    read: site that the dictionary reads,
    write: and writes; the same, or absorption means nothing.
    bias: [D], what the dictionary adds whatever its latents do, taken from x
      before projecting; None projects x as it is, as SAEBench does.
    seed: of the splits.
    test_fraction: share of the rows to count on.
    min_count: a letter with fewer rows on any of the three sides is left out.
    max_latents: candidates for main latents.
    min_gain: in F1.
    full_cosine: least cosine with the probe of the latent that absorbs.
    fraction_cosine: the same for `fraction`.
    proportion: least share of the probe projection.
    max_absorbers: of one word, for `fraction`.
    silent: activations up to this count as none.

  Raises:
    ValueError: a transcoder, decoder rows that are not of norm 1 (says which
      norms there are), shapes that differ, fewer than four groups, or no
      letter with enough rows.
    FloatingPointError: latents or activations that are not finite.
  """
  _check(latents, decoder, x, letters, groups, read, write)
  ids = np.flatnonzero(np.asarray(letters) >= 0)
  z, x = latents.tocsr()[ids], np.asarray(x, np.float64)[ids]
  letters, groups = np.asarray(letters)[ids], np.asarray(groups)[ids]
  test = split(groups, fraction=test_fraction, seed=seed)
  inner = np.zeros(len(ids), bool)
  inner[~test] = split(groups[~test], fraction=0.25, seed=seed + 1)
  y = letters == np.arange(len(LETTERS))[:, None]
  sides = (~test & ~inner, inner, test)
  counts = np.stack([(y & side).sum(1) for side in sides], axis=1)
  kept = np.flatnonzero(counts.min(1) >= min_count)
  dropped = {
    LETTERS[c]: f"{counts[c].tolist()} rows to fit, validate and test; needs "
    f"{min_count} of each"
    for c in np.flatnonzero(counts.min(1) < min_count)
  }
  if len(kept) < 2:
    raise ValueError(
      f"expected two letters with {min_count} rows to fit, validate and test, "
      f"got {len(kept)}; give more words, or a smaller min_count"
    )
  y = y[kept]
  probe = _fit_probe(x[~test], y[:, ~test], inner[~test])
  mains = _main_latents(z, y, ~test, inner, max_latents, min_gain)
  positive = probe(x) > 0
  right = y & positive & test
  out = np.full((3, len(LETTERS)), np.nan)
  words = np.zeros(len(LETTERS), np.int64)
  directions = probe.coefficients / np.linalg.norm(
    probe.coefficients, axis=1, keepdims=True
  )
  centred = x if bias is None else x - np.asarray(bias, np.float64)
  rows, absorbers, main = [], [], {}
  for i, c in enumerate(kept):
    out[2, c] = logistic.f1(positive[i, test], y[i, test])
    words[c] = right[i].sum()
    if not len(mains[i]) or not words[c]:
      dropped[LETTERS[c]] = (
        "the probe gets no test word right"
        if len(mains[i])
        else "no latent is more active on its words than on others"
      )
      continue
    main[LETTERS[c]] = mains[i]
    cosine = decoder @ directions[i]
    projection = centred @ directions[i]
    fractions, full = [], 0
    for row in np.flatnonzero(right[i]):
      span = slice(*z.indptr[row : row + 2])
      active = np.abs(z.data[span]) > silent
      where, acts = z.indices[span][active], z.data[span][active]
      part = acts * cosine[where]
      is_main = np.isin(where, mains[i])
      total = projection[row]
      if total > 0 and len(part) and not is_main.any():
        top = part.argmax()
        close = cosine[where[top]] >= full_cosine
        if close and part[top] >= proportion * total:
          full += 1
          rows.append(ids[row])
          absorbers.append(where[top])
      able = ~is_main & (cosine[where] >= fraction_cosine) & (part > 0)
      others = np.sort(part[able])[::-1][:max_absorbers].sum()
      fractions.append(
        _fraction(others, part[is_main].sum(), total, proportion)
      )
    out[:2, c] = full / words[c], np.mean(fractions)
  return Absorption(
    *out,
    words,
    main,
    np.array(rows, np.int64),
    np.array(absorbers, np.int64),
    dropped,
  )


def unit_rows(
  latents: scipy.sparse.csr_matrix, decoder: np.ndarray
) -> tuple[scipy.sparse.csr_matrix, np.ndarray]:
  """The same dictionary with decoder rows of norm 1: the norm goes to latents.

  Args:
    latents: [R, M].
    decoder: [M, D]; a row of zeros stays, and its latent becomes zero.
  """
  norms = np.linalg.norm(np.asarray(decoder, np.float64), axis=1)
  scaled = scipy.sparse.csr_matrix(latents.multiply(norms[None]))
  scaled.eliminate_zeros()
  unit = np.divide(
    decoder,
    norms[:, None],
    where=norms[:, None] > 0,
    out=np.zeros(decoder.shape),
  )
  return scaled, unit


def _check(latents, decoder, x, letters, groups, read, write):
  if read != write:
    raise ValueError(
      f"expected an SAE, got a transcoder from {read!r} to {write!r}: its "
      "decoder does not live where the probe is; absorption is not defined"
    )
  rows = check_latents(latents, len(groups))
  shapes = np.shape(x), np.shape(decoder), np.shape(letters)
  dims = shapes[0][-1] if len(shapes[0]) == 2 else None
  if shapes != ((rows, dims), (latents.shape[1], dims), (rows,)):
    raise ValueError(
      f"expected x [{rows}, D], decoder [{latents.shape[1]}, D] and letters "
      f"[{rows}], got {shapes}"
    )
  if not np.isfinite(x).all():
    raise FloatingPointError("Activations that are not finite.")
  norms = np.linalg.norm(np.asarray(decoder, np.float64), axis=1)
  # A latent that writes nothing can neither speak nor absorb.
  if not ((np.abs(norms - 1) <= UNIT) | (norms == 0)).all():
    raise ValueError(
      "expected decoder rows of norm 1, got norms from "
      f"{norms.min():.4g} to {norms.max():.4g}, mean {norms.mean():.4g}; pass "
      "what absorption.unit_rows makes of latents and decoder"
    )


def _fit_probe(x, y, inner):
  weight = logistic.balanced(y, np.ones_like(y))
  return logistic.fit_validated(x, y, weight, inner)


def _main_latents(z, y, train, inner, limit, min_gain):
  """Main latents of every letter, by F1 on `inner`, the best first."""
  fitted = train & ~inner
  difference = mean_difference(
    z[fitted], y[:, fitted], np.ones_like(y[:, fitted])
  )
  order = np.argsort(-difference, axis=1, kind="stable")[:, :limit]
  useful = np.take_along_axis(difference, order, axis=1) > 0
  features = gather(z, order)
  weight = logistic.balanced(y[:, fitted], np.ones_like(y[:, fitted]))
  used = np.zeros(order.shape, bool)
  best = np.full(len(y), -np.inf)
  for k in range(order.shape[1]):
    trial = used.copy()
    trial[:, k] = useful[:, k]
    own = features * trial[:, None]
    logits = logistic.fit(own[:, fitted], y[:, fitted], weight)(own)
    for i in np.flatnonzero(useful[:, k]):
      cut = logistic.best_threshold(logits[i, fitted], y[i, fitted])
      score = logistic.f1(logits[i, inner] >= cut, y[i, inner])
      if score > best[i] + min_gain:
        used[i, k], best[i] = True, score
  return [tuple(o[u].tolist()) for o, u in zip(order, used, strict=True)]


def _fraction(others, main, total, proportion) -> float:
  if total <= 0 or main >= total or others < proportion * total:
    return 0.0
  if main <= 0:
    return 1.0
  others = min(others, total - main)
  return float(others / (others + main))
