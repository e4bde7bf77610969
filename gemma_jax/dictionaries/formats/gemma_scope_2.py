"""Gemma Scope 2: dictionaries of Gemma 3, safetensors beside a config.json.

One layer: `params.safetensors`. Several: `params_layer_{i}.safetensors`, one
for each layer that is read. Hook strings are Hugging Face's and are meant
literally: the output of a norm has its gain in it, unlike in Gemma Scope 1.
"""

import pathlib
import re

import numpy as np

from gemma_jax.dictionaries.formats import hooks, tensors
from gemma_jax.dictionaries.formats.convention import (
  Convention,
  Loaded,
  finish,
)
from gemma_jax.models import safetensors

NAME = "gemma_scope_2"
CONFIG = "config.json"
WEIGHTS = "params.safetensors"
LAYERS = "params_layer_*.safetensors"
FILES = (WEIGHTS, LAYERS)
SKIP = "affine_skip_connection"
LAYOUT = {
  "w_enc": "DM",
  "b_enc": "M",
  "w_dec": "ME",
  "b_dec": "E",
  "threshold": "M",
  SKIP: "DE",
}
# R: the layers that are read and written.
LAYOUT_OF_MANY = LAYOUT | {"w_dec": "MRD", "b_dec": "D", SKIP: "DD"}
OURS = {"w_enc": "W_enc", "w_dec": "W_dec", SKIP: "W_skip"}
CONVENTION = Convention(
  NAME,
  "config.json of huggingface.co/google/gemma-scope-2-*; tensors: "
  "circuit-tracer 196e2ce, transcoder/single_layer_transcoder.py, and "
  "JumpReLUMultiLayerSAE of the release's tutorial",
  skip="x @ A",
)
METADATA = {"prepend_bos": True, "context_size": 1024}


def read(path: pathlib.Path, site=None) -> Loaded:
  """A folder of the release, or a `params.safetensors` in one.

  Raises:
    FileNotFoundError: weights or config.json are missing.
    ValueError: a cross-layer transcoder; a hook that is no site of ours; or
      files that are damaged or contradict each other.
  """
  folder = path if path.is_dir() else path.parent
  fields = {}
  if site is None or (folder / CONFIG).exists():
    fields = tensors.read_json(folder / CONFIG)
  config = _Config(folder / CONFIG, fields)
  if config.kind == "clt":
    raise ValueError(
      f"{folder} is a cross-layer transcoder: its latents write to every later "
      "layer, one encoder to a layer, which is no dictionary of one input and "
      "one output. Load a transcoder of single layers, or a crosscoder."
    )
  many = sorted(folder.glob(LAYERS))
  if many and (path.is_dir() or path in many):
    return _crosscoder(folder, many, config, site)
  file = tensors.weights(path, WEIGHTS)
  found = safetensors.open_file(file)
  tensors.sizes(file, found, LAYOUT, optional=(SKIP,), known=config.known())
  config.check_skip(SKIP in found)
  sites = config.sites() if site is None else hooks.pair(site, "gemma")
  params = {
    OURS.get(name, name): tensors.array(file, found, name) for name in found
  }
  return config.finish(file, sites, params, found["w_enc"].dtype)


class _Config:
  """The fields of config.json that matter, checked."""

  def __init__(self, file, fields):
    def get(name, kinds, default):
      return tensors.field(file, fields, name, kinds, default)

    self.file = file
    self.kind = get("type", str, "")
    self.l0 = get("l0", (int, float), None)
    self.width = get("width", int, None)
    self.affine = get("affine_connection", bool, None)
    self.hook_in = get("hf_hook_point_in", str, "")
    self.hook_out = get("hf_hook_point_out", str, self.hook_in)
    self.model = get("model_name", str, "")
    architecture = get("architecture", str, "jump_relu")
    if architecture != "jump_relu":
      raise ValueError(
        f"{file}: architecture {architecture!r} is unknown; expected "
        "'jump_relu', as all of Gemma Scope 2."
      )

  def known(self):
    return {} if self.width is None else {"M": (self.width, CONFIG)}

  def check_skip(self, there):
    if self.affine is not None and self.affine != there:
      raise ValueError(
        f"{self.file} says affine_connection={self.affine}, and the weights "
        f"hold {'a' if there else 'no'} {SKIP}. {tensors.AGAIN}"
      )

  def sites(self):
    sites = tuple(
      hooks.to_ours(hook, "gemma") for hook in (self.hook_in, self.hook_out)
    )
    if not all(sites):
      raise ValueError(
        f"{self.file} names the hooks {self.hook_in!r} and {self.hook_out!r}, "
        "which are not both sites of ours. Pass site=(what it reads, what it "
        "writes)."
      )
    return sites

  def finish(self, file, sites, params, dtype, **fields):
    return finish(
      file,
      CONVENTION.at(*sites),
      params,
      dtype=dtype,
      metadata=METADATA
      | {"hf_hook_name": self.hook_in, "hf_hook_name_out": self.hook_out},
      activation="jumprelu",
      k=self.l0,
      model=self.model,
      **fields,
    )


