"""Our own format: a folded dictionary, its config and its provenance."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping

import numpy as np

from gemma_jax.dictionaries import config as config_lib
from gemma_jax.dictionaries.config import DictionaryConfig
from gemma_jax.dictionaries.formats import hooks, tensors
from gemma_jax.dictionaries.formats.convention import Loaded
from gemma_jax.models import safetensors

NAME = "gemma_jax"
CONFIG = "dictionary.json"
WEIGHTS = "dictionary.safetensors"
FILES = (CONFIG, WEIGHTS)


def read(path: pathlib.Path, site=None) -> Loaded:
  """What `write` wrote; `site` replaces its sites.

  Raises:
    FileNotFoundError: one of the two files is missing.
    ValueError: the config or the weights are damaged, or do not fit.
  """
  directory = path.parent if path.is_file() else path
  file = directory / CONFIG
  fields = tensors.read_json(file)
  provenance = tensors.field(file, fields, "provenance", dict, {})
  fields.pop("provenance", None)
  try:
    cfg = config_lib.from_dict(fields)
    if site is not None:
      read_site, write_site = hooks.pair(site, cfg.model)
      cfg = dataclasses.replace(cfg, read=read_site, write=write_site)
  except (ValueError, TypeError) as e:
    raise ValueError(f"{file}: {e}") from e
  if not (directory / WEIGHTS).exists():
    raise FileNotFoundError(
      f"{directory} has a {CONFIG} and no {WEIGHTS}. Copy it there too."
    )
  found = safetensors.open_file(directory / WEIGHTS)
  shapes = {name: x.shape for name, x in found.items()}
  if shapes != cfg.shapes():
    raise ValueError(
      f"{directory / WEIGHTS} holds {shapes}; {CONFIG} says {cfg.shapes()}. "
      "Copy both files of one dictionary."
    )
  params = {
    name: tensors.array(directory / WEIGHTS, found, name) for name in found
  }
  return Loaded(cfg, params, provenance)


def write(
  directory: pathlib.Path,
  cfg: DictionaryConfig,
  params: Mapping[str, np.ndarray],
  provenance: Mapping,
) -> None:
  """Writes dictionary.json and dictionary.safetensors."""
  fields = dataclasses.asdict(cfg) | {"provenance": dict(provenance)}
  text = json.dumps(fields, indent=2)
  safetensors.write_file(directory / WEIGHTS, params)
  (directory / CONFIG).write_text(text)
