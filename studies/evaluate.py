"""Dictionaries on held-out text: what they keep, and what they are good for.

  python -m launch.run --config=configs/evaluate.py \
    --config.dictionaries="('runs/a','runs/b')" --workdir=runs/compare

Workdirs of ours and files of other libraries alike; all on the same tokens.
"""

import functools
import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import scipy.sparse
from jax.tree_util import Partial

from gemma_jax import dictionaries, metrics, models, probing
from gemma_jax.data import vocabulary
from gemma_jax.dictionaries import evaluate, linear
from gemma_jax.dictionaries.dictionary import reconstruct_prefixes
from gemma_jax.metrics import faithfulness
from gemma_jax.models import sites
from gemma_jax.probing import absorption, explain, noise, sparse
from gemma_jax.probing.labels import rows as label_rows
from gemma_jax.probing.split import subsample
from gemma_jax.report import sweep as sweep_report
from trainers import dictionary, fields, stores
from trainers.dictionary_plan import FIELDS as RUN

log = logging.getLogger("gemma_jax")

FIELDS = {
  "job": str,
  "dictionaries": (list, tuple),  # what gemma_jax.dictionaries.load takes
  "format": (str, type(None)),  # None: found out
  "model": {**RUN["model"], "name": (str, type(None))},  # None: theirs
  "mesh": RUN["mesh"],
  "data": RUN["data"],  # train_tokens: behind the linear and mean baselines
  "activations": {
    "dtype": RUN["activations"]["dtype"],
    "batch_size": RUN["activations"]["batch_size"],
  },
  "eval": {
    "batch_size": (int, type(None)),  # rows; None: what fits
    "splice_tokens": int,
    "splice_batch_size": int,
    "probe_tokens": int,  # held-out tokens for probing; 0: none of it
    "probe_seeds": int,  # at least 5
    "explained": int,  # latents
  },
}
LEAST_WORDS = 500  # below, no letter has enough
DEFINITIONS = {
  **evaluate.DEFINITIONS,
  **{f"splice.{n}": text for n, text in faithfulness.DEFINITIONS.items()},
  "splice.prefix M": "The site replaced by what the first M latents make.",
  **{f"sparse_probing.{n}": text for n, text in sparse.DEFINITIONS.items()},
  **{f"absorption.{n}": text for n, text in absorption.DEFINITIONS.items()},
  **{f"explained.{n}": text for n, text in explain.DEFINITIONS.items()},
  **{f"noise.{n}": text for n, text in noise.DEFINITIONS.items()},
}


def plan(config: Mapping[str, Any]) -> dict[str, Any]:
  """What would be evaluated, for `--dry_run`."""
  found, model, _ = prepare(config)
  return {
    "model": f"{model.family}, {model.num_layers} layers",
    "dictionaries": {
      path: {"read": d.config.read, "write": d.config.write}
      | {"width": d.config.width, "activation": d.config.activation}
      for path, d in found.items()
    },
  }


def prepare(config: Mapping[str, Any]):
  """The dictionaries by path, their model's config and name, checked.

  Raises:
    ValueError: unknown fields; no dictionaries, of several models, of sites
      that the model does not have, or of another width than those.
  """
  fields.check(config, FIELDS)
  if not config["dictionaries"]:
    raise ValueError(
      "config.dictionaries is empty. Name workdirs or files: "
      "--config.dictionaries=\"('runs/a','runs/b')\"."
    )
  own = config["eval"]
  if own["probe_tokens"] and own["probe_seeds"] < noise.LEAST:
    raise ValueError(
      f"eval.probe_seeds={own['probe_seeds']} must be at least {noise.LEAST}: "
      "a standard deviation of fewer says little. eval.probe_tokens=0 leaves "
      "probing out."
    )
  for name in ("splice_tokens", "splice_batch_size", "explained"):
    if own[name] < 1:
      raise ValueError(f"eval.{name}={own[name]} must be at least 1.")
  found = {
    str(path): dictionaries.load(path, format=config["format"])
    for path in config["dictionaries"]
  }
  names = {d.config.model for d in found.values()} - {""}
  name = config["model"]["name"] or (names.pop() if len(names) == 1 else None)
  if not name:
    raise ValueError(
      f"The dictionaries are of {sorted(names) or 'no known model'}; name one "
      "model with --config.model.name."
    )
  model = models.describe(name)
  for path, d in found.items():
    cfg = d.config
    if not cfg.read or not cfg.write:
      raise ValueError(f"{path} does not say which sites it reads and writes.")
    if ":" in cfg.read:
      raise ValueError(
        f"{path} is a crosscoder of several models ({cfg.read}), and this "
        "study runs one. Its own run has measured it: see its results.json."
      )
    for site, width in ((cfg.read, cfg.d_in), (cfg.write, cfg.d_out)):
      own = sum(sites.width(part, model) for part in site.split("+"))
      if own != width:
        raise ValueError(
          f"{path} has vectors of {width} at {site}, where {name} has {own}. "
          "It belongs to another model or site."
        )
  return found, model, name


