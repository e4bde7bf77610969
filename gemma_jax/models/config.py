"""What a model is: one frozen dataclass, presets, and the way in from HF."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shape and numerics of a Gemma text model. Hashable, so jit-static.

  Attributes:
    family: "gemma2" or "gemma3".
    num_layers: L of the complete model, whatever part of it is loaded.
    width: D, the residual stream.
    mlp_width: F, neurons of one branch of the gated MLP.
    num_heads: N, query heads.
    num_kv_heads: K, key-value heads; divides N.
    head_dim: H; N * H need not equal D.
    vocab_size: V, rows of the embedding.
    window: positions that a local layer sees, itself included.
    layer_is_global: [L], True where a layer attends to the whole context.
    query_scale: multiplies q.k; query_pre_attn_scalar ** -0.5.
    rope_theta_local: RoPE base of the local layers.
    rope_theta_global: RoPE base of the global layers.
    rope_factor_global: positions of global layers are divided by this.
    qk_norm: RMSNorm over H on queries and keys, before RoPE.
    attn_softcap: scores become c * tanh(scores / c); None for no cap.
    final_softcap: the same for logits.
    norm_eps: epsilon of every RMSNorm.
    norm_offset: a norm's gain is `norm_offset + weight`.
    max_context: longest context the model was trained for, in tokens.
    bos_id: id that starts every context.
    eos_id: id that ends a text.
    pad_id: id of padding.
  """

  family: str
  num_layers: int
  width: int
  mlp_width: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  vocab_size: int
  window: int
  layer_is_global: tuple[bool, ...]
  query_scale: float
  rope_theta_local: float = 10_000.0
  rope_theta_global: float = 10_000.0
  rope_factor_global: float = 1.0
  qk_norm: bool = False
  attn_softcap: float | None = None
  final_softcap: float | None = None
  norm_eps: float = 1e-6
  norm_offset: float = 1.0
  max_context: int = 8192
  bos_id: int = 2
  eos_id: int = 1
  pad_id: int = 0

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_heads={self.num_heads} must be a multiple of "
        f"num_kv_heads={self.num_kv_heads}."
      )
    if len(self.layer_is_global) != self.num_layers:
      raise ValueError(
        f"layer_is_global has {len(self.layer_is_global)} entries for "
        f"{self.num_layers} layers; expected one per layer."
      )

  def num_parameters(self, num_layers: int | None = None) -> int:
    """Parameters of the embedding, `num_layers` blocks and the last norm."""
    attn = self.width * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
    norms = 4 * self.width + (2 * self.head_dim if self.qk_norm else 0)
    block = attn + 3 * self.width * self.mlp_width + norms
    layers = self.num_layers if num_layers is None else num_layers
    return self.vocab_size * self.width + layers * block + self.width

  def flops_per_token(
    self, num_layers: int, context: int, *, unembed: bool
  ) -> float:
    """Multiply-adds, times two, of one forward pass per token.

    Attention is counted as it is computed: all T x T scores, no causal skip.
    """
    blocks = self.num_parameters(num_layers) - self.num_parameters(0)
    scores = 2 * self.num_heads * self.head_dim * context * num_layers
    head = self.vocab_size * self.width if unembed else 0
    return 2.0 * (blocks + scores + head)


def _gemma2(num_layers, width, mlp_width, num_heads, num_kv_heads, **changes):
  fields = {
    "family": "gemma2",
    "num_layers": num_layers,
    "width": width,
    "mlp_width": mlp_width,
    "num_heads": num_heads,
    "num_kv_heads": num_kv_heads,
    "head_dim": 256,
    "vocab_size": 256_000,
    "window": 4096,
    "layer_is_global": tuple(i % 2 == 1 for i in range(num_layers)),
    "query_scale": 256**-0.5,
    "attn_softcap": 50.0,
    "final_softcap": 30.0,
  }
  return ModelConfig(**(fields | changes))


def _gemma3(num_layers, width, mlp_width, num_heads, num_kv_heads, **changes):
  fields = {
    "family": "gemma3",
    "num_layers": num_layers,
    "width": width,
    "mlp_width": mlp_width,
    "num_heads": num_heads,
    "num_kv_heads": num_kv_heads,
    "head_dim": 256,
    "vocab_size": 262_144,
    "window": 512,
    "layer_is_global": tuple((i + 1) % 6 == 0 for i in range(num_layers)),
    "query_scale": 256**-0.5,
    "rope_theta_global": 1_000_000.0,
    "qk_norm": True,
    "max_context": 32_768,
  }
  return ModelConfig(**(fields | changes))


