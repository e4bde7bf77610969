"""A Matryoshka transcoder on layer 8 of Gemma 2 2B, on the GPUs of one host.

  python -m launch.run --config=configs/gemma2b_transcoder.py
  python -m launch.run --config=configs/gemma2b_transcoder.py:smoke

M = 36,864 in groups of 1x, 2x, 4x and 9x the model's width, k = 96, bfloat16
activations and products, latents split over the devices. `--dry_run` prints
what it costs. `:smoke` is a tiny random Gemma 2 on the same code path; it ends
in under a minute on a CPU.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is "" or "smoke"."""
  c = base.gemma2b()
  c.layer = 8
  c.activations.read = "blocks.{layer}.mlp_in"
  c.activations.write = "blocks.{layer}.mlp_out"
  c.dictionary.matryoshka = True
  c.dictionary.skip = True
  if base.check(arg):
    base.gemma2_smoke(c)
  return c
