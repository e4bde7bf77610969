"""Configs of other libraries that we cannot follow, or that do not fit."""

import json

import numpy as np
import pytest
import safetensors.numpy

from gemma_jax import dictionaries
from tests.dictionaries.formats.cases import CASES
from tests.dictionaries.formats.circuit_tracer_files import circuit_tracer
from tests.dictionaries.formats.files import (
  D,
  M,
  write_json,
  write_safetensors,
)
from tests.dictionaries.formats.gemma_files import (
  GS2_HOOKS,
  crosscoder,
  gemma_scope_2,
  gemma_scope_2_config,
)
from tests.dictionaries.formats.refusing import refused
from tests.dictionaries.formats.sae_lens_files import (
  sae_lens,
  sae_lens_config,
)
from tests.dictionaries.formats.sparsify_files import sparsify


# ----------------------------------------------------------- Gemma Scope 2
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"architecture": "topk"}, "architecture 'topk' is unknown"),
    ({"type": "clt"}, "is a cross-layer transcoder"),
    ({"width": 2 * M}, f"M = {M}; but M = {2 * M} in config.json"),
    ({"affine_connection": False}, "affine_connection=False, and the weights "),
    ({"width": "16k"}, "width must be int; got '16k'"),
    ({"hf_hook_point_in": "model.layers.7.mlp.gate"}, "not both sites of ours"),
    ({"l0": True}, "l0 must be int or float; got True"),
  ],
)
def test_gemma_scope_2_configs_that_do_not_fit(changes, message, tmp_path):
  path = gemma_scope_2(tmp_path, "transcoder", affine=True).path
  hooks = [f"model.layers.7.{name}" for name in GS2_HOOKS["transcoder"]]
  config = gemma_scope_2_config(hooks, "transcoder", affine_connection=True)
  write_json(path / "config.json", config | changes)
  refused(path, message)


def test_a_cross_layer_transcoder_is_refused(tmp_path):
  path = crosscoder(tmp_path).path
  hooks = ["model.layers.{all}.pre_feedforward_layernorm.output"] * 2
  write_json(path / "config.json", gemma_scope_2_config(hooks, "clt"))
  refused(path, "cross-layer transcoder.*Load a transcoder of single layers")


def test_a_crosscoder_lacks_a_layer(tmp_path):
  path = crosscoder(tmp_path).path
  (path / "params_layer_1.safetensors").unlink()
  refused(path, "expected layers 0 to", FileNotFoundError)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"width": 11}, "says width 11; the files hold 12 latents"),
    ({"type": "sae"}, "says type 'sae' of a folder of params_layer"),
    (
      {"hf_hook_point_in": "model.layers.{7,13}.output"},
      "expected one list of 3 layers",
    ),
    ({"hf_hook_point_out": "model.layers.7.output"}, "expected one list of 3"),
  ],
)
def test_a_crosscoders_config_does_not_fit(changes, message, tmp_path):
  path = crosscoder(tmp_path).path
  config = json.loads((path / "config.json").read_text())
  write_json(path / "config.json", config | changes)
  refused(path, message)


# ----------------------------------------------------------------- SAELens
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"architecture": "temporal"}, "'temporal' is not supported; expected one"),
    ({"d_sae": 99}, "M = 16; but M = 99 in cfg.json's d_sae"),
    ({"d_in": None}, None),
    ({"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input must be bool"),
    ({"metadata": []}, "metadata must be dict"),
    (
      {"normalize_activations": "constant_norm_rescale"},
      "divides every token by its own norm",
    ),
    (
      {"normalize_activations": "expected_average_only_in"},
      "factor that is not in the folder. Put it there as activation_scaler",
    ),
    (
      {"normalize_activations": "covariance_whitening"},
      "Save the final SAE with SAELens, which folds it",
    ),
    (
      {"normalize_activations": "zscore"},
      "'zscore' cannot be loaded: it is un",
    ),
  ],
)
def test_sae_lens_configs_that_do_not_fit(changes, message, tmp_path):
  path = sae_lens(tmp_path, "jumprelu").path
  write_json(path / "cfg.json", sae_lens_config("jumprelu") | changes)
  if message is None:  # an optional field
    assert dictionaries.load(path).config.d_in == D
  else:
    refused(path, message)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"apply_b_dec_to_input": True}, "whose b_dec belongs to the output"),
    ({"normalize_activations": "layer_norm"}, "what comes out is not turned"),
    ({"d_out": D + 1}, f"E = {D}; but E = {D + 1} in cfg.json's d_out"),
    ({"architecture": "transcoder"}, "Unknown: W_skip"),
  ],
)
def test_sae_lens_transcoders_that_do_not_fit(changes, message, tmp_path):
  path = sae_lens(tmp_path, "skip_transcoder").path
  write_json(path / "cfg.json", sae_lens_config("skip_transcoder") | changes)
  refused(path, message)


