"""GPT-NeoX (Pythia): sizes, names, and the wiring of one block."""

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

_HERE = "gpt_neox.layers.{}."
_QKV = _HERE + "attention.query_key_value."
# q, k and v are interleaved head by head.
_BLOCK = {
  "pre_attn_norm": Row("D", _HERE + "input_layernorm.weight"),
  "pre_attn_norm_bias": Row("D", _HERE + "input_layernorm.bias"),
  "q": Row("DNH", _QKV + "weight", "N3H D", 0),
  "k": Row("DNH", _QKV + "weight", "N3H D", 1),
  "v": Row("DNH", _QKV + "weight", "N3H D", 2),
  "q_bias": Row("NH", _QKV + "bias", "N3H", 0),
  "k_bias": Row("NH", _QKV + "bias", "N3H", 1),
  "v_bias": Row("NH", _QKV + "bias", "N3H", 2),
  "o": Row("NHD", _HERE + "attention.dense.weight", "D NH"),
  "o_bias": Row("D", _HERE + "attention.dense.bias"),
  "pre_mlp_norm": Row("D", _HERE + "post_attention_layernorm.weight"),
  "pre_mlp_norm_bias": Row("D", _HERE + "post_attention_layernorm.bias"),
  "up": Row("DF", _HERE + "mlp.dense_h_to_4h.weight", "F D"),
  "up_bias": Row("F", _HERE + "mlp.dense_h_to_4h.bias"),
  "down": Row("FD", _HERE + "mlp.dense_4h_to_h.weight", "D F"),
  "down_bias": Row("D", _HERE + "mlp.dense_4h_to_h.bias"),
}
_TOP = {
  "embed": Row("VD", "gpt_neox.embed_in.weight"),
  "final_norm": Row("D", "gpt_neox.final_layer_norm.weight"),
  "final_norm_bias": Row("D", "gpt_neox.final_layer_norm.bias"),
}


def block(cfg: ModelConfig) -> Table:
  """The tensors of one block."""
  del cfg
  return _BLOCK


def top(cfg: ModelConfig) -> Table:
  """The tensors outside the blocks."""
  return _TOP if cfg.tied else _TOP | {"unembed": Row("VD", "embed_out.weight")}


PREFIX = re.compile(r"\Agpt_neox\.")
CANONICAL = "gpt_neox."
HEAD = re.compile(r"(embed_out|lm_head)\.weight")
IGNORED = re.compile(
  r"gpt_neox\.layers\.\d+\.attention\.(rotary_emb\.inv_freq|(masked_)?bias)"
)

ROOT = "gpt_neox.layers"
SITES = {
  "input": "resid_pre",
  "attention.dense.input": "attn_z",
  "attention.output": "attn_out",
  "post_attention_layernorm.output": "mlp_in",
  "mlp.dense_4h_to_h.input": "mlp_hidden",
  "mlp.output": "mlp_out",
  "output": "resid_post",
}

norm = layers.layer_norm


class Block(nn.Module):
  """Declares one layer's parameters and runs it: attention beside the MLP."""

  cfg: ModelConfig
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, layer: Layer, ctx: Context, site: SiteFn):
    """The residual stream [B, T, D] after the block, and keys and values."""
    p = layers.declare(self, block(self.cfg), self.cfg, self.dtype)
    return layers.pre_norm_block(
      self.cfg, p, x, layer, ctx, site, norm=norm, unit=layers.layer_unit
    )


def _pythia(num_layers, width, num_heads, vocab_size=50_304, **changes):
  head_dim = width // num_heads
  fields = {
    "family": "neox",
    "num_layers": num_layers,
    "width": width,
    "mlp_width": 4 * width,
    "num_heads": num_heads,
    "num_kv_heads": num_heads,
    "head_dim": head_dim,
    "vocab_size": vocab_size,
    "max_context": 2048,
    "query_scale": head_dim**-0.5,
    "activation": "gelu",
    "rotary_dim": head_dim // 4,
    "norm_eps": 1e-5,
    "parallel_residual": True,
    "tied": False,
    "bos_id": 0,
    "eos_ids": (0,),
    "pad_id": 0,
  }
  return ModelConfig(**(fields | changes))


