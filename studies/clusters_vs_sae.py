"""Clusterings against sparse dictionaries, at equal budgets.

Both say of an activation which few of many vectors it is made of. A cluster
of 256 is 8 bits, an SAE with 32 of 8,192 latents active several hundred: they
can only be compared at equal bits, equal parameters or equal FLOPs. This
study measures all of them on one site and the same held-out tokens: what they
explain (FVU), what the model loses when they stand in the site's place (delta
CE), and how well short rules on tokens say when a latent or cluster is active.
"""

import json
import logging
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gemma_jax import (
  activations,
  dictionaries,
  machine,
  metrics,
  models,
  probing,
  tables,
)
from gemma_jax.activations import ActivationStore
from gemma_jax.clustering import Quantiser, kmeans
from gemma_jax.clustering.quantise import of_centroids
from gemma_jax.clustering.rows import ArrayRows
from gemma_jax.dictionaries import linear
from gemma_jax.metrics import document_interval, faithfulness, rates
from gemma_jax.metrics.intervals import DocumentSums
from gemma_jax.probing import explain, noise
from gemma_jax.report import rates as report
from studies import budgets, codes, evaluate, jobs
from studies.codes import Code
from studies.nearest_latents import nearest_latents
from trainers import clustering, dictionary, fields, stores

log = logging.getLogger("gemma_jax")

FIELDS = {
  "job": str,
  "run": fields.Free,  # of trainers.dictionary: an SAE, or a sweep of them
  # name -> `cluster` of trainers.clustering; the rest is taken from `run`.
  "clusterings": fields.Free,
  "prefixes": (list, tuple),  # stages of residual quantisers that are codes
  "components": (list, tuple),  # ranks of the principal components
  "lookup_clusters": int,  # C of what is left of the lookup by token; 0: none
  "eval": {
    "splice_tokens": int,
    "splice_batch_size": int,
    "explained": int,  # latents or clusters of each code; 0: none
    "probe_seeds": int,  # at least 5
  },
}
SAMPLE = 4_096  # training rows on which the bits of a value are measured
BLOCK = 2_048  # rows at once
MOST_NEAREST = 1_024  # clusters whose nearest latents are sought
COLUMNS = (
  "name",
  "bits",
  "parameters",
  "encode_flops",
  "fvu",
  "delta_ce",
  "kl",
  "auroc",
  "seconds_train",
  "encode_tokens_per_second",
)
VERSUS = ("dictionary", "budget", "rival", "measure", "ours", "theirs")
VERSUS += ("difference", "low", "high", "better")
DEFINITIONS = {
  "bits": (
    "Bits per token at fixed length. k-means log2 C; quantisers S log2 C; "
    "dictionaries log2 C(M, L0) + L0 x the bits of a value; components r x "
    "those; the lookup log2 of the tokens seen."
  ),
  "value_bits": (
    "Fewest bits per value, in equal steps to the largest of its latent, that "
    "raise the squared error by under 1 %."
  ),
  "bits_entropy": (
    "The same with the support coded at the entropy of independent latents, "
    "or labels at their entropy."
  ),
  "parameters": "Numbers in encoder, decoder, centroids or table.",
  "encode_flops": "Products of the encoder, per token.",
  "fvu": "Held-out squared error over variance; as are fvu_low and fvu_high.",
  "fvu_bound": "Least FVU of a Gaussian source at these bits.",
  "fvu_shuffled": "FVU of the reconstructions dealt to other tokens.",
  **{n: faithfulness.DEFINITIONS[n] for n in ("delta_ce", "kl")},
  "auroc": explain.DEFINITIONS["auroc"] + " Mean over latents, over seeds.",
  "auroc_mdd": noise.DEFINITIONS["mdd"],
  "auroc_random": "auroc of random directions that are active as often.",
  "auroc_shuffled": "auroc of the latents, dealt to other tokens.",
  "seconds_train": "Fitting alone: neither harvest nor evaluation.",
  "encode_tokens_per_second": "Reconstructing blocks of held-out rows.",
  "nearest_latents": (
    "Medians over clusters of the largest cosine of a decoder's row with the "
    "centroid (less their mean), and of the largest correlation of a latent's "
    "firing with membership; beside shuffled dims, or tokens."
  ),
  "host_memory_peak": "Bytes of this process while fitting, at most.",
  "difference": (
    "Theirs less ours, with a 95 % bootstrap interval over documents; of "
    "auroc, where the minimum detectable difference stands for it."
  ),
}


