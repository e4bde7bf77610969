"""k-means of Gemma 3 270M's residual stream after layer 9, C = 64 to 4,096.

pip install -e '.[demo]'
python -m launch.run --config=configs/gemma3_270m_clustering.py
python -m launch.run --config=configs/gemma3_270m_clustering.py:smoke
"""

from configs import base, clustering


def get_config(arg: str = ""):
  """`arg` is "" or "smoke"."""
  c = clustering.get_config()
  run = base.gemma3_270m()
  for name in ("layer", "model", "data"):
    c[name] = run[name]
  c.activations.batch_size = 8
  c.eval.stability_seeds = 3
  c.eval.gap_draws = 3
  c.cluster.counts = (64, 256, 1_024, 4_096)
  if base.check(arg):
    clustering.smoke(c, "random:gemma3-tiny")
  return c
