"""GPT-2: sizes, names, and the wiring of one block."""

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gemma_jax.models import hf_config, layers
from gemma_jax.models.config import ModelConfig
from gemma_jax.models.layers import Context, Layer, SiteFn
from gemma_jax.models.tables import Row, Table

# Its Conv1D keeps weights as (in, out), with q, k and v side by side.
_BLOCK = {
  "pre_attn_norm": Row("D", "transformer.h.{}.ln_1.weight"),
  "pre_attn_norm_bias": Row("D", "transformer.h.{}.ln_1.bias"),
  "q": Row("DNH", "transformer.h.{}.attn.c_attn.weight", "D 3NH", 0),
  "k": Row("DNH", "transformer.h.{}.attn.c_attn.weight", "D 3NH", 1),
  "v": Row("DNH", "transformer.h.{}.attn.c_attn.weight", "D 3NH", 2),
  "q_bias": Row("NH", "transformer.h.{}.attn.c_attn.bias", "3NH", 0),
  "k_bias": Row("NH", "transformer.h.{}.attn.c_attn.bias", "3NH", 1),
  "v_bias": Row("NH", "transformer.h.{}.attn.c_attn.bias", "3NH", 2),
  "o": Row("NHD", "transformer.h.{}.attn.c_proj.weight", "NH D"),
  "o_bias": Row("D", "transformer.h.{}.attn.c_proj.bias"),
  "pre_mlp_norm": Row("D", "transformer.h.{}.ln_2.weight"),
  "pre_mlp_norm_bias": Row("D", "transformer.h.{}.ln_2.bias"),
  "up": Row("DF", "transformer.h.{}.mlp.c_fc.weight"),
  "up_bias": Row("F", "transformer.h.{}.mlp.c_fc.bias"),
  "down": Row("FD", "transformer.h.{}.mlp.c_proj.weight"),
  "down_bias": Row("D", "transformer.h.{}.mlp.c_proj.bias"),
}
_TOP = {
  "embed": Row("VD", "transformer.wte.weight"),
  "positions": Row("TD", "transformer.wpe.weight"),
  "final_norm": Row("D", "transformer.ln_f.weight"),
  "final_norm_bias": Row("D", "transformer.ln_f.bias"),
}


def block(cfg: ModelConfig) -> Table:
  """The tensors of one block."""
  del cfg
  return _BLOCK


def top(cfg: ModelConfig) -> Table:
  """The tensors outside the blocks."""
  del cfg
  return _TOP


# The hub's files have no prefix, those of transformers' classes have one.
PREFIX = re.compile(r"\A(transformer\.)?")
CANONICAL = "transformer."
HEAD = re.compile(r"lm_head\.weight")
IGNORED = re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias")

ROOT = "transformer.h"
SITES = {
  "input": "resid_pre",
  "attn.c_proj.input": "attn_z",
  "attn.output": "attn_out",
  "ln_2.input": "resid_mid",
  "ln_2.output": "mlp_in",
  "mlp.c_proj.input": "mlp_hidden",
  "mlp.output": "mlp_out",
  "output": "resid_post",
}

norm = layers.layer_norm


class Block(nn.Module):
  """Declares one layer's parameters and runs it: LayerNorm, biases."""

  cfg: ModelConfig
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, layer: Layer, ctx: Context, site: SiteFn):
    """The residual stream [B, T, D] after the block, and keys and values."""
    p = layers.declare(self, block(self.cfg), self.cfg, self.dtype)
    return layers.pre_norm_block(
      self.cfg, p, x, layer, ctx, site, norm=norm, unit=layers.layer_unit
    )


def _preset(num_layers, width, num_heads, **changes):
  fields = {
    "family": "gpt2",
    "num_layers": num_layers,
    "width": width,
    "mlp_width": 4 * width,
    "num_heads": num_heads,
    "num_kv_heads": num_heads,
    "head_dim": width // num_heads,
    "vocab_size": 50_257,
    "max_context": 1024,
    "query_scale": (width // num_heads) ** -0.5,
    "activation": "gelu_tanh",
    "rotary_dim": 0,
    "norm_eps": 1e-5,
    "bos_id": 50_256,
    "eos_ids": (50_256,),
    "pad_id": 50_256,
  }
  return ModelConfig(**(fields | changes))


# Dims of the released checkpoints, from their config.json, and a tiny one.
PRESETS = {
  "gpt2-distil": _preset(6, 768, 12),
  "gpt2-small": _preset(12, 768, 12),
  "gpt2-medium": _preset(24, 1024, 16),
  "gpt2-large": _preset(36, 1280, 20),
  "gpt2-xl": _preset(48, 1600, 25),
  "gpt2-tiny": _preset(
    5,
    48,
    4,
    mlp_width=80,
    vocab_size=1000,
    max_context=256,
    bos_id=2,
    eos_ids=(1,),
    pad_id=0,
  ),
}

# Old ids have no owner.
HUB = {
  f"{owner}{name}": preset
  for home, name, preset in (
    ("distilbert/", "distilgpt2", "gpt2-distil"),
    ("openai-community/", "gpt2", "gpt2-small"),
    ("openai-community/", "gpt2-medium", "gpt2-medium"),
    ("openai-community/", "gpt2-large", "gpt2-large"),
    ("openai-community/", "gpt2-xl", "gpt2-xl"),
  )
  for owner in (home, "")
}

MODEL_TYPES = ("gpt2",)


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
  """A `ModelConfig` from config.json; see `families.from_hf_config`."""
  hf_config.refuse(
    hf,
    activation_function=("gelu_new", "gelu_pytorch_tanh"),
    scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False,
    reorder_and_upcast_attn=False,
    add_cross_attention=False,
    tie_word_embeddings=True,
  )

  def size(*keys, default=None):
    return hf_config.size(hf, *keys, default=default)

  width = size("n_embd", "hidden_size")
  heads = size("n_head", "num_attention_heads")
  head_dim = hf_config.per_head(width, heads)
  return ModelConfig(
    family="gpt2",
    num_layers=size("n_layer", "num_hidden_layers"),
    width=width,
    mlp_width=size("n_inner", default=4 * width),
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=head_dim,
    vocab_size=size("vocab_size"),
    max_context=size("n_positions", "n_ctx", "max_position_embeddings"),
    query_scale=head_dim**-0.5,
    activation="gelu_tanh",
    rotary_dim=0,
    norm_eps=hf_config.number(hf, "layer_norm_epsilon", 1e-5),
    **hf_config.ids(hf, 50_256, 50_256),
  )


def to_hf(cfg: ModelConfig) -> dict[str, Any]:
  """The config.json contents that `from_hf` turns back into `cfg`."""
  return {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_layer": cfg.num_layers,
    "n_embd": cfg.width,
    "n_inner": cfg.mlp_width,
    "n_head": cfg.num_heads,
    "vocab_size": cfg.vocab_size,
    "n_positions": cfg.max_context,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": cfg.norm_eps,
    "tie_word_embeddings": True,
    **hf_config.to_ids(cfg),
  }
