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
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gemma_jax import machine, metrics, models, tables
from gemma_jax.activations import ActivationStore
from gemma_jax.dictionaries import linear
from gemma_jax.metrics import faithfulness
from gemma_jax.probing import explain, noise
from gemma_jax.report import rates as report
from studies import budgets, contenders, held_out, jobs
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
LOSSES = ("delta_ce", "delta_ce_interval", "kl")
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
    "auroc, where the minimum detectable difference stands for it. Every "
    "code was fitted once: other seeds are not in the interval."
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
  moments, _ = linear.fit(store["train"], site, site)
  mean = moments.mean_x
  eigenvalues, vectors = np.linalg.eigh(moments.covariance)
  sample = contenders.sample(store["train"], site, contenders.SAMPLE)
  found = [*contenders.of_dictionaries(members, sample)]
  for name, one in clustered.items():
    found += contenders.of_clusterings(one, workdir / name, config["prefixes"])
  found += contenders.baselines(
    config,
    found,
    store["train"],
    site,
    mean,
    vectors[:, ::-1],
    sample,
    about.vocab_size,
  )
  # -------------------------------------------------------------- held-out
  windows = stores.windows(sae["data"], directory, about)["heldout"].collect()
  model = models.load_model(
    directory,
    dtype=stores.default_dtype(sae["model"]["dtype"]),
    mesh=models.make_mesh(sae["mesh"]),
  )
  held = held_out.read(store["heldout"], site)
  with jax.default_matmul_precision("highest"):
    rows, sums = held_out.explained_variance(found, held, eigenvalues)
    losses = held_out.splice(config["eval"], model, found, site, mean, windows)
    scores = held_out.interpreted(
      config["eval"], model.tokenizer, found, held, windows
    )
  summary = losses.summary()
  for row in rows:
    row |= {n: summary[row["name"]][n] for n in LOSSES}
    row |= scores.get(row["name"], {})
  duels = budgets.versus(found, rows, sums, losses)
  results = {
    "model": sae["model"]["name"],
    "site": site,
    "rows": rows,
    "versus": duels,
    "answers": budgets.answers(duels),
    "nearest_latents": nearest_latents(found, held.x),
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
  report.write(workdir, results=results, config=config, eigenvalues=eigenvalues)
  fields.write_json(workdir / "results.json", results)
  return results
