"""The main job: train dictionaries on models' sites.

  text -> tokens -> sites -> store -> dictionary -> held-out numbers -> page

`run(config, workdir)` goes all the way; each stage is cached or resumed, so
the same command goes on after an interruption.
"""

import functools
import importlib.metadata
import json
import logging
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from gemma_jax import activations, dictionaries, metrics, models
from gemma_jax.dictionaries import evaluate, linear
from gemma_jax.report import dictionary as report
from gemma_jax.report import sweep as sweep_report
from trainers import dictionary_task, fields, loop, stores
from trainers.dictionary_cost import plan
from trainers.dictionary_members import grouped
from trainers.dictionary_plan import Plan, prepare, sources

__all__ = ["plan", "run"]

log = logging.getLogger("gemma_jax")

SPLICE_DEFINITIONS = {
  "ce_clean": "Next-token loss of the whole model, nats per held-out token.",
  "ce_spliced": "The same with the dictionary's output in the site's place.",
  "ce_linear": "The same with the ridge map's output in the site's place.",
  "ce_ablated": "The same with the site set to zero.",
  "delta_ce": "ce_spliced - ce_clean, nats per token.",
  "ce_recovered": (
    "(ce_ablated - ce_spliced) / (ce_ablated - ce_clean); the denominator is "
    "ce_gap."
  ),
  "ce_recovered_linear": "The same for the ridge map.",
  "ce_gap": "ce_ablated - ce_clean, nats per token.",
  "kl": "Mean KL(clean || spliced) of the next-token distributions, nats.",
  "kl_linear": "The same for the ridge map.",
  "kl_ablated": "The same for the site set to zero.",
  "tokens_train": "Token vectors trained on, repeats counted.",
  "tokens_train_distinct": "Different token vectors among them, at most.",
  "tokens_heldout": "Held-out tokens behind fvu, l0 and dead_fraction.",
  "tokens_splice": "Held-out tokens behind the ce and kl values.",
  "tokens_per_second_harvest": "While the training store was written.",
  "tokens_per_second_train": (
    "Over the training steps, compilation and checkpoints included."
  ),
  "l0_train": "L0 in training, over the last log interval.",
  "diverged": "Members left out, and the step whose loss was not finite.",
  "k": "Asked for.",
  "learning_rate": "Peak.",
  "sparsity": "Coefficient of the sparsity term.",
  "threshold_running": "Running inference threshold, normalised coordinates.",
  "threshold": "The one in use: calibrated on held-out tokens to L0 = k.",
}


