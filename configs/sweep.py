"""L0 against FVU: six BatchTopK SAEs on one stream of activations.

  pip install -e '.[demo]'
  python -m launch.run --config=configs/sweep.py
  python -m launch.run --config=configs/sweep.py:smoke

Gemma 3 270M, residual stream after layer 9, M = 4,096; every combination of
`sweep` is a member. One pass over the activations trains them all; a table and
a Pareto plot come out.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is "" or "smoke"."""
  c = base.gemma3_270m()
  c.dictionary.width = 4_096
  c.sweep.k = (16.0, 32.0, 64.0)
  c.sweep.seed = (0, 1)
  c.train.steps = 600
  c.train.batch_size = 1_024
  c.eval.splice_tokens = 4_096
  if base.check(arg):
    base.smoke(c, "random:gemma3-tiny")
    c.sweep.k = (6.0, 12.0)
  return c
