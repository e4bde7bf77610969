"""A skip transcoder on the MLP of layer 6 of GPT-2.

  python -m launch.run --config=configs/gpt2_transcoder.py
  python -m launch.run --config=configs/gpt2_transcoder.py:smoke

M = 12,288, k = 32.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is "" or "smoke"."""
  c = base.get_config()
  c.model.name = "openai-community/gpt2"
  c.layer = 6
  c.activations.read = "blocks.{layer}.mlp_in"
  c.activations.write = "blocks.{layer}.mlp_out"
  c.dictionary.skip = True
  c.recipe.learning_rate = 2e-3
  c.recipe.dead_after = 1_000_000
  if base.check(arg):
    base.smoke(c, "random:gpt2-tiny")
    c.recipe.learning_rate = 4e-3
  return c