def run(config: Mapping[str, Any], workdir: str | pathlib.Path) -> dict:
  """Trains and evaluates; see the module's docstring.

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
  places = {
    name: models.resolve(source) for name, source in sources(config).items()
  }
  p = prepare(config, {n: models.read_config(at) for n, at in places.items()})
  directory = places[""]
  streams = stores.windows(p.config["data"], directory, p.model)
  heldout = streams["heldout"].collect()
  for name, where in places.items():
    if name:
      _require_alike(p, name, where, heldout)
  # ----------------------------------------------------------- activations
  harvested = {
    name: stores.harvest(
      streams,
      where,
      p.captured(name),
      p.config["activations"],
      mesh=p.mesh,
      dtype=p.dtype,
      depth=p.depth(name),
    )
    for name, where in places.items()
  }
  stored = harvested[""]
  if len(harvested) > 1:
    stored = {
      side: activations.Joined(
        {name: found[side] for name, found in harvested.items()}
      )
      for side in stored
    }
  got = len(stored["train"])
  if got < p.batch_size:
    raise ValueError(
      f"The train side of the corpus has {got} tokens, fewer than one batch "
      f"of {p.batch_size}. Give more text or a smaller batch."
    )
  # -------------------------------------------------------------- training
  cfg = p.dictionary
  moments, ridge = linear.fit(stored["train"], cfg.read, cfg.write)
  fields.claim(workdir, config)
  log.info("%s", dictionary_task.describe(p))
  state = loop.train(
    dictionary_task.make(p, stored["train"], moments, ridge),
    workdir,
    mesh=p.train_mesh,
    batch_size=p.batch_size,
    **{
      name: config["train"][name]
      for name in (
        "steps",
        "log_every",
        "checkpoint_every",
        "keep",
        "steps_per_dispatch",
      )
    },
    track=tuple(config["track"] or ()),
  )
  # ------------------------------------------------------------ evaluation
  rows = loop.read_metrics(workdir / "metrics.jsonl")
  tokens = config["train"]["steps"] * p.batch_size
  # GPUs would otherwise round the factors of float32 products to TF32.
  with jax.default_matmul_precision("highest"):
    names = [m.name for group in grouped(p.members) for m in group]
    diverged = {
      name: int(step)
      for name, step in zip(names, state.first_bad, strict=True)
      if step >= 0
    }
    trained = dictionary_task.finish(
      p, state, stored["heldout"], without=set(diverged)
    )
    del state
    for member, dictionary, _ in trained:
      dictionary.save(place(workdir, member.name) / "dictionary")
    measured = [
      evaluate.evaluate(
        dictionary,
        stored["heldout"],
        ridge,
        moments.mean_y,
        top=max(16, config["eval"]["contexts"]),
      )
      for _, dictionary, _ in trained
    ]
    model, spliced = None, [{} for _ in trained]
    if not cfg.parts or len(names) == 1:
      model = models.load_model(directory, dtype=p.dtype, mesh=p.mesh)
    if not cfg.parts:
      spliced = _splice(p, model, [d for _, d, _ in trained], ridge, heldout)
  members = [
    {
      "name": member.name,
      "width": member.config.width,
      "k": member.config.k,
      "learning_rate": member.learning_rate,
      "sparsity": member.sparsity,
      "seed": member.seed,
      **numbers,
      **losses,
      **thresholds,
      "l0_train": _last(rows, "l0", names.index(member.name)),
    }
    for (member, _, thresholds), (numbers, *_), losses in zip(
      trained, measured, spliced, strict=True
    )
  ]
  results = {
    "model": config["model"]["name"],
    "sites": [cfg.read, cfg.write],
    **(
      members[0]
      if len(names) == 1
      else {"members": members, "diverged": diverged}
    ),
    "tokens_train": tokens,
    "tokens_train_distinct": min(len(stored["train"]), tokens),
    "tokens_heldout": len(stored["heldout"]),
    "tokens_per_second_harvest": stored["train"].tokens_per_second,
    "tokens_per_second_train": rows[-1]["tokens"] / rows[-1]["seconds"],
    "memory": loop.memory(),
    "dtypes": {
      "model": p.dtype,
      "store": config["activations"]["dtype"],
      "metrics": "float32 values, float64 sums",
    },
    "seeds": {"train": config["seed"], "data": config["data"]["seed"]},
    "stores": {
      f"{name}:{side}" if name else side: str(store.path)
      for name, found in harvested.items()
      for side, store in found.items()
    },
    "definitions": evaluate.DEFINITIONS | SPLICE_DEFINITIONS,
    "versions": versions(),
  }
  # --------------------------------------------------------------- reports
  if len(names) > 1:
    page = sweep_report.write(
      workdir, results=results, config=config, metrics=rows
    )
  else:
    (_, dictionary, _), (_, latents, norms) = trained[0], measured[0]
    shown = report.latents(
      dictionary,
      latents,
      stored["heldout"],
      heldout,
      model,
      count=config["eval"]["latents"],
      contexts=config["eval"]["contexts"],
    )
    page = report.write(
      workdir,
      results=results,
      config=config,
      metrics=rows,
      statistics=latents,
      norms=norms,
      shown=shown,
    )
  fields.write_json(workdir / "results.json", results)
  log.info("report: %s", page)
  return results


def _require_alike(p: Plan, name, directory, heldout) -> None:
  """Raises ValueError unless a further model tokenises as the first does."""
  own = stores.windows(p.config["data"], directory, p.model)["heldout"]
  if not np.array_equal(own.collect().tokens, heldout.tokens):
    raise ValueError(
      f"config.models.{name} ({sources(p.config)[name]}) does not cut the text "
      f"into the tokens of {sources(p.config)['']}; their activations cannot "
      "be joined token by token."
    )


def place(workdir: pathlib.Path, member: str) -> pathlib.Path:
  """Where a member's dictionary goes: one alone into the workdir itself."""
  return workdir / "members" / member if member else workdir


def _last(rows, name: str, member: int) -> float:
  """A metric of one member over the last log interval."""
  last = rows[-1]
  return last["members"][name][member] if "members" in last else last[name]


def _splice(p: Plan, model, trained, ridge, windows) -> list[dict[str, Any]]:
  """What the model loses with each dictionary in the site's place."""

  def spliced(cfg, params, x, y):
    out = dictionaries.Dictionary(cfg, params).reconstruct(x)
    return out.astype(y.dtype)

  def affine(matrix, bias, x, y):
    return (x.astype(jnp.float32) @ matrix + bias).astype(y.dtype)

  loss = stores.splice(
    model,
    windows,
    p.config["eval"],
    {
      **{
        f"spliced{i}": Partial(functools.partial(spliced, d.config), d.params)
        for i, d in enumerate(trained)
      },
      "linear": Partial(affine, ridge.linear, ridge.bias),
      "ablated": lambda x, y: jnp.zeros_like(y),
    },
    read=p.dictionary.read,
    write=p.dictionary.write,
  ).means()
  ce = {name: value["ce"] for name, value in loss.items()}
  recovered = metrics.ce_recovered
  shared = {
    "ce_clean": ce["clean"],
    "ce_linear": ce["linear"],
    "ce_ablated": ce["ablated"],
    "ce_gap": ce["ablated"] - ce["clean"],
    "ce_recovered_linear": recovered(ce["clean"], ce["linear"], ce["ablated"]),
    "kl_linear": loss["linear"]["kl"],
    "kl_ablated": loss["ablated"]["kl"],
    "tokens_splice": loss["clean"]["tokens"],
  }
  return [
    {
      **shared,
      "ce_spliced": (own := ce[f"spliced{i}"]),
      "delta_ce": own - ce["clean"],
      "ce_recovered": recovered(ce["clean"], own, ce["ablated"]),
      "kl": loss[f"spliced{i}"]["kl"],
    }
    for i in range(len(trained))
  ]


def versions() -> dict[str, str]:
  """Of Python and of what computed the results."""
  names = (
    "gemma_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorstore",
    "numpy",
    "transformers",
  )
  out = {"python": platform.python_version()}
  for name in names:
    try:
      out[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue  # running from a checkout that is not installed
  return out
