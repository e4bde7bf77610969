"""What a transcoder must read: three sites before one MLP, side by side.

A transcoder of Gemma's MLP should read what the MLP reads, the normalised
residual with the learned gain (`mlp_in`). Published ones also read it before
the gain (`mlp_norm`) and, by a wrong hook, before the norm (`resid_mid`). The
same config is trained on each, several seeds each, and compared.
"""

import functools
import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax import activations, dictionaries, tables
from gemma_jax.dictionaries import core
from studies import jobs
from trainers import dictionary, fields

log = logging.getLogger("gemma_jax")

FIELDS = {
  "job": str,
  "reads": (list, tuple),  # names of sites, as "mlp_in"
  "seeds": (list, tuple),
  "run": fields.Free,  # of trainers.dictionary; {layer} and `also` are set here
}
ROWS, BLOCK = 32_768, 2_048  # held-out tokens behind the alignment
COLUMNS = (
  "read",
  "fvu",
  "fvu_sd",
  "fvu_linear",
  "delta_ce",
  "delta_ce_sd",
  "dead_fraction",
  "alignment_r2",
  "alignment_cosine",
  "alignment_cosine_null",
)
DEFINITIONS = {
  "fvu": "Held-out, mean over the seeds; see the runs for the others.",
  "fvu_sd": "Standard deviation over the seeds.",
  "alignment_r2": (
    "Share of a latent's pre-activation that a linear function of mlp_in "
    "explains over held-out tokens; median over live latents, mean over seeds."
  ),
  "alignment_cosine": (
    "Cosine, in whitened coordinates of mlp_in, between that linear function "
    "and the mean of mlp_in where the latent fires, less its mean anywhere; "
    "median over live latents, mean over seeds."
  ),
  "alignment_cosine_null": "The same with the firing dealt to other tokens.",
}


def plan(config: Mapping[str, Any]) -> dict[str, Any]:
  """What would be done, for `--dry_run`."""
  return {read: dictionary.plan(run) for read, run in prepare(config).items()}


def run(config: Mapping[str, Any], workdir: str | pathlib.Path) -> dict:
  """Trains, compares, and writes results.json and table.md.

  Args:
    config: with exactly the fields of `FIELDS`.
    workdir: each site's run goes into a directory of its name.

  Returns:
    The contents of results.json.
  """
  workdir = pathlib.Path(workdir)
  config = json.loads(json.dumps(dict(config)))
  runs = prepare(config)
  fields.claim(workdir, config)
  rows = []
  for read, one in runs.items():
    members = jobs.train(one, workdir / read)
    aligned = [_alignment(member) for member in members]
    row = {"read": read, "seeds": len(members)}
    for name in ("fvu", "delta_ce"):
      values = [member[name] for member in members]
      row[name] = float(np.mean(values))
      row[f"{name}_sd"] = float(np.std(values, ddof=len(values) > 1))
    for name in ("fvu_linear", "dead_fraction", "l0", "ce_gap"):
      row[name] = float(np.mean([member[name] for member in members]))
    for name in aligned[0]:
      row[name] = float(np.mean([a[name] for a in aligned]))
    rows.append(row)
  log.info("\n%s", tables.aligned(rows, COLUMNS))
  (workdir / "table.md").write_text(tables.markdown(rows, COLUMNS))
  results = {
    "rows": rows,
    "model": config["run"]["model"]["name"],
    "layer": config["run"]["layer"],
    "definitions": DEFINITIONS,
    "versions": dictionary.versions(),
  }
  fields.write_json(workdir / "results.json", results)
  return results


def prepare(config) -> dict[str, dict]:
  """A checked config of `trainers.dictionary` for every site.

  Raises:
    ValueError: no mlp_in, or what `trainers.dictionary` refuses.
  """
  fields.check(config, FIELDS)
  if "mlp_in" not in config["reads"]:
    raise ValueError(
      f"reads {list(config['reads'])} must have mlp_in, with which the others "
      "are compared."
    )
  sites = [f"blocks.{{layer}}.{read}" for read in config["reads"]]
  out = {}
  for read, site in zip(config["reads"], sites, strict=True):
    out[read] = jobs.changed(
      config["run"],
      {
        "activations.read": site,
        "activations.write": "blocks.{layer}.mlp_out",
        "activations.also": sites,
        "sweep.seed": list(config["seeds"]),
      },
    )
    dictionary.prepare(out[read])
  return out


def _alignment(member: Mapping[str, Any]) -> dict[str, float]:
  """How a trained member's latents relate to what the MLP reads."""
  found = dictionaries.load(member["path"])
  store = activations.ActivationStore.open(member["stores"]["heldout"])
  count = min(len(store), ROWS)
  what = found.config.read.rsplit(".", 1)[0] + ".mlp_in"
  u = _whitened(np.asarray(store.read(0, count, what), np.float64))
  other = u[np.random.default_rng(0).permutation(count)]
  total = None
  for start in range(0, count, BLOCK):
    stop = min(start + BLOCK, count)
    x = store.read(start, stop, found.config.read)
    z, acts = _latents(found.config, found.params, jnp.asarray(x))
    part = _products(u[start:stop], other[start:stop], z, acts)
    part = [np.asarray(a, np.float64) for a in part]
    total = part if total is None else list(map(np.add, total, part))
  uz, z1, z2, firing, dealt, fired = total
  cross = uz / count  # u has mean 0 and covariance 1
  variance = np.maximum(z2 / count - (z1 / count) ** 2, 1e-30)
  d = u.shape[1]
  r2 = np.sum(cross**2, axis=0) / variance
  r2 = 1 - (1 - r2) * (count - 1) / (count - d - 1)
  live = fired > 0

  def cosine(means):
    top = np.sum(cross * means, axis=0)
    below = np.linalg.norm(cross, axis=0) * np.linalg.norm(means, axis=0)
    return float(np.median((top / np.maximum(below, 1e-30))[live]))

  return {
    "alignment_r2": float(np.median(r2[live])),
    "alignment_cosine": cosine(firing),
    "alignment_cosine_null": cosine(dealt),
  }


def _whitened(x: np.ndarray) -> np.ndarray:
  """[n, D] with mean 0 and the identity as covariance, float32."""
  x = x - x.mean(0)
  values, vectors = np.linalg.eigh(x.T @ x / len(x))
  values = np.maximum(values, 1e-7 * values.max())
  return (x @ vectors / np.sqrt(values)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def _latents(cfg, params, x):
  z = core.pre_activations(params, x.astype(jnp.float32))
  return z, core.select(cfg, params, z)


@jax.jit
def _products(u, other, z, acts):
  fires = (acts > 0).astype(jnp.float32)
  return (
    u.T @ z,
    z.sum(0),
    jnp.sum(z * z, axis=0),
    u.T @ fires,
    other.T @ fires,
    fires.sum(0),
  )
