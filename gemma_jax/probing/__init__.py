"""Dictionary evaluation that needs only text: no downloads, API or judge."""

from gemma_jax.probing.absorption import measure_absorption
from gemma_jax.probing.explain import explain_latents, explain_with_baselines
from gemma_jax.probing.labels import Labels, label
from gemma_jax.probing.noise import reseeded
from gemma_jax.probing.sparse import probe

__all__ = [
  "Labels",
  "explain_latents",
  "explain_with_baselines",
  "label",
  "measure_absorption",
  "probe",
  "reseeded",
]
