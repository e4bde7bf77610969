"""dictionary_learning: `ae.pt`, a torch state dict, beside a config.json.

Classes and keys: dictionary_learning 0.1.0, dictionary.py and
trainers/{top_k,batch_top_k,matryoshka_batch_top_k}.py. Torch reads the file,
with `weights_only`; it is needed for nothing else. Latents keep the scale of
the file: the library's own loader of AutoEncoder makes decoder rows unit-norm.
"""

import math
import pathlib
import re
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

from gemma_jax.dictionaries.formats import hooks, npz, tensors
from gemma_jax.dictionaries.formats.convention import (
  Convention,
  Loaded,
  finish,
)

NAME = "dictionary_learning"
CONFIG = "config.json"
WEIGHTS = "ae.pt"
FILES = (WEIGHTS, "ae_*.pt")
_LINEAR = {
  "encoder.weight": "MD",
  "encoder.bias": "M",
  "decoder.weight": "DM",
}
_PLAIN = {"W_enc": "DM", "b_enc": "M", "W_dec": "MD", "b_dec": "D"}
_TOPK = _LINEAR | {"b_dec": "D", "k": "", "threshold": ""}
# class -> our activation, and the layout of its tensors.
CLASSES = {
  "AutoEncoder": ("relu", _LINEAR | {"bias": "D"}),
  "AutoEncoderNew": ("relu", _LINEAR | {"decoder.bias": "D"}),
  "AutoEncoderTopK": ("topk", _TOPK),
  "BatchTopKSAE": ("batchtopk", _TOPK),
  "MatryoshkaBatchTopKSAE": (
    "batchtopk",
    _PLAIN | {"k": "", "threshold": "", "group_sizes": "G"},
  ),
  "GatedAutoEncoder": (
    "gated",
    {
      "encoder.weight": "MD",
      "decoder.weight": "DM",
      "decoder_bias": "D",
      "r_mag": "M",
      "gate_bias": "M",
      "mag_bias": "M",
    },
  ),
  "JumpReluAutoEncoder": ("jumprelu", _PLAIN | {"threshold": "M"}),
}
# These read their input as it is; all others subtract the decoder's bias.
WITHOUT_B_DEC = ("AutoEncoderNew", "JumpReluAutoEncoder")
OURS = {
  "encoder.weight": "W_enc",
  "encoder.bias": "b_enc",
  "decoder.weight": "W_dec",
  "decoder.bias": "b_dec",
  "bias": "b_dec",
  "decoder_bias": "b_dec",
  "gate_bias": "b_enc",
  "mag_bias": "b_mag",
}
NUMBERS = ("k", "threshold", "group_sizes")  # which are no weights
CONVENTION = Convention(
  NAME,
  "config.json; dictionary_learning 0.1.0, dictionary.py and trainers/. The "
  "training's input scale is folded into biases and thresholds on saving",
)
FALLBACK = (
  "threshold < 0, never estimated: the k largest of every token, as the class "
  "does in training"
)


def read(path: pathlib.Path, site=None) -> Loaded:
  """A trainer's directory, its `ae.pt`, or one of its checkpoints.

  Raises:
    FileNotFoundError: one of the two files is missing.
    ModuleNotFoundError: torch is not installed.
    ValueError: a class that is not supported, or files that are damaged or
      contradict each other.
  """
  file = tensors.weights(path, WEIGHTS)
  cfg_file = file.with_name(CONFIG)
  if file.parent.name == "checkpoints" and not cfg_file.exists():
    cfg_file = file.parent.with_name(CONFIG)
  fields = tensors.read_json(cfg_file)
  trainer = tensors.field(cfg_file, fields, "trainer", dict)
  buffer = tensors.field(cfg_file, fields, "buffer", dict, {})
  kind = tensors.field(cfg_file, trainer, "dict_class", str)
  if kind not in CLASSES:
    raise ValueError(
      f"{cfg_file}: dict_class {kind!r} is not supported; expected one of "
      f"{', '.join(CLASSES)}. Others run in dictionary_learning alone."
    )
  activation, layout = CLASSES[kind]
  known = {
    letter: (size, f"{CONFIG}'s {name}")
    for letter, name in (("D", "activation_dim"), ("M", "dict_size"))
    if (size := tensors.field(cfg_file, trainer, name, int, None))
  }
  found = open_torch(file)
  size = tensors.sizes(
    file, found, layout, optional=("k", "threshold"), known=known
  )
  params = {}
  for name in layout:
    if name in found and (name not in NUMBERS or layout[name] == "M"):
      x = tensors.array(file, found, name)
      params[OURS.get(name, name)] = x.T if name.endswith(".weight") else x
  k = _k(cfg_file, trainer, found)
  note = ""
  if activation == "batchtopk":
    threshold = -1.0
    if "threshold" in found:
      threshold = float(tensors.array(file, found, "threshold"))
    if threshold < 0:
      activation, note = "topk", FALLBACK
    else:
      params["threshold"] = np.full(size["M"], threshold, np.float32)
  subtracts = kind not in WITHOUT_B_DEC
  model = tensors.field(cfg_file, trainer, "lm_name", str, "")
  convention = CONVENTION.at(
    *_sites(cfg_file, trainer, buffer, site, model),
    subtracts_b_dec=subtracts,
    note=note,
  )
  metadata = {"dict_class": kind, "model_name": model}
  if "ctx_len" in buffer:
    metadata["context_size"] = buffer["ctx_len"]
  return finish(
    file,
    convention,
    tensors.fold(params, subtracts_b_dec=subtracts),
    dtype=found[next(iter(layout))].dtype,
    metadata=metadata,
    prefix_widths=_prefixes(file, found, size),
    activation=activation,
    k=k,
    model=model,
  )


