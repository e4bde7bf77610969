"""Concept vectors: what single directions write, and what depends on them."""

from gemma_jax.concepts.projection import (
  Projection,
  Readout,
  project,
  project_directions,
  readout,
  value_vectors,
)

__all__ = [
  "Projection",
  "Readout",
  "project",
  "project_directions",
  "readout",
  "value_vectors",
]
