"""What a clustering run is asked, checked before any work."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma_jax import activations, models
from gemma_jax.clustering import seeding
from gemma_jax.models import sites
from trainers import fields
from trainers.dictionary_plan import FIELDS as RUN

SAMPLE = 16_384  # rows that are clustered again
METHODS = ("kmeans", "spherical", "residual", "product", "mixture")
FIELDS = {
  "job": str,
  "seed": int,  # of the first centroids and of mini-batches
  "layer": RUN["layer"],
  "model": RUN["model"],
  "mesh": RUN["mesh"],
  "data": RUN["data"],
  "activations": {
    "read": str,
    "dtype": RUN["activations"]["dtype"],
    "batch_size": RUN["activations"]["batch_size"],
  },
  "cluster": {
    "method": str,  # one of METHODS
    "counts": (list, tuple),  # C: one member for each
    "stages": int,  # S of "residual" and "product"
    "rank": int,  # of the covariances of "mixture"; 0: diagonal
    "init": str,  # see gemma_jax.clustering.kmeans
    "max_iter": int,
    "tol": float,
    "minibatch": (int, type(None)),  # rows; None: Lloyd's algorithm
    "normalise": str,  # one of activations.normalise.KINDS
    "shrinkage": (float, str),
    "power": float,
  },
  "train": {"checkpoint_every": int},  # iterations
  "eval": {
    "splice_tokens": int,  # 0: none
    "splice_batch_size": int,
    "silhouette_rows": int,  # held-out rows of the exact silhouette; 0: none
    "stability_seeds": int,  # of clusterings of a sample; 0: none
    "gap_draws": int,  # of each null of the gap statistic; 0: none
    "contexts": int,  # of each cluster on the page
    "clusters": int,  # on the page
  },
}


def plan(config: Mapping[str, Any]) -> dict[str, Any]:
  """What would be done, for `--dry_run`."""
  config = json.loads(json.dumps(dict(config)))
  site, about = prepare(config)
  own = config["cluster"]
  return {
    "model": f"{about.family}, {about.num_layers} layers",
    "site": site,
    "members": {
      name(own, k): {"bits": own["stages"] * float(np.log2(k))}
      for k in own["counts"]
    },
  }


def name(own: Mapping[str, Any], clusters: int) -> str:
  """Of a member."""
  stages = f"x{own['stages']}" if own["stages"] > 1 else ""
  return f"{own['method']}{clusters}{stages}"


def prepare(config: Mapping[str, Any], about: models.ModelConfig | None = None):
  """The site and the model's config, checked.

  Raises:
    ValueError: unknown fields or values that do not fit; a site that the
      model does not have.
  """
  fields.check(config, FIELDS)
  own = config["cluster"]
  if own["method"] not in METHODS:
    raise ValueError(
      f"cluster.method={own['method']!r}; expected one of {', '.join(METHODS)}."
    )
  several = own["method"] in ("residual", "product")
  if own["stages"] < 1 or (own["stages"] > 1 and not several):
    raise ValueError(
      f"cluster.stages={own['stages']} with cluster.method={own['method']!r}: "
      "expected 1, or at least 1 with 'residual' or 'product'."
    )
  most = config["data"]["train_tokens"]
  wrong = [
    k for k in own["counts"] if not isinstance(k, int) or not 1 <= k <= most
  ]
  if wrong or not 0 < len(own["counts"]) == len(set(own["counts"])):
    raise ValueError(
      f"cluster.counts={own['counts']}: expected different numbers of clusters "
      f"from 1 to the {most} tokens of data.train_tokens."
    )
  if own["rank"] < 0 or (own["rank"] and own["method"] != "mixture"):
    raise ValueError(
      f"cluster.rank={own['rank']} with cluster.method={own['method']!r}: "
      "expected 0, or more with 'mixture'."
    )
  if config["eval"]["stability_seeds"] == 1:
    raise ValueError("eval.stability_seeds=1: expected 0, or 2 to compare.")
  again = config["eval"]["stability_seeds"] or config["eval"]["gap_draws"]
  if again and 4 * max(own["counts"]) > SAMPLE:
    raise ValueError(
      f"eval.stability_seeds and eval.gap_draws cluster {SAMPLE} rows again, "
      f"and cluster.counts has {max(own['counts'])}. Set both to 0, or ask for "
      f"at most {SAMPLE // 4} clusters."
    )
  if own["max_iter"] < 1 or config["train"]["checkpoint_every"] < 1:
    raise ValueError(
      "cluster.max_iter and train.checkpoint_every must be at least 1."
    )
  if own["minibatch"] is not None and not 1 <= own["minibatch"] <= most:
    raise ValueError(
      f"cluster.minibatch={own['minibatch']}: expected null, or rows from 1 to "
      f"the {most} tokens of data.train_tokens."
    )
  if own["init"] not in (*seeding.KINDS, "bisecting") or not own["tol"] >= 0:
    raise ValueError(
      f"cluster.init={own['init']!r}, cluster.tol={own['tol']}: expected one "
      f"of {', '.join(seeding.KINDS)}, bisecting; and at least 0."
    )
  activations.normalise.check(
    own["normalise"], shrinkage=own["shrinkage"], power=own["power"]
  )
  about = about or models.describe(config["model"]["name"])
  site = config["activations"]["read"].format(layer=config["layer"])
  width = sites.width(site, about)
  if own["method"] == "product" and width % own["stages"]:
    raise ValueError(
      f"cluster.stages={own['stages']} parts of the {width} dims of {site}: "
      "they must be equal."
    )
  return str(sites.parse(site, about)), about
