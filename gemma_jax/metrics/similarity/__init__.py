"""Similarity of two models: of rows, codes, distributions and texts.

Every score has a chance level that is not 0; `calibrate` shows it.
"""

from gemma_jax.metrics.similarity.calibration import (
  Calibration,
  LayerCalibration,
  calibrate,
  calibrate_layers,
  permute_kernel,
  permute_neighbours,
  permute_rows,
)
from gemma_jax.metrics.similarity.cca import (
  canonical_correlations,
  pwcca,
  svcca,
)
from gemma_jax.metrics.similarity.cka import (
  StreamedCKA,
  kernel_cka,
  linear_cka,
  minibatch_cka,
)
from gemma_jax.metrics.similarity.distributions import (
  hellinger,
  jsd,
  kl,
  rbo,
  top1_agreement,
  topk_overlap,
)
from gemma_jax.metrics.similarity.geometry import (
  NoiseCeiling,
  cosine,
  procrustes_distance,
  rsa,
  rsa_noise_ceiling,
)
from gemma_jax.metrics.similarity.neighbours import (
  cknna,
  mutual_knn,
  nearest_neighbours,
  neighbour_overlap,
)
from gemma_jax.metrics.similarity.sets import (
  code_cosine,
  frequency_null,
  jaccard,
  ruzicka,
  token_overlaps,
)
from gemma_jax.metrics.similarity.text import (
  bits_per_byte,
  chrf,
  cross_likelihood,
  edit_ratio,
  rouge_l,
)

__all__ = [
  "Calibration",
  "LayerCalibration",
  "NoiseCeiling",
  "StreamedCKA",
  "bits_per_byte",
  "calibrate",
  "calibrate_layers",
  "canonical_correlations",
  "chrf",
  "cknna",
  "code_cosine",
  "cosine",
  "cross_likelihood",
  "edit_ratio",
  "frequency_null",
  "hellinger",
  "jaccard",
  "jsd",
  "kernel_cka",
  "kl",
  "linear_cka",
  "minibatch_cka",
  "mutual_knn",
  "nearest_neighbours",
  "neighbour_overlap",
  "permute_kernel",
  "permute_neighbours",
  "permute_rows",
  "procrustes_distance",
  "pwcca",
  "rbo",
  "rouge_l",
  "rsa",
  "rsa_noise_ceiling",
  "ruzicka",
  "svcca",
  "token_overlaps",
  "top1_agreement",
  "topk_overlap",
]
