"""Files that are damaged or hostile: one error each, naming the file."""

import json

import numpy as np
import pytest
import safetensors.numpy

from gemma_jax import dictionaries
from tests.dictionaries.formats.cases import CASES, marked
from tests.dictionaries.formats.files import (
  D,
  write_safetensors,
)
from tests.dictionaries.formats.refusing import refused

SAFETENSORS = {
  "gemma_scope_2-affine": "params.safetensors",
  "sae_lens-jumprelu_skip_transcoder": "sae_weights.safetensors",
  "sparsify-skip_transcoder": "sae.safetensors",
  "circuit_tracer-jumprelu_skip": "layer_4.safetensors",
  "gemma_scope_2-crosscoder": "params_layer_1.safetensors",
}


@pytest.fixture(params=SAFETENSORS)
def files(request, tmp_path):
  """(path to load, file of weights, its tensors)."""
  made = CASES[request.param](tmp_path)
  file = made.path / SAFETENSORS[request.param]
  return made.path, file, safetensors.numpy.load_file(file)


@pytest.mark.parametrize("kept", [4, 60, 300, -3])
def test_a_truncated_file_is_told(kept, files):
  path, file, _ = files
  file.write_bytes(file.read_bytes()[:kept])
  refused(path, "not a complete safetensors file")


def test_a_header_that_exceeds_the_file_takes_no_memory(files):
  path, file, tensors = files
  name = next(iter(tensors))
  header = {
    name: {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
  }
  text = json.dumps(header).encode()
  file.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 64)
  refused(
    path, f"{file.name} is not a complete safetensors file.*needs {2**42}"
  )


def test_a_missing_tensor_and_an_unknown_one_are_named(files):
  path, file, tensors = files
  first = next(n for n in tensors if n.lower() == "w_dec")
  fewer = {name: x for name, x in tensors.items() if name != first}
  write_safetensors(file, fewer | {"surprise": tensors["b_dec"]})
  refused(path, rf"expected .*{first}.* Missing: {first}\. Unknown: surprise")


def test_a_shape_that_contradicts_another_is_told(files):
  path, file, tensors = files
  tensors["b_dec"] = np.zeros(D + 1, np.float32)
  write_safetensors(file, tensors)
  refused(path, rf"b_dec has shape \[{D + 1}\].*= {D} in")


def test_a_tensor_with_another_number_of_axes_is_told(files):
  path, file, tensors = files
  tensors["b_dec"] = tensors["b_dec"][None]
  write_safetensors(file, tensors)
  refused(path, r"b_dec has shape \[1, \d+\]; expected \[[DE]\]")


def test_tensors_that_are_no_floats_are_refused(files):
  path, file, tensors = files
  tensors["b_dec"] = tensors["b_dec"].astype(np.int32)
  write_safetensors(file, tensors)
  refused(path, "b_dec is int32; expected floats")


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_values_that_are_not_finite_are_counted(value, files):
  path, file, tensors = files
  tensors["b_dec"][1:3] = value
  write_safetensors(file, tensors)
  refused(path, rf"{file.name}: b_dec holds 2 values that are not finite")


def test_halves_and_doubles_are_read(files):
  path, file, tensors = files
  write_safetensors(file, {n: x.astype(np.float16) for n, x in tensors.items()})
  half = dictionaries.load(path)
  write_safetensors(file, {n: x.astype(np.float64) for n, x in tensors.items()})
  double = dictionaries.load(path)
  for name, x in double.params.items():
    assert x.dtype == half.params[name].dtype == np.float32
    np.testing.assert_allclose(half.params[name], x, rtol=2e-3, atol=1e-3)


CONFIGS = {
  "gemma_scope_2-affine": "config.json",
  "sae_lens-jumprelu": "cfg.json",
  "sparsify-sae": "cfg.json",
  "circuit_tracer-relu": "config.yaml",
  "dictionary_learning-AutoEncoder": "config.json",
}


@pytest.mark.parametrize("name", [marked(name) for name in CONFIGS])
def test_a_config_that_is_missing_or_damaged_is_named(name, tmp_path):
  path = CASES[name](tmp_path).path
  config = path / CONFIGS[name]
  for contents in ('{"a": [', "[1, 2]", "", b"\xff\xfe\x00"):
    if isinstance(contents, bytes):
      config.write_bytes(contents)
    else:
      config.write_text(contents)
    refused(path, f"{config.name}.* Download or copy it again")
  config.write_bytes(b" " * (2**24 + 1))
  refused(path, f"{config.name} has 16777217 bytes")
  config.unlink()
  refused(path, f"no {config.name}", FileNotFoundError)