# Dims of the released checkpoints (their config.json), and two tiny ones in
# which every feature is visible: window < context, K < N, N * H != D, L that
# is no multiple of the local/global pattern, soft-caps that bite.
PRESETS: dict[str, ModelConfig] = {
  "gemma2-2b": _gemma2(26, 2304, 9216, 8, 4),
  "gemma2-9b": _gemma2(42, 3584, 14336, 16, 8),
  "gemma2-27b": _gemma2(
    46, 4608, 36864, 32, 16, head_dim=128, query_scale=144**-0.5
  ),
  "gemma3-270m": _gemma3(18, 640, 2048, 4, 1),
  "gemma3-1b": _gemma3(26, 1152, 6912, 4, 1),
  "gemma3-4b": _gemma3(
    34,
    2560,
    10240,
    8,
    4,
    window=1024,
    rope_factor_global=8.0,
    vocab_size=262_208,
    max_context=131_072,
  ),
  "gemma3-12b": _gemma3(
    48,
    3840,
    15360,
    16,
    8,
    window=1024,
    rope_factor_global=8.0,
    vocab_size=262_208,
    max_context=131_072,
  ),
  "gemma3-27b": _gemma3(
    62,
    5376,
    21504,
    32,
    16,
    head_dim=128,
    query_scale=168**-0.5,
    window=1024,
    rope_factor_global=8.0,
    vocab_size=262_208,
    max_context=131_072,
  ),
  "gemma2-tiny": _gemma2(
    5,
    48,
    96,
    4,
    2,
    head_dim=16,
    vocab_size=1000,
    window=12,
    query_scale=24**-0.5,
    attn_softcap=5.0,
    final_softcap=5.0,
    max_context=256,
  ),
  "gemma3-tiny": _gemma3(
    8,
    48,
    96,
    4,
    2,
    head_dim=16,
    vocab_size=1000,
    window=12,
    query_scale=24**-0.5,
    rope_factor_global=8.0,
    max_context=256,
  ),
}


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


def from_hf_config(hf: Mapping[str, Any]) -> ModelConfig:
  """A `ModelConfig` from the contents of a Hugging Face config.json.

  Old spellings (`rope_theta`, `rope_local_base_freq`, `rope_scaling`,
  `sliding_window_pattern`) and those of transformers >= 5 (`rope_parameters`
  for each layer type, `layer_types`) are both accepted; the `text_config` of
  a multimodal checkpoint is used where there is one.

  Args:
    hf: the parsed JSON object.

  Raises:
    ValueError: an architecture, activation, RoPE type or attention that is
      not supported (named), or a field that is missing (named).
  """
  if not isinstance(hf, Mapping):
    raise ValueError(f"Expected a JSON object; got {type(hf).__name__}.")
  architectures = hf.get("architectures") or []
  tied = hf.get("tie_word_embeddings")
  if hf.get("text_config"):
    hf = hf["text_config"]
    if hf.get("model_type") == "gemma3_text":
      hf = _TEXT_DEFAULTS | hf
  kind = hf.get("model_type")
  families = {"gemma2": "gemma2", "gemma3_text": "gemma3", "gemma3": "gemma3"}
  if kind not in families:
    raise ValueError(
      f"Unsupported model_type {kind!r} (architectures {architectures}). "
      f"Expected one of {sorted(families)}; point at a Gemma 2 or Gemma 3 "
      "text checkpoint."
    )
  if hf.get("use_bidirectional_attention"):
    raise ValueError(
      "use_bidirectional_attention is set (an embedding model); only causal "
      "language models are supported."
    )
  family = families[kind]
  act = hf.get("hidden_activation") or hf.get("hidden_act")
  if act not in ("gelu_pytorch_tanh", None):
    raise ValueError(
      f"hidden_activation {act!r} is not supported; expected "
      "'gelu_pytorch_tanh'."
    )
  if hf.get("attention_bias"):
    raise ValueError("attention_bias=true is not supported; expected false.")
  if False in (tied, hf.get("tie_word_embeddings")):
    raise ValueError(
      "tie_word_embeddings=false is not supported; every released Gemma ties "
      "its head to the embedding."
    )

  def need(key):
    if hf.get(key) is None:
      raise ValueError(
        f"config.json lacks {key!r}, which a {family} model needs. It has: "
        f"{', '.join(sorted(hf))}."
      )
    return hf[key]

  layers = need("num_hidden_layers")
  window = need("sliding_window")
  rope_local, rope_global = _rope(hf, family)
  return ModelConfig(
    family=family,
    num_layers=layers,
    width=need("hidden_size"),
    mlp_width=need("intermediate_size"),
    num_heads=need("num_attention_heads"),
    num_kv_heads=need("num_key_value_heads"),
    head_dim=need("head_dim"),
    vocab_size=need("vocab_size"),
    window=window,
    layer_is_global=_layer_is_global(hf, family, layers),
    query_scale=need("query_pre_attn_scalar") ** -0.5,
    rope_theta_local=rope_local[0],
    rope_theta_global=rope_global[0],
    rope_factor_global=rope_global[1],
    qk_norm=family == "gemma3",
    attn_softcap=hf.get("attn_logit_softcapping"),
    final_softcap=hf.get("final_logit_softcapping"),
    norm_eps=hf.get("rms_norm_eps", 1e-6),
    max_context=hf.get("max_position_embeddings", 8192),
    bos_id=_first(hf.get("bos_token_id"), 2),
    eos_id=_first(hf.get("eos_token_id"), 1),
    pad_id=_first(hf.get("pad_token_id"), 0),
  )


