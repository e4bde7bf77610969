"""What a GGUF file of each architecture holds: its config and its tensors.

A further architecture is a config function, a table, and a row in
`_ARCHITECTURES`.
"""

import pathlib
import re
import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gemma_jax.models import config as config_lib
from gemma_jax.models.gguf_file import File, field
from gemma_jax.models.gguf_tokenizer import (
  token_id,
  write_byte_level,
  write_sentencepiece,
)


class Weight(NamedTuple):
  """A row of an architecture's table. `{}` stands for the layer's index."""

  source: str
  target: str
  shape: tuple[str, ...]
  offset: float = 0.0  # added after dequantisation
  interleaved: bool = (
    False  # RoPE's pairs are neighbours, not half a head apart
  )
  untied: bool = False  # only there if the head is not the embedding


class Architecture(NamedTuple):
  config: Callable[[File], config_lib.ModelConfig]
  weights: tuple[Weight, ...]
  write_tokenizer: Callable[[File, config_lib.ModelConfig, pathlib.Path], None]


def _decimal(x: float) -> float:
  """1e-6 for the float32 nearest to it, as config.json spells it."""
  return float(str(np.float32(x)))


def _num_layers(file: File, name: str) -> int:
  layers = field(file, f"{name}.block_count", int)
  if layers > len(file.tensors):
    raise ValueError(
      f"{file.path}: expected a block_count of at most {len(file.tensors)}, "
      f"the number of tensors; got {layers}. Download the file again."
    )
  return layers


def _rope_factor(file: File, name: str) -> float:
  """What positions are divided by."""
  key = f"{name}.rope.scaling.type"
  kind = file.metadata.get(key, "linear")  # llama.cpp's default
  if kind == "none":
    return 1.0
  if kind == "linear":
    factor = None if key in file.metadata else 1.0
    return _decimal(field(file, f"{name}.rope.scaling.factor", float, factor))
  raise ValueError(
    f"{file.path}: expected {key!r} to be 'linear' or 'none', got {kind!r}. "
    "Other kinds of RoPE are not supported."
  )


def _check_head(file: File, name: str, head_dim: int):
  for key in ("attention.value_length", "rope.dimension_count"):
    size = field(file, f"{name}.{key}", int, head_dim)
    if size != head_dim or size % 2:
      raise ValueError(
        f"{file.path}: expected '{name}.{key}' to be the even width of a head, "
        f"got {size} for heads of {head_dim}. Partial RoPE and values of "
        "another width are not supported."
      )


def _ids(file: File, pad: int | None = None) -> dict[str, Any]:
  """The ids of special tokens; like llama.cpp, the end of a turn is an end."""
  eos_id = token_id(file, "eos")
  ends = eos_id, token_id(file, "eot", eos_id)
  return {
    "bos_id": token_id(file, "bos"),
    "eos_ids": tuple(dict.fromkeys(ends)),
    "pad_id": token_id(file, "padding", pad),
  }


# Entries that are read, or that repeat what the tensors say.
_KEYS = (
  "block_count",
  "context_length",
  "embedding_length",
  "feed_forward_length",
  "vocab_size",
  "attention.head_count",
  "attention.head_count_kv",
  "attention.key_length",
  "attention.value_length",
  "attention.layer_norm_rms_epsilon",
  "rope.dimension_count",
  "rope.freq_base",
  "rope.scaling.type",
  "rope.scaling.factor",
)
# Entries that may be there with the value that changes nothing.
_NEUTRAL = {
  "attention.causal": True,
  "expert_count": 0,
  "expert_used_count": 0,
  "tensor_data_layout": "Meta AI original pth",  # what every Llama has
}


def _refuse_entries(file: File, name: str, *more: str):
  """An entry that is not known could change what the model computes."""
  others = []
  for key, value in file.metadata.items():
    entry = key.removeprefix(f"{name}.")
    if entry == key or entry in (*_KEYS, *more):
      continue
    neutral = _NEUTRAL.get(entry)
    if type(value) is not type(neutral) or value != neutral:
      others.append(f"{key} = {reprlib.repr(value)}")
  if others:
    raise ValueError(
      f"{file.path}: expected a plain {name} model, but the metadata ask for "
      f"what is not supported: {', '.join(sorted(others))}. Choose a model "
      "without it."
    )


# ---------------------------------------------------------------------------
# Gemma 3.
# ---------------------------------------------------------------------------


