"""GGUF files of Llama models: tensors, features, byte-level tokenizers."""

import json
import pathlib
import random

import gguf as library
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import transformers

from gemma_jax.models import families, gguf

D, F, N, K, H, L = 32, 64, 2, 1, 4, 2
# GPT-2's spelling of the bytes, in no order that matters.
BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
MERGES = ["Ġ Ġ", "a b", "Ġ ab", "1 2", "Ġ 1"]
PIECES = ["<eos>", "<bos>", "<tool>", *BYTES]
PIECES += [merge.replace(" ", "") for merge in MERGES]
KINDS = [3, 3, 4] + [1] * (len(PIECES) - 3)


def tiny(
  path,
  *,
  without=(),
  tensors=None,
  kind="gpt2",
  pre="smollm",
  merges=MERGES,
  tokens=PIECES,
  ids=None,
  add=None,
  **changes,
):
  """A complete model of two layers, with the given things wrong.

  `changes` are entries `llama.*`; None leaves one out.
  """
  rng = np.random.default_rng(0)
  writer = library.GGUFWriter(path, "llama")
  fields = {
    "context_length": 64,
    "embedding_length": D,
    "block_count": L,
    "feed_forward_length": F,
    "attention.head_count": N,
    "attention.head_count_kv": K,
    "attention.key_length": H,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 1e5,
  } | changes
  for key, value in fields.items():
    if value is None:
      continue
    write = {
      int: writer.add_uint32,
      float: writer.add_float32,
      bool: writer.add_bool,
      str: writer.add_string,
      list: writer.add_array,
    }[type(value)]
    write(f"llama.{key}", value)
  writer.add_tokenizer_model(kind)
  if pre is not None:
    writer.add_tokenizer_pre(pre)
  writer.add_token_list(tokens)
  writer.add_token_types(KINDS)
  writer.add_token_merges(merges)
  for name, i in ({"bos": 1, "eos": 0} | (ids or {})).items():
    writer.add_uint32(f"tokenizer.ggml.{name}_token_id", i)
  for name, value in (add or {}).items():
    writer.add_bool(f"tokenizer.ggml.add_{name}_token", value)
  shapes = {"token_embd.weight": (len(tokens), D), "output_norm.weight": (D,)}
  for l in range(L):
    shapes |= {
      f"blk.{l}.{name}.weight": shape
      for name, shape in {
        "attn_norm": (D,),
        "attn_q": (N * H, D),
        "attn_k": (K * H, D),
        "attn_v": (K * H, D),
        "attn_output": (D, N * H),
        "ffn_norm": (D,),
        "ffn_gate": (F, D),
        "ffn_up": (F, D),
        "ffn_down": (D, F),
      }.items()
    }
  values = {
    name: rng.normal(size=shape).astype(np.float32)
    for name, shape in shapes.items()
  }
  for name, value in (values | (tensors or {})).items():
    if name not in without:
      writer.add_tensor(name, value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return pathlib.Path(path)


def refuses(tmp_path, match, **changes):
  """`convert` raises, and leaves nothing beside the file."""
  path = tiny(tmp_path / "tiny.gguf", **changes)
  with pytest.raises(ValueError, match=match):
    gguf.convert(path, tmp_path / "out")
  assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def tensors_of(path):
  return safetensors.numpy.load_file(path / "model.safetensors")


def numbered(rows):
  """A tensor whose row i is full of i."""
  return np.repeat(np.arange(rows, dtype=np.float32)[:, None], D, axis=1)


# Tensors.


def test_rows_of_queries_and_keys_return_to_the_order_of_hugging_face(
  tmp_path,
):
  """By hand: of a head's rows 0 1 2 3, the pairs 0 1 and 2 3 turn together
  in llama.cpp, and in Hugging Face the first and the third do."""
  changes = {
    "blk.1.attn_q.weight": numbered(N * H),
    "blk.1.attn_k.weight": numbered(K * H),
    "blk.1.attn_v.weight": numbered(K * H),
  }
  path = tiny(tmp_path / "tiny.gguf", tensors=changes)
  got = tensors_of(gguf.convert(path, tmp_path / "out"))
  rows = {
    name: got[f"model.layers.1.self_attn.{name}_proj.weight"][:, 5].tolist()
    for name in "qkv"
  }
  assert rows == {
    "q": [0, 2, 1, 3, 4, 6, 5, 7],
    "k": [0, 2, 1, 3],
    "v": [0, 1, 2, 3],
  }


def test_every_other_tensor_is_what_the_gguf_library_reads(tmp_path):
  """By the library's own table of names."""
  path = tiny(tmp_path / "tiny.gguf")
  got = tensors_of(gguf.convert(path, tmp_path / "out"))
  names = library.get_tensor_name_map(library.MODEL_ARCH.LLAMA, L)
  theirs = {t.name: t.data for t in library.GGUFReader(path).tensors}
  named = {
    names.get_name(name, try_suffixes=(".weight",)): value
    for name, value in got.items()
  }
  assert named.keys() == theirs.keys()
  for name, value in named.items():
    if "attn_q" not in name and "attn_k" not in name:
      np.testing.assert_array_equal(value, theirs[name], name)


def test_a_chunk_holds_whole_heads(tmp_path, monkeypatch):
  path = tiny(tmp_path / "tiny.gguf")
  whole = gguf.convert(path, tmp_path / "whole")
  # Seven rows, which is no multiple of a head's four; then less than a row.
  for rows in (7, 0):
    monkeypatch.setattr(gguf, "_CHUNK_BYTES", rows * 4 * D)
    parts = gguf.convert(path, tmp_path / f"parts{rows}")
    name = "model.safetensors"
    assert (whole / name).read_bytes() == (parts / name).read_bytes()


def test_the_head_is_written_only_if_it_is_not_the_embedding(tmp_path):
  tied = gguf.convert(tiny(tmp_path / "tied.gguf"), tmp_path / "tied")
  head = numbered(len(PIECES))
  untied = gguf.convert(
    tiny(tmp_path / "untied.gguf", tensors={"output.weight": head}),
    tmp_path / "untied",
  )
  assert tensors_of(untied).keys() - tensors_of(tied).keys() == {
    "lm_head.weight"
  }
  np.testing.assert_array_equal(tensors_of(untied)["lm_head.weight"], head)
  for directory, expected in ((tied, True), (untied, False)):
    config = json.loads((directory / "config.json").read_text())
    assert config["tie_word_embeddings"] is expected
    assert families.from_hf_config(config).tied is expected


def test_missing_and_unknown_tensors_are_listed(tmp_path):
  extra = {"blk.0.attn_q_norm.weight": np.ones(H, np.float32)}
  refuses(
    tmp_path,
    r"Missing: blk.1.attn_k.weight. Unknown: blk.0.attn_q_norm.weight.",
    without=("blk.1.attn_k.weight",),
    tensors=extra,
  )


@pytest.mark.parametrize(
  ("name", "feature"),
  [
    ("blk.0.attn_q.bias", "biases"),
    ("rope_freqs.weight", "RoPE with a factor for each frequency"),
    ("blk.1.ffn_gate_inp.weight", "a mixture of experts"),
  ],
)
def test_tensors_of_other_features_are_refused_by_name(tmp_path, name, feature):
  refuses(
    tmp_path,
    f"it has {feature}, which is not supported: {name}",
    tensors={name: np.ones(D, np.float32)},
  )


# Metadata.


def test_the_config_is_what_the_metadata_say(tmp_path):
  path = tiny(tmp_path / "tiny.gguf", **{"expert_count": 0})
  out = gguf.convert(path, tmp_path / "out")
  theirs = transformers.AutoConfig.from_pretrained(out)
  assert theirs.model_type == "llama"
  assert (theirs.num_hidden_layers, theirs.hidden_size) == (L, D)
  assert (theirs.num_attention_heads, theirs.num_key_value_heads) == (N, K)
  assert (theirs.head_dim, theirs.intermediate_size) == (H, F)
  assert theirs.rope_parameters["rope_theta"] == 1e5
  assert (theirs.rms_norm_eps, theirs.max_position_embeddings) == (1e-5, 64)
  assert (theirs.hidden_act, theirs.attention_bias) == ("silu", False)
  # A file without an id for padding is padded with the end of a text.
  ids = theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id
  assert ids == (1, 0, 0)


@pytest.mark.parametrize(("eot", "ends"), [(2, [0, 2]), (0, 0)])
def test_the_end_of_a_turn_ends_a_text_too(tmp_path, eot, ends):
  out = gguf.convert(tiny(tmp_path / "a", ids={"eot": eot}), tmp_path / "out")
  assert json.loads((out / "config.json").read_text())["eos_token_id"] == ends


def test_entries_that_may_be_missing_have_the_defaults_of_llama_cpp(tmp_path):
  """RoPE's base is 10,000, a head is D / N wide, and there are N of each."""
  square = {
    f"blk.{l}.attn_{name}.weight": np.ones((D, D), np.float32)
    for l in range(L)
    for name in ("q", "k", "v", "output")
  }
  absent = ("rope.freq_base", "attention.key_length", "attention.head_count_kv")
  path = tiny(tmp_path / "tiny.gguf", tensors=square, **dict.fromkeys(absent))
  out = gguf.convert(path, tmp_path / "out")
  theirs = transformers.AutoConfig.from_pretrained(out)
  assert theirs.rope_parameters["rope_theta"] == 1e4
  assert (theirs.head_dim, theirs.num_key_value_heads) == (D // N, N)


@pytest.mark.parametrize(
  ("changes", "factor"),
  [
    ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4.0),
    ({"rope.scaling.factor": 4.0}, 4.0),
    ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, 1.0),
    ({}, 1.0),
  ],
)
def test_a_linear_rope_factor_reaches_the_config(tmp_path, changes, factor):
  out = gguf.convert(tiny(tmp_path / "tiny.gguf", **changes), tmp_path / "out")
  config = json.loads((out / "config.json").read_text())
  assert families.from_hf_config(config).rope_factor_global == factor