# Dims of the released checkpoints, from their config.json (the deduplicated
# ones have the same), and a tiny one.
PRESETS = {
  "pythia-14m": _pythia(6, 128, 4),
  "pythia-31m": _pythia(6, 256, 8),
  "pythia-70m": _pythia(6, 512, 8),
  "pythia-160m": _pythia(12, 768, 12),
  "pythia-410m": _pythia(24, 1024, 16),
  "pythia-1b": _pythia(16, 2048, 8),
  "pythia-1.4b": _pythia(24, 2048, 16),
  "pythia-2.8b": _pythia(32, 2560, 32),
  "pythia-6.9b": _pythia(32, 4096, 32, 50_432),
  "pythia-12b": _pythia(36, 5120, 40, 50_688),
  "neox-tiny": _pythia(
    5, 48, 3, 1000, mlp_width=80, max_context=256, bos_id=2, eos_ids=(1,)
  ),
}

HUB = {
  f"EleutherAI/{name}{kind}": name
  for name in PRESETS
  if name.startswith("pythia")
  for kind in ("", "-deduped")
}

MODEL_TYPES = ("gpt_neox",)


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
  """A `ModelConfig` from config.json; see `families.from_hf_config`."""
  hf_config.refuse(hf, attention_bias=True)
  kinds = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh"}
  hf_config.refuse(hf, hidden_act=tuple(kinds))

  def size(key, default=None):
    return hf_config.size(hf, key, default=default)

  width, heads = size("hidden_size"), size("num_attention_heads")
  head_dim = hf_config.per_head(width, heads)
  rope = dict(hf_config.section(hf, "rope_parameters", "rope_scaling"))
  share = hf_config.number(hf, "rotary_pct", 0.25)
  share = hf_config.number(rope, "partial_rotary_factor", share)
  rope.pop("partial_rotary_factor", None)
  theta = hf_config.number(hf, "rotary_emb_base", 10_000.0)
  theta, factor = hf_config.rope(rope, theta)
  return ModelConfig(
    family="neox",
    num_layers=size("num_hidden_layers"),
    width=width,
    mlp_width=size("intermediate_size"),
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=head_dim,
    vocab_size=size("vocab_size"),
    max_context=size("max_position_embeddings", 2048),
    query_scale=head_dim**-0.5,
    activation=kinds[hf.get("hidden_act") or "gelu"],
    rotary_dim=int(head_dim * share),
    rope_theta_global=theta,
    rope_factor_global=factor,
    norm_eps=hf_config.number(hf, "layer_norm_eps", 1e-5),
    parallel_residual=hf_config.flag(hf, "use_parallel_residual", True),
    tied=hf_config.flag(hf, "tie_word_embeddings", False),
    **hf_config.ids(hf, 0, 2),
  )


def to_hf(cfg: ModelConfig) -> dict[str, Any]:
  """The config.json contents that `from_hf` turns back into `cfg`."""
  return {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "num_hidden_layers": cfg.num_layers,
    "hidden_size": cfg.width,
    "intermediate_size": cfg.mlp_width,
    "num_attention_heads": cfg.num_heads,
    "vocab_size": cfg.vocab_size,
    "max_position_embeddings": cfg.max_context,
    "hidden_act": "gelu" if cfg.activation == "gelu" else "gelu_new",
    "rotary_pct": cfg.rope_dim / cfg.head_dim,
    "rotary_emb_base": cfg.rope_theta_global,
    "rope_scaling": hf_config.linear(cfg.rope_factor_global),
    "layer_norm_eps": cfg.norm_eps,
    "use_parallel_residual": cfg.parallel_residual,
    "tie_word_embeddings": cfg.tied,
    **hf_config.to_ids(cfg),
  }
