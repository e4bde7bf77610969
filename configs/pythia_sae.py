"""A JumpReLU SAE on the residual stream of Pythia 410M after layer 12.

  python -m launch.run --config=configs/pythia_sae.py
  python -m launch.run --config=configs/pythia_sae.py:smoke

M = 16,384, thresholds trained towards L0 = 40.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is "" or "smoke"."""
  c = base.get_config()
  c.model.name = "EleutherAI/pythia-410m"
  c.layer = 12
  c.dictionary.activation = "jumprelu"
  c.recipe.learning_rate = 1e-3
  c.recipe.dead_after = 1_000_000
  if base.check(arg):
    base.smoke(c, "random:neox-tiny")
    c.recipe.learning_rate = 4e-3
  return c
