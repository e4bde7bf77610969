"""Trained dictionaries side by side on the same held-out text.

  python -m launch.run --config=configs/evaluate.py \\
    --config.dictionaries="('runs/gemma3_sae','runs/other')"

Paths are workdirs of ours, or files of SAELens, Gemma Scope,
dictionary_learning, sparsify, circuit-tracer. `:smoke` evaluates what
`configs/gemma3_sae.py:smoke` left in runs/gemma3_sae.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import base


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is "" or "smoke"."""
  run = base.get_config()
  smoke = base.check(arg)
  if smoke:
    base.smoke(run, "random:gemma3-tiny")
  c = ConfigDict()
  c.job = "studies.evaluate"
  c.dictionaries = ("runs/gemma3_sae",)
  c.format = placeholder(str)
  c.model = run.model
  c.model.name = None
  c.mesh = run.mesh
  c.data = run.data
  c.data.context = 64 if smoke else 256
  c.data.train_tokens = 20_000 if smoke else 262_144
  c.activations = ConfigDict()
  c.activations.dtype = "bfloat16"
  c.activations.batch_size = placeholder(int)
  c.eval = ConfigDict()
  c.eval.batch_size = placeholder(int)
  c.eval.splice_tokens = 2_000 if smoke else 32_768
  c.eval.splice_batch_size = 4
  c.eval.probe_tokens = 4_000 if smoke else 16_384
  c.eval.probe_seeds = 5
  c.eval.explained = 10 if smoke else 100
  return c
