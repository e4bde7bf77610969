"""What trainings on paired rows share: rows, encoders, the optimizer, checks.

A store of paired rows has the sites of two models, or of one, by the names
"model:site"; row i of all of them is the same place of a text. A route leads
from one site to another. Every step takes a batch of every store.
"""

import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from gemma_jax.activations import ActivationStore
from gemma_jax.alignment.objective import TERMS, CodeStatistics
from gemma_jax.dictionaries import Dictionary, DictionaryConfig, core
from trainers import fields

FIELDS = {
  "steps": int,
  "batch_size": int,  # rows of every store in a step
  "learning_rate": float,  # the highest: after `WARMUP`, before a cosine
  "weights": fields.Free,  # of some of the terms of alignment.objective
  "sampled": int,  # latents in the term "correlation"
  "buffer_rows": int,  # of every store, shuffled in memory
  "log_every": int,
  "checkpoint_every": int,
  "keep": int,
}
LOOP = ("steps", "batch_size", "log_every", "checkpoint_every", "keep")
WARMUP = 0.05  # share of the steps in which the learning rate rises
# Of a dictionary's parameters, those that make its codes.
_READ = ("W_enc", "b_enc", "threshold", "r_mag", "b_mag")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
  """What makes codes of a site's activations; a pytree of frozen arrays.

  Attributes:
    params: of a folded dictionary, those that read.
    about: its codes over the training rows.
    config: of the dictionary.
  """

  params: dict[str, jax.Array]
  about: CodeStatistics
  config: DictionaryConfig = dataclasses.field(metadata={"static": True})

  def __call__(self, x) -> tuple[jax.Array, jax.Array]:
    """Codes and logits of firing, float32 [n, M] both, of raw x [n, D].

    A logit is how far a latent's pre-activation lies above what it takes to
    fire, in the latent's `unit`: where the code is 0 it has a gradient.
    """
    cfg, x = self.config, jnp.asarray(x, jnp.float32)
    if cfg.layer_norm:
      x = core.centre_tokens(x)[0]
    z = core.pre_activations(self.params, x)
    codes = core.select(cfg, self.params, z)
    floor = self.params.get("threshold", 0.0)
    if cfg.activation == "topk":
      floor = jax.lax.stop_gradient(jax.lax.top_k(z, int(cfg.k))[0][:, -1:])
    return codes, (z - jnp.maximum(floor, 0)) / self.about.unit


def encoder(dictionary: Dictionary, about: CodeStatistics) -> Encoder:
  """The encoder of a dictionary.

  Args:
    dictionary: of one site.
    about: its codes over the training rows.

  Raises:
    ValueError: statistics of another number of latents.
  """
  cfg = dictionary.config
  if (found := {np.shape(a) for a in about}) != {(cfg.width,)}:
    raise ValueError(
      f"expected statistics of the {cfg.width} latents that read {cfg.read!r}, "
      f"got shapes {sorted(found)}; measure the codes of this dictionary"
    )
  params = {n: x for n, x in dictionary.params.items() if n in _READ}
  return Encoder(params, about, cfg)


