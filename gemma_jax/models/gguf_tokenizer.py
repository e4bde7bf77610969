"""The vocabulary of a GGUF file as a tokenizer.json."""

import json
import pathlib
from collections.abc import Callable

import numpy as np
import tokenizers

from gemma_jax.models import config as config_lib
from gemma_jax.models.gguf_file import File, field

# tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

# tokenizer.ggml.pre -> what splits the text. llama.cpp, src/llama-vocab.cpp,
# names more than seventy.
_PRE_TOKENIZERS = {
  "gpt-2": (),
  "smollm": (tokenizers.pre_tokenizers.Digits(individual_digits=True),),
}


def token_id(file: File, name: str, default: int | None = None) -> int:
  """The id of a special token.

  Raises:
    ValueError: it is missing, or no id of the vocabulary.
  """
  key = f"tokenizer.ggml.{name}_token_id"
  i = field(file, key, int, default)
  size = len(field(file, "tokenizer.ggml.tokens", list))
  if not 0 <= i < size:
    raise ValueError(
      f"{file.path}: expected {key!r} to be below {size}, got {i}. Convert "
      "the model to GGUF again."
    )
  return i


def write_sentencepiece(
  file: File, cfg: config_lib.ModelConfig, directory: pathlib.Path
):
  """tokenizer.json and tokenizer_config.json, as transformers has Gemma's.

  Equal to SentencePiece but for runs of more than 31 spaces, the longest that
  is a token: SentencePiece cuts 31 off the front, and merging, here as in
  transformers, cuts a run of 32 into halves.

  Normaliser, pre-tokenizer and decoder: huggingface/transformers,
  models/gemma/tokenization_gemma.py.

  Args:
    file: the file's header.
    cfg: for the ids of special tokens.
    directory: where to write.

  Raises:
    ValueError: a tokenizer of another kind, or ids, tokens and types that do
      not agree.
  """
  kind = file.metadata.get("tokenizer.ggml.model")
  if kind != "llama":
    raise ValueError(
      f"{file.path}: the tokenizer {kind!r} is not supported; expected "
      "'llama', a SentencePiece vocabulary, which every Gemma 3 has."
    )
  # llama.cpp writes the tokens that are runs of spaces with real spaces.
  tokens, kinds = _vocabulary(
    file, lambda token: token.replace(" ", "▁") if token.isspace() else token
  )
  vocab = {token: i for i, token in enumerate(tokens)}
  unk_id = token_id(file, "unknown")
  ids = {"bos": cfg.bos_id, "eos": cfg.eos_id, "pad": cfg.pad_id, "unk": unk_id}
  special = {name: tokens[i] for name, i in ids.items()}
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      vocab=vocab,
      merges=_merges(tokens, kinds),
      unk_token=special["unk"],
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(
    " ", "merged_with_previous"
  )
  tokenizer.decoder = tokenizers.decoders.Sequence(
    [
      tokenizers.decoders.Replace("▁", " "),
      tokenizers.decoders.ByteFallback(),
      tokenizers.decoders.Fuse(),
    ]
  )
  # Runs of spaces are user-defined too. They come about by merging, because an
  # added token would be looked for before spaces become "▁", and never found.
  merged = [
    _NORMAL if kind == _USER_DEFINED and not token.strip("▁") else kind
    for token, kind in zip(tokens, kinds, strict=True)
  ]
  _add_tokens(tokenizer, tokens, merged, ids)
  _save(
    file,
    tokenizer,
    special,
    directory,
    "GemmaTokenizer",
    add_bos=True,
    padding_side="left",
  )


