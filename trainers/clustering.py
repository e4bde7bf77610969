"""Clusterings of a site: k-means, quantisers, Gaussian mixtures.

  text -> tokens -> site -> store -> clusters -> held-out numbers -> page

`run(config, workdir)` goes all the way; each stage is cached or resumed, so
the same command goes on after an interruption.
"""

import itertools
import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.tree_util import Partial

from gemma_jax import activations, machine, metrics, models
from gemma_jax.clustering import (
  agreement,
  evaluate,
  gap,
  indices,
  kmeans,
  quantise,
)
from gemma_jax.clustering.em import fit_mixture
from gemma_jax.clustering.gaussian import gaussian_baselines
from gemma_jax.clustering.mixture import held_out
from gemma_jax.clustering.rows import StoredRows
from gemma_jax.metrics import faithfulness
from gemma_jax.models import sites
from gemma_jax.report import clustering as report
from trainers import dictionary, fields, loop, stores
from trainers.clustering_fit import fit
from trainers.clustering_plan import SAMPLE, name, plan, prepare

__all__ = ["name", "plan", "prepare", "run"]

log = logging.getLogger("gemma_jax")

DEFINITIONS = {
  **evaluate.DEFINITIONS,
  **{f"splice.{n}": text for n, text in faithfulness.DEFINITIONS.items()},
  **{f"tokens.{n}": text for n, text in agreement.DEFINITIONS.items()},
  "stability": (
    "Adjusted mutual information of the clusters of one sample of at most "
    f"{SAMPLE} training rows from several seeds: 0 is chance, 1 the same."
  ),
  "gap_permuted": "Gap statistic of the sample; null: every dim dealt alone.",
  "gap_gaussian": "The same; null: a Gaussian of the same covariance.",
  "inertia": (
    "Mean squared distance of a training row from what stands for it, in its "
    "coordinates; of a mixture, from the k-means it began with."
  ),
  "log_likelihood": (
    "Of a mixture, held-out, in its coordinates, nats per row or dim; and what "
    "it is over a single Gaussian, full or diagonal. Its numbers as a "
    "quantiser are those of its means."
  ),
  "seconds_train": "k-means alone: neither harvest nor evaluation.",
}


def run(config: Mapping[str, Any], workdir: str | pathlib.Path) -> dict:
  """Clusters and evaluates; see the module's docstring.

  Args:
    config: with exactly the fields of `FIELDS`.
    workdir: where everything of this run goes.

  Returns:
    The contents of results.json.
  """
  workdir = pathlib.Path(workdir)
  config = json.loads(json.dumps(dict(config)))
  prepare(config)
  if (found := fields.finished(workdir, config)) is not None:
    return found
  # ------------------------------------------------------- text and tokens
  directory = models.resolve(config["model"]["name"])
  site, about = prepare(config, models.read_config(directory))
  streams = stores.windows(config["data"], directory, about)
  mesh = models.make_mesh(config["mesh"])
  if (config["cluster"]["minibatch"] or 0) % mesh.size:
    raise ValueError(
      f"cluster.minibatch={config['cluster']['minibatch']}: expected a "
      f"multiple of the {mesh.size} devices."
    )
  dtype = stores.default_dtype(config["model"]["dtype"])
  # ----------------------------------------------------------- activations
  stored = stores.harvest(
    streams,
    directory,
    (site,),
    config["activations"],
    mesh=mesh,
    dtype=dtype,
    depth=sites.last_layer((site,), about),
  )
  own = config["cluster"]
  statistics = activations.measure(
    stored["train"],
    site,
    covariance=own["normalise"] in activations.normalise.WHITENING,
  )
  coordinates = activations.fit(
    statistics,
    own["normalise"],
    shrinkage=own["shrinkage"],
    power=own["power"],
  )
  rows = StoredRows(
    stored["train"], site, coordinates if own["normalise"] != "none" else None
  )
  fields.claim(workdir, config)
  # ------------------------------------------------------------ clustering
  members, trained, baselines = [], {}, None
  for k in own["counts"]:
    here = place(workdir, name(own, k))
    machine.reset_peak_memory()
    quantiser, density = _quantiser(config, rows, coordinates, k, here, mesh)
    quantiser.save(here / "quantiser")
    trained[name(own, k)] = quantiser
    members.append(
      {
        "name": name(own, k),
        "clusters": k,
        "stages": quantiser.stages,
        **_training(here, own["method"], len(rows)),
        "host_memory_peak": loop.memory()["host_memory_peak"],
      }
    )
    if density is not None:
      density.save(here / "mixture.safetensors")
      there = StoredRows(stored["heldout"], site, coordinates)
      baselines = baselines or gaussian_baselines(rows)
      members[-1]["log_likelihood"] = held_out(density, there, baselines)
  # ------------------------------------------------------------ evaluation
  measured = {}
  for member in members:
    q = trained[member["name"]]
    numbers, clusters = evaluate.evaluate(
      q,
      stored["heldout"],
      site,
      statistics.mean,
      top=config["eval"]["contexts"],
    )
    measured[member["name"]] = clusters
    member |= numbers | _indices(config, stored["heldout"], site, clusters)
    if own["method"] == "kmeans":
      member |= _again(config, rows, member["clusters"])
  windows = streams["heldout"].collect()
  model = models.load_model(directory, dtype=dtype, mesh=mesh)
  if config["eval"]["splice_tokens"]:
    spliced = _splice(config, model, site, trained, statistics.mean, windows)
    for member in members:
      full = spliced[member["name"]]
      member |= {
        "ce_clean": spliced["clean"]["ce"],
        "delta_ce": full["delta_ce"],
        "ce_recovered": full["ce_recovered"]["zero"]["value"],
        "kl": full["kl"],
        "splice": full,
      }
  results = {
    "model": config["model"]["name"],
    "site": site,
    "method": own["method"],
    "members": members,
    "tokens_train": len(stored["train"]),
    "tokens_heldout": len(stored["heldout"]),
    "dtypes": {
      "model": dtype,
      "store": config["activations"]["dtype"],
      "distances": "float32, sums compensated or float64",
    },
    "seeds": {"cluster": config["seed"], "data": config["data"]["seed"]},
    "stores": {side: str(store.path) for side, store in stored.items()},
    "definitions": DEFINITIONS,
    "versions": dictionary.versions(),
  }
  page = report.write(
    workdir,
    results=results,
    config=config,
    clusters=report.clusters(
      trained[members[-1]["name"]],
      measured[members[-1]["name"]],
      stored["heldout"],
      windows,
      model,
      count=config["eval"]["clusters"],
    ),
  )
  fields.write_json(workdir / "results.json", results)
  log.info("report: %s", page)
  return results