def run(config: Mapping[str, Any], workdir: str | pathlib.Path) -> dict:
  """Evaluates all; writes results.json, a table, plots, a page.

  Args:
    config: with exactly the fields of `FIELDS`.
    workdir: where the results go.

  Returns:
    The contents of results.json.
  """
  workdir = pathlib.Path(workdir)
  config = json.loads(json.dumps(dict(config)))
  found, _, name = prepare(config)
  if (results := fields.finished(workdir, config)) is not None:
    return results
  directory = models.resolve(name)
  about = models.read_config(directory)
  streams = stores.windows(config["data"], directory, about)
  mesh = models.make_mesh(config["mesh"])
  dtype = stores.default_dtype(config["model"]["dtype"])
  capture = sorted(
    {
      site
      for d in found.values()
      for joined in (d.config.read, d.config.write)
      for site in joined.split("+")
    }
  )
  stored = stores.harvest(
    streams,
    directory,
    capture,
    config["activations"],
    mesh=mesh,
    dtype=dtype,
    depth=sites.last_layer(tuple(capture), about),
  )
  fields.claim(workdir, config)
  windows = streams["heldout"].collect()
  model = models.load_model(directory, dtype=dtype, mesh=mesh)
  labels = None
  if config["eval"]["probe_tokens"]:
    labels = probing.label(
      windows.tokens,
      windows.mask,
      model.tokenizer,
      documents=np.where(windows.mask, windows.document, -1),
    )
  members, baselines = [], {}
  with jax.default_matmul_precision("highest"):
    for path, d in found.items():
      cfg = d.config
      log.info("%s: %s -> %s", path, cfg.read, cfg.write)
      key = cfg.read, cfg.write
      if key not in baselines:
        baselines[key] = linear.fit(stored["train"], *key)
      moments, ridge = baselines[key]
      numbers, *_ = evaluate.evaluate(
        d,
        stored["heldout"],
        ridge,
        moments.mean_y,
        batch_size=config["eval"]["batch_size"],
        mesh=mesh,
      )
      member = {
        "name": path,
        "sites": [cfg.read, cfg.write],
        "activation": cfg.activation,
        "width": cfg.width,
        "k": cfg.k,
        **numbers,
      }
      if not cfg.parts:
        member |= _splice(config, model, d, moments, windows)
      if labels is not None:
        member |= _probe(config, model, d, stored["heldout"], windows, labels)
      members.append(member)
  results = {
    "model": name,
    "sites": capture,
    "members": members,
    "tokens_heldout": len(stored["heldout"]),
    "dtypes": {"model": dtype, "store": config["activations"]["dtype"]},
    "definitions": DEFINITIONS,
    "versions": dictionary.versions(),
  }
  sweep_report.write(workdir, results=results, config=config, metrics=[])
  fields.write_json(workdir / "results.json", results)
  return results


def _splice(config, model, d, moments, windows) -> dict[str, Any]:
  """What the model loses with the dictionary or an ablation in the place."""

  def spliced(i, params, x, y):
    rows = x.reshape(-1, x.shape[-1])
    _, found = reconstruct_prefixes(d.config, params, rows)
    return found[i].reshape(y.shape)

  *widths, _ = d.config.prefix_widths
  names = [*(f"prefix {width}" for width in widths), "spliced"]
  own = {
    name: Partial(functools.partial(spliced, i), d.params)
    for i, name in enumerate(names)
  }
  summary = stores.splice(
    model,
    windows,
    config["eval"],
    {
      **own,
      **metrics.ablations(moments.mean_y),
    },
    read=d.config.read,
    write=d.config.write,
  ).summary()
  full = summary["spliced"]
  return {
    "ce_clean": summary["clean"]["ce"],
    "delta_ce": full["delta_ce"],
    "ce_recovered": full["ce_recovered"]["zero"]["value"],
    "kl": full["kl"],
    "splice": summary,
  }