@pytest.mark.parametrize(
  ("key", "value", "match"),
  [
    ("rope.scaling.type", "yarn", "'linear' or 'none', got 'yarn'"),
    ("expert_count", 8, "not supported: llama.expert_count = 8"),
    ("attention.sliding_window", 16, "llama.attention.sliding_window = 16"),
    ("attention.causal", False, "llama.attention.causal = False"),
    ("attention.scale", 0.5, "llama.attention.scale = 0.5"),
    ("logit_scale", [1, 2], r"llama.logit_scale = array\(\[1, 2\]"),
    ("rope.dimension_count", 2, "rope.dimension_count' to be the even width"),
    ("attention.value_length", 8, "value_length' to be .* got 8 for heads of"),
    ("attention.key_length", 3, "to be the even width of a head, got 3"),
    ("attention.head_count_kv", [1, 1], "head_count_kv' to be of type int"),
    ("attention.head_count", 3, "shapes that do not agree"),
    ("block_count", 3, "Missing: blk.2.attn_k.weight"),
    ("block_count", 2**32 - 1, "block_count of at most 20"),
  ],
)
def test_metadata_of_other_models_are_refused_by_name(
  tmp_path, key, value, match
):
  refuses(tmp_path, match, **{key: value})


def test_a_random_change_of_the_header_is_refused_or_harmless(tmp_path):
  path = tiny(tmp_path / "tiny.gguf")
  data = path.read_bytes()
  end = data.index(b"blk.1.ffn_down") + 60
  rng = random.Random(0)
  refused = 0
  for i in range(300):
    damaged = bytearray(data)
    damaged[rng.randrange(end)] = rng.choice((0, 1, 9, 0x7F, 0xFF))
    path.write_bytes(damaged)
    try:
      gguf.convert(path, tmp_path / f"out{i}")
    except ValueError:
      refused += 1
      assert not (tmp_path / f"out{i}").exists()
  assert 100 < refused < 300


