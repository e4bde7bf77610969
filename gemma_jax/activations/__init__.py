"""Activations: harvest, store, statistics, normalisation, streams."""

from gemma_jax.activations.capture import fitting_batch
from gemma_jax.activations.harvest import harvest, store_path
from gemma_jax.activations.joined import Joined, owner
from gemma_jax.activations.layout import DTYPES
from gemma_jax.activations.live import ModelStream
from gemma_jax.activations.merge import merge
from gemma_jax.activations.normalise import Normalisation, fit
from gemma_jax.activations.repair import repair, verify
from gemma_jax.activations.statistics import Statistics, measure
from gemma_jax.activations.store import ActivationStore, is_complete
from gemma_jax.activations.stream import Stream
from gemma_jax.activations.tokens import TokenMeans, token_means
from gemma_jax.activations.writer import Writer

__all__ = [
  "DTYPES",
  "ActivationStore",
  "Joined",
  "ModelStream",
  "Normalisation",
  "Statistics",
  "Stream",
  "TokenMeans",
  "Writer",
  "fit",
  "fitting_batch",
  "harvest",
  "is_complete",
  "measure",
  "merge",
  "owner",
  "repair",
  "store_path",
  "token_means",
  "verify",
]