def _gemma3_config(file: File) -> config_lib.ModelConfig:
  def need(key, kind, default=None):
    return field(file, f"gemma3.{key}", kind, default)

  _refuse_entries(
    file,
    "gemma3",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "final_logit_softcapping",
    "rope.freq_base_swa",
  )
  layers = _num_layers(file, "gemma3")
  heads = need("attention.head_count", int)
  width = need("embedding_length", int)
  head_dim = need("attention.key_length", int)
  _check_head(file, "gemma3", head_dim)
  # Not in the file. llama.cpp, src/llama-model.cpp: width / heads in the 27B,
  # which it knows by its number of layers, the head's width in all others.
  scalar = width // heads if layers == 62 else head_dim
  cap = None
  if "gemma3.final_logit_softcapping" in file.metadata:
    cap = _decimal(need("final_logit_softcapping", float))
  return config_lib.ModelConfig(
    family="gemma3",
    num_layers=layers,
    width=width,
    mlp_width=need("feed_forward_length", int),
    num_heads=heads,
    num_kv_heads=need("attention.head_count_kv", int),
    head_dim=head_dim,
    vocab_size=len(field(file, "tokenizer.ggml.tokens", list)),
    window=need("attention.sliding_window", int),
    layer_is_global=_global_layers(file, layers),
    query_scale=scalar**-0.5,
    rope_theta_local=_decimal(need("rope.freq_base_swa", float, 10_000.0)),
    rope_theta_global=_decimal(need("rope.freq_base", float, 1_000_000.0)),
    rope_factor_global=_rope_factor(file, "gemma3"),
    qk_norm=True,
    final_softcap=cap,
    norm_eps=_decimal(need("attention.layer_norm_rms_epsilon", float)),
    norm_offset=1.0,
    activation="gelu_tanh",
    embed_scale=width**0.5,
    max_context=need("context_length", int),
    **_ids(file),
  )


def _global_layers(file: File, layers: int) -> tuple[bool, ...]:
  # llama.cpp has the 6 of Gemma 3 in its source, and most files do not state
  # it. Its key holds a period, or whether each layer is local.
  key = "gemma3.attention.sliding_window_pattern"
  pattern = file.metadata.get(key, 6)
  if type(pattern) is int and pattern > 0:
    return tuple((i + 1) % pattern == 0 for i in range(layers))
  if isinstance(pattern, np.ndarray) and len(pattern) == layers:
    return tuple(not local for local in pattern.tolist())
  raise ValueError(
    f"{file.path}: expected {key!r} to be a period or {layers} entries, got "
    f"{pattern!r}. Convert the model to GGUF again."
  )


# llama.cpp stores 1 + weight of every norm (convert_hf_to_gguf.py,
# Gemma3Model.modify_tensors); Hugging Face adds the 1 in the forward pass.
_GEMMA3_WEIGHTS = (
  Weight("token_embd", "model.embed_tokens", ("V", "D")),
  Weight("output_norm", "model.norm", ("D",), -1.0),
  Weight("blk.{}.attn_norm", "model.layers.{}.input_layernorm", ("D",), -1.0),
  Weight("blk.{}.attn_q", "model.layers.{}.self_attn.q_proj", ("NH", "D")),
  Weight("blk.{}.attn_k", "model.layers.{}.self_attn.k_proj", ("KH", "D")),
  Weight("blk.{}.attn_v", "model.layers.{}.self_attn.v_proj", ("KH", "D")),
  Weight(
    "blk.{}.attn_q_norm", "model.layers.{}.self_attn.q_norm", ("H",), -1.0
  ),
  Weight(
    "blk.{}.attn_k_norm", "model.layers.{}.self_attn.k_norm", ("H",), -1.0
  ),
  Weight("blk.{}.attn_output", "model.layers.{}.self_attn.o_proj", ("D", "NH")),
  Weight(
    "blk.{}.post_attention_norm",
    "model.layers.{}.post_attention_layernorm",
    ("D",),
    -1.0,
  ),
  Weight(
    "blk.{}.ffn_norm", "model.layers.{}.pre_feedforward_layernorm", ("D",), -1.0
  ),
  Weight("blk.{}.ffn_gate", "model.layers.{}.mlp.gate_proj", ("F", "D")),
  Weight("blk.{}.ffn_up", "model.layers.{}.mlp.up_proj", ("F", "D")),
  Weight("blk.{}.ffn_down", "model.layers.{}.mlp.down_proj", ("D", "F")),
  Weight(
    "blk.{}.post_ffw_norm",
    "model.layers.{}.post_feedforward_layernorm",
    ("D",),
    -1.0,
  ),
)


# ---------------------------------------------------------------------------
# Llama.
# ---------------------------------------------------------------------------


