"""Gemma 2 and 3: sizes, names, and the wiring of one block."""

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
  "post_attn_norm": Row("D", "model.layers.{}.post_attention_layernorm.weight"),
  "pre_mlp_norm": Row("D", "model.layers.{}.pre_feedforward_layernorm.weight"),
  "gate": Row("DF", "model.layers.{}.mlp.gate_proj.weight", "F D"),
  "up": Row("DF", "model.layers.{}.mlp.up_proj.weight", "F D"),
  "down": Row("FD", "model.layers.{}.mlp.down_proj.weight", "D F"),
  "post_mlp_norm": Row(
    "D", "model.layers.{}.post_feedforward_layernorm.weight"
  ),
}
_QK_NORM = {
  "q_norm": Row("H", "model.layers.{}.self_attn.q_norm.weight"),
  "k_norm": Row("H", "model.layers.{}.self_attn.k_norm.weight"),
}
_TOP = {
  "embed": Row("VD", "model.embed_tokens.weight"),
  "final_norm": Row("D", "model.norm.weight"),
}


def block(cfg: ModelConfig) -> Table:
  """The tensors of one block."""
  return _BLOCK | _QK_NORM if cfg.qk_norm else _BLOCK


def top(cfg: ModelConfig) -> Table:
  """The tensors outside the blocks."""
  del cfg
  return _TOP


# The text tower's prefix in its several homes, and what it is called above.
PREFIX = re.compile(
  r"\A(language_model\.model\.|model\.language_model\.|model\.)"
)
CANONICAL = "model."
HEAD = re.compile(r"(language_model\.)?lm_head\.weight")
IGNORED = re.compile(
  r".*\.rotary_emb\..*|(model\.)?(vision_tower|multi_modal_projector)\..*"
)

# Hugging Face's modules, below ROOT.{l}.
ROOT = "model.layers"
SITES = {
  "input": "resid_pre",
  "self_attn.o_proj.input": "attn_z",
  "post_attention_layernorm.output": "attn_out",
  "pre_feedforward_layernorm.input": "resid_mid",
  "pre_feedforward_layernorm.output": "mlp_in",
  "mlp.down_proj.input": "mlp_hidden",
  "mlp.output": "mlp_raw",
  "post_feedforward_layernorm.output": "mlp_out",
  "output": "resid_post",
}

norm = layers.rms_norm


def mlp(cfg: ModelConfig, p, x: jax.Array, site: SiteFn) -> jax.Array:
  """Gated MLP and its post-norm, [B, T, D] `mlp_in` -> `mlp_out`."""
  raw = layers.mlp(cfg, p, x, site)
  return site("mlp_out", norm(cfg, p, "post_mlp_norm", raw))


class Block(nn.Module):
  """Declares one layer's parameters and runs it: norms before and after."""

  cfg: ModelConfig
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, layer: Layer, ctx: Context, site: SiteFn):
    """The residual stream [B, T, D] after the block, and keys and values."""
    cfg = self.cfg
    p = layers.declare(self, block(cfg), cfg, self.dtype)
    x = site("resid_pre", x)
    with jax.named_scope("attention"):
      normed = norm(cfg, p, "pre_attn_norm", x)
      out, kv = layers.self_attention(cfg, p, normed, layer, ctx, site)
      out = site("attn_out", norm(cfg, p, "post_attn_norm", out))
      x = site("resid_mid", x + out)
    with jax.named_scope("mlp"):
      read = layers.mlp_input(cfg, p, x, site, layers.rms_unit)
      x = site("resid_post", x + mlp(cfg, p, read, site))
    return x, kv


def _preset(num_layers, width, mlp_width, num_heads, num_kv_heads, **fields):
  return ModelConfig(
    num_layers=num_layers,
    width=width,
    mlp_width=mlp_width,
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    norm_offset=1.0,
    embed_scale=width**0.5,
    activation="gelu_tanh",
    **({"head_dim": 256, "query_scale": 256**-0.5} | fields),
  )


def _gemma2(num_layers, *dims, **changes):
  fields = {
    "family": "gemma2",
    "vocab_size": 256_000,
    "max_context": 8192,
    "window": 4096,
    "layer_is_global": tuple(i % 2 == 1 for i in range(num_layers)),
    "attn_softcap": 50.0,
    "final_softcap": 30.0,
  }
  return _preset(num_layers, *dims, **(fields | changes))