def write_byte_level(
  file: File, cfg: config_lib.ModelConfig, directory: pathlib.Path
):
  """tokenizer.json and tokenizer_config.json of a byte-level BPE.

  Gives the ids of llama.cpp, but around a byte that is no token: it is left
  out, here and in Hugging Face's before its neighbours merge, in llama.cpp
  after. SmolLM2 lacks six control characters, and two bytes of characters
  that are not assigned.

  Pre-tokenizers: llama.cpp, src/llama-vocab.cpp, llm_tokenizer_bpe. "smollm"
  takes every digit by itself before GPT-2's rule is used on what is between,
  so that two spaces before a digit stay together.

  Args:
    file: the file's header.
    cfg: for the ids of special tokens.
    directory: where to write.

  Raises:
    ValueError: a tokenizer or pre-tokenizer of another kind (named), or ids,
      tokens, types and merges that do not agree.
  """
  kind = file.metadata.get("tokenizer.ggml.model")
  if kind != "gpt2":
    raise ValueError(
      f"{file.path}: the tokenizer {kind!r} is not supported for this "
      "architecture; expected 'gpt2', a byte-level BPE. Load the model's "
      "Hugging Face directory."
    )
  split = file.metadata.get("tokenizer.ggml.pre")
  if not isinstance(split, str) or split not in _PRE_TOKENIZERS:
    raise ValueError(
      f"{file.path}: the pre-tokenizer {split!r} is not supported; expected "
      f"one of {sorted(_PRE_TOKENIZERS)}. Load the model's Hugging Face "
      "directory."
    )
  tokens, kinds = _vocabulary(file)
  ids = {"bos": cfg.bos_id, "eos": cfg.eos_id, "pad": cfg.pad_id}
  if "tokenizer.ggml.unknown_token_id" in file.metadata:
    ids["unk"] = token_id(file, "unknown")
  special = {name: tokens[i] for name, i in ids.items()}
  vocab = {token: i for i, token in enumerate(tokens)}
  merges = [
    tuple(merge.split(" "))
    for merge in field(file, "tokenizer.ggml.merges", list)
  ]
  for merge in merges:
    if len(merge) != 2 or not {*merge, "".join(merge)} <= vocab.keys():
      raise ValueError(
        f"{file.path}: expected every merge to be two tokens that make a "
        f"third, got {' '.join(merge)!r}. Convert the model to GGUF again."
      )
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.BPE(vocab=vocab, merges=merges)
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      *_PRE_TOKENIZERS[split],
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  _add_tokens(tokenizer, tokens, kinds, ids)
  _save(
    file,
    tokenizer,
    special,
    directory,
    # GPT2Tokenizer and LlamaTokenizer put their own pre-tokenizer in place of
    # the one in tokenizer.json.
    "PreTrainedTokenizerFast",
    add_bos=False,
  )


def _vocabulary(
  file: File, spell: Callable[[str], str] = str
) -> tuple[list[str], list[int]]:
  """Every token as its tokenizer spells it, and its type."""
  tokens = [spell(t) for t in field(file, "tokenizer.ggml.tokens", list)]
  kinds = field(file, "tokenizer.ggml.token_type", np.ndarray).tolist()
  if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
    raise ValueError(
      f"{file.path}: expected different tokens and a type for each; got "
      f"{len(tokens)} tokens, {len(set(tokens))} different ones, and "
      f"{len(kinds)} types. Convert the model to GGUF again."
    )
  return tokens, kinds


def _add_tokens(
  tokenizer: tokenizers.Tokenizer,
  tokens: list[str],
  kinds: list[int],
  ids: dict[str, int],
):
  """Tokens that are found whole in text; all but the user's are special."""
  tokenizer.add_tokens(
    [
      tokenizers.AddedToken(
        token, normalized=False, special=kind != _USER_DEFINED
      )
      for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
      if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) or i in ids.values()
    ]
  )


def _save(
  file: File,
  tokenizer: tokenizers.Tokenizer,
  special: dict[str, str],
  directory: pathlib.Path,
  tokenizer_class: str,
  *,
  add_bos: bool,
  **settings: str,
):
  """Writes both files; `add_bos` holds where the GGUF file does not say it."""
  add_bos = field(file, "tokenizer.ggml.add_bos_token", bool, add_bos)
  add_eos = field(file, "tokenizer.ggml.add_eos_token", bool, False)
  before = [special["bos"]] if add_bos else []
  after = [special["eos"]] if add_eos else []
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single=[*before, "$A", *after],
    pair=[
      *before,
      "$A",
      *after,
      *(f"{token}:1" for token in before),
      "$B:1",
      *(f"{token}:1" for token in after),
    ],
    special_tokens=[
      (token, tokenizer.token_to_id(token)) for token in before + after
    ],
  )
  tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
  contents = {f"{name}_token": token for name, token in special.items()}
  contents |= {
    "tokenizer_class": tokenizer_class,
    "add_bos_token": add_bos,
    "add_eos_token": add_eos,
    **settings,
    "clean_up_tokenization_spaces": False,
    "spaces_between_special_tokens": False,
  }
  template = file.metadata.get("tokenizer.chat_template")
  if isinstance(template, str):
    contents["chat_template"] = template
  path = directory / "tokenizer_config.json"
  path.write_text(json.dumps(contents, indent=2), encoding="utf-8")


def _merges(tokens: list[str], kinds: list[int]) -> list[tuple[str, str]]:
  """All pairs of pieces that make a piece, those that merge first in front.

  SentencePiece joins the neighbours whose union has the best score. In Gemma
  a lower id is a better score, and user-defined pieces, whose scores in a GGUF
  file mean nothing, have the lowest ids: so the id is the rank. Among the
  pairs of one piece the longer left part is first: huggingface/transformers,
  tokenization_utils_base.py, generate_merges.
  """
  pieces = {
    token
    for token, kind in zip(tokens, kinds, strict=True)
    if kind in (_NORMAL, _USER_DEFINED)
  }
  merges = []
  for token in tokens:
    if token not in pieces:
      continue
    for cut in range(len(token) - 1, 0, -1):
      left, right = token[:cut], token[cut:]
      if left in pieces and right in pieces:
        merges.append((left, right))
  return merges
