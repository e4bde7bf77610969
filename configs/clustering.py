"""What every clustering run is asked; other configs change a few lines of it.

`trainers/clustering.py` says what each field means.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import base


def get_config() -> ConfigDict:
  run = base.get_config()
  c = ConfigDict()
  c.job = "trainers.clustering"
  for name in ("seed", "layer", "model", "mesh", "data"):
    c[name] = run[name]

  c.activations = ConfigDict()
  for name in ("read", "dtype", "batch_size"):
    c.activations[name] = run.activations[name]

  c.cluster = ConfigDict()
  c.cluster.method = "kmeans"
  c.cluster.counts = (256,)
  c.cluster.stages = 1
  c.cluster.rank = 0
  c.cluster.init = "k-means++"
  c.cluster.max_iter = 25
  c.cluster.tol = 1e-4
  c.cluster.minibatch = placeholder(int)
  c.cluster.normalise = "none"
  c.cluster.shrinkage = 0.0
  c.cluster.power = 1.0

  c.train = ConfigDict({"checkpoint_every": 5})

  c.eval = ConfigDict()
  c.eval.splice_tokens = 4_096
  c.eval.splice_batch_size = 4
  c.eval.silhouette_rows = 2_000
  c.eval.stability_seeds = 0
  c.eval.gap_draws = 0
  c.eval.contexts = 8
  c.eval.clusters = 20
  return c


def smoke(c: ConfigDict, model: str) -> None:
  """Shrinks a config to a tiny random model."""
  run = base.get_config()
  base.smoke(run, model)
  for name in ("layer", "model", "mesh", "data"):
    c[name] = run[name]
  c.cluster.counts = (16, 48)
  c.cluster.max_iter = 6
  c.train.checkpoint_every = 2
  c.eval.splice_tokens = 1_000
  c.eval.silhouette_rows = 200
  c.eval.stability_seeds = 2
  c.eval.gap_draws = 2
  c.eval.contexts = 4
  c.eval.clusters = 5