def _gemma3(num_layers, *dims, **changes):
  fields = {
    "family": "gemma3",
    "vocab_size": 262_144,
    "max_context": 32_768,
    "window": 512,
    "layer_is_global": tuple((i + 1) % 6 == 0 for i in range(num_layers)),
    "rope_theta_global": 1_000_000.0,
    "qk_norm": True,
  }
  return _preset(num_layers, *dims, **(fields | changes))


_MULTIMODAL = {
  "vocab_size": 262_208,
  "max_context": 131_072,
  "window": 1024,
  "rope_factor_global": 8.0,
}
# In the tiny ones every feature is visible: window < context, K < N,
# N * H != D, L that is no multiple of the local/global pattern, soft-caps
# that bite, a query_scale that is not H ** -0.5.
_TINY = {
  "head_dim": 16,
  "vocab_size": 1000,
  "window": 12,
  "query_scale": 24**-0.5,
  "max_context": 256,
}

# Dims of the released checkpoints, from their config.json.
PRESETS = {
  "gemma2-2b": _gemma2(26, 2304, 9216, 8, 4),
  "gemma2-9b": _gemma2(42, 3584, 14336, 16, 8),
  "gemma2-27b": _gemma2(
    46, 4608, 36864, 32, 16, head_dim=128, query_scale=144**-0.5
  ),
  "gemma3-270m": _gemma3(18, 640, 2048, 4, 1),
  "gemma3-1b": _gemma3(26, 1152, 6912, 4, 1),
  "gemma3-4b": _gemma3(34, 2560, 10240, 8, 4, **_MULTIMODAL),
  "gemma3-12b": _gemma3(48, 3840, 15360, 16, 8, **_MULTIMODAL),
  "gemma3-27b": _gemma3(
    62,
    5376,
    21504,
    32,
    16,
    head_dim=128,
    query_scale=168**-0.5,
    **_MULTIMODAL,
  ),
  "gemma2-tiny": _gemma2(
    5, 48, 96, 4, 2, attn_softcap=5.0, final_softcap=5.0, **_TINY
  ),
  "gemma3-tiny": _gemma3(8, 48, 96, 4, 2, rope_factor_global=8.0, **_TINY),
}

HUB = {
  **{
    f"google/gemma-2-{n}{it}": f"gemma2-{n}"
    for n in ("2b", "9b", "27b")
    for it in ("", "-it")
  },
  **{
    f"google/gemma-3-{n}{kind}": f"gemma3-{n}"
    for n in ("270m", "1b", "4b", "12b", "27b")
    for kind in ("", "-pt", "-it")
  },
}

MODEL_TYPES = ("gemma2", "gemma3", "gemma3_text")

# What released multimodal checkpoints leave out of their text_config: the
# defaults of Gemma3TextConfig (transformers, configuration_gemma3.py).
_TEXT_DEFAULTS = {
  "num_attention_heads": 8,
  "num_key_value_heads": 4,
  "head_dim": 256,
  "vocab_size": 262_208,
  "query_pre_attn_scalar": 256,
  "max_position_embeddings": 131_072,
}


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
  """A `ModelConfig` from config.json; see `families.from_hf_config`."""
  hf_config.refuse(hf, tie_word_embeddings=True)
  text = hf_config.section(hf, "text_config")
  if text:
    # The outer ids have precedence: GenerationConfig.from_model_config.
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    outer = {key: hf[key] for key in ids if hf.get(key) is not None}
    defaults = _TEXT_DEFAULTS if text["model_type"] == "gemma3_text" else {}
    hf = {**defaults, **text, **outer}
  family = "gemma2" if hf.get("model_type") == "gemma2" else "gemma3"
  hf_config.refuse(
    hf,
    use_bidirectional_attention=False,
    hidden_activation="gelu_pytorch_tanh",
    attention_bias=False,
    tie_word_embeddings=True,
    partial_rotary_factor=1,
  )
  if hf.get("hidden_activation") is None:
    hf_config.refuse(hf, hidden_act="gelu_pytorch_tanh")

  def size(key, default=None):
    return hf_config.size(hf, key, default=default)

  gemma2 = family == "gemma2"
  num_layers, width = size("num_hidden_layers"), size("hidden_size")
  local, everywhere = _rope(hf, family)
  return ModelConfig(
    family=family,
    num_layers=num_layers,
    width=width,
    mlp_width=size("intermediate_size"),
    num_heads=size("num_attention_heads"),
    num_kv_heads=size("num_key_value_heads"),
    head_dim=size("head_dim"),
    vocab_size=size("vocab_size"),
    max_context=size("max_position_embeddings", 8192 if gemma2 else 131_072),
    query_scale=hf_config.number(hf, "query_pre_attn_scalar") ** -0.5,
    activation="gelu_tanh",
    window=size("sliding_window"),
    layer_is_global=_layer_is_global(hf, family, num_layers),
    rope_theta_local=local[0],
    rope_theta_global=everywhere[0],
    rope_factor_global=everywhere[1],
    qk_norm=not gemma2,
    # A null is no default here, but no cap.
    attn_softcap=hf.get("attn_logit_softcapping", 50.0 if gemma2 else None),
    final_softcap=hf.get("final_logit_softcapping", 30.0 if gemma2 else None),
    norm_eps=hf_config.number(hf, "rms_norm_eps", 1e-6),
    norm_offset=1.0,
    embed_scale=width**0.5,
    **hf_config.ids(hf, 2, 1, 0),
  )


