"""From text to stores of activations, as every job needs them."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gemma_jax import activations, data, metrics, models


def windows(
  config: Mapping[str, Any],
  directory: pathlib.Path,
  model: models.ModelConfig,
) -> dict[str, data.WindowStream]:
  """Token windows of both sides of the split, "train" and "heldout".

  Args:
    config: `data` of a job's config.
    directory: of the model, with its tokenizer.
    model: its config.

  Raises:
    FileNotFoundError: the model has no tokenizer.
  """
  tokenizer = models.load_tokenizer(directory)
  if tokenizer is None:
    raise FileNotFoundError(
      f"{directory} has no tokenizer.json; text cannot be tokenised. Put the "
      "model's tokenizer beside its weights."
    )
  sides = data.split(
    data.load(config["corpus"]),
    heldout_fraction=config["heldout_fraction"],
    seed=config["seed"],
  )
  return {
    name: data.WindowStream(
      side,
      tokenizer.backend_tokenizer,
      seed=config["seed"],
      max_tokens=config[f"{name}_tokens"],
      bos_id=model.bos_id,
      pad_id=model.pad_id,
      special_ids=model.eos_ids,
      **{
        option: config[option]
        for option in (
          "context",
          "packing",
          "bos",
          "stride",
          "allocation",
          "document_tokens",
        )
      },
    )
    for name, side in zip(("train", "heldout"), sides, strict=True)
  }


def default_dtype(asked: str | None) -> str:
  """Of a model's parameters and compute, where a config leaves it open."""
  default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  return asked or default


def splice(
  model: models.Model,
  windows: data.Windows,
  config: Mapping[str, Any],
  replacements: Mapping[str, Callable],
  *,
  read: str,
  write: str,
) -> metrics.SpliceLosses:
  """`metrics.splice_losses` over as many windows as hold `splice_tokens`.

  Args:
    model: with all its layers.
    windows: held-out.
    config: `eval` of a job's config.
    replacements: see there.
    read: see there.
    write: see there.
  """
  enough = np.cumsum(windows.mask.sum(1)) >= config["splice_tokens"]
  count = int(np.argmax(enough)) + 1 if enough.any() else len(enough)
  ways = model.mesh.shape["data"] * model.mesh.shape["fsdp"]
  return metrics.splice_losses(
    model,
    windows.tokens[:count],
    windows.mask[:count],
    replacements,
    read=read,
    write=write,
    batch_size=-(-config["splice_batch_size"] // ways) * ways,
    document=windows.document[:count],
  )


def harvest(
  streams: Mapping[str, data.WindowStream],
  directory: pathlib.Path,
  capture: Sequence[str],
  config: Mapping[str, Any],
  *,
  mesh: Mesh,
  dtype: str,
  depth: int,
) -> dict[str, activations.ActivationStore]:
  """A store for each stream; the model is loaded if one is incomplete.

  Args:
    streams: of `windows`.
    directory: of the model.
    capture: sites.
    config: `dtype` of the stores and `batch_size` of the forward passes.
    mesh: of the model.
    dtype: of its parameters.
    depth: blocks that are run.
  """
  stores, model = {}, None
  for name, side in streams.items():
    path = activations.store_path(
      directory, side, capture, dtype=config["dtype"], compute_dtype=dtype
    )
    if not activations.is_complete(path) and model is None:
      model = models.load_model(directory, dtype=dtype, mesh=mesh, layers=depth)
    stores[name] = activations.harvest(
      model,
      side,
      capture,
      path,
      batch_size=config["batch_size"],
      dtype=config["dtype"],
    )
  return stores