def _llama_config(file: File) -> config_lib.ModelConfig:
  def need(key, kind, default=None):
    return field(file, f"llama.{key}", kind, default)

  _refuse_entries(file, "llama")
  layers = _num_layers(file, "llama")
  heads = need("attention.head_count", int)
  width = need("embedding_length", int)
  head_dim = need("attention.key_length", int, width // heads)
  _check_head(file, "llama", head_dim)
  return config_lib.ModelConfig(
    family="llama",
    num_layers=layers,
    width=width,
    mlp_width=need("feed_forward_length", int),
    num_heads=heads,
    num_kv_heads=need("attention.head_count_kv", int, heads),
    head_dim=head_dim,
    vocab_size=len(field(file, "tokenizer.ggml.tokens", list)),
    query_scale=head_dim**-0.5,
    rope_theta_global=_decimal(need("rope.freq_base", float, 10_000.0)),
    rope_factor_global=_rope_factor(file, "llama"),
    norm_eps=_decimal(need("attention.layer_norm_rms_epsilon", float)),
    norm_offset=0.0,
    activation="silu",
    embed_scale=1.0,
    tied="output.weight" not in file.tensors,
    max_context=need("context_length", int),
    **_ids(file, pad=token_id(file, "eos")),
  )


# llama.cpp rotates neighbouring rows of a head, Hugging Face rows that are half
# a head apart; convert_hf_to_gguf.py, LlamaModel.permute, reorders q and k.
_LLAMA_WEIGHTS = (
  Weight("token_embd", "model.embed_tokens", ("V", "D")),
  Weight("output", "lm_head", ("V", "D"), untied=True),
  Weight("output_norm", "model.norm", ("D",)),
  Weight("blk.{}.attn_norm", "model.layers.{}.input_layernorm", ("D",)),
  Weight(
    "blk.{}.attn_q",
    "model.layers.{}.self_attn.q_proj",
    ("NH", "D"),
    interleaved=True,
  ),
  Weight(
    "blk.{}.attn_k",
    "model.layers.{}.self_attn.k_proj",
    ("KH", "D"),
    interleaved=True,
  ),
  Weight("blk.{}.attn_v", "model.layers.{}.self_attn.v_proj", ("KH", "D")),
  Weight("blk.{}.attn_output", "model.layers.{}.self_attn.o_proj", ("D", "NH")),
  Weight("blk.{}.ffn_norm", "model.layers.{}.post_attention_layernorm", ("D",)),
  Weight("blk.{}.ffn_gate", "model.layers.{}.mlp.gate_proj", ("F", "D")),
  Weight("blk.{}.ffn_up", "model.layers.{}.mlp.up_proj", ("F", "D")),
  Weight("blk.{}.ffn_down", "model.layers.{}.mlp.down_proj", ("D", "F")),
)


# ---------------------------------------------------------------------------
# What a file must hold.
# ---------------------------------------------------------------------------

_ARCHITECTURES = {
  "gemma3": Architecture(_gemma3_config, _GEMMA3_WEIGHTS, write_sentencepiece),
  "llama": Architecture(_llama_config, _LLAMA_WEIGHTS, write_byte_level),
}

# Tensors of models that are more than their table.
_FEATURES = {
  r"\.bias$": "biases",
  r"rope_freqs|rope_factors": "RoPE with a factor for each frequency",
  r"ffn_gate_inp|_exps": "a mixture of experts",
}


def architecture(file: File) -> Architecture:
  """The row of the file's architecture.

  Raises:
    ValueError: an architecture that is not known.
  """
  name = file.metadata.get("general.architecture")
  if not isinstance(name, str) or name not in _ARCHITECTURES:
    raise ValueError(
      f"{file.path}: the architecture {name!r} is not supported; expected one "
      f"of {sorted(_ARCHITECTURES)}. Choose a .gguf file of a supported model, "
      "or load the model's Hugging Face directory."
    )
  return _ARCHITECTURES[name]


def plan(
  file: File, cfg: config_lib.ModelConfig, table: tuple[Weight, ...]
) -> dict[str, tuple[str, Weight]]:
  """GGUF name -> (Hugging Face name, row), complete and of those shapes.

  Raises:
    ValueError: tensors that are missing, unknown, of another shape, or of a
      feature that is not supported; they are listed.
  """
  for pattern, feature in _FEATURES.items():
    found = sorted(name for name in file.tensors if re.search(pattern, name))
    if found:
      raise ValueError(
        f"{file.path}: expected a plain model, but it has {feature}, which is "
        f"not supported: {', '.join(found[:4])}. Choose another model."
      )
  sizes = {
    "V": cfg.vocab_size,
    "D": cfg.width,
    "F": cfg.mlp_width,
    "H": cfg.head_dim,
    "NH": cfg.num_heads * cfg.head_dim,
    "KH": cfg.num_kv_heads * cfg.head_dim,
  }
  rows, shapes = {}, {}
  for weight in table:
    if weight.untied and cfg.tied:
      continue
    for l in range(cfg.num_layers if "{}" in weight.source else 1):
      source = weight.source.format(l) + ".weight"
      rows[source] = weight.target.format(l) + ".weight", weight
      shapes[source] = tuple(sizes[dim] for dim in weight.shape)
  missing = sorted(rows.keys() - file.tensors.keys())
  unknown = sorted(file.tensors.keys() - rows.keys())
  if missing or unknown:
    raise ValueError(
      f"{file.path}: expected the {len(rows)} tensors of a model with "
      f"{cfg.num_layers} layers. Missing: {', '.join(missing) or 'none'}. "
      f"Unknown: {', '.join(unknown) or 'none'}. Convert the model to GGUF "
      "again, or download the file again."
    )
  wrong = [
    f"{name} {file.tensors[name].shape}, expected {shape}"
    for name, shape in shapes.items()
    if file.tensors[name].shape != shape
  ]
  if wrong:
    raise ValueError(
      f"{file.path}: shapes that do not agree with the metadata: "
      f"{'; '.join(wrong)}. Convert the model to GGUF again."
    )
  return rows
