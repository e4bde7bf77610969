"""Gemma Scope 1 and 2, in their own layout."""

import numpy as np

from tests.dictionaries.formats.files import (
  D,
  M,
  Written,
  case,
  relu,
  weights,
  wide,
  write_json,
  write_safetensors,
)


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
