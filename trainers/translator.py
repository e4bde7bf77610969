"""Networks from one dictionary's codes to another's, trained side by side."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gemma_jax.activations import ActivationStore
from gemma_jax.alignment import objective, translator
from gemma_jax.alignment.objective import CodeStatistics
from gemma_jax.dictionaries import Dictionary
from trainers import fields, loop, paired
from trainers.paired import Encoder, encoder

__all__ = ["FIELDS", "Encoder", "encoder", "train"]

FIELDS = {
  "width": int,  # of the hidden layers
  "dropout": float,  # share of hidden units that are left out
  **paired.FIELDS,
}


def check(config: Mapping[str, Any], mesh: Mesh) -> None:
  """Raises ValueError for what can be known before there are rows."""
  fields.check(config, FIELDS)
  paired.check_config(config, mesh)
  if config["width"] < 1 or not 0 <= config["dropout"] < 1:
    raise ValueError(
      "expected a width of 1 or more and a dropout of 0 to below 1, got "
      f"{config['width']} and {config['dropout']}"
    )


def train(
  config: Mapping[str, Any],
  routes: Sequence[tuple],
  stores: Sequence[ActivationStore],
  dictionaries: Mapping[str, Dictionary],
  statistics: Mapping[str, CodeStatistics],
  workdir: pathlib.Path,
  *,
  mesh: Mesh,
  seed: int,
) -> list[dict]:
  """A translator for every route; goes on from the newest checkpoint.

  They share the batches and their codes, which every step makes anew, and
  nothing else: one whose loss is not finite stays as it was, with a warning,
  and the others go on.

  Args:
    config: with exactly the fields of `FIELDS`.
    routes: (source, target, ...), sites.
    stores: of paired rows, for each route; see `paired.Rows`.
    dictionaries: site -> dictionary, folded.
    statistics: site -> its codes over the training rows.
    workdir: of this training alone. Its checkpoints hold the encoders too.
    mesh: with an axis "data", over which rows are split.
    seed: of parameters, rows, dropout.

  Returns:
    Parameters of `alignment.translator` for each route, on the host.

  Raises:
    ValueError: a config, routes, stores or dictionaries that do not fit, or a
      workdir of another training.
    FloatingPointError, SystemExit: as `loop.train`.
  """
  check(config, mesh)
  used = sorted({site for route in routes for site in route[:2]})
  if lacking := [
    s for s in used if s not in dictionaries or s not in statistics
  ]:
    raise ValueError(
      "expected a dictionary and statistics of its codes for every site, got "
      f"none for {', '.join(lacking)}"
    )
  encoders = {s: encoder(dictionaries[s], statistics[s]) for s in used}
  paired.check(config, routes, stores, encoders)
  paired.claim(workdir, config, routes, stores, seed, encoders)
  state = loop.train(
    _task(config, routes, paired.Rows(routes, stores), encoders, seed),
    workdir,
    mesh=mesh,
    **{name: config[name] for name in paired.LOOP},
  )
  return list(jax.device_get(state.params))


def _task(config, routes, rows: paired.Rows, encoders, seed) -> loop.Task:
  adam, weights = paired.optimizer(config), dict(config["weights"])

  def init(encoders):
    params = []
    for i, (source, target, *_) in enumerate(routes):
      d_in, d_out = (encoders[s].config.width for s in (source, target))
      key = jax.random.fold_in(jax.random.key(seed), i)
      params.append(translator.init(key, d_in, config["width"], d_out))
    going = jnp.ones(len(routes), bool)
    opt_state = [adam.init(own) for own in params]
    return params, opt_state, {"encoders": encoders, "going": going}

  def one(params, opt_state, going, about, codes, key):
    """The step of one route."""
    (source, target), (z, y) = about, codes
    dropped, sampled = jax.random.split(key)

    def loss(params):
      predicted, logits = translator.apply(
        params, source, target, z, dropout=config["dropout"], key=dropped
      )
      losses = objective.code_losses(
        predicted,
        logits,
        y,
        target,
        paired.sample(sampled, y.shape[1], config),
      )
      return objective.total(losses, weights), losses

    (value, losses), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    updates, moved = adam.update(gradients, opt_state, params)
    # Once left behind, it stays so.
    finite = going & paired.finite(value, gradients)
    after = jax.tree.map(
      lambda new, old: jnp.where(finite, new, old),
      (optax.apply_updates(params, updates), moved),
      (params, opt_state),
    )
    return *after, finite, {"loss": value, **losses}

  def step(params, opt_state, extra, batch, number):
    known = extra["encoders"]
    codes = {n: known[site](batch[n])[0] for n, site in rows.sites.items()}
    key = jax.random.fold_in(jax.random.key(seed), number)
    out = [
      one(
        params[i],
        opt_state[i],
        extra["going"][i],
        [known[rows.sites[name]].about for name in names],
        [codes[name] for name in names],
        jax.random.fold_in(key, i),
      )
      for i, names in enumerate(rows.routes)
    ]
    params, opt_state, finite, metrics = map(list, zip(*out, strict=True))
    finite = jnp.stack(finite)
    metrics = jax.tree.map(lambda *x: jnp.stack(x), *metrics)
    return params, opt_state, extra | {"going": finite}, finite, metrics

  return loop.Task(
    members=tuple(" to ".join(route[:2]) for route in routes),
    init=init,
    init_args=lambda: (encoders,),
    init_shapes=(jax.eval_shape(lambda x: x, encoders),),
    step=step,
    batches=rows.batches(config, seed),
    batch_shapes=rows.shapes(config["batch_size"]),
    rule=lambda path, shape: P(),
    by_row=P("data"),
    shown=("loss", "reconstruction", "firing"),
    watch=_watch,
  )


def _watch(row) -> dict[str, str]:
  if row["reconstruction"] > 2:
    return {
      "diverging": (
        f"the share of variance that is not predicted is "
        f"{row['reconstruction']:.3g}, more than the mean's 1. Lower the "
        "learning rate."
      )
    }
  return {}
