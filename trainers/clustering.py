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
  seeding,
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
from trainers.dictionary_plan import FIELDS as RUN

log = logging.getLogger("gemma_jax")

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
  "inertia": "Mean squared distance of a training row, in its coordinates.",
  "log_likelihood": (
    "Of a mixture, held-out, in its coordinates, nats per row or dim; and what "
    "it is over a single Gaussian, full or diagonal. Its numbers as a "
    "quantiser are those of its means."
  ),
  "seconds_train": "Clustering alone: neither harvest nor evaluation.",
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
  if wrong or not own["counts"]:
    raise ValueError(
      f"cluster.counts={own['counts']}: expected numbers of clusters from 1 to "
      f"the {most} tokens of data.train_tokens."
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
  if own["normalise"] not in activations.normalise.KINDS:
    raise ValueError(
      f"cluster.normalise={own['normalise']!r}; expected one of "
      f"{', '.join(activations.normalise.KINDS)}."
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
  fields.compare(workdir, config)
  if (workdir / "results.json").exists():
    log.info("%s is finished; nothing to do", workdir)
    return json.loads((workdir / "results.json").read_text())
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
  members, trained = [], {}
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
        "seconds_train": _seconds(here),
        "host_memory_peak": loop.memory()["host_memory_peak"],
      }
    )
    if density is not None:
      density.save(here / "mixture.safetensors")
      there = StoredRows(stored["heldout"], site, coordinates)
      baselines = gaussian_baselines(rows)
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


def _seconds(directory: pathlib.Path) -> float:
  """Of all stages, first centroids included and interruptions left out."""
  found = directory.glob("stage*/kmeans.json")
  return sum(json.loads(path.read_text())["seconds"] for path in found)


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
  count, batch_size = stores.splice_sample(windows, config["eval"], model.mesh)

  def spliced(quantiser, x, y):
    return quantiser.reconstruct(x).astype(y.dtype)

  return metrics.splice_losses(
    model,
    windows.tokens[:count],
    windows.mask[:count],
    {
      **{name: Partial(spliced, q) for name, q in trained.items()},
      **metrics.ablations(mean),
    },
    read=site,
    write=site,
    batch_size=batch_size,
    document=windows.document[:count],
  ).summary()
