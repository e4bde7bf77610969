"""circuit-tracer: a transcoder for each layer, beside one config.yaml.

Formulas and keys: circuit-tracer (safety-research/circuit-tracer 196e2ce),
transcoder/single_layer_transcoder.py and utils/hf_utils.py.
"""

import pathlib
import re
from typing import Any

import numpy as np
import yaml  # comes with ml_collections

from gemma_jax.dictionaries.formats import hooks, tensors
from gemma_jax.dictionaries.formats.convention import (
  Convention,
  Loaded,
  finish,
)
from gemma_jax.models import safetensors

NAME = "circuit_tracer"
CONFIG = "config.yaml"
FILES = ("layer_*.safetensors", "W_enc_*.safetensors")
THRESHOLD = "activation_function.threshold"
LAYOUT = {
  "W_enc": "MD",
  "W_dec": "MD",
  "b_enc": "M",
  "b_dec": "D",
  THRESHOLD: "M",
  "W_skip": "DD",
  "k": "",
}
CONVENTION = Convention(
  NAME,
  "config.yaml; circuit-tracer 196e2ce, transcoder/single_layer_transcoder.py",
  note="circuit-tracer sets latents of a text's first position to 0, and keeps "
  "negative ones among the k of its top-k, which are 0 here",
)


def read(path: pathlib.Path, site=None) -> Loaded:
  """One layer: its `layer_{i}.safetensors`, or a folder with only one.

  Raises:
    FileNotFoundError: weights or config.yaml are missing.
    ValueError: several layers, a cross-layer transcoder, or files that are
      damaged or contradict each other.
  """
  folder = path if path.is_dir() else path.parent
  cfg_file = folder / CONFIG
  cfg = _read_yaml(cfg_file)
  kind = tensors.field(cfg_file, cfg, "model_kind", str, "transcoder_set")
  if kind != "transcoder_set":
    raise ValueError(
      f"{cfg_file}: model_kind {kind!r} cannot be loaded; expected "
      "'transcoder_set'. The latents of a cross-layer transcoder write to "
      "every later layer, which is no dictionary of one input and one output."
    )
  file = path if path.is_file() else _only(folder)
  match = re.fullmatch(r"layer_(\d+)\.safetensors", file.name)
  if match is None and site is None:
    raise ValueError(
      f"{file} does not say its layer; expected layer_{{i}}.safetensors. "
      "Rename it, or pass site=(what it reads, what it writes)."
    )
  found = safetensors.open_file(file)
  threshold = found.get(THRESHOLD)
  if threshold is not None and threshold.size == 1:  # one for all latents
    shape = np.shape(found.get("b_enc", threshold))
    found[THRESHOLD] = np.broadcast_to(threshold.reshape(()), shape)
  tensors.sizes(file, found, LAYOUT, optional=(THRESHOLD, "W_skip", "k"))
  activation, k = _activation(cfg_file, cfg, found)
  model = tensors.field(cfg_file, cfg, "model_name", str, "")
  if site is None:
    sites = _sites(cfg_file, cfg, int(match[1]), model)
  else:
    sites = hooks.pair(site, model)
  params = {
    name.rsplit(".", 1)[-1]: tensors.array(file, found, name)
    for name in found
    if name != "k"
  }
  for name in ("W_enc", "W_skip"):
    if name in params:
      params[name] = params[name].T
  convention = CONVENTION.at(
    *sites, skip="x @ A.T" if "W_skip" in params else ""
  )
  return finish(
    file,
    convention,
    params,
    dtype=found["W_enc"].dtype,
    metadata={"model_name": model},
    activation=activation,
    k=k,
    model=model,
  )


def _read_yaml(file) -> dict[str, Any]:
  try:
    cfg = yaml.safe_load(tensors.read_text(file))
  except (yaml.YAMLError, ValueError, RecursionError) as e:
    raise ValueError(f"{file} is no YAML ({e}). {tensors.AGAIN}") from e
  if not isinstance(cfg, dict):
    raise ValueError(
      f"{file} holds a {type(cfg).__name__}, expected a mapping. "
      f"{tensors.AGAIN}"
    )
  return cfg


def _only(folder) -> pathlib.Path:
  files = sorted(folder.glob(FILES[0]))
  if len(files) != 1:
    raise ValueError(
      f"{folder} holds {len(files)} layers; a dictionary is one of them. Pass "
      f"its file, such as {folder / 'layer_0.safetensors'}."
    )
  return files[0]


def _activation(file, cfg, found):
  """(ours, k) from the config's word and the tensors."""
  name = tensors.field(file, cfg, "activation", str, "")
  if name == "topk":
    k = tensors.field(file, cfg, "k", int, None)
    if k is None and "k" in found:
      k = int(found["k"])
    if k is None or THRESHOLD in found:
      raise ValueError(
        f"{file}: activation 'topk' needs k and no thresholds; got k={k}. "
        f"{tensors.AGAIN}"
      )
    return name, k
  if name == "relu" and THRESHOLD in found:
    raise ValueError(
      f"{file} says activation 'relu', and the weights hold thresholds. "
      f"{tensors.AGAIN}"
    )
  return "jumprelu" if THRESHOLD in found else "relu", None


def _sites(file, cfg, layer, model):
  sites = []
  for name in ("feature_input_hook", "feature_output_hook"):
    hook = tensors.field(file, cfg, name, str)
    sites.append(hooks.to_ours(f"blocks.{layer}.{hook}", model))
    if not sites[-1]:
      raise ValueError(
        f"{file}: {name} {hook!r} is no site of ours. Pass site=(what it "
        "reads, what it writes)."
      )
  return sites
