"""Forward passes of Gemma 2 and 3, GPT-2, Pythia and Llama; named sites."""

from gemma_jax.models import edits, perturb, reduce
from gemma_jax.models.config import ModelConfig
from gemma_jax.models.edits import PerLayer, Splice
from gemma_jax.models.families import PRESETS
from gemma_jax.models.forward import forward, site_gradients
from gemma_jax.models.head import unembed
from gemma_jax.models.model import Model, load_model
from gemma_jax.models.sharding import make_mesh
from gemma_jax.models.sources import (
  DEMO,
  describe,
  load_tokenizer,
  read_config,
  resolve,
)

__all__ = [
  "DEMO",
  "PRESETS",
  "Model",
  "ModelConfig",
  "PerLayer",
  "Splice",
  "describe",
  "edits",
  "forward",
  "load_model",
  "load_tokenizer",
  "make_mesh",
  "perturb",
  "read_config",
  "reduce",
  "resolve",
  "site_gradients",
  "unembed",
]
