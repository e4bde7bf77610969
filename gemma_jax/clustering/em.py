"""Fits Gaussian mixtures by EM over blocks of rows.

Responsibilities exist for one block only; sums over blocks are compensated.
MPPCA: Tipping and Bishop 1999, "Mixtures of probabilistic principal component
analysers", Neural Computation 11.
"""

import contextlib
import dataclasses
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.clustering import gaussian, lloyd
from gemma_jax.clustering.mixture import (
  Mixture,
  factors,
  log_joint,
  terms_about,
)
from gemma_jax.clustering.rows import Blocks, Rows, as_rows
from gemma_jax.progress import bar

log = logging.getLogger("gemma_jax")

# Effective rows of a component; at 1, rounding would take away the one row
# that a component owns.
LEAST_ROWS = 0.99

_nearest = jax.jit(lloyd.nearest)


class _Sums(NamedTuple):
  """Sums over centred rows, weighted by their responsibilities."""

  rows: jax.Array  # [C]
  x: jax.Array  # [C, D]
  square: jax.Array  # of each dim, [C, D]
  xy: jax.Array  # x y^T with y = A^T (x - mean), [C, D, r]


def _add(total, lost, part):
  """Kahan's sum: what rounding took from `total` comes back in `lost`."""
  part = jax.tree.map(jnp.subtract, part, lost)
  new = jax.tree.map(jnp.add, total, part)
  lost = jax.tree.map(lambda n, t, p: (n - t) - p, new, total, part)
  return new, lost


@jax.jit
def _step(total, lost, x, valid, terms, labels):
  """Sums with one block more; log-likelihoods [B]. Labels None: soft."""
  joint, y = log_joint(x, terms)
  likelihood = jax.nn.logsumexp(joint, axis=1)
  if labels is None:
    share = jnp.exp(joint - likelihood[:, None])
  else:
    share = jax.nn.one_hot(labels, joint.shape[1])
  share = jnp.where(valid[:, None], share, 0)
  with jax.default_matmul_precision("highest"):
    part = _Sums(
      share.sum(0),
      share.T @ x,
      share.T @ (x * x),
      jnp.einsum("bcr,bd->cdr", share[:, :, None] * y, x),
    )
  return *_add(total, lost, part), likelihood


def _expect(mixture, blocks: Blocks, centre, count, labels=None):
  """One pass: sums in float64, log-likelihoods [N].

  Args:
    labels: (first row, x) -> components [B] to which rows belong wholly;
      None: responsibilities.
  """
  terms = terms_about(mixture, centre)
  shapes = terms.constant, terms.linear, terms.linear, terms.directions
  total = lost = _Sums(*map(jnp.zeros_like, shapes))
  found = []
  for start, x, valid in blocks:
    given = None if labels is None else labels(start, x)
    total, lost, likelihood = _step(total, lost, x, valid, terms, given)
    found.append(np.asarray(likelihood))
  total, lost = (
    _Sums(*(np.asarray(a, np.float64) for a in side)) for side in (total, lost)
  )
  sums = _Sums(*map(np.subtract, total, lost))
  return sums, np.concatenate(found)[:count]


def _maximise(old: Mixture, sums: _Sums, centre, least: float) -> Mixture:
  """The M step; noise stays above `least`.

  At rank > 0 in two stages (MPPCA, appendix C): weights and means, then W and
  noise about the new means, from S A and not from the covariance S. In the
  second the covariance of the factors is a parameter, too, which then moves
  into W (PX-EM: Liu, Rubin and Wu 1998, "Parameter expansion to accelerate
  EM", Biometrika 85): without, the length of W takes hundreds of iterations
  where the noise is small. With u = L^T z, whose posterior has mean A^T (x -
  mean) and covariance I, E[u u^T] = I + A^T S A = F F^T and W = S A F^-T.
  Then W W^T + noise has the trace of S.
  """
  # A component without rows becomes anything finite: it is seeded again.
  rows = np.maximum(sums.rows, np.finfo(np.float32).tiny)[:, None]
  means = sums.x / rows
  directions, _ = factors(old)
  y = np.einsum("cd,cdr->cr", means - (old.means - centre), directions)
  covered = sums.xy / rows[:, :, None] - means[:, :, None] * y[:, None]  # S A
  inner, axes = np.linalg.eigh(directions.mT @ covered + np.eye(old.rank))
  # Below 1 it is rounding.
  loadings = covered @ (axes / np.sqrt(np.maximum(inner, 1))[:, None])
  noise = sums.square / rows - means**2 - np.sum(loadings**2, axis=2)
  if old.rank:
    noise = noise.mean(1, keepdims=True)
  return Mixture(
    sums.rows / sums.rows.sum(),
    means + centre,
    np.maximum(noise, least),
    loadings,
  )


def _seed_again(mixture, start, held, likelihood, rows: Rows) -> bool:
  """Moves components that lost their rows to the least likely rows, in place.

  Args:
    start: whose noise and loadings they take.
    held: effective rows of each component, [C].
    likelihood: of each row, [N].

  Returns:
    Whether there were any.
  """
  (starved,) = np.nonzero(held < LEAST_ROWS)
  if not len(starved):
    return False
  worst = np.argsort(likelihood, kind="stable")[: len(starved)]
  for component, row in zip(starved, worst, strict=True):
    log.warning(
      "mixture: component %d holds %.2g rows; it starts again at row %d, the "
      "least likely",
      component,
      held[component],
      row,
    )
    mixture.weights[component] = 1 / len(likelihood)
    mixture.means[component] = rows.read(row, row + 1)[0]
    mixture.noise[component] = start.noise[component]
    mixture.loadings[component] = start.loadings[component]
  mixture.weights[:] /= mixture.weights.sum()
  return True