def plan(config: Mapping[str, Any]) -> dict[str, Any]:
  """What would be done, for `--dry_run`."""
  run, clusterings = prepare(config)
  return {
    "dictionaries": dictionary.plan(run),
    **{name: clustering.plan(c) for name, c in clusterings.items()},
  }


def prepare(config: Mapping[str, Any]):
  """Checked configs of `trainers.dictionary` and of each clustering.

  Raises:
    ValueError: what those refuse; a transcoder; numbers that do not fit.
  """
  fields.check(config, FIELDS)
  own = config["eval"]
  if own["explained"] and own["probe_seeds"] < noise.LEAST:
    raise ValueError(
      f"eval.probe_seeds={own['probe_seeds']} must be at least {noise.LEAST}; "
      "eval.explained=0 leaves interpretability out."
    )
  run = jobs.changed(config["run"], {})
  read, write = run["activations"]["read"], run["activations"]["write"]
  if read != write or not isinstance(read, str):
    raise ValueError(
      f"run.activations reads {read!r} and writes {write!r}: clusterings are "
      "of one site, so give an SAE of one site."
    )
  dictionary.prepare(run)
  clusterings = {
    name: {
      "job": "trainers.clustering",
      **{n: run[n] for n in ("seed", "layer", "model", "mesh", "data")},
      "activations": {
        n: run["activations"][n] for n in ("read", "dtype", "batch_size")
      },
      "cluster": jobs.changed(group, {}),
      "train": {"checkpoint_every": 5},
      "eval": {
        "splice_tokens": 0,
        "splice_batch_size": own["splice_batch_size"],
        "silhouette_rows": 1_000,
        "stability_seeds": 0,
        "gap_draws": 0,
        "contexts": 8,
        "clusters": 10,
      },
    }
    for name, group in config["clusterings"].items()
  }
  for one in clusterings.values():
    clustering.prepare(one)
  return run, clusterings


def run(config: Mapping[str, Any], workdir: str | pathlib.Path) -> dict:
  """Trains all, measures all, compares; writes results, tables, plots, a page.

  Args:
    config: with exactly the fields of `FIELDS`.
    workdir: every training goes into a directory of its own.

  Returns:
    The contents of results.json.
  """
  workdir = pathlib.Path(workdir)
  config = json.loads(json.dumps(dict(config)))
  sae, clusterings = prepare(config)
  fields.claim(workdir, config)
  # -------------------------------------------------------------- trainings
  machine.reset_peak_memory()
  members = jobs.train(sae, workdir / "dictionaries")
  clustered = {
    name: clustering.run(one, workdir / name)
    for name, one in clusterings.items()
  }
  store = {
    side: ActivationStore.open(members[0]["stores"][side])
    for side in ("train", "heldout")
  }
  site = members[0]["sites"][0]
  directory = models.resolve(sae["model"]["name"])
  about = models.read_config(directory)
  found, moments = _codes(
    config, members, clustered, workdir, store["train"], site, about
  )
  # -------------------------------------------------------------- held-out
  windows = stores.windows(sae["data"], directory, about)["heldout"].collect()
  model = models.load_model(
    directory,
    dtype=stores.default_dtype(sae["model"]["dtype"]),
    mesh=models.make_mesh(sae["mesh"]),
  )
  with jax.default_matmul_precision("highest"):
    rows, sums = _explained_variance(found, store["heldout"], site, moments)
    losses = _splice(config, model, found, site, moments, windows)
    summary = losses.summary()
    scores = _interpreted(config, model, found, store["heldout"], site, windows)
  for row in rows:
    full = summary[row["name"]]
    row |= {
      "delta_ce": full["delta_ce"],
      "delta_ce_interval": full["delta_ce_interval"],
      "kl": full["kl"],
      **scores.get(row["name"], {}),
    }
  duels = budgets.versus(found, rows, sums, losses)
  nearest = nearest_latents(
    found,
    *_pairs(members, clustered, workdir),
    np.asarray(
      store["heldout"].read(0, len(store["heldout"]), site), np.float32
    ),
  )
  results = {
    "model": sae["model"]["name"],
    "site": site,
    "rows": rows,
    "versus": duels,
    "answers": budgets.answers(duels),
    "nearest_latents": nearest,
    "ce_clean": summary["clean"]["ce"],
    "ablations": {n: summary[n]["delta_ce"] for n in metrics.ABLATIONS},
    "tokens_train": len(store["train"]),
    "tokens_heldout": len(store["heldout"]),
    "tokens_splice": summary["clean"]["tokens"],
    "documents_heldout": len(sums["all"]),
    "seeds": {"train": sae["seed"], "data": sae["data"]["seed"]},
    "definitions": DEFINITIONS,
    "versions": dictionary.versions(),
  }
  log.info("\n%s", tables.aligned(rows, COLUMNS))
  log.info("\n%s", "\n".join(results["answers"]))
  (workdir / "table.md").write_text(
    tables.markdown(rows, COLUMNS) + "\n" + tables.markdown(duels, VERSUS)
  )
  report.write(
    workdir,
    results=results,
    config=config,
    eigenvalues=np.linalg.eigvalsh(moments.covariance),
  )
  fields.write_json(workdir / "results.json", results)
  return results


