"""What the loop trains: the dictionary's task, and what comes of it."""

import functools
import logging
from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gemma_jax import dictionaries
from gemma_jax.activations import ActivationStore
from gemma_jax.dictionaries import core, linear
from trainers import dictionary_step, loop
from trainers.dictionary_members import Member, grouped
from trainers.dictionary_plan import Plan

log = logging.getLogger("gemma_jax")

EXAMPLES = 65_536  # rows from which initial latents are drawn


def make(
  p: Plan,
  store: ActivationStore | None = None,
  moments: linear.Moments | None = None,
  ridge: linear.Ridge | None = None,
) -> loop.Task:
  """The loop's task; without the training store, good for its shapes only."""
  cfg, train, seed = p.dictionary, p.config["train"], p.config["seed"]
  d, e = cfg.d_in, cfg.d_out
  f32 = jnp.float32
  shape = jax.ShapeDtypeStruct
  stored = p.config["activations"]["dtype"]
  stored = jnp.dtype("float32" if stored == "int8" else stored)
  groups = grouped(p.members)
  recipe = dictionary_step.in_steps(p.recipe, train["steps"])
  widest = max(member.config.width for member in p.members)
  rows = max(EXAMPLES, widest)
  if store is not None:
    rows = min(rows, len(store))
  norm_shapes = core.Normalisation(
    *(shape(s, f32) for s in ((d,), (d, d), (e,), (e,), ()))
  )
  ridge_shapes = (shape((d, e), f32), shape((e,), f32))
  example_shapes = (
    shape((rows, d), f32),
    shape((rows, e), f32),
    shape((rows,), bool),
  )
  key_shape = jax.eval_shape(lambda: dictionary_step.keys(groups))

  def init_args():
    batch = next(store.stream(rows, seed + 1, sites=p.sites))
    x, y = (np.asarray(side, np.float32) for side in _sides(p, batch))
    inside = moments
    if cfg.layer_norm:  # the constants are of what it makes
      x = y = np.asarray(core.centre_tokens(jnp.asarray(x))[0])
      inside = linear.moments([(x, y)])
    norm = core.normalisation(
      inside,
      recipe,
      # The moments hold no norms; so many rows tell their mean well enough.
      mean_norms=tuple(
        float(np.linalg.norm(side, axis=1).mean()) for side in (x, y)
      ),
      parts=cfg.parts,
    )
    if cfg.activation == "jumprelu":
      _check_thresholds(recipe, norm, x)
    first = np.zeros(rows, bool)
    first[np.unique(x, axis=0, return_index=True)[1]] = True
    if recipe.init == "examples" and first.sum() < widest:
      raise ValueError(
        f"{first.sum()} different inputs among {rows} cannot start {widest} "
        "latents. Harvest more text, take a narrower dictionary, or "
        "recipe.init='random'."
      )
    return (
      dictionary_step.keys(groups),
      norm,
      (ridge.linear, ridge.bias),
      (x, y, first),
    )

  def batches(start, sharding):
    stream = store.stream(
      p.batch_size,
      seed,
      sites=p.sites,
      start=start,
      buffer_rows=p.config["activations"]["buffer_rows"],
      sharding=sharding,
    )
    try:
      for batch in stream:
        x, y = _sides(p, batch)
        yield {"x": x, "y": y}
    finally:
      stream.close()

  size = p.batch_size
  return loop.Task(
    members=tuple(member.name for group in groups for member in group),
    init=functools.partial(dictionary_step.start, groups, recipe),
    init_args=init_args,
    init_shapes=(key_shape, norm_shapes, ridge_shapes, example_shapes),
    step=dictionary_step.make(
      groups,
      recipe,
      p.train_mesh,
      steps=train["steps"],
      at_once=p.members_at_once,
      sparse=p.sparse,
    ),
    batches=batches,
    batch_shapes={"x": shape((size, d), stored), "y": shape((size, e), stored)},
    rule=dictionary_step.rule,
    by_row=P("data"),
    shown=("loss", "fvu", "l0", "dead_fraction"),
    watch=_watch,
  )


def _check_thresholds(recipe, norm, x) -> None:
  """Warns where JumpReLU's constants belong to inputs of another scale."""
  x = (x[:4096] - norm.x_mean) @ norm.x_map
  own = recipe.encoder_norm
  own = recipe.decoder_norm if own is None else own
  typical = float(own * np.sqrt(np.mean(np.square(x))))
  for name in ("threshold_init", "bandwidth"):
    value = getattr(recipe, name)
    if not 1e-3 < value / typical < 30:
      log.warning(
        "recipe.%s=%.3g is of another scale than the pre-activations, whose "
        "standard deviation under normalise=%r is about %.3g at the start. "
        "Thresholds will not move, or nothing will fire: scale it, or "
        "normalise otherwise.",
        name,
        value,
        recipe.normalise,
        typical,
      )


