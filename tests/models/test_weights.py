"""Checkpoints: tables of names and dims, what does not fit, memory."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from gemma_jax import models
from gemma_jax.models import random, weights
from gemma_jax.models import safetensors as ours
from gemma_jax.models.families import PRESETS, to_hf_config

CFG = PRESETS["gemma3-tiny"]


@pytest.fixture(scope="module")
def tensors():
  """The tiny random checkpoint as the safetensors package reads it."""
  path = models.resolve("random:gemma3-tiny") / ours.SINGLE
  return safetensors.numpy.load_file(path)


@pytest.fixture(scope="module")
def model(one_device):
  return models.load_model("random:gemma3-tiny", mesh=one_device)


@pytest.fixture
def directory(tmp_path):
  """A directory with config.json, to put weights into."""
  (tmp_path / "config.json").write_text(json.dumps(to_hf_config(CFG)))
  return tmp_path


@pytest.fixture
def load(directory, one_device):
  def load(tensors, **changes):
    safetensors.numpy.save_file(tensors, directory / ours.SINGLE)
    return models.load_model(directory, mesh=one_device, **changes)

  return load


def equal(tree, other):
  jax.tree.map(np.testing.assert_array_equal, tree, other)


# The table: their names and dims, and ours.


def test_every_tensor_has_hugging_faces_name_and_shape(model, tensors):
  d, f, h = CFG.width, CFG.mlp_width, CFG.head_dim
  n, k = CFG.num_heads * h, CFG.num_kv_heads * h
  block = {
    "input_layernorm": (d,),
    "self_attn.q_proj": (n, d),
    "self_attn.k_proj": (k, d),
    "self_attn.v_proj": (k, d),
    "self_attn.o_proj": (d, n),
    "self_attn.q_norm": (h,),
    "self_attn.k_norm": (h,),
    "post_attention_layernorm": (d,),
    "pre_feedforward_layernorm": (d,),
    "mlp.gate_proj": (f, d),
    "mlp.up_proj": (f, d),
    "mlp.down_proj": (d, f),
    "post_feedforward_layernorm": (d,),
  }
  expected = {
    f"model.layers.{l}.{name}.weight": shape
    for l in range(CFG.num_layers)
    for name, shape in block.items()
  }
  expected["model.embed_tokens.weight"] = (CFG.vocab_size, d)
  expected["model.norm.weight"] = (d,)
  assert {name: x.shape for name, x in tensors.items()} == expected


def test_heads_are_rows_there_and_an_axis_here(model, tensors):
  p = model.params["blocks"]
  h = CFG.head_dim
  q = tensors["model.layers.3.self_attn.q_proj.weight"]
  o = tensors["model.layers.3.self_attn.o_proj.weight"]
  v = tensors["model.layers.3.self_attn.v_proj.weight"]
  for head in range(CFG.num_heads):
    rows = slice(head * h, (head + 1) * h)
    np.testing.assert_array_equal(p["q"][3, :, head], q[rows].T)
    np.testing.assert_array_equal(p["o"][3, head], o[:, rows].T)
  np.testing.assert_array_equal(p["v"][3, :, 1], v[h:].T)
  down = tensors["model.layers.3.mlp.down_proj.weight"]
  np.testing.assert_array_equal(p["down"][3], down.T)


@pytest.mark.parametrize("preset", ["gemma2-tiny", "gemma3-tiny"])
def test_what_is_saved_is_what_is_loaded(preset, tmp_path, one_device):
  params = models.load_model(f"random:{preset}", mesh=one_device).params
  params = jax.tree.map(lambda x: np.asarray(x) + 1, params)
  weights.save(tmp_path, params, PRESETS[preset])
  hf = to_hf_config(PRESETS[preset])
  (tmp_path / "config.json").write_text(json.dumps(hf))
  again = models.load_model(tmp_path, mesh=one_device)
  equal(again.params, params)
  assert [path.name for path in sorted(tmp_path.iterdir())] == [
    "config.json",
    "model.safetensors",
  ]


def test_a_model_loaded_in_part_is_not_saved(tmp_path, one_device):
  part = models.load_model("random:gemma3-tiny", mesh=one_device, layers=3)
  with pytest.raises(ValueError, match="3 of 8 layers are loaded"):
    weights.save(tmp_path, part.params, CFG)
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("layers", [3, range(3)])
def test_the_first_layers_are_slices_of_all(model, one_device, layers):
  part = models.load_model("random:gemma3-tiny", mesh=one_device, layers=layers)
  assert part.num_loaded == 3
  assert part.config == CFG
  equal(
    part.params["blocks"], jax.tree.map(lambda x: x[:3], model.params["blocks"])
  )
  equal(part.params["embed"], model.params["embed"])


def test_a_head_of_its_own_is_not_loaded_with_the_first_layers(one_device):
  model = models.load_model("random:llama-tiny", mesh=one_device, layers=2)
  assert "unembed" not in model.params
  x = np.zeros((1, model.config.width), np.float32)
  with pytest.raises(ValueError, match="head is not loaded"):
    models.unembed(model.config, model.params, x)
  model.forward(np.zeros((1, 5), int), stop_at=2)


@pytest.mark.parametrize(
  ("layers", "message"),
  [
    (0, r"layers=0 must be 1\.\.8"),
    (9, r"layers=9 must be 1\.\.8"),
    (-1, r"layers=-1 must be 1\.\.8"),
    (range(2, 4), "must start at 0 with step 1"),
    (range(0, 6, 2), "must start at 0 with step 1"),
  ],
)
def test_layers_that_cannot_be_loaded_are_an_error(one_device, layers, message):
  with pytest.raises(ValueError, match=message):
    models.load_model("random:gemma3-tiny", mesh=one_device, layers=layers)


def test_bfloat16_is_float32_rounded_to_nearest(model, one_device):
  half = models.load_model(
    "random:gemma3-tiny", mesh=one_device, dtype="bfloat16"
  )
  assert {x.dtype.name for x in jax.tree.leaves(half.params)} == {"bfloat16"}
  equal(
    half.params,
    jax.tree.map(
      lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), model.params
    ),
  )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_files_of_any_float_load_as_the_dtype_that_was_asked_for(
  tensors, load, dtype
):
  narrow = {name: x.astype(dtype) for name, x in tensors.items()}
  loaded = load(narrow, dtype="float32").params
  assert {x.dtype.name for x in jax.tree.leaves(loaded)} == {"float32"}
  name = "model.layers.7.mlp.up_proj.weight"
  expected = narrow[name].astype(np.float32).T
  np.testing.assert_array_equal(loaded["blocks"]["up"][7], expected)


@pytest.mark.parametrize(
  "prefix", ["language_model.model.", "model.language_model."]
)
def test_the_text_tower_of_a_multimodal_checkpoint_loads(
  model, tensors, load, prefix
):
  vision = "vision_tower.vision_model.embeddings.patch_embedding.weight"
  inner = "model." if prefix.startswith("model.") else ""
  renamed = {
    name.replace("model.", prefix, 1): x for name, x in tensors.items()
  } | {
    inner + vision: np.ones((3, 3), np.float32),
    inner + "multi_modal_projector.mm_soft_emb_norm.weight": np.ones(3),
    "lm_head.weight": tensors["model.embed_tokens.weight"],
  }
  equal(load(renamed).params, model.params)


@pytest.mark.parametrize(
  ("preset", "name"),
  [
    ("gemma3-tiny", "lm_head.weight"),
    ("gpt2-tiny", "lm_head.weight"),
    ("neox-tiny", "embed_out.weight"),
    ("neox-tiny", "lm_head.weight"),
    ("llama-tiny", "lm_head.weight"),
  ],
)
def test_a_tied_model_leaves_out_the_head_of_its_file(
  tmp_path, one_device, preset, name
):
  cfg = dataclasses.replace(PRESETS[preset], tied=True)
  shapes = jax.eval_shape(lambda key: random.init(cfg, key), jax.random.key(0))
  params = jax.tree.map(lambda x: np.full(x.shape, x.size, x.dtype), shapes)
  weights.save(tmp_path, params, cfg)
  path = tmp_path / ours.SINGLE
  head = {name: np.ones((cfg.vocab_size, cfg.width), np.float32)}
  safetensors.numpy.save_file(safetensors.numpy.load_file(path) | head, path)
  (tmp_path / "config.json").write_text(json.dumps(to_hf_config(cfg)))
  equal(models.load_model(tmp_path, mesh=one_device).params, params)


def test_the_head_of_a_neox_has_two_names(tmp_path, one_device):
  model = models.load_model("random:neox-tiny", mesh=one_device)
  there = safetensors.numpy.load_file(model.directory / ours.SINGLE)
  there["lm_head.weight"] = there.pop("embed_out.weight")
  safetensors.numpy.save_file(there, tmp_path / ours.SINGLE)
  shutil.copy(model.directory / "config.json", tmp_path)
  again = models.load_model(tmp_path, mesh=one_device)
  equal(again.params, model.params)
  there["embed_out.weight"] = there["lm_head.weight"]
  safetensors.numpy.save_file(there, tmp_path / ours.SINGLE)
  with pytest.raises(ValueError, match=r"Not expected: (embed_out|lm_head)"):
    models.load_model(tmp_path, mesh=one_device)


# Tensors that are not those of the model.


def listed(message):
  """The three lists of the error."""
  _, rest = message.split(" Missing: ")
  missing, rest = rest.split(". Not expected: ")
  extra, wrong = rest.split(". Of another shape or type: ")
  return missing, extra, wrong.removesuffix(".")


def test_everything_that_does_not_fit_is_listed_at_once(tensors, load):
  wrong = dict(tensors)
  up = wrong.pop("model.layers.2.mlp.up_proj.weight")
  wrong.pop("model.norm.weight")
  wrong["model.layers.2.mlp.upp_proj.weight"] = up
  wrong["model.layers.8.mlp.up_proj.weight"] = up
  wrong["score.weight"] = up
  wrong["model.embed_tokens.weight"] = np.zeros((999, 48), np.float32)
  wrong["model.layers.0.mlp.down_proj.weight"] = up
  with pytest.raises(ValueError, match="does not hold the model") as e:
    load(wrong)
  missing, extra, shapes = listed(str(e.value))
  assert set(missing.split(", ")) == {
    "model.layers.2.mlp.up_proj.weight",
    "model.norm.weight",
  }
  assert set(extra.split(", ")) == {
    "model.layers.2.mlp.upp_proj.weight",
    "model.layers.8.mlp.up_proj.weight",
    "score.weight",
  }
  assert "model.embed_tokens.weight is [999, 48], not [1000, 48]" in shapes
  assert "layers.0.mlp.down_proj.weight is [96, 48], not [48, 96]" in shapes
  assert shapes.count(" is [") == 2


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
def test_weights_that_are_no_floats_are_listed(tensors, load, dtype):
  name = "model.layers.3.mlp.up_proj.weight"
  with pytest.raises(ValueError, match="does not hold the model") as e:
    load(tensors | {name: tensors[name].astype(dtype)})
  assert listed(str(e.value)) == (
    "none",
    "none",
    f"{name} is {dtype}, not a float",
  )


def test_a_list_that_has_no_entries_says_none(tensors, load):
  wrong = dict(tensors)
  wrong.pop("model.norm.weight")
  with pytest.raises(ValueError, match="does not hold the model") as e:
    load(wrong)
  assert listed(str(e.value)) == ("model.norm.weight", "none", "none")


def test_a_long_list_is_cut_and_counted(tensors, load):
  wrong = {k: x for k, x in tensors.items() if "self_attn" not in k}
  with pytest.raises(ValueError, match="does not hold the model") as e:
    load(wrong)
  missing, _, _ = listed(str(e.value))
  assert missing.count("self_attn") == 20
  assert missing.endswith(f"and {6 * 8 - 20} more")


def test_norms_of_gemma_3_are_not_expected_in_a_gemma_2(
  tensors, directory, load
):
  hf = to_hf_config(CFG) | {"model_type": "gemma2"}
  hf |= {"rope_scaling": None, "rope_theta": 10_000.0}
  (directory / "config.json").write_text(json.dumps(hf))
  with pytest.raises(ValueError, match="does not hold the model") as e:
    load(tensors)
  missing, extra, shapes = listed(str(e.value))
  assert (missing, shapes) == ("none", "none")
  assert "model.layers.0.self_attn.q_norm.weight" in extra


def test_one_tensor_under_two_prefixes_is_not_expected(tensors, load):
  twice = dict(tensors)
  key = "language_model.model.norm.weight"
  twice[key] = np.zeros(48, np.float32)
  with pytest.raises(ValueError, match="does not hold the model") as e:
    load(twice)
  _, extra, _ = listed(str(e.value))
  assert extra in (key, "model.norm.weight")


# Damage, and memory.


def test_a_truncated_checkpoint_is_an_error_of_load_model(
  model, directory, one_device
):
  path = directory / ours.SINGLE
  shutil.copy(model.directory / ours.SINGLE, path)
  with path.open("r+b") as f:
    f.truncate(path.stat().st_size - 1)
  with pytest.raises(ValueError, match=f"{path} is not a complete"):
    models.load_model(directory, mesh=one_device)


MEASURE = """
import sys

import jax

from gemma_jax import models


def resident(key):
  with open("/proc/self/status") as f:
    return next(int(l.split()[1]) for l in f if l.startswith(key)) * 1024


directory, dtype = sys.argv[1:]
jax.block_until_ready(jax.numpy.ones(3) + 1)
with open("/proc/self/clear_refs", "w") as f:
  f.write("5")  # forgets the peak so far
before = resident("VmRSS:")
model = models.load_model(directory, dtype=dtype)
jax.block_until_ready(model.params)
size = sum(x.nbytes for x in jax.tree.leaves(model.params))
print((resident("VmHWM:") - before) / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
  "dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"]
)
def test_loading_the_real_model_peaks_at_its_own_size(dtype):
  """Not at twice that: neither the file nor a stack is in memory besides."""
  directory = models.resolve(models.DEMO)
  done = subprocess.run(
    [sys.executable, "-c", MEASURE, directory, dtype],
    check=True,
    capture_output=True,
    text=True,
  )
  assert 0.9 < float(done.stdout) < 1.2
