"""Clustering: k-means and its kin, quantisers, mixtures, indices."""

from gemma_jax.clustering.em import fit_mixture
from gemma_jax.clustering.kmeans import KMeans, kmeans
from gemma_jax.clustering.mixture import Mixture
from gemma_jax.clustering.quantise import Quantiser, fit_product, fit_residual

__all__ = [
  "KMeans",
  "Mixture",
  "Quantiser",
  "fit_mixture",
  "fit_product",
  "fit_residual",
  "kmeans",
]
