"""Forward passes of Gemma 2 and 3, with named sites."""

from gemma_jax.models.config import PRESETS, ModelConfig
from gemma_jax.models.forward import forward, unembed
from gemma_jax.models.model import (
  Model,
  describe,
  load_model,
  load_tokenizer,
  read_config,
  resolve,
)
from gemma_jax.models.sharding import make_mesh
from gemma_jax.models.sites import Splice

__all__ = [
  "PRESETS",
  "Model",
  "ModelConfig",
  "Splice",
  "describe",
  "forward",
  "load_model",
  "load_tokenizer",
  "make_mesh",
  "read_config",
  "resolve",
  "unembed",
]