@pytest.mark.parametrize("scale", [0, -1.0, "big", float("nan")])
def test_an_input_scale_that_is_none_is_refused(scale, tmp_path):
  path = CASES["sae_lens-input_scale"](tmp_path).path
  write_json(path / "activation_scaler.json", {"scaling_factor": scale})
  refused(path, "activation_scaler.json: scaling_factor")


def test_a_finetuning_scale_that_nothing_explains_is_refused(tmp_path):
  made = CASES["sae_lens-finetuning_scale"](tmp_path)
  config = json.loads((made.path / "cfg.json").read_text())
  write_json(
    made.path / "cfg.json", config | {"finetuning_scaling_factor": False}
  )
  refused(made.path, "it is not known whether to apply it")


def test_an_old_activation_that_we_lack_is_refused(tmp_path):
  made = CASES["sae_lens-flat"](tmp_path)
  config = json.loads((made.path / "cfg.json").read_text())
  config["activation_fn_str"] = "tanh-relu"
  write_json(made.path / "cfg.json", config)
  refused(made.path, "activation_fn_str 'tanh-relu' is not supported")


def test_topk_needs_its_k(tmp_path):
  path = sae_lens(tmp_path, "topk", k=3).path
  write_json(path / "cfg.json", sae_lens_config("topk"))
  refused(path, "k must be int; got nothing")


# ------------------------------------------------- sparsify, circuit-tracer
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"activation": "groupmax"}, "activation 'groupmax' is not supported"),
    ({"signed": True}, "activation 'signed' is not supported"),
    ({"k": 2.5}, "k must be int; got 2.5"),
    ({"k": M + 1}, rf"k={M + 1} must be in \(0, {M}\]"),
    ({"d_in": D + 2}, f"D = {D}; but D = {D + 2} in cfg.json's d_in"),
    ({"skip_connection": True}, "Missing: W_skip"),
  ],
)
def test_sparsify_configs_that_do_not_fit(changes, message, tmp_path):
  refused(sparsify(tmp_path, "layers.3", **changes).path, message)


@pytest.mark.parametrize(
  ("extra", "message"),
  [
    ("activation: topk", "needs k and no thresholds; got k=None"),
    ("activation: topk\nk: 3", "needs k and no thresholds"),
    ("activation: relu", "'relu', and the weights hold thresholds"),
    ("k: [", "is no YAML"),
    ("model_kind: cross_layer_transcoder", "cross-layer transcoder write to"),
    ("feature_input_hook: hook_pattern", "'hook_pattern' is no site of ours"),
    ("&a [*a]: 3", "config.yaml"),
    ("x: !!python/object/apply:os.getcwd []", "is no YAML"),
  ],
)
def test_circuit_tracer_configs_that_do_not_fit(extra, message, tmp_path):
  path = circuit_tracer(tmp_path, threshold=True, config=extra + "\n").path
  refused(path, message)


def test_a_set_of_layers_is_not_one_dictionary(tmp_path):
  path = circuit_tracer(tmp_path).path
  layer = path / "layer_4.safetensors"
  (path / "layer_5.safetensors").write_bytes(layer.read_bytes())
  refused(path, "holds 2 layers; .* Pass its file")
  d = dictionaries.load(path / "layer_5.safetensors")
  assert d.config.read == "blocks.5.mlp_in"


def test_one_threshold_may_stand_for_all_latents(tmp_path):
  path = circuit_tracer(tmp_path).path
  file = path / "layer_4.safetensors"
  tensors = safetensors.numpy.load_file(file)
  name = "activation_function.threshold"
  tensors[name] = np.array([0.5], np.float32)
  write_safetensors(file, tensors)
  d = dictionaries.load(path)
  np.testing.assert_array_equal(d.params["threshold"], np.full(M, 0.5))
