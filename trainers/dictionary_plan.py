"""What a dictionary run may be asked, and what it will cost."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gemma_jax import activations, dictionaries, models
from gemma_jax.dictionaries import core, defaults
from gemma_jax.dictionaries.config import SELECTING, DictionaryConfig
from gemma_jax.dictionaries.presets import preset
from gemma_jax.dictionaries.recipe import Recipe
from gemma_jax.models import sites
from trainers import fields, stores, track

AXES = ("member", "data", "latent")  # of the training's mesh
# Below this many latents for each active one all of them cost less than the
# bookkeeping of a few: benchmarks/dictionary.py --crossover.
SPARSE_FROM = 16
OPTIONAL = (list, tuple, type(None))
SITES = (str, list, tuple)  # several are a crosscoder's
FIELDS = {
  "job": str,
  "seed": int,  # of the initial latents and of the order of the batches
  "layer": (int, type(None)),  # what {layer} in a site stands for
  "model": {
    "name": str,  # see gemma_jax.load_model
    "dtype": (str, type(None)),  # None: float32 on CPUs, else bfloat16
  },
  "mesh": {"data": int, "fsdp": int, "tensor": int},  # of the model
  "data": {
    "corpus": fields.Free,  # see gemma_jax.data.load
    "seed": int,  # of the split and of the order of the documents
    "heldout_fraction": float,  # of the documents
    "context": int,  # T, with BOS
    "packing": str,  # "packed" or "document"
    "bos": str,  # starts a "window", a "document", "both", or "none"
    "stride": (int, type(None)),  # new positions per window; None: all
    "allocation": (str, Mapping),  # "equal", "proportional", {source: weight}
    "document_tokens": (int, type(None)),  # at most so many of each document
    "train_tokens": int,
    "heldout_tokens": int,
  },
  "activations": {
    "read": SITES,  # sites of the input
    "write": SITES,  # sites to reconstruct
    "also": OPTIONAL,  # sites to store besides, so that runs can share them
    "dtype": str,  # in the store
    "batch_size": (int, type(None)),  # windows at once; None: what fits
    "buffer_rows": int,  # tokens shuffled in memory
  },
  "dictionary": {
    "width": (int, type(None)),  # M; None: by the model, see `defaults`
    "activation": str,  # one of gemma_jax.dictionaries.config.ACTIVATIONS
    "k": (float, type(None)),  # None: by the model
    "matryoshka": bool,  # nested groups: those below, or 1 : 2 : 4 : 9
    "prefix_widths": OPTIONAL,  # nested widths, or
    "group_sizes": OPTIONAL,  # sizes of the groups, or
    "group_fractions": OPTIONAL,  # their shares of M
    "skip": bool,
  },
  # "preset", and what to change of it: see gemma_jax.dictionaries.recipe.
  "recipe": fields.Free,
  # Values of each; every combination is a member. Empty: one value, as above.
  "sweep": {
    "learning_rate": OPTIONAL,
    "k": OPTIONAL,
    "sparsity": OPTIONAL,
    "width": OPTIONAL,
    "seed": OPTIONAL,
  },
  "train": {
    "steps": int,
    "batch_size": (int, type(None)),  # tokens; None: by the model
    "mesh": {"member": int, "data": int, "latent": int},
    "steps_per_dispatch": int,
    "members_at_once": (int, type(None)),  # None: 1 on CPUs, else all
    "sparse": (bool, type(None)),  # None: where it is faster
    "log_every": int,
    "checkpoint_every": int,
    "keep": int,
  },
  "eval": {
    "splice_tokens": int,  # for cross-entropy and KL
    "splice_batch_size": int,  # windows
    "latents": int,  # on the page
    "contexts": int,  # texts for each
  },
  "track": OPTIONAL,  # some of trainers.track.KINDS
}


@dataclasses.dataclass(frozen=True)
class Member:
  """One dictionary of a sweep; without a sweep there is one.

  Attributes:
    name: what it differs in, as in "k=32,seed=1".
    config: what it is.
    learning_rate: peak.
    sparsity: coefficient.
    seed: of its initial latents.
  """

  name: str
  config: DictionaryConfig
  learning_rate: float
  sparsity: float
  seed: int


@dataclasses.dataclass(frozen=True)
class Plan:
  """Everything that is known before any long work, checked.

  Attributes:
    config: as given, with sites spelled out.
    model: of the model.
    recipe: how the dictionaries are trained.
    members: all dictionaries.
    read: sites of the input.
    write: sites of the output.
    also: sites that are stored besides.
    batch_size: tokens.
    mesh: of the model.
    train_mesh: of the training, over `AXES`.
    depth: blocks that the harvest runs.
  """

  config: dict[str, Any]
  model: models.ModelConfig
  recipe: Recipe
  members: tuple[Member, ...]
  read: tuple[str, ...]
  write: tuple[str, ...]
  also: tuple[str, ...]
  batch_size: int
  mesh: Mesh
  train_mesh: Mesh
  depth: int

  @property
  def sites(self) -> tuple[str, ...]:
    """Those that are trained on."""
    return tuple(dict.fromkeys(self.read + self.write))

  @property
  def stored(self) -> tuple[str, ...]:
    """All sites that are harvested, in the same order for any that train."""
    return tuple(sorted({*self.sites, *self.also}))

  @property
  def dictionary(self) -> DictionaryConfig:
    """The first member, which has the sites of all."""
    return self.members[0].config

  @property
  def dtype(self) -> str:
    """Of the model's parameters and compute."""
    return stores.default_dtype(self.config["model"]["dtype"])

  @property
  def members_at_once(self) -> int:
    """Members over which a device vectorises.

    A CPU's caches hold one; accelerators fill up with all.
    """
    asked = self.config["train"]["members_at_once"]
    if asked is not None:
      return max(1, asked)
    return 1 if jax.default_backend() == "cpu" else len(self.members)

  @property
  def sparse(self) -> bool:
    """Whether the step touches active latents only; see `SPARSE_FROM`."""
    if not core.can_be_sparse(self.dictionary, self.recipe):
      return False
    asked = self.config["train"]["sparse"]
    if asked is not None:
      return asked
    most = max(m.config.k for m in self.members)
    return min(m.config.width for m in self.members) >= SPARSE_FROM * most