def _crosscoder(folder, files, config, site) -> Loaded:
  """Latents of layer i read layer i, and write to all of the layers.

  As one dictionary of the joined layers: encoders and skips on the diagonal.
  """
  if config.kind not in ("", "crosscoder"):
    raise ValueError(
      f"{config.file} says type {config.kind!r} of a folder of {LAYERS}; "
      f"expected 'crosscoder'. {tensors.AGAIN}"
    )
  names = {f"params_layer_{i}.safetensors" for i in range(len(files))}
  if {file.name for file in files} != names:
    raise FileNotFoundError(
      f"{folder} holds {', '.join(f.name for f in files)}; expected layers 0 "
      "to the number of layers less 1. Download all."
    )
  if site is None:
    read_site = write_site = _joined(config, len(files))
  else:
    read_site, write_site = hooks.pair(site, "gemma")
  parts, known, width = [], {"R": (len(files), "the number of files")}, 0
  for i in range(len(files)):
    file = folder / f"params_layer_{i}.safetensors"
    found = safetensors.open_file(file)
    size = tensors.sizes(
      file, found, LAYOUT_OF_MANY, optional=(SKIP,), known=known
    )
    known["D"] = (size["D"], "the other layers' files")
    config.check_skip(SKIP in found)
    width += size["M"]
    parts.append((file, found))
  if config.width not in (None, width):
    raise ValueError(
      f"{config.file} says width {config.width}; the files hold {width} "
      f"latents together. {tensors.AGAIN}"
    )
  d, n = known["D"][0], len(files)
  if {SKIP in found for _, found in parts} == {True, False}:
    raise ValueError(f"{folder}: some layers have a {SKIP}, some have none.")
  params = {
    "W_enc": np.zeros((n * d, width), np.float32),
    "b_enc": _joined_arrays(parts, "b_enc"),
    "W_dec": _joined_arrays(parts, "w_dec").reshape(width, n * d),
    "b_dec": _joined_arrays(parts, "b_dec"),
    "threshold": _joined_arrays(parts, "threshold"),
  }
  if SKIP in parts[0][1]:
    params["W_skip"] = np.zeros((n * d, n * d), np.float32)
  start = 0
  for i, (file, found) in enumerate(parts):
    rows = slice(i * d, (i + 1) * d)
    encoder = tensors.array(file, found, "w_enc")
    params["W_enc"][rows, start : start + encoder.shape[1]] = encoder
    start += encoder.shape[1]
    if SKIP in found:
      params["W_skip"][rows, rows] = tensors.array(file, found, SKIP)
  return config.finish(
    files[0],
    (read_site, write_site),
    params,
    parts[0][1]["w_enc"].dtype,
    parts=(d,) * n,
  )


def _joined_arrays(parts, name):
  return np.concatenate([tensors.array(*part, name) for part in parts])


def _joined(config, count) -> str:
  """Our sites of "model.layers.{7,13,17,22}.output", joined."""
  match = re.fullmatch(r"(.*)\{([\d,]+)\}(.*)", config.hook_in)
  layers = match[2].split(",") if match else []
  site = ""
  if len(layers) == count and config.hook_in == config.hook_out:
    site = "+".join(f"{match[1]}{layer}{match[3]}" for layer in layers)
    site = hooks.to_ours(site, "gemma")
  if not site:
    raise ValueError(
      f"{config.file} names the hooks {config.hook_in!r} and "
      f"{config.hook_out!r}; expected one list of {count} layers, as there are "
      "files, such as 'model.layers.{7,13,17,22}.output', for both."
    )
  return site
