"""A BatchTopK SAE on the residual stream of Gemma 2 2B after layer 12.

  python -m launch.run --config=configs/gemma2b_sae.py
  python -m launch.run --config=configs/gemma2b_sae.py:smoke

M = 36,864, k = 96, bfloat16, latents split over the GPUs of one host.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is "" or "smoke"."""
  c = base.gemma2b()
  c.layer = 12
  if base.check(arg):
    base.gemma2_smoke(c)
  return c