def _sides(p: Plan, batch):
  """What is read and written, the sites of each joined."""
  for names in (p.read, p.write):
    parts = [batch[name] for name in names]
    if len(parts) == 1:
      yield parts[0]
    elif isinstance(parts[0], np.ndarray):
      yield np.concatenate(parts, axis=-1)
    else:
      yield jnp.concatenate(parts, axis=-1)


def describe(p: Plan) -> str:
  """What will be trained and how, in a line for the log."""
  groups = grouped(p.members)
  path = "active latents only" if p.sparse else "all latents"
  changes = {
    name: value
    for name, value in p.config["recipe"].items()
    if name != "preset" and value is not None
  }
  own = ", ".join(f"{name}={value}" for name, value in changes.items())
  return (
    f"{len(p.members)} {p.dictionary.activation} dictionaries by "
    f"{p.config['recipe'].get('preset', 'default')}"
    f"{f' with {own}' if own else ''}, M = "
    f"{', '.join(str(group[0].config.width) for group in groups)}, after the "
    f"encoder's product by {path}, {p.members_at_once} at once, mesh "
    f"{dict(p.train_mesh.shape)}"
  )


def _watch(row) -> dict[str, str]:
  """What a user should hear of before the end, by kind of trouble."""
  out = {}
  if row["dead_fraction"] > 0.9:
    out["dead"] = (
      f"{row['dead_fraction']:.0%} of the latents are dead. Lower the learning "
      "rate or the sparsity, or raise recipe.aux_coefficient."
    )
  if row["l0"] == 0:
    out["silent"] = (
      "no latent fires (L0 is 0). The sparsity coefficient is too large, or "
      "the thresholds lie above every activation for this normalisation."
    )
  if row["fvu"] > 2:
    out["diverging"] = (
      f"FVU is {row['fvu']:.3g}, worse than predicting the mean. The training "
      "diverges: lower the learning rate."
    )
  return out


def finish(
  p: Plan,
  state: loop.State,
  store: ActivationStore,
  *,
  without: Collection[str] = (),
) -> list[tuple[Member, dictionaries.Dictionary, dict[str, float]]]:
  """The trained dictionaries on raw activations, and their thresholds.

  Args:
    p: the plan.
    state: of the loop.
    store: held-out activations, on whose inputs thresholds are calibrated.
    without: names of members that diverged.
  """
  norm = jax.device_get(state.extra["norm"])
  widest = max(member.config.width for member in p.members)
  rows = min(len(store), max(1024, 2**25 // widest))
  batch = next(store.stream(rows, p.config["seed"] + 2, sites=p.sites))
  x, _ = _sides(p, batch)
  x = jnp.asarray(x)
  data = p.config["data"]
  # In SAELens' names where it has them.
  metadata = {
    "model_name": p.config["model"]["name"],
    "context_size": data["context"],
    "prepend_bos": data["bos"] in ("window", "both"),
  }
  if p.config["models"]:
    metadata["models"] = dict(p.config["models"])
  out = []
  groups = zip(
    grouped(p.members), state.params, state.extra["states"], strict=True
  )
  for group, stacked, states in groups:
    for i, member in enumerate(group):
      if member.name in without:
        continue
      params, carried = jax.device_get(
        jax.tree.map(lambda a, i=i: a[i], (stacked, states))
      )
      calibrated, found = None, {}
      if member.config.activation == "batchtopk":
        calibrated = float(_calibrate(member.config, p.recipe, params, norm, x))
        found = {
          "threshold": calibrated,
          "threshold_running": float(carried.threshold),
        }
      folded = core.fold(member.config, p.recipe, params, norm, calibrated)
      folded = {name: jnp.asarray(a) for name, a in folded.items()}
      dictionary = dictionaries.Dictionary(
        member.config, folded, {"metadata": metadata}
      )
      out.append((member, dictionary, found))
  return out


def _calibrate(cfg, recipe, params, norm, x):
  @jax.jit
  def calibrate(params, norm, x):
    return core.calibrate(cfg, recipe, params, norm, x, cfg.k)

  return calibrate(params, norm, x)