# The tokenizer of the tiny model.


@pytest.mark.parametrize(
  ("pre", "text", "expected"),
  [
    # Digits one by one, and what is between them by itself: no merge with a
    # digit, and two spaces before one stay together.
    ("smollm", "12", ["1", "2"]),
    ("smollm", " 12", ["Ġ", "1", "2"]),
    ("smollm", "  12", ["ĠĠ", "1", "2"]),
    ("gpt-2", "12", ["12"]),
    ("gpt-2", " 12", ["Ġ", "12"]),
    ("gpt-2", "  12", ["Ġ", "Ġ", "12"]),
    *(
      (pre, text, expected)
      for pre in ("smollm", "gpt-2")
      for text, expected in [
        (" ab  ab", ["Ġab", "Ġ", "Ġab"]),
        ("a b\n", ["a", "Ġ", "b", "Ċ"]),
        ("é", ["Ã", "©"]),
        ("<bos>ab<tool>ab<eos>", ["<bos>", "ab", "<tool>", "ab", "<eos>"]),
      ]
    ),
  ],
)
def test_merges_come_in_their_order_within_what_the_split_leaves(
  tmp_path, pre, text, expected
):
  out = gguf.convert(tiny(tmp_path / "tiny.gguf", pre=pre), tmp_path / "out")
  theirs = transformers.AutoTokenizer.from_pretrained(
    out, local_files_only=True
  )
  ids = theirs(text)["input_ids"]
  assert theirs.convert_ids_to_tokens(ids) == expected
  assert theirs.decode(ids) == text
  assert theirs.all_special_ids == [1, 0]
  visible = text.replace("<bos>", "").replace("<eos>", "")
  assert theirs.decode(ids, skip_special_tokens=True) == visible


