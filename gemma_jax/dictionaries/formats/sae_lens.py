"""SAELens: cfg.json and sae_weights.safetensors, of version 6 and before.

Formulas and names: SAELens 6.54, saes/sae.py, saes/transcoder.py,
saes/topk_sae.py and loading/pretrained_sae_loaders.py.
"""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma_jax.dictionaries.config import DictionaryConfig
from gemma_jax.dictionaries.formats import hooks, tensors
from gemma_jax.dictionaries.formats.convention import (
  Convention,
  Loaded,
  finish,
)
from gemma_jax.models import safetensors

NAME = "sae_lens"
CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
SCALER = "activation_scaler.json"
FILES = (WEIGHTS,)
VERSION = "6.0.0"  # of the layout that `write` writes
# architecture -> our activation, whether it is a transcoder, and has a skip.
ARCHITECTURES = {
  "standard": ("relu", False, False),
  "gated": ("gated", False, False),
  "topk": ("topk", False, False),
  "jumprelu": ("jumprelu", False, False),
  "transcoder": ("relu", True, False),
  "skip_transcoder": ("relu", True, True),
  "jumprelu_transcoder": ("jumprelu", True, False),
  "jumprelu_skip_transcoder": ("jumprelu", True, True),
}
CONVENTION = Convention(
  NAME, "cfg.json; SAELens 6.54, saes/sae.py and saes/transcoder.py"
)
# Why an input normalisation cannot be loaded.
REFUSED = {
  "constant_norm_rescale": (
    "divides every token by its own norm, which no weights can do"
  ),
  "expected_average_only_in": (
    "multiplies the input by a factor that is not in the folder. Put it there "
    f'as {SCALER}, {{"scaling_factor": ...}} (sqrt(d_in) over the mean norm '
    "of the training activations), or save the final SAE with SAELens, which "
    "folds it"
  ),
  "covariance_whitening": (
    "whitens the input by a matrix that is not in the weights. Save the final "
    "SAE with SAELens, which folds it"
  ),
}


def read(path: pathlib.Path, site=None) -> Loaded:
  """A directory that SAELens saved.

  Folded: b_dec where it is subtracted from the input; decoder norms that rank
  top-k; a fixed input scale; a finetuning scale, into the decoder.

  Raises:
    FileNotFoundError: one of the two files is missing.
    ValueError: an architecture or normalisation that is not supported, or
      files that are damaged or contradict each other.
  """
  folder = path if path.is_dir() else path.parent
  file, cfg_file = tensors.weights(path, WEIGHTS), folder / CONFIG
  cfg = _upgrade(cfg_file, tensors.read_json(cfg_file))
  activation, transcoder, skip = _architecture(cfg_file, cfg)
  metadata = tensors.field(cfg_file, cfg, "metadata", dict, {})
  subtracts = tensors.field(
    cfg_file, cfg, "apply_b_dec_to_input", bool, not transcoder
  )
  if transcoder and subtracts:
    raise ValueError(
      f"{cfg_file}: apply_b_dec_to_input is true of a transcoder, whose b_dec "
      f"belongs to the output. {tensors.AGAIN}"
    )
  scale, layer_norm = _normalisation(folder, cfg, transcoder)
  found = safetensors.open_file(file)
  _check(file, cfg, found, activation, transcoder, skip)
  params = {name: tensors.array(file, found, name) for name in found}
  params = _own(cfg_file, cfg, params)
  k = None
  if activation == "topk":
    k = tensors.field(cfg_file, cfg, "k", int)
    if tensors.field(
      cfg_file, cfg, "rescale_acts_by_decoder_norm", bool, False
    ):
      norms = np.linalg.norm(params["W_dec"], axis=1)
      norms = np.maximum(norms, 1e-12)
      params["W_enc"] = params["W_enc"] * norms
      params["b_enc"] = params["b_enc"] * norms
      params["W_dec"] = params["W_dec"] / norms[:, None]
  convention = CONVENTION.at(
    *_sites(cfg_file, metadata, site, transcoder),
    subtracts_b_dec=subtracts,
    input_scale=scale,
    skip="x @ A.T" if skip else "",
  )
  return finish(
    file,
    convention,
    tensors.fold(params, subtracts_b_dec=subtracts, input_scale=scale),
    dtype=found["W_enc"].dtype,
    metadata=metadata,
    activation=activation,
    k=k,
    layer_norm=layer_norm,
    model=tensors.field(cfg_file, metadata, "model_name", str, ""),
  )