def _checked(rows: Rows, centroids, labels, rank: int):
  n, width = len(rows), rows.width
  centroids = np.asarray(centroids, np.float64)
  if centroids.ndim != 2 or centroids.shape[1] != width or not len(centroids):
    raise ValueError(
      f"Expected centroids [C, D] with D = {width}, got {centroids.shape}."
    )
  clusters = len(centroids)
  if clusters > n:
    raise ValueError(
      f"{clusters} components of {n} rows: ask for at most as many as rows."
    )
  if not np.isfinite(centroids).all():
    raise FloatingPointError("The centroids are not all finite.")
  if not 0 <= rank < width:
    raise ValueError(
      f"rank={rank}: expected at least 0 and less than the {width} dims."
    )
  if labels is None:
    return centroids, None
  labels = np.asarray(labels)
  if labels.shape != (n,) or not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(
      f"Expected labels as whole numbers [N], N = {n}; got {labels.dtype} "
      f"{labels.shape}."
    )
  if labels.min() < 0 or labels.max() >= clusters:
    raise ValueError(
      f"Labels go from {labels.min()} to {labels.max()}; expected 0 to "
      f"{clusters - 1}, one number for each centroid."
    )
  return centroids, labels


def fit_mixture(
  rows,
  centroids,
  labels=None,
  *,
  rank: int = 0,
  max_iter: int = 50,
  tol: float = 1e-4,
  floor: float = 1e-3,
  seed: int = 0,
  block: int = gaussian.BLOCK,
  progress: bool = True,
) -> Mixture:
  """Fits a mixture by EM, from clusters of the rows.

  It starts at the weights, means and noise of the clusters; each W from
  random directions, of which one product with the cluster's covariance has
  been taken. No iteration lowers the likelihood, but for rounding and for
  those (named in the log) after which a component that holds no row is seeded
  again at the least likely row.

  Args:
    rows: [N, D], or `Rows`.
    centroids: [C, D], of k-means.
    labels: whole numbers [N], the cluster of each row; None: the nearest
      centroid.
    rank: r, columns of each W; 0: diagonal covariances.
    max_iter: iterations, at most.
    tol: it has converged when the mean log-likelihood rises by less than this
      times its size.
    floor: least noise of a dim, times the mean variance of all rows. It also
      bounds what rounding does: about 1e-7 / floor nats per dim, and for a row
      far from the mean as much more as its square is larger.
    seed: of the random directions.
    block: B, rows whose responsibilities exist at once.
    progress: whether to show a bar.

  Raises:
    ValueError: shapes that do not go together, more components than rows, a
      rank that is not less than D, rows that do not differ.
    FloatingPointError: rows or centroids that are not finite, or rows too
      large for float32 to square; names the first row.
  """
  if max_iter < 1 or not tol >= 0 or not floor > 0 or block < 1:
    raise ValueError(
      f"Expected max_iter and block >= 1, tol >= 0 and floor > 0; got "
      f"{max_iter}, {block}, {tol} and {floor}."
    )
  rows = as_rows(rows)
  n = len(rows)
  centroids, labels = _checked(rows, centroids, labels, rank)
  mean, variance, constant = gaussian.moments(rows)
  scale = variance.mean()
  least = floor * scale
  if constant.any():
    log.warning(
      "mixture: dims %s are constant; their variance is floored at %.3g",
      np.flatnonzero(constant).tolist(),
      least,
    )
  centre = mean.astype(np.float32)
  blocks = gaussian.blocks(rows, centre, block)

  noise = np.full(1, scale) if rank else np.maximum(variance, least)
  draws = np.random.default_rng(seed).normal(size=(rows.width, rank))
  loadings = np.sqrt(scale) * np.linalg.qr(draws)[0]
  clusters = len(centroids)
  start = Mixture(
    np.full(clusters, 1 / clusters),
    centroids,
    np.tile(noise, (clusters, 1)),
    np.tile(loadings, (clusters, 1, 1)),
  )
  if labels is None:
    near = jnp.asarray(centroids - centre, jnp.float32)

    def given(first, x):
      return _nearest(x, near)
  else:
    filled = np.pad(labels, (0, blocks.size))  # the last block is, too

    def given(first, x):
      return filled[first : first + len(x)]

  mixture, history, converged = start, [], False
  sums, likelihood = _expect(mixture, blocks, centre, n, given)
  name = f"mixture, C = {clusters}, rank {rank}"
  with (
    bar(max_iter, name, unit="iterations")
    if progress
    else contextlib.nullcontext()
  ) as shown:
    for iteration in range(max_iter + 1):
      mixture = _maximise(mixture, sums, centre, least)
      seeded = _seed_again(mixture, start, sums.rows, likelihood, rows)
      sums, likelihood = _expect(mixture, blocks, centre, n)
      history.append(float(likelihood.mean(dtype=np.float64)))
      if iteration == 0:  # the start
        continue
      if shown is not None:
        shown.update(1)
        shown.set_postfix(nats=f"{history[-1]:.5g}", refresh=False)
      rise = history[-1] - history[-2]
      if not seeded and rise < tol * abs(history[-1]):
        converged = True
        break
  return dataclasses.replace(
    mixture, history=np.asarray(history), converged=converged
  )
