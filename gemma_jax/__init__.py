"""Interpretability at scale for Gemma, in JAX.

Dimension letters, the same in every einsum, annotation and docstring:

  B batch            T position          S key position     D residual width
  N query heads      K key-value heads   G = N / K          H head width
  F MLP neurons      V vocabulary        L layers           M latents
  P token pairs      C clusters          W windows         R rotated dims of H
"""

__version__ = "0.1.0"


def load_model(
  path_or_name, *, dtype=None, mesh=None, layers=None, attention="auto"
):
  """See `gemma_jax.models.load_model`; imported on first use."""
  from gemma_jax import models

  return models.load_model(
    path_or_name, dtype=dtype, mesh=mesh, layers=layers, attention=attention
  )