def place(workdir: pathlib.Path, member: str) -> pathlib.Path:
  """Where a member's clustering goes."""
  return workdir / "members" / member


def _quantiser(config, rows, coordinates, k, directory, mesh):
  """A member, from its checkpoints as far as they go, and its density."""
  own, numbers = config["cluster"], itertools.count()

  def one(rows, k, *, seed):
    return fit(
      rows,
      k,
      directory / f"stage{next(numbers)}",
      seed=seed,
      spherical=own["method"] == "spherical",
      checkpoint_every=config["train"]["checkpoint_every"],
      mesh=mesh,
      **{n: own[n] for n in ("init", "max_iter", "tol", "minibatch")},
    )

  several = {"residual": quantise.fit_residual, "product": quantise.fit_product}
  if own["method"] in several:
    found = several[own["method"]](
      rows,
      k,
      own["stages"],
      coordinates=coordinates,
      seed=config["seed"],
      fit=one,
    )
    return found, None
  found, density = one(rows, k, seed=config["seed"]), None
  centroids = found.centroids
  if own["method"] == "mixture":
    density = fit_mixture(
      rows,
      centroids,
      found.labels,
      rank=own["rank"],
      max_iter=own["max_iter"],
      seed=config["seed"],
    )
    centroids = density.means.astype(np.float32)
  spherical = own["method"] == "spherical"
  return (
    quantise.of_centroids(centroids, coordinates, spherical=spherical),
    density,
  )


def _training(directory: pathlib.Path, method: str, rows: int) -> dict:
  """Seconds of all stages, first centroids included, and what they left."""
  found = [
    json.loads((directory / f"stage{i}" / "kmeans.json").read_text())
    for i in range(len([*directory.glob("stage*")]))
  ]
  inertias = [stage["inertia"] / rows for stage in found]
  return {
    "seconds_train": sum(stage["seconds"] for stage in found),
    "inertia": inertias[-1] if method == "residual" else sum(inertias),
  }


def _indices(config, store, site, clusters) -> dict[str, Any]:
  """Of the first stage: how it cuts space, and what it says of tokens."""
  labels = clusters.codes[:, 0]
  out: dict[str, Any] = {
    "tokens": agreement.token_information(
      labels, store.read(0, len(store), "token"), seed=config["seed"]
    )
  }
  count = min(config["eval"]["silhouette_rows"], len(store))
  if count and len(np.unique(labels)) > 1:
    x = np.asarray(store.read(0, len(store), site), np.float32)
    documents = store.read(0, len(store), "document")
    score = indices.sampled_silhouette(
      x, labels, samples=count, documents=documents, seed=config["seed"]
    )
    out["silhouette"] = score.value
    out["silhouette_interval"] = score.interval
    out["davies_bouldin"] = indices.davies_bouldin(x, labels)
    out["calinski_harabasz"] = indices.calinski_harabasz(x, labels)
  return out


def _again(config, rows, k) -> dict[str, Any]:
  """What other seeds and rows without clusters would give, on a sample."""
  own, out = config["eval"], {}
  rng = np.random.default_rng(config["seed"])
  count = min(len(rows), SAMPLE)
  x = rows.take(np.sort(rng.choice(len(rows), count, replace=False)))
  options = {"init": config["cluster"]["init"], "max_iter": 10}
  if own["stability_seeds"]:
    found = agreement.stability(
      [
        kmeans(x, k, seed=seed, **options).labels
        for seed in range(own["stability_seeds"])
      ]
    )
    out["stability"] = {"ami": found.mean, "ami_sd": found.sd}
  for null in gap.NULLS if own["gap_draws"] else ():
    found = gap.gap_statistic(
      x,
      lambda rows: kmeans(rows, k, **options).inertia,
      null=null,
      draws=own["gap_draws"],
      seed=config["seed"],
    )
    out[f"gap_{null}"] = {
      "value": found.gap,
      "standard_error": found.standard_error,
    }
  return out


def _splice(config, model, site, trained, mean, windows):
  """What the model loses with each member in the site's place."""

  def spliced(quantiser, x, y):
    return quantiser.reconstruct(x).astype(y.dtype)

  return stores.splice(
    model,
    windows,
    config["eval"],
    {
      **{name: Partial(spliced, q) for name, q in trained.items()},
      **metrics.ablations(mean),
    },
    read=site,
    write=site,
  ).summary()