class Rows:
  """Batches of the stores of some routes, each site of a store once.

  Args:
    routes: (source, target, ...) each.
    stores: of each route; several that are one object are read once.

  Attributes:
    routes: (source, target) of each, as a batch calls them.
    sites: name in a batch -> site.
  """

  def __init__(self, routes, stores: Sequence[ActivationStore]):
    self._stores = list(dict.fromkeys(stores))
    self.routes, self.sites = [], {}
    for (source, target, *_), store in zip(routes, stores, strict=True):
      prefix = f"{self._stores.index(store)} "
      self.routes.append((prefix + source, prefix + target))
      self.sites |= {prefix + source: source, prefix + target: target}

  def _each(self) -> Iterator[tuple[ActivationStore, dict[str, str]]]:
    """Every store, and by name in a batch its sites."""
    for i, store in enumerate(self._stores):
      yield store, {n: s for n, s in self.sites.items() if n == f"{i} {s}"}

  def shapes(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Of a batch."""
    return {
      name: jax.eval_shape(lambda x: x, store.empty(rows, site))
      for store, sites in self._each()
      for name, site in sites.items()
    }

  def batches(
    self, config: Mapping[str, Any], seed: int
  ) -> Callable[..., Iterator[dict[str, jax.Array]]]:
    """What a `loop.Task` takes."""

    def batches(start, sharding):
      streams = [
        store.stream(
          config["batch_size"],
          seed,
          sites=tuple(sites.values()),
          start=start,
          buffer_rows=config["buffer_rows"],
          sharding=sharding,
        )
        for store, sites in self._each()
      ]
      try:
        while True:
          found = [next(stream) for stream in streams]
          yield {
            name: batch[site]
            for batch, (_, sites) in zip(found, self._each(), strict=True)
            for name, site in sites.items()
          }
      finally:
        for stream in streams:
          stream.close()

    return batches


def optimizer(config: Mapping[str, Any]) -> optax.GradientTransformation:
  """AdamW; its learning rate rises at first, and falls to 0 along a cosine."""
  peak, steps = config["learning_rate"], config["steps"]

  def rate(step):
    up = (step + 1) / max(1, WARMUP * steps)
    return peak * jnp.minimum(up, 1) * (1 + jnp.cos(jnp.pi * step / steps)) / 2

  return optax.adamw(rate)


def finite(value: jax.Array, gradients: Any) -> jax.Array:
  """Whether a loss and all of its gradients are finite."""
  size = sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients))
  return jnp.isfinite(value) & jnp.isfinite(size)


def sample(key: jax.Array, width: int, config: Mapping[str, Any]) -> jax.Array:
  """Different latents for the term "correlation", int32 [S]."""
  return jax.random.choice(key, width, (config["sampled"],), replace=False)


def check_config(
  config: Mapping[str, Any], mesh: Mesh, terms: Sequence[str] = TERMS
) -> None:
  """Raises ValueError for what no rows can be trained with.

  Args:
    config: of the training.
    mesh: of the training.
    terms: that may have a weight.
  """
  for name in (*LOOP, "buffer_rows"):
    if config[name] < 1:
      raise ValueError(f"expected {name} of 1 or more, got {config[name]}")
  if not 0 < config["learning_rate"] < math.inf:
    raise ValueError(
      f"expected a learning_rate above 0, got {config['learning_rate']}"
    )
  weights = config["weights"]
  if (
    set(weights) - set(terms)
    or not all(
      isinstance(w, (int, float)) and 0 <= w < math.inf
      for w in weights.values()
    )
    or not any(weights.values())
  ):
    raise ValueError(
      f"expected weights of 0 or more for some of {', '.join(terms)}, got "
      f"{dict(weights)}"
    )
  if "data" not in mesh.shape or config["batch_size"] % mesh.shape["data"]:
    raise ValueError(
      f"expected a batch_size that the mesh's axis 'data' divides, got "
      f"{config['batch_size']} and {dict(mesh.shape)}"
    )


def check(
  config: Mapping[str, Any],
  routes: Sequence[tuple],
  stores: Sequence[ActivationStore],
  encoders: Mapping[str, Encoder],
) -> None:
  """Raises ValueError for what would only fail in training, or go unseen."""
  if not routes or len(routes) != len(stores):
    raise ValueError(
      f"expected routes and a store for each, got {len(routes)} routes and "
      f"{len(stores)} stores"
    )
  for (source, target, *_), store in zip(routes, stores, strict=True):
    for site in (source, target):
      if site not in store.sites:
        raise ValueError(
          f"expected {site} in the store of {source} to {target}, got "
          f"{', '.join(store.sites)} in {store.path}; pair the stores of both "
          "models"
        )
      if site in encoders:
        _check_encoder(site, store.sites[site], encoders[site], config)
    if len(store) < config["batch_size"]:
      raise ValueError(
        f"expected a batch_size of at most the {len(store)} rows of "
        f"{store.path}, got {config['batch_size']}"
      )


def _check_encoder(site, width, own: Encoder, config) -> None:
  if own.config.d_in != width:
    raise ValueError(
      f"expected a dictionary for {site} that reads {width} dims, got one of "
      f"{own.config.d_in}, of {own.config.read!r}"
    )
  if not 2 <= config["sampled"] <= own.config.width:
    raise ValueError(
      f"expected sampled of 2 to the {own.config.width} latents of {site}, got "
      f"{config['sampled']}"
    )


def claim(
  workdir: pathlib.Path,
  config: Mapping[str, Any],
  routes: Sequence[tuple],
  stores: Sequence[ActivationStore],
  seed: int,
  given: Any,
) -> None:
  """Makes a workdir that of this training.

  Args:
    workdir: made if need be.
    config: of the training.
    routes: of the training.
    stores: of each route.
    seed: of the training.
    given: tree of arrays that it begins from.

  Raises:
    ValueError: it is another's; shows what differs.
  """
  digest = hashlib.sha256()
  for path, x in jax.tree_util.tree_leaves_with_path(given):
    digest.update(f"{jax.tree_util.keystr(path)} {np.shape(x)}".encode())
    digest.update(np.asarray(x).tobytes())
  about = {
    "config": dict(config),
    "routes": [list(route) for route in routes],
    "rows": [len(store) for store in stores],
    "seed": seed,
    "given": digest.hexdigest(),
  }
  fields.claim(workdir, about)