def _probe(config, model, d, store, windows, labels) -> dict[str, Any]:
  """Sparse probing, first-letter absorption, and how latents are explained."""
  own, cfg = config["eval"], d.config
  count = min(own["probe_tokens"], len(store))
  x = np.asarray(linear.rows(store, 0, count, cfg.read), np.float32)
  z = sparse_latents(
    lambda rows: scipy.sparse.csr_matrix(np.asarray(d.encode(rows))), x
  )
  documents = np.asarray(store.read(0, count, "document"))
  at = {
    name: probing.Labels(label.values[:count], label.classes)
    for name, label in label_rows(labels, windows.mask).items()
  }
  seeds = range(own["probe_seeds"])
  out = {"sparse_probing": or_why(_noisy_probes, z, at, documents, x, seeds)}
  if cfg.read == cfg.write and not cfg.parts:
    tokens = np.asarray(store.read(0, count, "token"))
    out["absorption"] = or_why(_noisy_absorption, d, z, x, tokens, model, seeds)
  live = np.flatnonzero(np.asarray((z > 0).sum(0)).ravel() >= 20)
  rng = np.random.default_rng(0)
  chosen = rng.permutation(live)[: own["explained"]]
  kinds = explain.candidates(windows.tokens, windows.mask, labels)
  kinds = {name: kind[:count] for name, kind in kinds.items()}
  out["explained"] = or_why(
    noisy_explained, z, kinds, documents, chosen, x, seeds
  )
  return out


def or_why(score, *args) -> dict[str, Any]:
  """A score, or why these tokens are too few for it: the others go on."""
  try:
    return score(*args)
  except ValueError as e:
    log.warning("%s is left out: %s", score.__name__.strip("_"), e)
    return {"left_out": str(e)}


def noisy_explained(z, kinds, documents, chosen, x, seeds):
  """How latents and their baselines are explained, over seeds."""
  runs = {
    seed: probing.explain_with_baselines(
      z, kinds, documents, chosen, x, seed=seed
    )
    for seed in seeds
  }
  return {
    name: first.summary()
    | {
      "auroc": _noise(
        probing.reseeded(lambda s, n=name: runs[s][n].auroc, seeds)
      )
    }
    for name, first in runs[seeds[0]].items()
  }


def _noisy_probes(z, labels, documents, x, seeds):
  """Each method's AUC over seeds; noise as `noise.DEFINITIONS` says."""
  runs = {
    seed: probing.probe(z, labels, documents, raw=x, seed=seed)
    for seed in seeds
  }
  methods = runs[seeds[0]].scores
  return {
    method: _noise(
      probing.reseeded(lambda s, m=method: runs[s].scores[m]["auc"], seeds)
    )
    for method in methods
  }


def _noisy_absorption(d, z, x, tokens, model, seeds):
  """First-letter absorption over seeds; why not, where it has no meaning."""
  letters = np.full(model.config.vocab_size, -1)
  ids, first = vocabulary.words(model.tokenizer)
  letters[ids] = first
  letter = letters[tokens]
  at = np.flatnonzero(letter >= 0)
  if len(at) < LEAST_WORDS:
    return {"left_out": f"{len(at)} words; needs {LEAST_WORDS}"}
  z, decoder = absorption.unit_rows(z, np.asarray(d.params["W_dec"]))

  def run(seed):
    own = at[subsample(tokens[at], 4, seed=seed)]
    return probing.measure_absorption(
      z[own],
      decoder,
      x[own],
      letter[own],
      tokens[own],
      read=d.config.read,
      write=d.config.write,
      bias=np.asarray(d.params["b_dec"]),
      seed=seed,
    )

  runs = {seed: run(seed) for seed in seeds}
  return {
    name: _noise(probing.reseeded(lambda s, n=name: getattr(runs[s], n), seeds))
    for name in ("full", "fraction", "probe_f1")
  }


def _noise(found: noise.Reseeded) -> dict[str, Any]:
  return {
    "value": found.value,
    "reseed_sd": found.reseed_sd,
    "mdd": found.mdd,
    "interval": list(found.interval),
  }


def sparse_latents(latents, x, block: int = 2048):
  """CSR [R, M] of a function that gives the CSR of some rows.

  Args:
    latents: float32 [n, D] -> [n, M].
    x: [R, D].
    block: rows at once.
  """
  parts = [latents(x[at : at + block]) for at in range(0, len(x), block)]
  return scipy.sparse.vstack(parts, format="csr")