def _k(file, trainer, found):
  """k, or what is aimed at, or None."""
  given = tensors.field(file, trainer, "k", (int, float), None)
  if "k" in found:
    stored = int(found["k"])
    if given not in (None, stored):
      raise ValueError(
        f"{file} says k={given}, and the weights k={stored}. {tensors.AGAIN}"
      )
    return stored
  return given or tensors.field(file, trainer, "target_l0", (int, float), None)


def _prefixes(file, found, size) -> tuple[int, ...]:
  if "group_sizes" not in found:
    return ()
  groups = np.asarray(found["group_sizes"])
  if groups.dtype.kind not in "iu" or groups.sum() != size["M"]:
    raise ValueError(
      f"{file}: group_sizes {groups.tolist()} must be integers that add up to "
      f"the width, {size['M']}. {tensors.AGAIN}"
    )
  return tuple(int(end) for end in np.cumsum(groups))


def _sites(file, trainer, buffer, site, model) -> tuple[str, str]:
  """Our sites; blank where the submodule's name is the trainer's own."""
  if site is not None:
    return hooks.pair(site, model)
  name = tensors.field(file, trainer, "submodule_name", str, "")
  match = re.fullmatch(r"(resid_post|resid_pre|mlp_out)_layer_(\d+)", name)
  if match is None or buffer.get("io", "out") != "out":
    return "", ""
  read_site = f"blocks.{match[2]}.{match[1]}"
  return read_site, read_site


def open_torch(file: pathlib.Path) -> dict[str, np.ndarray]:
  """All tensors of a state dict, as views.

  Raises:
    ModuleNotFoundError: torch is not installed.
    ValueError: not what torch >= 1.6 saves, damaged, or more than tensors.
  """
  try:
    import torch
  except ModuleNotFoundError as e:
    raise ModuleNotFoundError(
      f"{file} is a PyTorch file, which needs torch to be read; it is not "
      "installed. pip install torch --index-url "
      "https://download.pytorch.org/whl/cpu, or convert it to safetensors."
    ) from e
  bad = f"{file} is no complete PyTorch file of tensors"
  try:
    with zipfile.ZipFile(file) as archive:
      claimed = sum(info.file_size for info in archive.infolist())
  except (zipfile.BadZipFile, EOFError) as e:
    raise ValueError(f"{bad} ({e}). {tensors.AGAIN}") from e
  if claimed > npz.MAX_EXPANSION * file.stat().st_size + npz.SLACK:
    raise ValueError(
      f"{file} has {file.stat().st_size} bytes and claims to unpack to "
      f"{claimed}. It is no file of weights: do not use it."
    )
  try:
    state = torch.load(file, map_location="cpu", weights_only=True)
  except Exception as e:  # torch raises what its parts raise
    raise ValueError(
      f"{bad} ({type(e).__name__}: {str(e).splitlines()[0]}). Files that hold "
      f"other objects are not read: they could run code. {tensors.AGAIN}"
    ) from e
  if not isinstance(state, dict):
    raise ValueError(f"{bad}: it holds a {type(state).__name__}.")
  return {str(name): _view(file, name, x) for name, x in state.items()}


def _view(file, name, x: Any) -> np.ndarray:
  import torch

  plain = isinstance(x, torch.Tensor) and x.layout == torch.strided
  if not plain or x.is_quantized or x.device.type != "cpu":
    raise ValueError(
      f"{file}: {name} is a {type(x).__name__}; expected a plain tensor."
    )
  # Strides of 0 make much of little.
  if math.prod(x.shape) * x.element_size() > x.untyped_storage().nbytes():
    raise ValueError(
      f"{file}: {name} of shape {list(x.shape)} is larger than what is stored "
      f"of it. {tensors.AGAIN}"
    )
  x = x.detach()
  if x.dtype == torch.bfloat16:  # which NumPy lacks
    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
  return x.numpy()
