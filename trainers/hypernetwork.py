"""One network that writes the maps of all routes: both ways, all layers."""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gemma_jax.activations import ActivationStore
from gemma_jax.alignment import hypernetwork, objective
from gemma_jax.alignment.hypernetwork import Config, Route, SiteScale
from gemma_jax.alignment.objective import TERMS
from trainers import fields, loop, paired
from trainers.downstream import Downstream, Texts
from trainers.paired import Encoder

SIZES = {"rank": int, "width": int, "embedding": int, "frequencies": int}
FIELDS = {
  **SIZES,  # of gemma_jax.alignment.hypernetwork.Config
  **paired.FIELDS,
  "kl_windows": int,  # of a target's text, in a step; for the term "kl"
}
OF_ACTIVATIONS = ("reconstruction", "cosine", "kl")


def check(config: Mapping[str, Any], mesh: Mesh) -> None:
  """Raises ValueError for what can be known before there are rows."""
  fields.check(config, FIELDS)
  paired.check_config(config, mesh, (*TERMS, "kl"))
  count = config["kl_windows"]
  if config["weights"].get("kl") and (count < 1 or count % mesh.shape["data"]):
    raise ValueError(
      "expected kl_windows of 1 or more that the mesh's axis 'data' divides, "
      f"got {count} and {dict(mesh.shape)}"
    )


def train(
  config: Mapping[str, Any],
  about: Config,
  routes: Sequence[Route],
  stores: Sequence[ActivationStore],
  scales: Mapping[str, SiteScale],
  bases: Sequence[jax.Array | None] | None,
  encoders: Mapping[str, Encoder],
  workdir: pathlib.Path,
  *,
  mesh: Mesh,
  seed: int,
  downstream: Downstream | None = None,
) -> dict:
  """Trains on all routes at once; goes on from the newest checkpoint.

  Minimised is the mean over routes of what the activations are off and, where
  the target's site has an encoder, of what the codes of the mapped activations
  are off. A weight counts for the terms of its name in both. With a weight for
  "kl", so is what the target model predicts with the mapped activations in
  place of its own; every step then runs and differentiates these models.

  Args:
    config: with exactly the fields of `FIELDS`.
    about: of those sizes, and with all directions.
    routes: each is one map.
    stores: of paired rows, for each route; see `paired.Rows`.
    scales: site -> coordinates.
    bases: of each direction; see `hypernetwork.init`.
    encoders: site -> encoder, of as many targets as have one.
    workdir: of this training alone. Its checkpoints hold the encoders too.
    mesh: with an axis "data", over which rows are split; an axis "fsdp" splits
      the largest matrices.
    seed: of parameters, rows, sampled latents and texts.
    downstream: of all targets; for the term "kl" alone.

  Returns:
    Parameters of `alignment.hypernetwork`, on the host.

  Raises:
    ValueError: a config, routes, stores, scales, bases or encoders that do not
      fit, or a workdir of another training.
    FloatingPointError, SystemExit: as `loop.train`.
  """
  check(config, mesh)
  encoders = {
    r.target: encoders[r.target] for r in routes if r.target in encoders
  }
  paired.check(config, routes, stores, encoders)
  texts = _texts(config, routes, stores, downstream, mesh, seed)
  bases = [None] * len(about.directions) if bases is None else list(bases)
  _check(config, about, routes, stores, scales, bases, encoders)
  frozen = {
    "scales": {site: scales[site] for r in routes for site in r[:2]},
    "encoders": encoders,
  }
  read = texts and downstream.tokens
  paired.claim(workdir, config, routes, stores, seed, (frozen, bases, read))
  state = loop.train(
    _task(config, about, routes, stores, (bases, frozen), texts, mesh, seed),
    workdir,
    mesh=mesh,
    **{name: config[name] for name in paired.LOOP},
  )
  return jax.device_get(state.params)


def _texts(config, routes, stores, downstream, mesh, seed) -> Texts | None:
  """For the term "kl", if it has a weight."""
  if not config["weights"].get("kl"):
    return None
  if downstream is None:
    raise ValueError(
      'expected models and texts for the term "kl", got none; give downstream, '
      "or no weight for it"
    )
  return Texts(routes, stores, downstream, config["kl_windows"], mesh, seed)