def prepare(
  config: Mapping[str, Any], model: models.ModelConfig | None = None
) -> Plan:
  """Checks a config against its model (by default, what its name tells).

  Raises:
    ValueError: unknown fields, sites, layers or sizes that do not fit.
  """
  fields.check(config, FIELDS)
  if jax.process_count() > 1:
    raise ValueError(
      "A run on several hosts is not supported yet: each would have to write "
      "its own part of the activations. Use the devices of one host."
    )
  track.check(config["track"] or ())
  model = model or models.describe(config["model"]["name"])
  acts, train = config["activations"], config["train"]
  read, write, also = _sites(config, model)
  if acts["dtype"] not in activations.DTYPES:
    raise ValueError(
      f"activations.dtype {acts['dtype']!r}; expected one of "
      f"{', '.join(activations.DTYPES)}."
    )
  for name in (
    "steps",
    "log_every",
    "checkpoint_every",
    "keep",
    "steps_per_dispatch",
  ):
    if train[name] < 1:
      raise ValueError(f"train.{name}={train[name]} must be at least 1.")
  known = defaults.of(model, read, write)
  recipe = _recipe(config)
  members = _members(config, recipe, known, read, write)
  batch_size = train["batch_size"] or known.batch_size
  if batch_size > config["data"]["train_tokens"]:
    raise ValueError(
      f"data.train_tokens={config['data']['train_tokens']} is less than one "
      f"batch of train.batch_size={batch_size} tokens."
    )
  mesh = models.make_mesh(config["mesh"])
  train_mesh = models.make_mesh(train["mesh"], axes=AXES)
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  if (acts["batch_size"] or 0) % ways:
    raise ValueError(
      f"activations.batch_size={acts['batch_size']} must be a multiple of the "
      f"{ways} devices on the mesh's data and fsdp axes."
    )
  if batch_size % train_mesh.shape["data"]:
    raise ValueError(
      f"train.batch_size={batch_size} does not divide over the "
      f"{train_mesh.shape['data']} devices of train.mesh.data."
    )
  for group in grouped(members):
    width, count = group[0].config.width, len(group)
    if width % train_mesh.shape["latent"]:
      raise ValueError(
        f"dictionary.width={width} does not divide over the "
        f"{train_mesh.shape['latent']} devices of train.mesh.latent."
      )
    if count % train_mesh.shape["member"]:
      raise ValueError(
        f"{count} members of width {width} do not divide over the "
        f"{train_mesh.shape['member']} devices of train.mesh.member."
      )
  found = Plan(
    dict(config),
    model,
    recipe,
    members,
    read,
    write,
    also,
    batch_size,
    mesh,
    train_mesh,
    sites.last_layer((*read, *write, *also), model),
  )
  wide = max(m.config.width for m in members)
  counts = found.dictionary.activation == "batchtopk" and (
    not found.sparse or recipe.resample_every
  )
  if counts and batch_size * wide > np.iinfo(np.int32).max:
    raise ValueError(
      f"train.batch_size={batch_size} times dictionary.width={wide} is more "
      "activations than BatchTopK over all latents can count (2^31 - 1). Take "
      "smaller batches, or train.sparse=True without recipe.resample_every."
    )
  return found


