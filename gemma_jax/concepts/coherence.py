"""Whether tokens belong together, by the cosine of their input embeddings.

Tokens of one script and of one frequency are near each other anyway: a set
is compared with random ones of the same scripts and frequencies.
"""

import itertools
from typing import NamedTuple

import numpy as np

from gemma_jax.concepts.nulls import Null, repeats

# Fewer tokens are no stratum of their own.
LEAST = 50
# Rows in memory at a time: 50 MiB for sets of 10 tokens at D = 640.
CHUNK = 2048


class Coherence(NamedTuple):
  """Of n sets of tokens.

  Attributes:
    value: [n], mean cosine over pairs; NaN of fewer than 3 tokens.
    z: [n], value less its expectation for tokens of the same strata, over its
      standard deviation; 0 where value is NaN.
    p: [n], share of random sets of as high a z; 1 where value is NaN.
  """

  value: np.ndarray
  z: np.ndarray
  p: np.ndarray


def embeddings(embed, usable, *, components: int = 3) -> np.ndarray:
  """Directions of tokens: centred, without the top components, of length 1.

  Mean and top principal components hold frequency and script, which raise
  the cosine of any two tokens (Mu and Viswanath 2018, "All-but-the-top",
  arXiv 1702.01417, algorithm 1).

  Args:
    embed: [V, D], input embeddings.
    usable: bool [V], tokens from which mean and components are taken.
    components: how many are removed.

  Returns:
    float32 [V, D]; 0 for tokens that are not usable.

  Raises:
    ValueError: other shapes, too few tokens for the components, or embeddings
      that are not finite.
  """
  embed, usable = np.asarray(embed), np.asarray(usable)
  if embed.ndim != 2 or usable.shape != embed.shape[:1] or usable.dtype != bool:
    raise ValueError(
      "expected embeddings [V, D] and for each of the V tokens a bool, got "
      f"{embed.shape} and {usable.dtype} {usable.shape}"
    )
  ids, width = np.flatnonzero(usable), embed.shape[1]
  if not 0 <= components < min(width, len(ids) - 1):
    raise ValueError(
      f"expected components from 0 and below D = {width} and the "
      f"{len(ids)} usable tokens less 1, got {components}: nothing would be "
      "left of the embeddings. Remove fewer"
    )
  chunks = np.array_split(ids, -(-len(ids) // CHUNK))
  mean = sum(embed[c].astype(np.float64).sum(0) for c in chunks) / len(ids)
  if not np.isfinite(mean).all():
    raise ValueError(
      f"expected finite embeddings, got {(~np.isfinite(mean)).sum()} columns "
      "of others; leave those tokens out of `usable`"
    )
  unit = np.zeros(embed.shape, np.float32)
  gram = np.zeros((width, width))
  for c in chunks:
    rows = embed[c].astype(np.float32) - mean.astype(np.float32)
    gram += rows.T @ rows
    unit[c] = rows
  top = np.linalg.eigh(gram)[1][:, width - components :].astype(np.float32)
  for c in chunks:
    rows = unit[c]
    rows -= rows @ top @ top.T
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    unit[c] = rows / np.maximum(length, np.finfo(np.float32).tiny)
  return unit


def strata(usable, script, *, bins: int = 5, frequency=None) -> np.ndarray:
  """Stratum of each token: its script and its bin of frequency.

  Ids of a BPE vocabulary are in the order of its merges, hence of frequency:
  the rank of a usable token's id stands for it. Bins are of equal size, all
  scripts together. A stratum of fewer than 50 tokens is joined with the
  nearest bin of its script; scripts of fewer share one stratum of any size.
  Gemma 3 has its single characters behind all merges, from id 236,743 on,
  however frequent they are: with many of them, give counts.

  Args:
    usable: bool [V].
    script: int [V], in any numbers.
    bins: of frequency.
    frequency: counts [V] that replace the order of ids.

  Returns:
    int32 [V], from 0; -1 where not usable.

  Raises:
    ValueError: other shapes, no bins, or no usable token.
  """
  usable, script = np.asarray(usable), np.asarray(script)
  rarity = np.arange(len(usable))
  if frequency is not None:
    rarity = -np.asarray(frequency, np.float64)
  shapes = {usable.shape, script.shape, rarity.shape}
  if len(shapes) > 1 or usable.ndim != 1 or usable.dtype != bool:
    raise ValueError(
      "expected for each of V tokens a bool, a script and a frequency, got "
      f"{usable.dtype} {usable.shape}, {script.shape} and {rarity.shape}"
    )
  ids = np.flatnonzero(usable)
  if bins < 1 or not len(ids):
    raise ValueError(
      f"expected bins and usable tokens, got {bins} and {len(ids)}"
    )
  bin_of = np.empty(len(ids), np.int64)
  order = np.argsort(rarity[ids], kind="stable")
  bin_of[order] = np.arange(len(ids)) * bins // len(ids)
  found, number = np.full(len(usable), -1, np.int32), 0
  for name in np.unique(script[ids]):
    own = script[ids] == name
    if own.sum() < LEAST:
      continue
    for group in _joined(np.bincount(bin_of[own])):
      found[ids[own & np.isin(bin_of, group)]] = number
      number += 1
  found[usable & (found < 0)] = number
  return found


def fit(unit: np.ndarray, strata: np.ndarray) -> Null:
  """Moments of the cosine of different tokens drawn at random from strata.

  From the mean μ_s and the second moments M_s of each stratum: u_a·μ_s is the
  mean cosine of a with it, and tr(M_s M_t) the mean square for two of them.

  Args:
    unit: float32 [V, D], of `embeddings`.
    strata: int [V], of `strata`.

  Raises:
    ValueError: other shapes, or strata without tokens.
  """
  _check(unit, strata)
  size = np.bincount(strata[strata >= 0])
  if not len(size) or not size.all():
    raise ValueError(
      f"expected tokens in every stratum, got {size.tolist()}; number strata "
      "from 0, without gaps"
    )
  width = unit.shape[1]
  means = np.empty((len(size), width))
  second = np.empty((len(size), width, width))
  for s in range(len(size)):
    rows = unit[strata == s]
    means[s] = rows.mean(0, dtype=np.float64)
    second[s] = rows.T @ rows
    second[s] /= len(rows)
  flat, own = second.reshape(len(size), -1), strata >= 0
  cosines = (unit @ means.T.astype(np.float32))[own]
  squares = np.einsum("vd,vd->v", unit, unit)[own]
  return Null.fit(cosines, flat @ flat.T, squares, strata[own])


def score(
  tokens,
  unit: np.ndarray,
  strata: np.ndarray,
  null: Null,
  *,
  draws: int = 20_000,
  seed: int = 0,
) -> Coherence:
  """Mean cosine of sets of tokens, beside random sets of the same strata.

  Neither these nor the moments behind z repeat a token, see `Null`.

  Args:
    tokens: int [n, m], different ids in a row, -1 for none.
    unit: float32 [V, D], of `embeddings`.
    strata: int [V], of `strata`.
    null: of `fit`, of the same tokens.
    draws: random sets, for all rows together.
    seed: of the random sets.

  Raises:
    ValueError: other shapes, ids without a stratum, or twice in a row.
  """
  _check(unit, strata)
  tokens = np.asarray(tokens)
  if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
    raise ValueError(
      f"expected whole numbers [n, m], got {tokens.dtype} {tokens.shape}"
    )
  tokens = tokens.astype(np.int64)
  if tokens.max(initial=-1) >= len(strata):
    raise ValueError(
      f"expected ids below V = {len(strata)}, got {tokens.max()}; pass the "
      "embeddings of the same vocabulary"
    )
  sets = np.where(tokens < 0, -1, strata[tokens])
  outside, twice = (tokens >= 0) & (sets < 0), repeats(tokens)
  if outside.any() or twice.any():
    raise ValueError(
      "expected different tokens that have a stratum, got "
      f"{outside.sum()} without and {twice.sum()} rows that repeat one; put -1 "
      "in their place"
    )
  squares = np.einsum("vd,vd->v", unit, unit)
  value = _mean_cosine(tokens, unit, squares)
  z, p = null.compare(
    value,
    sets,
    strata,
    lambda drawn: _mean_cosine(drawn, unit, squares),
    draws=draws,
    seed=seed,
  )
  return Coherence(value, z, p)


def _mean_cosine(tokens, unit, squares) -> np.ndarray:
  """(|Σu|² - Σ|u|²) / (m (m - 1)) of each row; NaN of fewer than 3 tokens."""
  there = tokens >= 0
  found = -np.where(there, squares[tokens], 0).sum(1, dtype=np.float64)
  for start in range(0, len(tokens), CHUNK):
    some = slice(start, start + CHUNK)
    rows = unit[tokens[some]]
    rows[~there[some]] = 0
    total = rows.sum(1)
    found[some] += np.einsum("nd,nd->n", total, total)
  members = there.sum(1)
  return found / np.where(members > 2, members * (members - 1), np.nan)


def _joined(counts: np.ndarray) -> list[list[int]]:
  """Bins in groups of neighbours that have `LEAST` tokens each."""
  groups = [[b] for b in np.flatnonzero(counts).tolist()]
  while len(groups) > 1:
    sizes = [counts[group].sum() for group in groups]
    small = int(np.argmin(sizes))
    if sizes[small] >= LEAST:
      break
    gaps = [b[0] - a[-1] for a, b in itertools.pairwise(groups)]
    beside = [i for i in (small - 1, small) if 0 <= i < len(gaps)]
    left = min(beside, key=gaps.__getitem__)
    groups[left] += groups.pop(left + 1)
  return groups


def _check(unit: np.ndarray, strata: np.ndarray):
  if unit.ndim != 2 or strata.shape != unit.shape[:1]:
    raise ValueError(
      "expected embeddings [V, D] and for each of the V tokens a stratum, got "
      f"{unit.shape} and {strata.shape}"
    )
