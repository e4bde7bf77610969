"""A BatchTopK SAE on the residual stream of Gemma 2 2B after layer 12.

  python -m launch.run --config=configs/gemma2b_sae.py
  python -m launch.run --config=configs/gemma2b_sae.py:smoke

M = 36,864, k = 96, bfloat16, latents split over the GPUs of one host.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is "" or "smoke"."""
  c = base.get_config()
  c.model.name = "google/gemma-2-2b"
  c.model.dtype = "bfloat16"
  c.layer = 12
  c.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1})
  c.recipe.learning_rate = 1e-3
  c.recipe.aux_k = 256
  c.recipe.aux_candidates = 2048
  c.recipe.dead_after = 1_000_000
  c.recipe.products = "bfloat16"
  c.train.mesh = ConfigDict({"member": 1, "data": 1, "latent": -1})
  if base.check(arg):
    base.smoke(c, "random:gemma2-tiny")
    c.recipe.products = "float32"
    c.recipe.learning_rate = 4e-3
  return c
