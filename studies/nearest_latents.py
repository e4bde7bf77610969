"""Which latents of a dictionary say what a cluster says."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma_jax.clustering import Quantiser
from gemma_jax.dictionaries import Dictionary
from studies import evaluate
from studies.codes import Code


def nearest_latents(
  found: Sequence[Code],
  quantisers: Mapping[str, Quantiser],
  members: Mapping[str, Dictionary],
  x: np.ndarray,
) -> list[dict[str, Any]]:
  """For every k-means the latents of every dictionary nearest to a cluster.

  By direction: cosine of the decoder's row with the centroid less the mean of
  the centroids. By activity: correlation of firing with membership. Each
  beside the same for a shuffled partner.

  Args:
    found: codes, those of `quantisers` and `members` among them.
    quantisers: k-means by name.
    members: dictionaries by name.
    x: held-out rows, float32 [N, D].
  """
  rng = np.random.default_rng(0)
  by_name = {code.name: code for code in found}
  fires = {
    name: evaluate.sparse_latents(by_name[name].latents, x) > 0
    for name in members
  }
  out = []
  for name, q in quantisers.items():
    centroids = np.asarray(q.centroids[0])
    ways = _unit(centroids - centroids.mean(0))
    inside = evaluate.sparse_latents(by_name[name].latents, x) > 0
    dealt = inside[rng.permutation(len(x))]
    for sae, d in members.items():
      rows = _unit(np.asarray(d.params["W_dec"]))
      cosines = ways @ rows.T
      turned = ways[:, rng.permutation(ways.shape[1])] @ rows.T
      together = _correlations(inside, fires[sae])
      apart = _correlations(dealt, fires[sae])
      out.append(
        {
          "clusters": name,
          "dictionary": sae,
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


def _unit(rows: np.ndarray) -> np.ndarray:
  return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


def _correlations(a, b) -> np.ndarray:
  """Pearson between the columns of two Boolean CSR [R, C], [R, M]."""
  count = a.shape[0]
  both = (a.astype(np.float32).T @ b.astype(np.float32)).toarray() / count
  p, q = (np.asarray(m.sum(0)).ravel() / count for m in (a, b))
  spread = np.sqrt(np.outer(p * (1 - p), q * (1 - q)))
  return (both - np.outer(p, q)) / np.maximum(spread, 1e-30)