def _upgrade(file, cfg) -> dict[str, Any]:
  """The fields of version 6 from those of any version."""
  nested = tensors.field(file, cfg, "metadata", dict, {})
  version = nested.get("sae_lens_version") or cfg.get("sae_lens_version")
  major = re.match(r"\d+", str(version))
  if major and int(major[0]) >= 6:
    return cfg
  renamed = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
  }
  cfg = {renamed.get(name, name): value for name, value in cfg.items()}
  function = cfg.get("activation_fn_str") or cfg.get("activation_fn") or "relu"
  options = tensors.field(file, cfg, "activation_fn_kwargs", dict, {})
  if function == "topk":
    cfg |= {"architecture": "topk", "k": options.get("k", cfg.get("k"))}
  elif function != "relu":
    raise ValueError(
      f"{file}: activation_fn_str {function!r} is not supported; expected "
      "'relu' or 'topk'."
    )
  normalise = cfg.get("normalize_activations")
  if type(normalise) is bool:  # before there were several kinds
    cfg["normalize_activations"] = (
      "expected_average_only_in" if normalise else "none"
    )
  cfg.setdefault("architecture", "standard")
  names = (
    "model_name",
    "hook_name",
    "hook_name_out",
    "hook_head_index",
    "context_size",
    "prepend_bos",
    "dataset_path",
    "neuronpedia_id",
    "model_from_pretrained_kwargs",
  )
  metadata = {name: cfg[name] for name in names if cfg.get(name) is not None}
  return cfg | {"metadata": metadata | nested}


def _architecture(file, cfg):
  name = tensors.field(file, cfg, "architecture", str)
  if name not in ARCHITECTURES:
    raise ValueError(
      f"{file}: architecture {name!r} is not supported; expected one of "
      f"{', '.join(ARCHITECTURES)}. Others run in SAELens alone: load another "
      "release."
    )
  return ARCHITECTURES[name]


def _normalisation(folder, cfg, transcoder) -> tuple[float, bool]:
  """(factor on the input, layer_norm), or why not."""
  file = folder / CONFIG
  kind = tensors.field(file, cfg, "normalize_activations", str, "none")
  if kind == "none":
    return 1.0, False
  if kind == "layer_norm" and not transcoder:
    # The same as `core.centre_tokens`: D - 1 and 1e-5 outside of the root.
    return 1.0, True
  if kind == "layer_norm":
    raise ValueError(
      f"{file}: normalize_activations 'layer_norm' of a transcoder: what comes "
      "out is not turned back, and DictionaryConfig.layer_norm turns it back."
    )
  if kind == "expected_average_only_in" and (folder / SCALER).exists():
    if transcoder:
      raise ValueError(
        f"{file}: normalize_activations {kind!r} of a transcoder: the scale of "
        "its output is not known. Save it with SAELens after training."
      )
    scaler = tensors.read_json(folder / SCALER)
    scale = tensors.field(
      folder / SCALER, scaler, "scaling_factor", (int, float), 1.0
    )
    if not 0 < scale < float("inf"):
      raise ValueError(
        f"{folder / SCALER}: scaling_factor is {scale}; expected a positive "
        "number."
      )
    return float(scale), False
  known = f"expected none, layer_norm or one of {', '.join(REFUSED)}"
  raise ValueError(
    f"{file}: normalize_activations {kind!r} cannot be loaded: it "
    f"{REFUSED.get(kind, f'is unknown; {known}')}."
  )


def _check(file, cfg, found, activation, transcoder, skip):
  """Names and shapes against the config."""
  out = "E" if transcoder else "D"
  layout = {"W_enc": "DM", "W_dec": f"M{out}", "b_dec": out}
  if activation == "gated":
    layout |= {"b_gate": "M", "b_mag": "M", "r_mag": "M"}
  else:
    layout["b_enc"] = "M"
  if activation == "jumprelu":
    layout["threshold"] = "M"
  if skip:
    layout["W_skip"] = f"{out}D"
  layout["scaling_factor"] = "M"
  cfg_file = file.parent / CONFIG
  known = {}
  for letter, name in (("D", "d_in"), ("M", "d_sae"), ("E", "d_out")):
    size = tensors.field(cfg_file, cfg, name, int, None)
    if size is not None and letter in {*"DM", out}:
      known[letter] = (size, f"{CONFIG}'s {name}")
  tensors.sizes(file, found, layout, optional=("scaling_factor",), known=known)