def test_a_byte_that_is_no_token_is_left_out_before_the_merges(tmp_path):
  """As Hugging Face does; SmolLM2's vocabulary has such bytes."""
  # "x" gives up its place, which merges do not need.
  tokens = ["xx" if piece == "x" else piece for piece in PIECES]
  path = tiny(tmp_path / "tiny.gguf", tokens=tokens)
  out = gguf.convert(path, tmp_path / "out")
  made = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
  assert made.encode("axb").tokens == ["ab"]


@pytest.mark.parametrize(
  ("add", "expected"),
  [
    ({}, ["ab"]),
    ({"bos": True}, ["<bos>", "ab"]),
    ({"bos": False, "eos": True}, ["ab", "<eos>"]),
  ],
)
def test_the_tokenizer_adds_what_the_file_says(tmp_path, add, expected):
  out = gguf.convert(tiny(tmp_path / "tiny.gguf", add=add), tmp_path / "out")
  theirs = transformers.AutoTokenizer.from_pretrained(
    out, local_files_only=True
  )
  assert theirs.convert_ids_to_tokens(theirs("ab")["input_ids"]) == expected


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"pre": "llama-bpe"}, "'llama-bpe' is not supported; expected one of"),
    ({"pre": None}, "the pre-tokenizer None is not supported"),
    ({"kind": "llama"}, "the tokenizer 'llama' is not supported"),
    ({"merges": ["a b", "a zz"]}, "two tokens that make a third, got 'a zz'"),
    ({"merges": ["a b c"]}, "two tokens that make a third, got 'a b c'"),
    ({"merges": ["b a"]}, "two tokens that make a third, got 'b a'"),
    ({"ids": {"eos": 999}}, "eos_token_id' to be below 264, got 999"),
    ({"ids": {"unknown": 264}}, "unknown_token_id' to be below 264, got"),
    ({"tokens": ["a", *PIECES[1:]]}, "264 tokens, 263 different ones"),
  ],
)
def test_tokenizers_that_are_not_known_are_refused_by_name(
  tmp_path, changes, match
):
  refuses(tmp_path, match, **changes)
