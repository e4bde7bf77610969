"""Clustering: k-means and its kin, quantisers, mixtures, indices."""

from gemma_jax.clustering.kmeans import KMeans, kmeans
from gemma_jax.clustering.quantise import Quantiser, fit_product, fit_residual

__all__ = ["KMeans", "Quantiser", "fit_product", "fit_residual", "kmeans"]
