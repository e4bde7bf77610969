"""Small files in every format's own layout, and what its library makes of them.

A case writes a dictionary into a directory and says, in NumPy and float64, what
the formulas of the format give for an input: nothing here knows our loader.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.numpy

D, E, M, K = 6, 5, 16, 3


def inputs(rows=40, width=D, seed=1):
  """Off centre, so that what is subtracted and scaled shows."""
  rng = np.random.default_rng(seed)
  return (rng.normal(size=(rows, width)) + 0.5).astype(np.float32)


def weights(seed, **shapes):
  rng = np.random.default_rng(seed)
  out = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
  for name in out:
    if "threshold" in name:
      out[name] = rng.uniform(0.2, 1.5, shapes[name]).astype(np.float32)
  return out


def write_json(path: pathlib.Path, fields) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(fields))


def write_safetensors(path: pathlib.Path, tensors) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  safetensors.numpy.save_file(tensors, path)


def relu(z):
  return np.maximum(z, 0)


def top(z, k=K):
  """The k largest of every row, if they are positive."""
  cut = np.sort(z, axis=-1)[:, -k:][:, :1]
  return np.where(z >= cut, relu(z), 0)


def wide(w):
  return {name: np.asarray(x, np.float64) for name, x in w.items()}


@dataclasses.dataclass
class Written:
  """Where it was written, with which `site`, and what it computes.

  `formula` maps x to the latents and the output.
  """

  path: pathlib.Path
  formula: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
  site: Any = None


CASES: dict[str, Callable[[pathlib.Path], Written]] = {}


def case(name):
  def add(fn):
    CASES[name] = fn
    return fn

  return add


# ------------------------------------------------------------- Gemma Scope 1
def gemma_scope(root, folder, *, seed, scale=1.0, site=None, **options):
  w = weights(seed, W_enc=(D, M), b_enc=M, W_dec=(M, D), b_dec=D, threshold=M)
  path = root / folder
  path.mkdir(parents=True)
  (np.savez_compressed if options.get("compressed") else np.savez)(
    path / "params.npz", **w
  )
  w = wide(w)

  def formula(x):
    z = x * scale @ w["W_enc"] + w["b_enc"]
    acts = relu(z) * (z > w["threshold"])
    return acts, (acts @ w["W_dec"] + w["b_dec"]) / scale

  return Written(path, formula, site)


for kind in ("res", "mlp", "att", "transcoders"):
  name = f"gemma-scope-2b-pt-{kind}/layer_12/width_16k/average_l0_4"

  @case(f"gemma_scope-{kind}")
  def _(root, name=name):
    return gemma_scope(root, name, seed=len(name))


@case("gemma_scope-embedding")
def _(root):
  name = "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6"
  return gemma_scope(root, name, seed=5, scale=D**-0.5)


@case("gemma_scope-compressed_and_without_a_label")
def _(root):
  return gemma_scope(
    root, "mine", seed=6, site="blocks.3.mlp_out", compressed=True
  )


# ------------------------------------------------------------- Gemma Scope 2
GS2_HOOKS = {
  "resid_post": ("output", "output"),
  "attn_out": ("self_attn.o_proj.input",) * 2,
  "mlp_out": ("post_feedforward_layernorm.output",) * 2,
  "transcoder": (
    "pre_feedforward_layernorm.output",
    "post_feedforward_layernorm.output",
  ),
}


def gemma_scope_2_config(hooks, kind="sae", **changes):
  return {
    "hf_hook_point_in": hooks[0],
    "hf_hook_point_out": hooks[1],
    "width": M,
    "model_name": "google/gemma-3-1b-pt",
    "architecture": "jump_relu",
    "l0": 4,
    "affine_connection": False,
    "type": kind,
  } | changes


def gemma_scope_2(root, kind, *, affine=False, seed=0):
  """The skip is square and far from symmetric: shapes cannot tell it turned."""
  shapes = {"w_enc": (D, M), "b_enc": M, "w_dec": (M, D), "b_dec": D}
  shapes["threshold"] = M
  if affine:
    shapes["affine_skip_connection"] = (D, D)
  w = weights(seed, **shapes)
  path = root / kind / f"layer_7_width_16k_l0_small{'_affine' * affine}"
  write_safetensors(path / "params.safetensors", w)
  hooks = [f"model.layers.7.{name}" for name in GS2_HOOKS[kind]]
  write_json(
    path / "config.json",
    gemma_scope_2_config(
      hooks,
      "transcoder" if kind == "transcoder" else "sae",
      affine_connection=affine,
    ),
  )
  w = wide(w)

  def formula(x):
    z = x @ w["w_enc"] + w["b_enc"]
    acts = relu(z) * (z > w["threshold"])
    y = acts @ w["w_dec"] + w["b_dec"]
    return acts, y + (x @ w["affine_skip_connection"] if affine else 0)

  return Written(path, formula)


for kind in GS2_HOOKS:

  @case(f"gemma_scope_2-{kind}")
  def _(root, kind=kind):
    return gemma_scope_2(root, kind, seed=len(kind))


@case("gemma_scope_2-affine")
def _(root):
  return gemma_scope_2(root, "transcoder", affine=True, seed=9)


def crosscoder(root, *, affine=False, layers=(7, 13, 17), per_layer=4):
  """Latents of each file read their layer and write to all."""
  n = len(layers)
  shapes = {
    "w_enc": (n, D, per_layer),
    "b_enc": (n, per_layer),
    "w_dec": (n, per_layer, n, D),
    "b_dec": (n, D),
    "threshold": (n, per_layer),
  }
  if affine:
    shapes["affine_skip_connection"] = (n, D, D)
  w = weights(4, **shapes)
  path = root / "crosscoder" / "layer_7_13_17_width_65k_l0_medium"
  for i in range(n):
    write_safetensors(
      path / f"params_layer_{i}.safetensors",
      {name: np.ascontiguousarray(x[i]) for name, x in w.items()},
    )
  hook = f"model.layers.{{{','.join(map(str, layers))}}}.output"
  config = gemma_scope_2_config(
    (hook, hook),
    "crosscoder",
    width=n * per_layer,
    affine_connection=affine,
  )
  write_json(path / "config.json", config)
  w = wide(w)

  def formula(x):
    parts = x.reshape(len(x), n, D)
    z = np.einsum("blk,lkm->blm", parts, w["w_enc"]) + w["b_enc"]
    acts = relu(z) * (z > w["threshold"])
    y = np.einsum("blm,lmrd->brd", acts, w["w_dec"]) + w["b_dec"]
    if affine:
      y = y + np.einsum("blk,lkd->bld", parts, w["affine_skip_connection"])
    return acts.reshape(len(x), -1), y.reshape(len(x), -1)

  return Written(path, formula)


@case("gemma_scope_2-crosscoder")
def _(root):
  return crosscoder(root)


@case("gemma_scope_2-crosscoder_affine")
def _(root):
  return crosscoder(root, affine=True)


# ------------------------------------------------------------------ SAELens
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


# -------------------------------------------------------------- sparsify
def sparsify(
  root, hookpoint, *, transcode=False, skip=False, seed=0, **changes
):
  w = weights(
    seed, **{"encoder.weight": (M, D), "encoder.bias": M}, W_dec=(M, D), b_dec=D
  )
  if skip:
    w |= weights(seed + 1, W_skip=(D, D))
  path = root / "run" / hookpoint
  write_safetensors(path / "sae.safetensors", w)
  cfg = {
    "activation": "topk",
    "expansion_factor": 32,
    "normalize_decoder": True,
    "num_latents": M,
    "k": K,
    "multi_topk": False,
    "skip_connection": skip,
    "transcode": transcode,
    "d_in": D,
  }
  write_json(path / "cfg.json", cfg | changes)
  write_json(
    root / "run" / "config.json",
    {"model": "EleutherAI/pythia-70m", "ctx_len": 9},
  )
  w = wide(w)

  def formula(x):
    read = x if transcode else x - w["b_dec"]
    acts = top(relu(read @ w["encoder.weight"].T + w["encoder.bias"]))
    y = acts @ w["W_dec"] + w["b_dec"]
    return acts, y + (x @ w["W_skip"].T if skip else 0)

  return Written(path, formula)


@case("sparsify-sae")
def _(root):
  return sparsify(root, "layers.3", seed=30)


@case("sparsify-transcoder")
def _(root):
  return sparsify(root, "layers.3.mlp", transcode=True, seed=31)


@case("sparsify-skip_transcoder")
def _(root):
  return sparsify(root, "layers.3.mlp", transcode=True, skip=True, seed=32)


# --------------------------------------------------------- circuit-tracer
def circuit_tracer(root, *, skip=False, threshold=False, seed=0, config=""):
  w = weights(seed, W_enc=(M, D), W_dec=(M, D), b_enc=M, b_dec=D)
  if threshold:
    name = "activation_function.threshold"
    w |= weights(seed + 1, **{name: M})
  if skip:
    w |= weights(seed + 2, W_skip=(D, D))
  path = root / "transcoders"
  write_safetensors(path / "layer_4.safetensors", w)
  (path / "config.yaml").write_text(
    'model_name: "meta-llama/Llama-3.2-1B"\n'
    'model_kind: "transcoder_set"\n'
    'feature_input_hook: "mlp.hook_in"\n'
    'feature_output_hook: "hook_mlp_out"\n'
    'scan: "llama"\n' + config
  )
  w = wide(w)

  def formula(x):
    z = x @ w["W_enc"].T + w["b_enc"]
    if "topk" in config:
      acts = top(z)
    else:
      acts = relu(z) * (z > w.get("activation_function.threshold", 0))
    y = acts @ w["W_dec"] + w["b_dec"]
    return acts, y + (x @ w["W_skip"].T if skip else 0)

  return Written(path, formula)


for name, options in {
  "relu": {},
  "skip": {"skip": True},
  "jumprelu_skip": {"skip": True, "threshold": True},
  "topk": {"config": f"activation: topk\nk: {K}\n"},
}.items():

  @case(f"circuit_tracer-{name}")
  def _(root, name=name, options=options):
    return circuit_tracer(root, seed=40 + len(name), **options)


# ---------------------------------------------------- dictionary_learning
def dictionary_learning(root, kind, w, formula, **trainer):
  """Saved as its training does: a state dict, and the trainer's config."""
  import torch

  path = root / "run" / "trainer_0"
  path.mkdir(parents=True)
  state = {name: torch.tensor(x) for name, x in w.items()}
  torch.save(state, path / "ae.pt")
  config = {
    "dict_class": kind,
    "activation_dim": D,
    "dict_size": M,
    "layer": 8,
    "lm_name": "EleutherAI/pythia-160m",
    "submodule_name": "resid_post_layer_8",
  }
  config |= trainer
  buffer = {"d_submodule": D, "io": "out", "ctx_len": 64}
  write_json(path / "config.json", {"trainer": config, "buffer": buffer})
  return Written(path, formula)