def _codes(config, members, clustered, workdir, store, site, about):
  """Everything that is compared, and the moments of the training rows."""
  moments, _ = linear.fit(store, site, site)
  rng = np.random.default_rng(0)
  chosen = np.sort(rng.choice(len(store), min(SAMPLE, len(store)), False))
  sample = np.asarray(store.take(chosen, site), np.float32)
  found: list[Code] = []
  for member in members:
    spent = member["tokens_train"] / member["tokens_per_second_train"]
    found.append(
      codes.of_dictionary(
        _name(member),
        dictionaries.load(member["path"]),
        sample,
        seconds_train=spent / len(members),
        host_memory_peak=member["memory"]["host_memory_peak"],
      )
    )
  for name, results in clustered.items():
    for member in results["members"]:
      q = Quantiser.load(
        clustering.place(workdir / name, member["name"]) / "quantiser"
      )
      kept = {
        n: member[n]
        for n in ("seconds_train", "host_memory_peak", "bits_entropy")
      }
      method = results["method"]
      if method != "residual":
        found.append(codes.of_quantiser(member["name"], method, q, **kept))
        continue
      kept.pop("bits_entropy")
      for stages in config["prefixes"]:
        if stages <= q.stages:
          kept["seconds_train"] = member["seconds_train"] * stages / q.stages
          found.append(
            codes.of_quantiser(
              f"residual{q.clusters}x{stages}", method, q, stages, **kept
            )
          )
  # Baselines that see nothing, little, or the token alone.
  largest = max(
    (c for c in found if c.kind == "kmeans"),
    key=lambda c: c.bits,
    default=None,
  )
  if largest is not None:
    count = round(2**largest.bits)
    drawn = np.sort(rng.choice(len(store), count, False))
    random = np.asarray(store.take(drawn, site), np.float32)
    found.append(
      codes.of_quantiser(f"random{count}", "random", of_centroids(random))
    )
  _, vectors = np.linalg.eigh(moments.covariance)
  for rank in config["components"]:
    top = vectors[:, ::-1][:, :rank]
    found.append(codes.of_components(moments.mean_x, top, sample))
  means = activations.token_means(store, site, about.vocab_size)
  found.append(codes.of_tokens(means))
  if config["lookup_clusters"]:
    found.append(
      codes.of_tokens(means, _of_the_rest(config, store, site, means))
    )
  return found, moments


def _name(member) -> str:
  """Of a dictionary among the codes."""
  return f"sae {member['name'] or ''}".strip()


def _pairs(members, clustered, workdir):
  """k-means with at most `MOST_NEAREST` clusters, and dictionaries, by name."""
  quantisers = {
    member["name"]: Quantiser.load(
      clustering.place(workdir / name, member["name"]) / "quantiser"
    )
    for name, results in clustered.items()
    for member in results["members"]
    if results["method"] == "kmeans" and member["clusters"] <= MOST_NEAREST
  }
  return quantisers, {
    _name(member): dictionaries.load(member["path"]) for member in members
  }


def _of_the_rest(config, store, site, means) -> Quantiser:
  """k-means of what a lookup by token leaves."""
  x = np.asarray(store.read(0, len(store), site), np.float32)
  x = x - np.asarray(means(store.read(0, len(store), "token")))
  return of_centroids(
    kmeans(ArrayRows(x), config["lookup_clusters"], max_iter=25).centroids
  )


@jax.jit
def _made(function, tokens, x):
  return function(tokens, x)


