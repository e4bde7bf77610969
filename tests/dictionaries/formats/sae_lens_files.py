"""SAELens, of version 6 and before, in its own layout."""

import json

import numpy as np
import safetensors.numpy

from tests.dictionaries.formats.files import (
  D,
  E,
  K,
  M,
  Written,
  case,
  relu,
  top,
  weights,
  wide,
  write_json,
  write_safetensors,
)


def sae_lens_config(architecture, **changes):
  """cfg.json as SAELens 6 writes it."""
  transcoder = "transcoder" in architecture
  metadata = {
    "sae_lens_version": "6.54.12",
    "sae_lens_training_version": "6.54.12",
    "model_name": "gemma-2-2b",
    "hook_name": "blocks.5.hook_resid_post",
    "hook_head_index": None,
    "context_size": 256,
    "prepend_bos": True,
  }
  if transcoder:
    metadata |= {
      "hook_name": "blocks.5.ln2.hook_normalized",
      "hook_name_out": "blocks.5.hook_mlp_out",
    }
  return {
    "architecture": architecture,
    "d_in": D,
    "d_sae": M,
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": not transcoder,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": metadata,
  } | changes


def sae_lens(root, architecture, *, seed=0, d_out=None, extra=None, **changes):
  cfg = sae_lens_config(architecture, **changes)
  d_out = d_out or D
  if "transcoder" in architecture:
    cfg["d_out"] = d_out
  shapes = {"W_enc": (D, M), "b_enc": M, "W_dec": (M, d_out), "b_dec": d_out}
  if architecture == "gated":
    del shapes["b_enc"]
    shapes |= {"b_gate": M, "b_mag": M, "r_mag": M}
  if "jumprelu" in architecture:
    shapes["threshold"] = M
  if "skip" in architecture:
    shapes["W_skip"] = (d_out, D)
  w = weights(seed, **shapes) | (extra or {})
  path = root / f"sae_lens_{architecture}"
  write_safetensors(path / "sae_weights.safetensors", w)
  write_json(path / "cfg.json", cfg)
  return Written(path, sae_lens_formula(cfg, wide(w)))


def sae_lens_formula(cfg, w, scale=1.0):
  """SAELens 6.54: saes/sae.py, gated_sae.py, topk_sae.py, transcoder.py."""
  norms = np.linalg.norm(w["W_dec"], axis=1)

  def formula(x):
    raw = x.astype(np.float64)
    x = raw * scale
    mean, std = 0.0, 1.0
    if cfg["normalize_activations"] == "layer_norm":
      mean, std = x.mean(-1, keepdims=True), x.std(-1, ddof=1, keepdims=True)
      x = (x - mean) / (std + 1e-5)
    if cfg["apply_b_dec_to_input"]:
      x = x - w["b_dec"]
    if cfg["architecture"] == "gated":
      pi = x @ w["W_enc"]
      acts = relu(np.exp(w["r_mag"]) * pi + w["b_mag"]) * (pi + w["b_gate"] > 0)
    else:
      z = x @ w["W_enc"] + w["b_enc"]
      if cfg["architecture"] == "topk":
        rescale = norms if cfg.get("rescale_acts_by_decoder_norm") else 1
        acts = top(z * rescale)
        # Ours are unit-norm decoders' activations, as SAELens returns them.
        y = acts / rescale @ w["W_dec"] + w["b_dec"]
        return acts, y * std + mean
      acts = relu(z) * (z > w.get("threshold", 0))
    y = acts * w.get("scaling_factor", 1) @ w["W_dec"] + w["b_dec"]
    if "W_skip" in w:
      y = y + raw @ w["W_skip"].T
    return acts, (y * std + mean) / scale

  return formula


for name, options in {
  "standard": {},
  "gated": {},
  "jumprelu": {},
  "topk": {"k": K, "rescale_acts_by_decoder_norm": False},
  "transcoder": {"d_out": E},
  "skip_transcoder": {},
  "jumprelu_transcoder": {"d_out": E},
  "jumprelu_skip_transcoder": {},
}.items():

  @case(f"sae_lens-{name}")
  def _(root, name=name, options=options):
    return sae_lens(root, name, seed=len(name), **options)


@case("sae_lens-without_b_dec")
def _(root):
  return sae_lens(root, "jumprelu", seed=20, apply_b_dec_to_input=False)


@case("sae_lens-topk_by_norm")
def _(root):
  return sae_lens(root, "topk", seed=21, k=K, rescale_acts_by_decoder_norm=True)


@case("sae_lens-layer_norm")
def _(root):
  return sae_lens(root, "standard", seed=22, normalize_activations="layer_norm")


@case("sae_lens-input_scale")
def _(root):
  kind = "expected_average_only_in"
  made = sae_lens(root, "jumprelu", seed=23, normalize_activations=kind)
  write_json(
    made.path / "activation_scaler.json",
    {"scaling_factor": 0.7, "has_whitening": False},
  )
  cfg = json.loads((made.path / "cfg.json").read_text())
  w = safetensors.numpy.load_file(made.path / "sae_weights.safetensors")
  return Written(made.path, sae_lens_formula(cfg, wide(w), scale=0.7))


def flat(root, architecture, *, drop=(), **changes):
  """cfg.json as SAELens wrote it before version 6."""
  made = sae_lens(root, architecture, seed=24)
  cfg = json.loads((made.path / "cfg.json").read_text())
  metadata = cfg.pop("metadata")
  old = cfg | {
    "model_name": metadata["model_name"],
    "hook_point": metadata["hook_name"],
    "hook_point_layer": 5,
    "hook_point_head_index": None,
    "context_size": 128,
    "activation_fn_str": "relu",
    "normalize_activations": False,
  }
  old = {k: v for k, v in (old | changes).items() if k not in drop}
  write_json(made.path / "cfg.json", old)
  full = cfg | {"apply_b_dec_to_input": True, "normalize_activations": "none"}
  w = safetensors.numpy.load_file(made.path / "sae_weights.safetensors")
  return Written(made.path, sae_lens_formula(full | changes, wide(w)))


@case("sae_lens-flat")
def _(root):
  drop = ("apply_b_dec_to_input", "architecture", "reshape_activations")
  return flat(root, "standard", drop=drop)


@case("sae_lens-flat_topk")
def _(root):
  made = flat(
    root,
    "standard",
    drop=("architecture",),
    activation_fn_str="topk",
    activation_fn_kwargs={"k": K},
  )
  w = safetensors.numpy.load_file(made.path / "sae_weights.safetensors")
  cfg = sae_lens_config("topk", k=K)
  return Written(made.path, sae_lens_formula(cfg, wide(w)))


@case("sae_lens-finetuning_scale")
def _(root):
  scale = np.random.default_rng(2).uniform(0.5, 2, M).astype(np.float32)
  return sae_lens(
    root,
    "standard",
    seed=25,
    extra={"scaling_factor": scale},
    finetuning_scaling_factor=True,
  )
