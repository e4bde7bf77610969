"""What a dictionary run may be asked, and what it will cost."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gemma_jax import activations, models
from gemma_jax.dictionaries import core, defaults
from gemma_jax.dictionaries.config import DictionaryConfig
from gemma_jax.dictionaries.presets import preset
from gemma_jax.dictionaries.recipe import Recipe
from gemma_jax.models import sites
from trainers import dictionary_members, fields, stores, track
from trainers.dictionary_members import Member

AXES = ("member", "data", "latent")  # of the training's mesh
# Below this many latents for each active one all of them cost less than the
# bookkeeping of a few: benchmarks/dictionary.py --crossover.
SPARSE_FROM = 32
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
  # More of them, for crosscoders: with {"chat": "google/gemma-2-2b-it"} there
  # are sites "chat:blocks.12.resid_post". They must tokenise alike.
  "models": fields.Free,
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


AT_LEAST_1 = (
  "data.train_tokens",
  "data.heldout_tokens",
  "activations.batch_size",
  "activations.buffer_rows",
  "train.steps",
  "train.batch_size",
  "train.steps_per_dispatch",
  "train.members_at_once",
  "train.log_every",
  "train.checkpoint_every",
  "train.keep",
  "eval.splice_tokens",
  "eval.splice_batch_size",
  "eval.latents",
  "eval.contexts",
)


@dataclasses.dataclass(frozen=True)
class Plan:
  """Everything that is known before any long work, checked.

  Attributes:
    config: as given, with sites spelled out.
    models: by their names in sites; the first is "".
    recipe: how the dictionaries are trained.
    members: all dictionaries.
    read: sites of the input.
    write: sites of the output.
    also: sites that are stored besides.
    batch_size: tokens.
    mesh: of the model.
    train_mesh: of the training, over `AXES`.
  """

  config: dict[str, Any]
  models: Mapping[str, models.ModelConfig]
  recipe: Recipe
  members: tuple[Member, ...]
  read: tuple[str, ...]
  write: tuple[str, ...]
  also: tuple[str, ...]
  batch_size: int
  mesh: Mesh
  train_mesh: Mesh

  @property
  def sites(self) -> tuple[str, ...]:
    """Those that are trained on."""
    return tuple(dict.fromkeys(self.read + self.write))

  @property
  def model(self) -> models.ModelConfig:
    """The first model."""
    return self.models[""]

  def captured(self, name: str) -> tuple[str, ...]:
    """A model's harvested sites, in the same order for any that train."""
    owned = map(activations.owner, {*self.sites, *self.also})
    return tuple(sorted(site for model, site in owned if model == name))

  def depth(self, name: str) -> int:
    """Blocks of a model that its harvest runs."""
    return sites.last_layer(self.captured(name), self.models[name])

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
      return asked
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
  config: Mapping[str, Any],
  known: Mapping[str, models.ModelConfig] | None = None,
) -> Plan:
  """Checks a config against its models.

  Args:
    config: with exactly the fields of `FIELDS`.
    known: of every model; None: what the models' names tell.

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
  known = known or {
    name: models.describe(source) for name, source in sources(config).items()
  }
  acts, train = config["activations"], config["train"]
  read, write, also = _sites(config, known)
  if acts["dtype"] not in activations.DTYPES:
    raise ValueError(
      f"activations.dtype {acts['dtype']!r}; expected one of "
      f"{', '.join(activations.DTYPES)}."
    )
  for path in AT_LEAST_1:
    group, name = path.split(".")
    value = config[group][name]
    if value is not None and value < 1:
      raise ValueError(f"{path}={value} must be at least 1.")
  sizes = defaults.of(*(_widths(names, known) for names in (read, write)))
  recipe = _recipe(config)
  members = dictionary_members.of(config, recipe, sizes, read, write)
  batch_size = train["batch_size"] or sizes.batch_size
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
  for group in dictionary_members.grouped(members):
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
    known,
    recipe,
    members,
    read,
    write,
    also,
    batch_size,
    mesh,
    train_mesh,
  )
  _check_sizes(found)
  return found


def _check_sizes(p: Plan) -> None:
  """Raises ValueError for what would only fail after the harvest."""
  train = p.config["train"]
  for member in p.members:
    core.check(member.config, p.recipe)
  if train["sparse"] and not p.sparse:
    raise ValueError(
      "train.sparse=True: the step of activation "
      f"{p.dictionary.activation!r} with recipe.sparsity "
      f"{p.recipe.sparsity!r} needs all latents. Leave train.sparse out."
    )
  wide = max(m.config.width for m in p.members)
  tokens = p.config["data"]["train_tokens"]
  if p.recipe.init == "examples" and tokens < wide:
    raise ValueError(
      f"data.train_tokens={tokens} cannot start {wide} latents, each at an "
      "example. Harvest more, take a narrower dictionary, or "
      "recipe.init='random'."
    )
  counts = p.dictionary.activation == "batchtopk" and (
    not p.sparse or p.recipe.resample_every
  )
  if counts and p.batch_size * wide > np.iinfo(np.int32).max:
    raise ValueError(
      f"train.batch_size={p.batch_size} times dictionary.width={wide} is more "
      "activations than BatchTopK over all latents can count (2^31 - 1). Take "
      "smaller batches, or train.sparse=True without recipe.resample_every."
    )


def sources(config: Mapping[str, Any]) -> dict[str, str]:
  """Where every model comes from, by its name in sites."""
  for name, source in config["models"].items():
    if not (re.fullmatch(r"[\w-]+", name) and isinstance(source, str)):
      raise ValueError(
        f"config.models has {name!r}: {source!r}; expected a short name of "
        "letters and digits, and where the model comes from."
      )
  return {"": config["model"]["name"], **config["models"]}


def _widths(names, known) -> list[int]:
  owned = map(activations.owner, names)
  return [sites.width(site, known[model]) for model, site in owned]


def _sites(config, known) -> list[tuple[str, ...]]:
  """What is read, written and stored besides, spelled out and checked."""
  layer, acts = config["layer"], config["activations"]
  found, where, used = [], {}, set()
  for name in ("read", "write", "also"):
    given = acts[name] or ()
    given = (given,) if isinstance(given, str) else given
    if layer is None and any("{layer}" in site for site in given):
      raise ValueError(f"activations.{name}={acts[name]!r} needs config.layer.")
    spelled = []
    for site in given:
      model, own = activations.owner(site.replace("{layer}", str(layer)))
      if model not in known:
        raise ValueError(
          f"Site {site!r}: config.models has no {model!r}; it has "
          f"{', '.join(filter(None, known)) or 'none'}."
        )
      parsed = sites.parse(own, known[model])
      spelled.append(f"{model}:{parsed}" if model else str(parsed))
      where[spelled[-1]] = model, parsed
      used.add(model)
    found.append(tuple(spelled))
  if unused := set(known) - used:
    raise ValueError(
      f"No site of activations.read is one of {config['model']['name']}."
      if "" in unused
      else f"No site of activations.read begins with '{min(unused)}:'."
    )
  if any(site.layer is None for _, site in where.values()):
    raise ValueError("activations.read and .write name one layer each, not *.")
  read, write, _ = found
  order = sites.NAMES.index
  if len(read) == len(write) == 1:
    (model, a), (other, b) = where[read[0]], where[write[0]]
    if model != other:
      raise ValueError(
        f"activations.read={read[0]} and activations.write={write[0]} are of "
        "two models; a transcoder stays in one."
      )
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