def _check(
  config, about: Config, routes, stores, scales, bases, encoders
) -> None:
  """Raises ValueError for what does not fit the network."""
  sizes = {name: config[name] for name in SIZES}
  if sizes != (found := {name: getattr(about, name) for name in SIZES}):
    raise ValueError(f"expected a network of {sizes}, got one of {found}")
  for route, store in zip(routes, stores, strict=True):
    widths = tuple(store.sites[site] for site in route[:2])
    known = {i: d[2:] for i, d in enumerate(about.directions)}
    if known.get(route.direction) != widths:
      raise ValueError(
        f"expected {route.source} to {route.target} to go in a direction of "
        f"widths {widths}, got number {route.direction} of {about.directions}"
      )
    for site, width in zip(route[:2], widths, strict=True):
      shape = np.shape(scales[site].mean) if site in scales else "none"
      if shape != (width,):
        raise ValueError(
          f"expected a scale of {site} and its {width} dims, got {shape}; see "
          "SiteScale.of"
        )
  if not encoders and not any(config["weights"].get(n) for n in OF_ACTIVATIONS):
    raise ValueError(
      f"expected a weight for {' or '.join(OF_ACTIVATIONS)}, or encoders of "
      f"targets, got {dict(config['weights'])} and none"
    )

  # These say themselves which base or depth they cannot take.
  key = jax.eval_shape(lambda: jax.random.key(0))
  params = jax.eval_shape(
    lambda key, bases: hypernetwork.init(key, about, bases), key, bases
  )
  for route in routes:
    jax.eval_shape(
      lambda params, r=route: hypernetwork.factors(about, params, r), params
    )


def _task(
  config, about, routes, stores, given, texts: Texts | None, mesh, seed
) -> loop.Task:
  adam, rows = paired.optimizer(config), paired.Rows(routes, stores)
  weights = dict(config["weights"])

  def init(bases, frozen):
    params = hypernetwork.init(jax.random.key(seed), about, bases)
    return params, adam.init(params), frozen

  def weighed(found):
    own = {n: w for n, w in weights.items() if n in found}
    return objective.total(found, own) if own else 0.0

  def loss(params, frozen, route, x, y, codes, key, apart):
    """Of one route, and its terms."""
    source, target = (frozen["scales"][site] for site in route[:2])
    write = functools.partial(
      hypernetwork.apply, about, params, route, source, target
    )
    predicted = write(x)
    variance = jnp.mean(jnp.square(target.scale))
    found = objective.activation_losses(predicted, y, target.mean, variance)
    total = weighed(found)
    terms = {"fvu": found["reconstruction"], "cosine": found["cosine"]}
    if apart is not None:
      terms["kl"] = apart(write)
      total += weights["kl"] * terms["kl"]
    if codes is not None:
      encoder = frozen["encoders"][route.target]
      sampled = paired.sample(key, codes.shape[1], config)
      found = objective.code_losses(
        *encoder(predicted), codes, encoder.about, sampled
      )
      total += weighed(found)
      terms |= {f"code_{name}": value for name, value in found.items()}
    return total / len(routes), terms

  def step(params, opt_state, frozen, batch, number):
    encoders = frozen["encoders"]
    codes = {
      name: encoders[rows.sites[name]](batch[name])[0]
      for name in dict.fromkeys(target for _, target in rows.routes)
      if rows.sites[name] in encoders
    }
    key = jax.random.fold_in(jax.random.key(seed), number)
    value, terms, gradients = 0.0, [], None
    # One after the other: the codes of all at once would not fit.
    for i, (route, (x, y)) in enumerate(zip(routes, rows.routes, strict=True)):
      (one, found), own = jax.value_and_grad(loss, has_aux=True)(
        params,
        frozen,
        route,
        batch[x],
        batch[y],
        codes.get(y),
        jax.random.fold_in(key, i),
        texts and functools.partial(texts.kl, i, batch),
      )
      value, terms = value + one, [*terms, found]
      gradients = own if i == 0 else jax.tree.map(jnp.add, gradients, own)
    updates, opt_state = adam.update(gradients, opt_state, params)
    params = optax.apply_updates(params, updates)
    finite = paired.finite(value, gradients)[None]
    metrics = {"loss": value} | {
      name: jnp.stack([t[name] for t in terms if name in t]).mean()
      for name in {name: None for t in terms for name in t}
    }
    metrics = {name: x[None] for name, x in metrics.items()}
    return params, opt_state, frozen, finite, metrics

  ways = mesh.shape.get("fsdp", 1)

  def rule(path: str, shape: tuple[int, ...]) -> P:
    large = "['maps']" in path and len(shape) == 2
    if large and ways > 1 and shape[1] % ways == 0:
      return P(None, "fsdp")
    return P()

  batches, more = rows.batches(config, seed), texts.shapes() if texts else {}
  return loop.Task(
    members=("",),
    init=init,
    init_args=lambda: given,
    init_shapes=jax.eval_shape(lambda *x: x, *given),
    step=step,
    batches=texts.beside(batches) if texts else batches,
    batch_shapes={**rows.shapes(config["batch_size"]), **more},
    rule=rule,
    by_row=P("data"),
    shown=("loss", "fvu", "kl") if texts else ("loss", "fvu"),
    watch=_watch,
    constant=texts.constant if texts else {},
  )


def _watch(row) -> dict[str, str]:
  if row["fvu"] > 2:
    return {
      "diverging": (
        f"FVU is {row['fvu']:.3g}, worse than predicting the mean. The "
        "training diverges: lower the learning rate."
      )
    }
  return {}