def _explained_variance(found, store, site, moments):
  """Rows of the table, and squared errors by document and code."""
  sums = {code.name: DocumentSums() for code in found}
  sums["all"] = DocumentSums()
  total, count = 0.0, len(store)
  for start in range(0, count, BLOCK):
    stop = min(start + BLOCK, count)
    total = total + np.sum(store.read(start, stop, site), 0, np.float64)
  mean = total / count
  shuffled, seconds = {}, {}
  order = np.random.default_rng(0).permutation(BLOCK)
  for code in found:
    error = spent = rows = 0.0
    for start in range(0, count, BLOCK):
      stop = min(start + BLOCK, count)
      x = np.asarray(store.read(start, stop, site), np.float32)
      tokens = store.read(start, stop, "token")
      began = time.perf_counter()
      made = np.asarray(_made(code.function, tokens, x))
      if start and len(x) == BLOCK:  # the first one compiles
        spent, rows = spent + time.perf_counter() - began, rows + len(x)
      documents = store.read(start, stop, "document")
      off = np.square(x - made, dtype=np.float64).sum(1)
      sums[code.name].add(documents, error=off)
      dealt = made[order[order < len(made)]]
      error += np.square(x - dealt, dtype=np.float64).sum()
      if code is found[0]:
        away = np.square(x - mean).sum(1)
        sums["all"].add(documents, away=away)
    shuffled[code.name] = error
    seconds[code.name] = rows / spent if spent else None
  away = sums["all"]["away"]
  values = np.linalg.eigvalsh(moments.covariance)
  out = []
  for code in found:
    error = sums[code.name]["error"]
    interval = document_interval(error, away) or (None, None)
    out.append(
      {
        "name": code.name,
        "kind": code.kind,
        "bits": float(code.bits),
        "parameters": int(code.parameters),
        "encode_flops": float(code.encode_flops),
        "fvu": float(error.sum() / away.sum()),
        "fvu_low": interval[0],
        "fvu_high": interval[1],
        "fvu_bound": float(rates.gaussian_bound(values, code.bits)),
        "fvu_shuffled": float(shuffled[code.name] / away.sum()),
        "encode_tokens_per_second": seconds[code.name],
        **code.about,
      }
    )
  return out, sums


def _splice(config, model, found, site, moments, windows):
  """What the model loses with each code in the site's place."""
  count, batch_size = stores.splice_sample(windows, config["eval"], model.mesh)
  return metrics.splice_losses(
    model,
    windows.tokens[:count],
    windows.mask[:count],
    {
      **{
        code.name: metrics.ByToken(
          jax.tree_util.Partial(_spliced, code.function)
        )
        for code in found
      },
      **metrics.ablations(moments.mean_y),
    },
    read=site,
    write=site,
    batch_size=batch_size,
    document=windows.document[:count],
  )


def _spliced(function, tokens, x, y):
  return function(tokens, x).astype(y.dtype)


def _interpreted(config, model, found, store, site, windows):
  """How well rules on tokens say when latents and clusters are active."""
  own = config["eval"]
  if not own["explained"]:
    return {}
  labels = probing.label(
    windows.tokens,
    windows.mask,
    model.tokenizer,
    documents=np.where(windows.mask, windows.document, -1),
  )
  kinds = explain.candidates(windows.tokens, windows.mask, labels)
  documents = store.read(0, len(store), "document")
  x = np.asarray(store.read(0, len(store), site), np.float32)
  out = {}
  for code in found:
    if code.latents is None:
      continue
    log.info("explaining %s", code.name)
    z = evaluate.sparse_latents(code.latents, x)
    live = np.flatnonzero(np.asarray((z > 0).sum(0)).ravel() >= 20)
    chosen = np.random.default_rng(0).permutation(live)[: own["explained"]]
    score = evaluate.or_why(
      evaluate.noisy_explained,
      z,
      kinds,
      documents,
      chosen,
      x,
      range(own["probe_seeds"]),
    )
    if "latents" not in score:
      continue
    auroc = score["latents"]["auroc"]
    out[code.name] = {
      "auroc": auroc["value"],
      "auroc_mdd": auroc["mdd"],
      "auroc_interval": auroc["interval"],
      "auroc_random": score["random"]["auroc"]["value"],
      "auroc_shuffled": score["shuffled"]["auroc"]["value"],
      "explained_latents": len(chosen),
    }
  return out
