"""Clusterings against SAEs on Gemma 3 270M's residual stream after layer 9.

  pip install -e '.[demo]'
  python -m launch.run --config=configs/clusters_vs_sae.py
  python -m launch.run --config=configs/clusters_vs_sae.py:smoke

k-means with 64 to 16,384 clusters, residual and product quantisers, principal
components, lookups by token, and three SAEs, on the same tokens: FVU, delta CE
and interpretability at equal bits, parameters and FLOPs.
"""

from ml_collections import ConfigDict

from configs import base, clustering


def get_config(arg: str = "") -> ConfigDict:
  """`arg` is "" or "smoke"."""
  c = ConfigDict()
  c.job = "studies.clusters_vs_sae"

  c.run = run = base.gemma3_270m()
  run.data.train_tokens = 184_320
  run.data.heldout_tokens = 16_384
  run.dictionary.width = 8_192
  run.dictionary.k = 32.0
  run.sweep.k = (8.0, 32.0, 64.0)
  run.train.steps = 400
  run.train.batch_size = 1_024
  run.eval.splice_tokens = 256
  run.eval.splice_batch_size = 1
  run.eval.latents = 5

  def clusters(**changes) -> ConfigDict:
    own = clustering.get_config().cluster
    own.update(changes)
    return own

  c.clusterings = ConfigDict()
  c.clusterings.kmeans = clusters(
    counts=(64, 128, 256, 512, 1_024, 2_048), max_iter=15
  )
  c.clusterings.large = clusters(
    counts=(4_096, 8_192, 16_384), init="bisecting", max_iter=3
  )
  c.clusterings.spherical = clusters(
    method="spherical", counts=(256, 2_048), max_iter=15
  )
  c.clusterings.residual = clusters(
    method="residual", counts=(256,), stages=64, init="random", max_iter=8
  )
  for parts in (4, 16, 64):
    c.clusterings[f"product{parts}"] = clusters(
      method="product", counts=(256,), stages=parts, init="random", max_iter=8
    )
  c.prefixes = (2, 4, 8, 16, 32, 64)
  c.components = (1, 4, 16, 64, 256)
  c.lookup_clusters = 256

  c.eval = ConfigDict()
  c.eval.splice_tokens = 1_000
  c.eval.splice_batch_size = 2
  c.eval.explained = 40
  c.eval.probe_seeds = 5

  if base.check(arg):
    base.smoke(run, "random:gemma3-tiny")
    run.sweep.k = (6.0, 12.0)
    c.clusterings = ConfigDict()
    c.clusterings.kmeans = clusters(counts=(16, 64), max_iter=5)
    c.clusterings.large = clusters(counts=(128,), init="bisecting", max_iter=2)
    c.clusterings.residual = clusters(
      method="residual", counts=(16,), stages=4, max_iter=4
    )
    c.clusterings.product = clusters(
      method="product", counts=(16,), stages=4, max_iter=4
    )
    c.prefixes = (2, 4)
    c.components = (2, 8)
    c.lookup_clusters = 16
    c.eval.splice_tokens = 1_000
    c.eval.explained = 5
  return c
