"""What a model is: one frozen dataclass for all families."""

import dataclasses

_SIZES = (
  "num_layers",
  "width",
  "mlp_width",
  "num_heads",
  "num_kv_heads",
  "head_dim",
  "vocab_size",
  "max_context",
)
_NUMBERS = (
  "query_scale",
  "window",
  "rope_theta_local",
  "rope_theta_global",
  "rope_factor_global",
  "attn_softcap",
  "final_softcap",
  "norm_eps",
)
_OPTIONAL = ("window", "attn_softcap", "final_softcap")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shape and numerics of a causal language model. Hashable, so jit-static.

  Attributes:
    family: "gemma2", "gemma3", "gpt2", "neox" (Pythia) or "llama" (SmolLM2).
    num_layers: L of the complete model, whatever part of it is loaded.
    width: D, the residual stream.
    mlp_width: F, neurons of the MLP (of one branch, where it is gated).
    num_heads: N, query heads.
    num_kv_heads: K, key-value heads; divides N.
    head_dim: H; N * H need not equal D.
    vocab_size: V, rows of the embedding.
    max_context: the longest context that the model takes, in tokens.
    query_scale: multiplies q.k.
    activation: of the MLP: "gelu_tanh", "gelu" (exact) or "silu".
    window: positions that a local layer sees, itself included; None where
      all layers are global.
    layer_is_global: [L], True where a layer attends to the whole context;
      () stands for True everywhere.
    rotary_dim: leading dims of a head that RoPE turns; None for all of them,
      0 for learned positions.
    rope_theta_local: RoPE base of the local layers.
    rope_theta_global: RoPE base of the global layers.
    rope_factor_global: positions of global layers are divided by this.
    qk_norm: RMSNorm over H on queries and keys, before RoPE.
    attn_softcap: scores become c * tanh(scores / c); None for no cap.
    final_softcap: the same for logits.
    norm_eps: epsilon of every norm.
    norm_offset: a norm's gain is `norm_offset + weight`.
    embed_scale: multiplies the embedding.
    parallel_residual: attention and MLP both read the block's input, so that
      there is no `resid_mid`.
    tied: logits come from the embedding itself.
    bos_id: id that starts every context.
    eos_ids: ids of which each ends a text.
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
  max_context: int
  query_scale: float
  activation: str
  window: int | None = None
  layer_is_global: tuple[bool, ...] = ()
  rotary_dim: int | None = None
  rope_theta_local: float = 10_000.0
  rope_theta_global: float = 10_000.0
  rope_factor_global: float = 1.0
  qk_norm: bool = False
  attn_softcap: float | None = None
  final_softcap: float | None = None
  norm_eps: float = 1e-6
  norm_offset: float = 0.0
  embed_scale: float = 1.0
  parallel_residual: bool = False
  tied: bool = True
  bos_id: int = 2
  eos_ids: tuple[int, ...] = (1,)
  pad_id: int = 0

  def __post_init__(self):
    for name in _SIZES:
      value = getattr(self, name)
      if type(value) is not int or value < 1:
        raise ValueError(f"{name}={value!r} must be a positive integer.")
    for name in _NUMBERS:
      value = getattr(self, name)
      if value is None and name in _OPTIONAL:
        continue
      if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise ValueError(f"{name}={value!r} must be a positive number.")
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_heads={self.num_heads} must be a multiple of "
        f"num_kv_heads={self.num_kv_heads}."
      )
    everywhere = (True,) * self.num_layers
    object.__setattr__(
      self, "layer_is_global", self.layer_is_global or everywhere
    )
    if len(self.layer_is_global) != self.num_layers:
      raise ValueError(
        f"layer_is_global has {len(self.layer_is_global)} entries for "
        f"{self.num_layers} layers; expected one per layer."
      )
    if self.window is None and self.layer_is_global != everywhere:
      raise ValueError(
        "Some layers are local (layer_is_global), so window must be a number "
        "of positions; got None."
      )
    turned = self.rope_dim
    if type(turned) is not int or not 0 <= turned <= self.head_dim:
      raise ValueError(
        f"rotary_dim={turned!r} must be an integer of 0 to "
        f"head_dim={self.head_dim}."
      )
    if turned % 2 or (turned and self.head_dim % 2):
      raise ValueError(
        f"RoPE turns pairs: rotary_dim={turned} and head_dim={self.head_dim} "
        "must be even."
      )
    if not isinstance(self.eos_ids, tuple) or not self.eos_ids:
      raise ValueError(
        f"eos_ids={self.eos_ids!r} must be a tuple of at least one token id."
      )
    for i in (self.bos_id, *self.eos_ids, self.pad_id):
      if type(i) is not int or i < 0:
        raise ValueError(
          f"bos_id={self.bos_id!r}, eos_ids={self.eos_ids!r} and "
          f"pad_id={self.pad_id!r} must be token ids, integers from 0."
        )

  @property
  def rope_dim(self) -> int:
    """R: `rotary_dim`, or the whole head where that is None."""
    return self.head_dim if self.rotary_dim is None else self.rotary_dim

  @property
  def eos_id(self) -> int:
    """The first of `eos_ids`."""
    return self.eos_ids[0]

  def num_parameters(self, num_layers: int | None = None) -> int:
    """Parameters of `num_layers` blocks and of all that is outside them."""
    from gemma_jax.models import families, tables  # they import this file

    family = families.of(self)
    layers = self.num_layers if num_layers is None else num_layers
    block, top = (
      tables.count(t(self), self) for t in (family.block, family.top)
    )
    return top + layers * block

  def flops_per_token(
    self, num_layers: int, context: int, *, unembed: bool
  ) -> float:
    """Multiply-adds, times two, of one forward pass per token.

    Attention is counted with all T x T scores, no causal skip.
    """
    blocks = self.num_parameters(num_layers) - self.num_parameters(0)
    scores = 2 * self.num_heads * self.head_dim * context * num_layers
    head = self.vocab_size * self.width if unembed else 0
    return 2.0 * (blocks + scores + head)