def linear_weights(seed, *, bias="b_dec", encoder_bias=True):
  shapes = {"encoder.weight": (M, D), "decoder.weight": (D, M), bias: D}
  if encoder_bias:
    shapes["encoder.bias"] = M
  return weights(seed, **shapes)


def linear_formula(w, bias, select, *, subtract=True):
  w = wide(w)

  def formula(x):
    read = x - w[bias] if subtract else x
    acts = select(relu(read @ w["encoder.weight"].T + w["encoder.bias"]))
    return acts, acts @ w["decoder.weight"].T + w[bias]

  return formula


@case("dictionary_learning-AutoEncoder")
def _(root):
  w = linear_weights(50, bias="bias")
  formula = linear_formula(w, "bias", lambda a: a)
  return dictionary_learning(root, "AutoEncoder", w, formula)


@case("dictionary_learning-AutoEncoderNew")
def _(root):
  w = linear_weights(51, bias="decoder.bias")
  formula = linear_formula(w, "decoder.bias", lambda a: a, subtract=False)
  return dictionary_learning(root, "AutoEncoderNew", w, formula)


def numbers(threshold):
  return {"k": np.int32(K), "threshold": np.float32(threshold)}


@case("dictionary_learning-AutoEncoderTopK")
def _(root):
  w = linear_weights(52)
  formula = linear_formula(w, "b_dec", top)
  w |= numbers(0.4)
  return dictionary_learning(root, "AutoEncoderTopK", w, formula, k=K)


