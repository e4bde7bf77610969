"""Tokens, activations and latents of two models, brought together."""

from gemma_jax.alignment.controls import shuffled
from gemma_jax.alignment.lookups import fit_lookup, fit_position
from gemma_jax.alignment.maps import (
  Map,
  fit_cca,
  fit_mean,
  fit_procrustes,
  fit_reduced_rank,
  fit_ridge,
)
from gemma_jax.alignment.matching import Correlations, significance
from gemma_jax.alignment.matching import match as match_features
from gemma_jax.alignment.moments import Moments
from gemma_jax.alignment.pairing import pair_by_byte_end, pair_windows
from gemma_jax.alignment.scores import Scores

__all__ = [
  "Correlations",
  "Map",
  "Moments",
  "Scores",
  "fit_cca",
  "fit_lookup",
  "fit_mean",
  "fit_position",
  "fit_procrustes",
  "fit_reduced_rank",
  "fit_ridge",
  "match_features",
  "pair_by_byte_end",
  "pair_windows",
  "shuffled",
  "significance",
]