def _own(file, cfg, params) -> dict[str, np.ndarray]:
  """Our names, with the finetuning scale in the decoder."""
  params = dict(params)
  scale = params.pop("scaling_factor", None)
  if scale is not None and not np.allclose(scale, 1):
    if cfg.get("finetuning_scaling_factor") is not True:
      raise ValueError(
        f"{file}: the weights hold a scaling_factor other than 1, and "
        "finetuning_scaling_factor is not true, so it is not known whether to "
        f"apply it. {tensors.AGAIN}"
      )
    params["W_dec"] = params["W_dec"] * scale[:, None]
  if "b_gate" in params:
    params["b_enc"] = params.pop("b_gate")
  if "W_skip" in params:
    params["W_skip"] = np.ascontiguousarray(params["W_skip"].T)
  return params


def _sites(file, metadata, site, transcoder) -> tuple[str, str]:
  """Our sites; blank where a hook has none."""
  model = tensors.field(file, metadata, "model_name", str, "")
  if site is not None:
    return hooks.pair(site, model)
  if metadata.get("hook_head_index") is not None:
    return "", ""  # one head of a site
  found = []
  for end in ("", "_out") if transcoder else ("",):
    # What SAELens calls hook_mlp_in is told apart by this one alone.
    names = (f"hook_name{end}", f"hf_hook_name{end}")
    given = (tensors.field(file, metadata, name, str, "") for name in names)
    ours = (hooks.to_ours(hook, model) for hook in given)
    found.append(next(filter(None, ours), ""))
  return found[0], found[-1]


def write(
  directory: pathlib.Path,
  cfg: DictionaryConfig,
  params: Mapping[str, np.ndarray],
  provenance: Mapping,
) -> None:
  """Writes cfg.json and sae_weights.safetensors, as version 6 does.

  BatchTopK becomes jumprelu, and Matryoshka prefixes are lost: SAELens has
  neither at inference. b_dec is not subtracted from the input.

  Raises:
    ValueError: SAELens has no such architecture.
  """
  transcoder = cfg.is_transcoder or cfg.skip or cfg.d_in != cfg.d_out
  activation = "jumprelu" if cfg.activation == "batchtopk" else cfg.activation
  kinds = {kind: name for name, kind in ARCHITECTURES.items()}
  kind = (activation, transcoder, cfg.skip)
  if kind not in kinds or cfg.parts:
    what = "crosscoder" if cfg.parts else "transcoder" if transcoder else "SAE"
    raise ValueError(
      f"Format {NAME!r} has no {what} with activation {cfg.activation!r}"
      f"{' and a skip' * cfg.skip}; its architectures are "
      f"{', '.join(ARCHITECTURES)}. Save as 'gemma_jax'."
    )
  tensors_ = dict(params)
  if activation == "gated":
    tensors_["b_gate"] = tensors_.pop("b_enc")
  if cfg.skip:
    tensors_["W_skip"] = np.ascontiguousarray(tensors_["W_skip"].T)
  fields: dict[str, Any] = {
    "architecture": kinds[kind],
    "d_in": cfg.d_in,
    "d_sae": cfg.width,
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": False,
    "normalize_activations": "layer_norm" if cfg.layer_norm else "none",
    "reshape_activations": (
      "hook_z" if cfg.read.endswith(".attn_z") else "none"
    ),
    "metadata": _metadata(cfg, transcoder, provenance),
  }
  if transcoder:
    fields["d_out"] = cfg.d_out
  if activation == "topk":
    fields |= {"k": int(cfg.k), "rescale_acts_by_decoder_norm": False}
  safetensors.write_file(directory / WEIGHTS, tensors_)
  (directory / CONFIG).write_text(json.dumps(fields, indent=2))


def _metadata(cfg, transcoder, provenance) -> dict[str, Any]:
  metadata = {"prepend_bos": True} | dict(provenance.get("metadata", {}))
  for end, site in (("", cfg.read), ("_out", cfg.write)):
    hook = metadata.get(f"hf_hook_name{end}")
    if hook and hooks.to_ours(hook, cfg.model) != site:
      del metadata[f"hf_hook_name{end}"]
  metadata |= {"sae_lens_version": VERSION, "sae_lens_training_version": None}
  if cfg.model:
    metadata["model_name"] = cfg.model
  if cfg.read:
    metadata["hook_name"] = hooks.to_transformer_lens(cfg.read)
  if transcoder and cfg.write:
    metadata["hook_name_out"] = hooks.to_transformer_lens(cfg.write)
  return metadata
