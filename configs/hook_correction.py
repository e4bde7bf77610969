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

  c.run = run = base.gemma3_270m()
  run.dictionary.width = 4_096
  run.dictionary.k = 32.0
  run.train.steps = 600
  run.train.batch_size = 1_024
  run.eval.splice_tokens = 8_192
  if base.check(arg):
    base.smoke(run, "random:gemma3-tiny")
    c.seeds = (0, 1)
  return c
