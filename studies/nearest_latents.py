"""Which latents of a dictionary say what a cluster says."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from studies import evaluate
from studies.codes import Code

MOST = 1_024  # clusters


def nearest_latents(
  found: Sequence[Code], x: np.ndarray
) -> list[dict[str, Any]]:
  """For every k-means the latents of every dictionary nearest to a cluster.

  By direction: cosine of the decoder's row with the centroid less the mean of
  the centroids. By activity: correlation of firing with membership. Each
  beside the same for a shuffled partner.

  Args:
    found: codes; of k-means those of at most `MOST` clusters are looked at.
    x: held-out rows, float32 [N, D].
  """
  rng = np.random.default_rng(0)
  saes = [
    (code, _unit(np.asarray(code.origin.params["W_dec"])), _active(code, x))
    for code in found
    if code.kind == "dictionary"
  ]
  out = []
  for code in found:
    if code.kind != "kmeans" or code.origin.clusters > MOST:
      continue
    centroids = np.asarray(code.origin.centroids[0])
    ways = _unit(centroids - centroids.mean(0))
    inside = _active(code, x)
    dealt = inside[rng.permutation(len(x))]
    for sae, rows, fires in saes:
      cosines = ways @ rows.T
      turned = ways[:, rng.permutation(ways.shape[1])] @ rows.T
      together = _correlations(inside, fires)
      apart = _correlations(dealt, fires)
      out.append(
        {
          "clusters": code.name,
          "dictionary": sae.name,
          "cosine_median": float(np.median(cosines.max(1))),
          "cosine_null": float(np.median(turned.max(1))),
          "correlation_median": float(np.median(together.max(1))),
          "correlation_null": float(np.median(apart.max(1))),
          "same_latent": float(
            np.mean(cosines.argmax(1) == together.argmax(1))
          ),
          "latent_by_cosine": cosines.argmax(1).tolist(),
          "latent_by_correlation": together.argmax(1).tolist(),
        }
      )
  return out


def _active(code: Code, x: np.ndarray):
  """Which latents are, Boolean CSR [N, M]."""
  return evaluate.sparse_latents(code.latents, x) > 0


def _unit(rows: np.ndarray) -> np.ndarray:
  return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


def _correlations(a, b) -> np.ndarray:
  """Pearson between the columns of two Boolean CSR [R, C], [R, M]."""
  count = a.shape[0]
  both = (a.astype(np.float32).T @ b.astype(np.float32)).toarray() / count
  p, q = (np.asarray(m.sum(0)).ravel() / count for m in (a, b))
  spread = np.sqrt(np.outer(p * (1 - p), q * (1 - q)))
  return (both - np.outer(p, q)) / np.maximum(spread, 1e-30)
