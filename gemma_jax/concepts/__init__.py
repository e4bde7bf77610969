"""Concept vectors: what single directions write, and what depends on them.

`projection` reads directions in the vocabulary, `scoring` says which are about
something, `usage` where a model uses them, and `damage` what it loses without.
"""

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