def to_hf(cfg: ModelConfig) -> dict[str, Any]:
  """The config.json contents that `from_hf` turns back into `cfg`."""
  gemma2 = cfg.family == "gemma2"
  shared = {
    "architectures": [f"Gemma{2 if gemma2 else 3}ForCausalLM"],
    "model_type": "gemma2" if gemma2 else "gemma3_text",
    "num_hidden_layers": cfg.num_layers,
    "hidden_size": cfg.width,
    "intermediate_size": cfg.mlp_width,
    "num_attention_heads": cfg.num_heads,
    "num_key_value_heads": cfg.num_kv_heads,
    "head_dim": cfg.head_dim,
    "vocab_size": cfg.vocab_size,
    "sliding_window": cfg.window,
    "query_pre_attn_scalar": round(cfg.query_scale**-2),
    "layer_types": [
      "full_attention" if g else "sliding_attention"
      for g in cfg.layer_is_global
    ],
    "attn_logit_softcapping": cfg.attn_softcap,
    "final_logit_softcapping": cfg.final_softcap,
    "rms_norm_eps": cfg.norm_eps,
    "max_position_embeddings": cfg.max_context,
    **hf_config.to_ids(cfg),
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "rope_theta": cfg.rope_theta_global,
  }
  if gemma2:
    return shared
  return shared | {
    "rope_local_base_freq": cfg.rope_theta_local,
    "rope_scaling": hf_config.linear(cfg.rope_factor_global),
  }


def _layer_is_global(hf, family, num_layers) -> tuple[bool, ...]:
  types = hf.get("layer_types")
  if types is not None:
    known = {"full_attention": True, "sliding_attention": False}
    fits = isinstance(types, list) and len(types) == num_layers
    if not fits or not all(t in tuple(known) for t in types):
      raise ValueError(
        f"config.json: layer_types={types!r} must be a list of {num_layers}, "
        f"an entry per layer, each one of {sorted(known)}."
      )
    return tuple(known[t] for t in types)
  pattern = 2
  if family == "gemma3":
    pattern = hf_config.size(hf, "sliding_window_pattern", default=6)
  return tuple((i + 1) % pattern == 0 for i in range(num_layers))


def _rope(hf, family) -> tuple[tuple[float, float], tuple[float, float]]:
  """((theta, factor) of local layers, (theta, factor) of global layers)."""
  parameters = hf_config.section(hf, "rope_parameters", "rope_scaling")
  theta = hf_config.number(
    hf, "rope_theta", 10_000.0 if family == "gemma2" else 1_000_000.0
  )
  if family == "gemma2":
    local = everywhere = hf_config.rope(parameters, theta)
  else:
    kinds = "sliding_attention", "full_attention"
    of_local, of_global = (hf_config.section(parameters, k) for k in kinds)
    if not parameters.keys() & kinds:
      of_global = parameters
    local = hf_config.rope(
      of_local, hf_config.number(hf, "rope_local_base_freq", 10_000.0)
    )
    everywhere = hf_config.rope(of_global, theta)
  if local[1] != 1.0:
    raise ValueError(
      f"RoPE factor {local[1]} on local layers is not supported; expected 1."
    )
  return local, everywhere
