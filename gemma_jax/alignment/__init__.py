"""Tokens, activations and latents of two models, brought together."""

from gemma_jax.alignment.controls import shuffled
from gemma_jax.alignment.correlations import Correlations
from gemma_jax.alignment.hypernetwork import Route, SiteScale
from gemma_jax.alignment.lookups import fit_lookup, fit_position
from gemma_jax.alignment.maps import (
  Map,
  fit_cca,
  fit_mean,
  fit_procrustes,
  fit_reduced_rank,
  fit_ridge,
)
from gemma_jax.alignment.matching import match as match_features
from gemma_jax.alignment.matching import significance
from gemma_jax.alignment.moments import Moments
from gemma_jax.alignment.objective import CodeStatistics, code_statistics
from gemma_jax.alignment.paired import Paired, pair_stores
from gemma_jax.alignment.pairing import pair_by_byte_end, pair_windows
from gemma_jax.alignment.pooling import pool_spans
from gemma_jax.alignment.scores import Scores

__all__ = [
  "CodeStatistics",
  "Correlations",
  "Map",
  "Moments",
  "Paired",
  "Route",
  "Scores",
  "SiteScale",
  "code_statistics",
  "fit_cca",
  "fit_lookup",
  "fit_mean",
  "fit_position",
  "fit_procrustes",
  "fit_reduced_rank",
  "fit_ridge",
  "match_features",
  "pair_by_byte_end",
  "pair_stores",
  "pair_windows",
  "pool_spans",
  "shuffled",
  "significance",
]
