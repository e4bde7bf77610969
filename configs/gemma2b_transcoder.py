"""A Matryoshka transcoder on layer 8 of Gemma 2 2B, on the GPUs of one host.

  python -m launch.run --config=configs/gemma2b_transcoder.py
  python -m launch.run --config=configs/gemma2b_transcoder.py:smoke

M = 36,864 in groups of 1x, 2x, 4x and 9x the model's width, k = 96, bfloat16
activations, parameters split over the devices. `--dry_run` prints what it
costs. `:smoke` is a tiny random Gemma 2 on the same code path; it ends in
under a minute on a CPU.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is "" or "smoke"."""
  if arg not in ("", "smoke"):
    raise ValueError(f"Unknown argument {arg!r}; expected 'smoke' or nothing.")
  c = ConfigDict()
  c.job = "trainers.dictionary"
  c.seed = 0
  c.track = ()

  c.model = ConfigDict()
  c.model.name = "google/gemma-2-2b"
  c.model.dtype = "bfloat16"

  c.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1})

  c.data = ConfigDict()
  c.data.corpus = ConfigDict({"kind": "builtin"})
  c.data.seed = 0
  c.data.heldout_fraction = 0.1
  c.data.context = 1024
  c.data.packing = "packed"
  c.data.bos = "both"
  c.data.stride = None
  c.data.allocation = "equal"
  c.data.document_tokens = None
  c.data.train_tokens = 4_000_000
  c.data.heldout_tokens = 262_144

  c.activations = ConfigDict()
  c.activations.read = "blocks.8.mlp_in"
  c.activations.write = "blocks.8.mlp_out"
  c.activations.dtype = "bfloat16"
  c.activations.batch_size = None
  c.activations.buffer_rows = 2**20

  c.dictionary = ConfigDict()
  c.dictionary.width = 36_864
  c.dictionary.activation = "batchtopk"
  c.dictionary.k = 96.0
  c.dictionary.prefix_widths = ()
  c.dictionary.group_sizes = (2304, 4608, 9216, 20736)
  c.dictionary.skip = True
  c.dictionary.aux_k = 256
  c.dictionary.aux_candidates = 2048
  c.dictionary.aux_coefficient = 1 / 32
  c.dictionary.dead_after = 1_000_000
  c.dictionary.threshold_decay = 0.99

  c.train = ConfigDict()
  c.train.steps = 20_000
  c.train.batch_size = 4_096
  c.train.learning_rate = 1e-3
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
  c.train.log_every = 50
  c.train.checkpoint_every = 1_000
  c.train.keep = 3

  c.eval = ConfigDict()
  c.eval.splice_tokens = 65_536
  c.eval.splice_batch_size = 8
  c.eval.latents = 20
  c.eval.contexts = 8

  if arg == "smoke":
    c.model.name = "random:gemma2-tiny"
    c.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    c.data.context = 64
    c.data.train_tokens = 20_000
    c.data.heldout_tokens = 4_000
    c.activations.read = "blocks.2.mlp_in"
    c.activations.write = "blocks.2.mlp_out"
    c.activations.buffer_rows = 2**13  # smaller than the store
    c.dictionary.width = 768
    c.dictionary.k = 12.0
    c.dictionary.group_sizes = (48, 96, 192, 432)
    c.dictionary.aux_k = 16
    c.dictionary.aux_candidates = 64
    c.dictionary.dead_after = 4_000
    c.train.steps = 60
    c.train.batch_size = 512
    c.train.log_every = 10
    c.train.checkpoint_every = 20
    c.eval.splice_tokens = 2_000
    c.eval.latents = 5
    c.eval.contexts = 4
  return c
