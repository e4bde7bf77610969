"""Gemma Scope 1: JumpReLU dictionaries of Gemma 2, each a `params.npz`.

The file holds five arrays and no word about the site: that stands in the path,
gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82/params.npz.
"""

import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma_jax.dictionaries.config import DictionaryConfig
from gemma_jax.dictionaries.formats import hooks, npz, tensors
from gemma_jax.dictionaries.formats.convention import (
  Convention,
  Loaded,
  finish,
)

NAME = "gemma_scope"
WEIGHTS = "params.npz"
FILES = (WEIGHTS,)
LAYOUT = {
  "W_enc": "DM",
  "b_enc": "M",
  "W_dec": "ME",
  "b_dec": "E",
  "threshold": "M",
}
# What each kind of repository reads and writes. Transcoders read the MLP's
# normalised input BEFORE the norm's gain; MLP dictionaries sit behind Gemma's
# post-norm, attention's before the output projection.
SITES = {
  "res": ("resid_post", "resid_post"),
  "mlp": ("mlp_out", "mlp_out"),
  "att": ("attn_z", "attn_z"),
  "transcoders": ("mlp_norm", "mlp_out"),
}
EMBEDDING = "blocks.0.resid_pre"
CONVENTION = Convention(
  NAME,
  "arXiv 2408.05147; tensors and scale of the embedding: SAELens 6.54, "
  "loading/pretrained_sae_loaders.py; sites: measured by Neuronpedia, "
  "test_gemma_mlp_sae_hook.py and gemma_transcoder_hook_check.py",
)
# The dictionary of the embedding reads it without Gemma's factor sqrt(D).
OF_EMBEDDING = "embedding: trained without Gemma's factor sqrt(D), folded in"
# How the dictionaries were trained.
METADATA = {"prepend_bos": True, "context_size": 1024}


def read(path: pathlib.Path, site=None) -> Loaded:
  """A `params.npz`, or the directory that holds one.

  Raises:
    FileNotFoundError: there is none.
    ValueError: the path does not tell the site and neither does `site`; or the
      file is damaged or of another format.
  """
  file = tensors.weights(path, WEIGHTS)
  label = parse(file)
  model = label.get("model", "")
  sites = _sites(file, label) if site is None else hooks.pair(site, model)
  found = npz.open_npz(file)
  size = tensors.sizes(file, found, LAYOUT)
  convention = CONVENTION.at(*sites)
  if sites == (EMBEDDING, EMBEDDING):
    convention = convention.at(
      *sites, input_scale=size["D"] ** -0.5, note=OF_EMBEDDING
    )
  params = {name: tensors.array(file, found, name) for name in LAYOUT}
  return finish(
    file,
    convention,
    tensors.fold(params, input_scale=convention.input_scale),
    dtype=found["W_enc"].dtype,
    label=label,
    metadata=METADATA,
    activation="jumprelu",
    k=label.get("l0"),
    model=model,
  )


def parse(file: pathlib.Path) -> dict[str, Any]:
  """What a path says: model, kind, layer, width and l0, where it does."""
  text = file.absolute().as_posix()
  label: dict[str, Any] = {}
  repos = re.findall(
    r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)", text
  )
  if repos:
    size, tuned, kind = repos[-1]
    label["model"] = f"google/gemma-2-{size}" + "-it" * (tuned == "it")
    label["kind"] = kind
  if "/embedding/" in text:
    label["kind"] = "embedding"
  for name, pattern, kind in (
    ("layer", r"/layer_(\d+)(?=/)", int),
    ("width", r"/width_(\w+)(?=/)", str),
    ("l0", r"/average_l0_(\d+(?:\.\d+)?)(?=/)", float),
  ):
    values = re.findall(pattern, text)
    if values:
      label[name] = kind(values[-1])
  return label


def _sites(file, label) -> tuple[str, str]:
  if label.get("kind") == "embedding":
    return EMBEDDING, EMBEDDING
  if "kind" in label and "layer" in label:
    names = SITES[label["kind"]]
    return tuple(f"blocks.{label['layer']}.{name}" for name in names)
  raise ValueError(
    f"{file}: the path does not say what this dictionary reads. Expected one "
    "that ends as gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82; keep "
    "the repository's folders, or pass site='blocks.12.resid_post' "
    "(a transcoder's: site=('blocks.12.mlp_norm', 'blocks.12.mlp_out'))."
  )


def write(
  directory: pathlib.Path,
  cfg: DictionaryConfig,
  params: Mapping[str, np.ndarray],
  provenance: Mapping,
) -> None:
  """Writes params.npz; what the site is must be in the directory's path.

  Raises:
    ValueError: the format cannot hold the dictionary.
  """
  lacks = {
    f"activation {cfg.activation!r}": cfg.activation in ("topk", "gated"),
    "a skip": cfg.skip,
    "layer_norm": cfg.layer_norm,
    "a crosscoder's parts": bool(cfg.parts),
    "the embedding": cfg.read == EMBEDDING,
  }
  for what, there in lacks.items():
    if there:
      raise ValueError(
        f"Format {NAME!r} cannot hold {what}: it is W_enc, b_enc, W_dec, b_dec "
        "and a threshold on activations as they are. Save as 'gemma_jax', or "
        "as 'sae_lens' if it is an SAE."
      )
  arrays = dict(params)
  arrays.setdefault("threshold", np.zeros(cfg.width, np.float32))
  partial = directory / f".{WEIGHTS}.{os.getpid()}"
  with partial.open("wb") as f:
    np.savez(f, **{name: arrays[name] for name in LAYOUT})
  partial.rename(directory / WEIGHTS)