@case("dictionary_learning-BatchTopKSAE")
def _(root):
  w = linear_weights(53)
  formula = linear_formula(w, "b_dec", lambda a: a * (a > 1.2))
  w |= numbers(1.2)
  return dictionary_learning(root, "BatchTopKSAE", w, formula, k=K)


@case("dictionary_learning-BatchTopKSAE_without_a_threshold")
def _(root):
  w = linear_weights(54)
  formula = linear_formula(w, "b_dec", top)
  w |= numbers(-1)
  return dictionary_learning(root, "BatchTopKSAE", w, formula, k=K)


def plain_formula(w, *, subtract):
  w = wide(w)

  def formula(x):
    z = (x - w["b_dec"] * subtract) @ w["W_enc"] + w["b_enc"]
    acts = relu(z) * (z > w["threshold"])
    return acts, acts @ w["W_dec"] + w["b_dec"]

  return formula


@case("dictionary_learning-MatryoshkaBatchTopKSAE")
def _(root):
  w = weights(55, W_enc=(D, M), b_enc=M, W_dec=(M, D), b_dec=D) | numbers(0.9)
  formula = plain_formula(w, subtract=True)
  w["group_sizes"] = np.array([4, 4, 8])
  return dictionary_learning(root, "MatryoshkaBatchTopKSAE", w, formula, k=K)


@case("dictionary_learning-JumpReluAutoEncoder")
def _(root):
  w = weights(56, W_enc=(D, M), b_enc=M, W_dec=(M, D), b_dec=D, threshold=M)
  formula = plain_formula(w, subtract=False)
  return dictionary_learning(
    root, "JumpReluAutoEncoder", w, formula, target_l0=4
  )


@case("dictionary_learning-GatedAutoEncoder")
def _(root):
  w = linear_weights(57, bias="decoder_bias", encoder_bias=False)
  w |= weights(58, r_mag=M, gate_bias=M, mag_bias=M)
  v = wide(w)

  def formula(x):
    pi = (x - v["decoder_bias"]) @ v["encoder.weight"].T
    acts = relu(np.exp(v["r_mag"]) * pi + v["mag_bias"])
    acts = acts * (pi + v["gate_bias"] > 0)
    return acts, acts @ v["decoder.weight"].T + v["decoder_bias"]

  return dictionary_learning(root, "GatedAutoEncoder", w, formula)
