"""Concept vectors in the MLPs of Gemma 3 270M: found, scored, damaged.

  pip install -e '.[demo]'
  python -m launch.run --config=configs/concept_vectors.py
  python -m launch.run --config=configs/concept_vectors.py:smoke
  python -m launch.run --config=configs/concept_vectors.py:gemma3_1b

All 36,864 value vectors are projected to the vocabulary and scored without a
language model as a judge; the 60 likeliest are damaged on prompts that the text
holds, beside neurons, random directions and prompts that should not matter.
"gemma3_1b" takes Gemma 3 1B from the hub, on a GPU.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import base


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is "", "gemma3_1b" or "smoke"."""
  c = ConfigDict()
  c.job = "studies.concepts"
  c.seed = 0
  c.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
  run = base.gemma3_270m()
  c.model = ConfigDict({"name": run.model.name, "dtype": placeholder(str)})
  c.data = run.data
  c.data.context = 128
  c.data.packing = "document"
  c.data.heldout_fraction = 0.5
  c.data.document_tokens = placeholder(int)
  c.data.train_tokens = 65_536
  c.data.heldout_tokens = 1_000_000
  c.lexicons = ()

  c.project = ConfigDict()
  c.project.layers = ()
  c.project.max_vectors = 0
  c.project.top_k = 50
  c.project.null = 400

  c.usage = ConfigDict()
  c.usage.contexts = 10
  c.usage.batch_size = 8

  c.score = ConfigDict()
  c.score.tokens = 10
  c.score.threshold = 0.75
  c.score.keep = 300

  c.damage = ConfigDict()
  c.damage.max_vectors = 60
  c.damage.random = 30
  c.damage.prompts = 24
  c.damage.least = 10
  c.damage.context = 32
  c.damage.pool = 512
  c.damage.general = 16
  c.damage.controls = 3
  c.damage.alpha = 0.05
  c.damage.draws = 9_999
  c.damage.matrix = 20
  c.damage.matrix_prompts = 8
  c.damage.dose_vectors = 6
  c.damage.factors = (1.0, 0.5, 0.0, -1.0, -2.0)
  c.damage.noise = (0.25, 0.5, 1.0, 2.0)
  c.damage.noise_seeds = 8

  if arg == "gemma3_1b":
    c.model.name = "google/gemma-3-1b-pt"
    c.model.dtype = "bfloat16"
    c.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1})
    c.usage.batch_size = 64
  elif base.check(arg):
    _smoke(c)
  return c


def _smoke(c: ConfigDict) -> None:
  """The same model, since a random one has no words; a part of a layer."""
  c.data.train_tokens = 8_192
  c.data.heldout_tokens = 131_072
  c.project.layers = (12,)
  c.project.max_vectors = 400
  c.project.null = 100
  c.score.keep = 20
  c.damage.max_vectors = 6
  c.damage.random = 2
  c.damage.prompts = 12
  c.damage.least = 6
  c.damage.pool = 64
  c.damage.general = 4
  c.damage.draws = 999
  c.damage.matrix = 3
  c.damage.matrix_prompts = 3
  c.damage.dose_vectors = 1
  c.damage.factors = (1.0, 0.0)
  c.damage.noise = (1.0,)
  c.damage.noise_seeds = 2
