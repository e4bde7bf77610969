"""Safetensors files as untrusted data, against the safetensors package."""

import json
import math

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from gemma_jax.models import safetensors as ours

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


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F4", "U16", "C64"])
def test_a_dtype_that_is_not_read_is_named(tmp_path, dtype):
  header = json.dumps({"a": entry(), "b": entry(dtype=dtype)}).encode()
  path = tmp_path / "x.safetensors"
  path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(9))
  with pytest.raises(
    ValueError, match=f"not supported: b is {dtype}. Expected F64, F32"
  ) as e:
    ours.open_file(path)
  assert "complete" not in str(e.value)


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


# Several files with an index.


@pytest.fixture
def sharded(tmp_path):
  """Two shards and their index, written by hand."""
  directory = tmp_path / "sharded"
  directory.mkdir()
  where = {}
  for i in (0, 1):
    name = f"model-0000{i + 1}-of-00002.safetensors"
    part = {k: x for j, (k, x) in enumerate(SAMPLE.items()) if j % 2 == i}
    safetensors.numpy.save_file(part, directory / name)
    where |= dict.fromkeys(part, name)
  index = {"metadata": {"total_size": 1}, "weight_map": where}
  (directory / ours.INDEX).write_text(json.dumps(index))
  return directory


def test_shards_hold_what_the_single_file_would(sharded):
  same(ours.open_directory(sharded), SAMPLE)


def test_a_missing_shard_is_named(sharded):
  (sharded / "model-00002-of-00002.safetensors").unlink()
  with pytest.raises(
    FileNotFoundError, match=r": 'model-00002-of-00002\.safetensors'\. Download"
  ):
    ours.open_directory(sharded)


def test_a_tensor_that_is_not_in_its_shard_is_named(sharded):
  index = json.loads((sharded / ours.INDEX).read_text())
  index["weight_map"]["model.norm.weights"] = "model-00001-of-00002.safetensors"
  (sharded / ours.INDEX).write_text(json.dumps(index))
  with pytest.raises(ValueError, match=r"files lack: model\.norm\.weights\."):
    ours.open_directory(sharded)


@pytest.mark.parametrize(
  "name", ["../secret.safetensors", "..", ".", "", "a/b"]
)
def test_an_index_cannot_name_a_file_outside_the_directory(sharded, name):
  part = {"f32": SAMPLE["f32"]}
  outside = sharded.parent / "secret.safetensors"
  safetensors.numpy.save_file(part, outside)
  index = json.loads((sharded / ours.INDEX).read_text())
  index["weight_map"]["f32"] = name
  (sharded / ours.INDEX).write_text(json.dumps(index))
  with pytest.raises(FileNotFoundError, match="shards that are not in"):
    ours.open_directory(sharded)
  outside.unlink()


@pytest.mark.parametrize(
  "text",
  [
    "",
    "{",
    "[" * 100_000,
    "[]",
    "{}",
    '{"weight_map": 3}',
    '{"weight_map": {"a": 1}}',
  ],
)
def test_a_broken_index_is_named(tmp_path, text):
  (tmp_path / ours.INDEX).write_text(text)
  with pytest.raises(ValueError, match=r"index\.json is no.*weight_map.*again"):
    ours.open_directory(tmp_path)


def test_a_directory_without_weights_says_which_files_belong_there(tmp_path):
  with pytest.raises(
    FileNotFoundError, match=r"neither model\.safetensors nor model\..*index"
  ):
    ours.open_directory(tmp_path)
