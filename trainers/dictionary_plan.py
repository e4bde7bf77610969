"""What a dictionary run may be asked, and what it will cost."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from gemma_jax import activations, dictionaries, models
from gemma_jax.activations import normalise
from gemma_jax.dictionaries.config import DictionaryConfig
from gemma_jax.models import sites
from trainers import fields, track

OPTIONAL = (list, tuple, type(None))
FIELDS = {
  "job": str,
  "seed": int,  # of the initial latents and of the order of the batches
  "model": {
    "name": str,  # see gemma_jax.load_model
    "dtype": (str, type(None)),  # None: float32 on CPUs, else bfloat16
  },
  "mesh": {"data": int, "fsdp": int, "tensor": int},
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
    "read": str,  # site of the input
    "write": str,  # site to reconstruct
    "dtype": str,  # in the store
    "batch_size": (int, type(None)),  # windows at once; None: what fits
    "buffer_rows": int,  # tokens shuffled in memory
  },
  "dictionary": {
    "width": int,  # M
    "activation": str,  # "topk" or "batchtopk"
    "k": float,
    "prefix_widths": OPTIONAL,  # nested widths, or
    "group_sizes": OPTIONAL,  # sizes of the groups
    "skip": bool,
    "aux_k": int,
    "aux_candidates": int,
    "aux_coefficient": float,
    "dead_after": int,  # tokens
    "threshold_decay": float,
  },
  "train": {
    "steps": int,
    "batch_size": int,  # tokens
    "learning_rate": float,
    "skip_learning_rate": float,  # times learning_rate
    "warmup_fraction": float,  # of the steps, linear from 0
    "decay_fraction": float,  # of the steps, linear to 0 at the end
    "beta1": float,
    "beta2": float,
    "epsilon": float,
    "normalise": str,  # x, by one of gemma_jax.activations.normalise.KINDS
    "whiten_epsilon": float,  # shrinkage of the kinds that whiten
    "init": str,  # "examples" or "random"
    "encoder_norm": float,
    "decoder_norm": float,
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
class Plan:
  """Everything that is known before any long work, checked."""

  config: dict[str, Any]
  model: models.ModelConfig
  dictionary: DictionaryConfig
  mesh: Mesh
  depth: int  # blocks that the harvest runs

  @property
  def dtype(self) -> str:
    """Of the model's parameters and compute."""
    default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return self.config["model"]["dtype"] or default


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
  where = {n: sites.parse(acts[n], model) for n in ("read", "write")}
  if any(site.layer is None for site in where.values()):
    raise ValueError("activations.read and .write name one layer each, not *.")
  read, write = where["read"], where["write"]
  order = sites.NAMES.index
  if read.layer != write.layer or order(read.name) > order(write.name):
    raise ValueError(
      f"activations.read={acts['read']} and activations.write={acts['write']} "
      "must be in one block, what is read not after what is written. In "
      f"order: {', '.join(sites.NAMES)}."
    )
  if acts["dtype"] not in activations.DTYPES:
    raise ValueError(
      f"activations.dtype {acts['dtype']!r}; expected one of "
      f"{', '.join(activations.DTYPES)}."
    )
  if train["init"] not in ("examples", "random"):
    raise ValueError(
      f"train.init {train['init']!r}; expected 'examples' or 'random'."
    )
  if train["normalise"] not in normalise.KINDS:
    raise ValueError(
      f"train.normalise {train['normalise']!r}; expected one of "
      f"{', '.join(normalise.KINDS)}."
    )
  for name in ("steps", "batch_size", "log_every", "checkpoint_every", "keep"):
    if train[name] < 1:
      raise ValueError(f"train.{name}={train[name]} must be at least 1.")
  if train["batch_size"] > config["data"]["train_tokens"]:
    raise ValueError(
      f"data.train_tokens={config['data']['train_tokens']} is less than one "
      f"batch of train.batch_size={train['batch_size']} tokens."
    )
  wide = {"attn_z": model.num_heads * model.head_dim}
  wide["mlp_hidden"] = model.mlp_width
  own = dict(config["dictionary"])
  own["prefix_widths"] = dictionaries.prefix_widths(
    own["width"],
    prefix_widths=own["prefix_widths"],
    group_sizes=own.pop("group_sizes"),
  )
  dictionary = DictionaryConfig(
    **own,
    d_in=wide.get(where["read"].name, model.width),
    d_out=wide.get(where["write"].name, model.width),
    read=acts["read"],
    write=acts["write"],
    model=config["model"]["name"],
  )
  mesh = models.make_mesh(config["mesh"])
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  if train["batch_size"] % ways or (acts["batch_size"] or 0) % ways:
    raise ValueError(
      f"train.batch_size={train['batch_size']} and activations.batch_size="
      f"{acts['batch_size']} must be multiples of the {ways} devices on the "
      "mesh's data and fsdp axes."
    )
  split = mesh.shape["fsdp"] * mesh.shape["tensor"]
  if dictionary.width % split:
    raise ValueError(
      f"dictionary.width={dictionary.width} does not divide over the {split} "
      "devices of the mesh's fsdp and tensor axes."
    )
  depth = sites.last_layer((acts["read"], acts["write"]), model)
  return Plan(dict(config), model, dictionary, mesh, depth)