def _sites(config, model) -> list[tuple[str, ...]]:
  """What is read, written and stored besides, spelled out and checked."""
  layer, acts = config["layer"], config["activations"]
  found = []
  for name in ("read", "write", "also"):
    given = acts[name] or ()
    given = (given,) if isinstance(given, str) else given
    if layer is None and any("{layer}" in site for site in given):
      raise ValueError(f"activations.{name}={acts[name]!r} needs config.layer.")
    found.append(tuple(s.replace("{layer}", str(layer)) for s in given))
  read, write, also = found
  where = {site: sites.parse(site, model) for site in (*read, *write, *also)}
  if any(site.layer is None for site in where.values()):
    raise ValueError("activations.read and .write name one layer each, not *.")
  order = sites.NAMES.index
  if len(read) == len(write) == 1:
    a, b = where[read[0]], where[write[0]]
    if a.layer != b.layer or order(a.name) > order(b.name):
      raise ValueError(
        f"activations.read={read[0]} and activations.write={write[0]} must be "
        "in one block, what is read not after what is written. In order: "
        f"{', '.join(sites.NAMES)}."
      )
  elif read != write:
    raise ValueError(
      f"A crosscoder reads and writes the same sites; activations.read is "
      f"{list(read)}, activations.write {list(write)}."
    )
  return found


def _recipe(config) -> Recipe:
  changes = dict(config["recipe"])
  name = changes.pop("preset", "default")
  changes = {key: value for key, value in changes.items() if value is not None}
  return preset(name, config["dictionary"]["activation"], changes)


def _members(config, recipe, known, read, write) -> tuple[Member, ...]:
  own = dict(config["dictionary"])
  sweep = {name: tuple(v) for name, v in config["sweep"].items() if v}
  for name, values in sweep.items():
    if len(set(values)) < len(values):
      raise ValueError(f"sweep.{name}={list(values)} has a value twice.")
  groups = {
    name: own.pop(name)
    for name in ("prefix_widths", "group_sizes", "group_fractions")
  }
  if own.pop("matryoshka") and not any(groups.values()):
    groups["group_fractions"] = defaults.GROUP_FRACTIONS
  elif any(groups.values()) and not config["dictionary"]["matryoshka"]:
    raise ValueError(
      "dictionary.matryoshka is False and its groups are given; make it True, "
      "or leave them out."
    )
  aims = own["activation"] in SELECTING or recipe.sparsity.startswith("target")
  for name, used in (
    ("k", aims),
    ("sparsity", recipe.sparsity != "none"),
  ):
    if name in sweep and not used:
      raise ValueError(
        f"sweep.{name} changes nothing here: activation "
        f"{own['activation']!r} with recipe.sparsity {recipe.sparsity!r} does "
        "not use it."
      )
  if own["skip"] and read == write:
    raise ValueError(
      "dictionary.skip would learn the identity: activations.read and .write "
      f"are both {', '.join(read)}. Skips are for transcoders."
    )
  members = []
  for values in itertools.product(*sweep.values()):
    at = dict(zip(sweep, values, strict=True))
    width = at.get("width", own["width"]) or known.width
    k = at.get("k", own["k"] or known.k) if aims else None
    dictionary = DictionaryConfig(
      d_in=known.d_in,
      d_out=known.d_out,
      width=width,
      activation=own["activation"],
      k=None if k is None else float(k),
      prefix_widths=dictionaries.prefix_widths(width, **groups),
      skip=own["skip"],
      layer_norm=recipe.layer_norm,
      read="+".join(read),
      write="+".join(write),
      parts=known.parts,
      model=config["model"]["name"],
    )
    members.append(
      Member(
        ",".join(f"{name}={value}" for name, value in at.items()),
        dictionary,
        float(at.get("learning_rate", recipe.rate(width))),
        float(at.get("sparsity", recipe.sparsity_coefficient)),
        int(at.get("seed", config["seed"])),
      )
    )
  if recipe.sparsity != "none" and not all(m.sparsity for m in members):
    raise ValueError(
      f"recipe.sparsity {recipe.sparsity!r} has the coefficient 0, so nothing "
      "would be sparse. Give recipe.sparsity_coefficient; its scale is that of "
      f"loss {recipe.loss!r}."
    )
  return tuple(members)


def grouped(members: tuple[Member, ...]) -> list[tuple[Member, ...]]:
  """Members of one width together: they are one program."""
  widths = dict.fromkeys(member.config.width for member in members)
  return [
    tuple(m for m in members if m.config.width == width) for width in widths
  ]
