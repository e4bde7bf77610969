"""The SentencePiece vocabulary of a GGUF file as a tokenizer.json."""

import json
import pathlib

import numpy as np
import tokenizers

from gemma_jax.models import config as config_lib
from gemma_jax.models.gguf_file import File, field

# tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4


def write_tokenizer(
  file: File, cfg: config_lib.ModelConfig, directory: pathlib.Path
):
  """tokenizer.json and tokenizer_config.json, as transformers has Gemma's.

  Equal to SentencePiece but for runs of more than 31 spaces, the longest that
  is a token: SentencePiece cuts 31 off the front, and merging, here as in
  transformers, cuts a run of 32 into halves.

  Normaliser, pre-tokenizer and decoder: huggingface/transformers,
  models/gemma/tokenization_gemma.py.
  """
  kind = file.metadata.get("tokenizer.ggml.model")
  if kind != "llama":
    raise ValueError(
      f"{file.path}: the tokenizer {kind!r} is not supported; expected "
      "'llama', a SentencePiece vocabulary, which every Gemma 3 has."
    )
  tokens, kinds = _vocabulary(file)
  vocab = {token: i for i, token in enumerate(tokens)}
  unk_id = field(file, "tokenizer.ggml.unknown_token_id", int)
  ids = {"bos": cfg.bos_id, "eos": cfg.eos_id, "pad": cfg.pad_id, "unk": unk_id}
  for name, i in ids.items():
    if not 0 <= i < len(tokens):
      raise ValueError(
        f"{file.path}: expected the id of <{name}> to be below {len(tokens)}, "
        f"got {i}. Convert the model to GGUF again."
      )
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
  added = [
    tokenizers.AddedToken(
      token, normalized=False, special=kind != _USER_DEFINED
    )
    for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
    if (kind in (_UNKNOWN, _CONTROL) or i in ids.values())
    or (kind == _USER_DEFINED and token.strip("▁"))
  ]
  tokenizer.add_tokens(added)
  add_bos = field(file, "tokenizer.ggml.add_bos_token", bool, True)
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
    special_tokens=[(token, vocab[token]) for token in before + after],
  )
  tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
  contents = {f"{name}_token": token for name, token in special.items()}
  contents |= {
    "tokenizer_class": "GemmaTokenizer",
    "add_bos_token": add_bos,
    "add_eos_token": add_eos,
    "padding_side": "left",
    "clean_up_tokenization_spaces": False,
    "spaces_between_special_tokens": False,
  }
  template = file.metadata.get("tokenizer.chat_template")
  if isinstance(template, str):
    contents["chat_template"] = template
  path = directory / "tokenizer_config.json"
  path.write_text(json.dumps(contents, indent=2))


def _vocabulary(file: File) -> tuple[list[str], list[int]]:
  """Every token as SentencePiece spells it, and its type."""
  tokens = field(file, "tokenizer.ggml.tokens", list)
  kinds = field(file, "tokenizer.ggml.token_type", np.ndarray).tolist()
  # llama.cpp writes the tokens that are runs of spaces with real spaces.
  tokens = [
    token.replace(" ", "▁") if token.isspace() else token for token in tokens
  ]
  if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
    raise ValueError(
      f"{file.path}: expected different tokens and a type for each; got "
      f"{len(tokens)} tokens, {len(set(tokens))} different ones, and "
      f"{len(kinds)} types. Convert the model to GGUF again."
    )
  return tokens, kinds


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
