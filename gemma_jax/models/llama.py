"""The Llama shape (SmolLM2): sizes, names, and the wiring of one block."""

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

_BLOCK = {
  "pre_attn_norm": Row("D", "model.layers.{}.input_layernorm.weight"),
  "q": Row("DNH", "model.layers.{}.self_attn.q_proj.weight", "NH D"),
  "k": Row("DKH", "model.layers.{}.self_attn.k_proj.weight", "KH D"),
  "v": Row("DKH", "model.layers.{}.self_attn.v_proj.weight", "KH D"),
  "o": Row("NHD", "model.layers.{}.self_attn.o_proj.weight", "D NH"),
  # There it is named for where it stands: after attention, before the MLP.
  "pre_mlp_norm": Row("D", "model.layers.{}.post_attention_layernorm.weight"),
  "gate": Row("DF", "model.layers.{}.mlp.gate_proj.weight", "F D"),
  "up": Row("DF", "model.layers.{}.mlp.up_proj.weight", "F D"),
  "down": Row("FD", "model.layers.{}.mlp.down_proj.weight", "D F"),
}
_TOP = {
  "embed": Row("VD", "model.embed_tokens.weight"),
  "final_norm": Row("D", "model.norm.weight"),
}


def block(cfg: ModelConfig) -> Table:
  """The tensors of one block."""
  del cfg
  return _BLOCK


def top(cfg: ModelConfig) -> Table:
  """The tensors outside the blocks."""
  return _TOP if cfg.tied else _TOP | {"unembed": Row("VD", "lm_head.weight")}


PREFIX = re.compile(r"\Amodel\.")
CANONICAL = "model."
HEAD = re.compile(r"lm_head\.weight")
IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")

ROOT = "model.layers"
SITES = {
  "input": "resid_pre",
  "self_attn.o_proj.input": "attn_z",
  "self_attn.output": "attn_out",
  "post_attention_layernorm.input": "resid_mid",
  "post_attention_layernorm.output": "mlp_in",
  "mlp.down_proj.input": "mlp_hidden",
  "mlp.output": "mlp_out",
  "output": "resid_post",
}

norm = layers.rms_norm


class Block(nn.Module):
  """Declares one layer's parameters and runs it: norms before, none after."""

  cfg: ModelConfig
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, layer: Layer, ctx: Context, site: SiteFn):
    """The residual stream [B, T, D] after the block, and keys and values."""
    p = layers.declare(self, block(self.cfg), self.cfg, self.dtype)
    return layers.pre_norm_block(
      self.cfg, p, x, layer, ctx, site, norm=norm, unit=layers.rms_unit
    )


def _preset(
  num_layers, width, mlp_width, num_heads, num_kv_heads, rope_theta, **changes
):
  head_dim = width // num_heads
  fields = {
    "family": "llama",
    "num_layers": num_layers,
    "width": width,
    "mlp_width": mlp_width,
    "num_heads": num_heads,
    "num_kv_heads": num_kv_heads,
    "head_dim": head_dim,
    "vocab_size": 49_152,
    "max_context": 8192,
    "query_scale": head_dim**-0.5,
    "activation": "silu",
    "rope_theta_global": rope_theta,
    "norm_eps": 1e-5,
    "bos_id": 0,
    "eos_ids": (0,),
    "pad_id": 0,
  }
  return ModelConfig(**(fields | changes))


# Dims of the released checkpoints, from their config.json, and a tiny one:
# K < N, N * H != D, a head of its own, a RoPE factor.
PRESETS = {
  "smollm2-135m": _preset(30, 576, 1536, 9, 3, 100_000.0),
  "smollm2-360m": _preset(32, 960, 2560, 15, 5, 100_000.0),
  "smollm2-1.7b": _preset(24, 2048, 8192, 32, 32, 130_000.0),
  "llama-tiny": _preset(
    5,
    48,
    96,
    4,
    2,
    10_000.0,
    head_dim=16,
    query_scale=16**-0.5,
    rope_factor_global=8.0,
    vocab_size=1000,
    max_context=256,
    tied=False,
    bos_id=2,
    eos_ids=(1,),
  ),
}

HUB = {
  f"HuggingFaceTB/SmolLM2-{n}": f"smollm2-{n.lower()}"
  for n in ("135M", "360M", "1.7B")
}

MODEL_TYPES = ("llama",)


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
  """A `ModelConfig` from config.json; see `families.from_hf_config`."""
  hf_config.refuse(
    hf,
    hidden_act="silu",
    attention_bias=False,
    mlp_bias=False,
    partial_rotary_factor=1,
  )

  def size(key, default=None):
    return hf_config.size(hf, key, default=default)

  width, heads = size("hidden_size"), size("num_attention_heads")
  given = hf.get("head_dim") is not None
  head_dim = size("head_dim") if given else hf_config.per_head(width, heads)
  theta, factor = hf_config.rope(
    hf_config.section(hf, "rope_parameters", "rope_scaling"),
    hf_config.number(hf, "rope_theta", 10_000.0),
  )
  return ModelConfig(
    family="llama",
    num_layers=size("num_hidden_layers"),
    width=width,
    mlp_width=size("intermediate_size"),
    num_heads=heads,
    num_kv_heads=size("num_key_value_heads", heads),
    head_dim=head_dim,
    vocab_size=size("vocab_size"),
    max_context=size("max_position_embeddings", 2048),
    query_scale=head_dim**-0.5,
    activation="silu",
    rope_theta_global=theta,
    rope_factor_global=factor,
    norm_eps=hf_config.number(hf, "rms_norm_eps", 1e-6),
    tied=hf_config.flag(hf, "tie_word_embeddings", False),
    **hf_config.ids(hf, 1, 2),
  )


def to_hf(cfg: ModelConfig) -> dict[str, Any]:
  """The config.json contents that `from_hf` turns back into `cfg`."""
  return {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": cfg.num_layers,
    "hidden_size": cfg.width,
    "intermediate_size": cfg.mlp_width,
    "num_attention_heads": cfg.num_heads,
    "num_key_value_heads": cfg.num_kv_heads,
    "head_dim": cfg.head_dim,
    "vocab_size": cfg.vocab_size,
    "max_position_embeddings": cfg.max_context,
    "hidden_act": "silu",
    "rope_theta": cfg.rope_theta_global,
    "rope_scaling": hf_config.linear(cfg.rope_factor_global),
    "rms_norm_eps": cfg.norm_eps,
    "tie_word_embeddings": cfg.tied,
    **hf_config.to_ids(cfg),
  }