def to_hf_config(cfg: ModelConfig) -> dict[str, Any]:
  """The config.json contents that `from_hf_config` turns back into `cfg`."""
  shared = {
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
    "bos_token_id": cfg.bos_id,
    "eos_token_id": cfg.eos_id,
    "pad_token_id": cfg.pad_id,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "rope_theta": cfg.rope_theta_global,
  }
  if cfg.family == "gemma2":
    return shared | {
      "architectures": ["Gemma2ForCausalLM"],
      "model_type": "gemma2",
    }
  scaling = None
  if cfg.rope_factor_global != 1.0:
    scaling = {"rope_type": "linear", "factor": cfg.rope_factor_global}
  return shared | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "rope_local_base_freq": cfg.rope_theta_local,
    "rope_scaling": scaling,
  }


def _first(value, default: int) -> int:
  if isinstance(value, list):
    value = value[0] if value else None
  return default if value is None else value


def _layer_is_global(hf, family, layers) -> tuple[bool, ...]:
  types = hf.get("layer_types")
  if types is not None:
    known = {"full_attention": True, "sliding_attention": False}
    unknown = sorted(set(types) - set(known))
    if unknown:
      raise ValueError(
        f"layer_types holds {unknown}; expected only {sorted(known)}."
      )
    return tuple(known[t] for t in types)
  default = 2 if family == "gemma2" else 6
  pattern = hf.get("sliding_window_pattern") or default
  return tuple((i + 1) % pattern == 0 for i in range(layers))


def _rope(hf, family) -> tuple[tuple[float, float], tuple[float, float]]:
  """((theta, factor) of local layers, (theta, factor) of global layers)."""

  def read(parameters, theta):
    parameters = parameters or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", "linear"):
      raise ValueError(
        f"RoPE type {kind!r} is not supported; expected 'default' or 'linear'."
      )
    factor = parameters.get("factor", 1.0) if kind == "linear" else 1.0
    return float(parameters.get("rope_theta", theta)), float(factor)

  by_type = hf.get("rope_parameters") or {}
  if "full_attention" in by_type:
    local = read(by_type.get("sliding_attention"), 10_000.0)
    both = local, read(by_type["full_attention"], 1_000_000.0)
  elif family == "gemma2":
    scaling = by_type or hf.get("rope_scaling")
    one = read(scaling, hf.get("rope_theta") or 10_000.0)
    both = one, one
  else:
    theta = hf.get("rope_theta") or 1_000_000.0
    both = (
      (float(hf.get("rope_local_base_freq") or 10_000.0), 1.0),
      read(by_type or hf.get("rope_scaling"), theta),
    )
  if both[0][1] != 1.0:
    raise ValueError(
      f"RoPE factor {both[0][1]} on local layers is not supported; expected 1."
    )
  return both
