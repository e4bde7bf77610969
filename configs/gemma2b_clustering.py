"""k-means of Gemma 2 2B's residual stream after layer 12, C = 256 to 16,384.

  python -m launch.run --config=configs/gemma2b_clustering.py
  python -m launch.run --config=configs/gemma2b_clustering.py:smoke

In whitened coordinates, reported in raw ones: Euclidean k-means of the raw
stream is decided by a few massive dims.
"""

from configs import base, clustering


def get_config(arg: str = ""):
  """`arg` is "" or "smoke"."""
  c = clustering.get_config()
  run = base.gemma2b()
  for name in ("model", "mesh", "data"):
    c[name] = run[name]
  c.layer = 12
  c.cluster.counts = (256, 1_024, 4_096, 16_384)
  c.cluster.init = "bisecting"
  c.cluster.normalise = "zca"
  c.cluster.shrinkage = 1e-5
  if base.check(arg):
    clustering.smoke(c, "random:gemma2-tiny")
  return c
