"""Activations: harvest, store, stream."""

from gemma_jax.activations.harvest import harvest, is_complete, store_path
from gemma_jax.activations.store import ActivationStore, Writer
from gemma_jax.activations.stream import Stream

__all__ = [
  "ActivationStore",
  "Stream",
  "Writer",
  "harvest",
  "is_complete",
  "store_path",
]
