"""How dictionaries are trained: every choice by name; `presets` has whole sets.

A `Recipe` fixes what a dictionary's loss, start and constraints are.
"""

import dataclasses
import math

from gemma_jax.activations import normalise as normalise_lib

CHOICES = {
  "normalise": normalise_lib.KINDS,
  "target": ("variance", "input"),
  "init": ("examples", "random"),
  "encoder_init": ("independent", "decoder", "he"),
  "b_enc_init": ("zeros", "centre"),
  "b_dec_init": ("zeros", "mean", "geometric_median"),
  "skip_init": ("ridge", "zeros"),
  "loss": ("mean", "sum", "fvu_batch"),
  "prefix_weights": ("mean", "sum", "mean_of_shares"),
  "sparsity": ("none", "l1", "l0", "target_l0", "target_l0_token", "tanh"),
  "step_sees": ("pre_activation", "activation"),
  "aux_scale": ("residual", "total", "sum", "mean"),
  "decoder": ("free", "unit_after_step", "unit_before_step"),
  "products": ("float32", "bfloat16"),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How a dictionary is trained. Hashable, so jit-static.

  Lengths in steps that are 1 or less are shares of the whole training.

  Attributes:
    normalise: what happens to the input, one of
      `activations.normalise.KINDS`.
    whiten_epsilon: shrinkage of the kinds that whiten.
    target: "variance": the output is centred and has a mean variance of 1;
      "input": it goes through `normalise` as the input does.
    layer_norm: every token is centred and divided by its own deviation first.
    init: "examples" starts every latent at one input and what is left of its
      output; "random" at random directions.
    encoder_init: of "random": "independent", the "decoder" transposed, or
      "he": the same with norms sqrt(2 D / M), as He's rule gives a [D, M].
    encoder_norm: of every latent's encoder at the start, but with "he"; None:
      the decoder's.
    decoder_norm: of every decoder row at the start.
    b_enc_init: "zeros", or "centre": pre-activations have a mean of 0.
    b_dec_init: "zeros" (the mean, where the target is centred), "mean" or
      "geometric_median" of the targets.
    skip_init: "ridge", the best affine map, or "zeros".
    subtract_b_dec: the encoder reads x - b_dec. SAEs only.
    train_b_enc: False keeps the encoder's bias at 0.
    rank_by_norm: top-k ranks activation times decoder norm.
    loss: squared errors: "mean" over rows and dims, "sum" over dims and mean
      over rows, "fvu_batch" divided by the batch's variance.
    prefix_weights: of every Matryoshka prefix: "mean" 1/n, "sum" 1,
      "mean_of_shares" 1/n^2.
    bias_prefix: Matryoshka has one more prefix, of no latents.
    multi_topk: weight of the loss with 4 k latents.
    sparsity: "l1" sum of activations, "l0" their number, "target_l0" the
      square of (mean number / k - 1), "target_l0_token" that of
      2 / k (number - k)^2 for each token, "tanh" of activations.
    sparsity_coefficient: its weight.
    sparsity_by_norm: activations count times their decoder's norm.
    sparsity_power: p of sum(a^p)^(1/p).
    sparsity_warmup: steps over which the weight rises from 0.
    tanh_scale: factor inside the tanh.
    pre_activation_coefficient: of ReLU(threshold - z) of dead latents.
    bandwidth: of the JumpReLU's rectangle kernel.
    threshold_init: of the JumpReLU.
    log_threshold: train the threshold's logarithm.
    step_sees: what the L0 estimator's kernel is applied to.
    gradient_to_input: the estimators also reach the pre-activation.
    gated_detach: Gated's second reconstruction does not train the decoder.
    aux_k: dead latents that each row recruits; None: half the output's width.
    aux_candidates: the longest dead, among which they are; None (or M): all.
    aux_coefficient: weight of the aux-k loss; 0 turns it off.
    aux_scale: divisor: the "residual"'s variance, the targets' "total" one,
      rows ("sum"), rows and dims ("mean").
    aux_relu: their activations are ReLU(z), not z.
    aux_detach: the residual is a constant.
    aux_ramp: times dead latents / aux_k where there are fewer.
    aux_after_batch: counts this batch before saying who is dead.
    dead_after: tokens without firing after which a latent is dead.
    dead_after_steps: where given, dead is who has not fired for more steps.
    threshold_decay: of BatchTopK's running inference threshold.
    threshold_start: step at which it begins.
    threshold_from_zero: it starts at 0, not at its first value.
    decoder: rows "free", or of unit norm: gradients lose what is parallel
      and rows are divided by their norms after the step or before it.
    resample_every: steps; 0 never. Dead latents restart at badly
      reconstructed inputs.
    k_start: k anneals from here.
    k_anneal: steps until k is reached.
    learning_rate: None: 2e-4 / sqrt(M / 2^14).
    skip_learning_rate: of the affine skip, times that.
    warmup: steps of linear rise from 0.
    decay: steps of linear fall to 0 at the end.
    beta1: of Adam.
    beta2: of Adam.
    epsilon: of Adam.
    clip: largest norm of all gradients; None: any.
    products: dtype of the encoder's product; sums are float32.
  """

  normalise: str = "whiten"
  whiten_epsilon: float = 4.0
  target: str = "variance"
  layer_norm: bool = False
  init: str = "examples"
  encoder_init: str = "independent"
  encoder_norm: float | None = 0.7
  decoder_norm: float = 0.1
  b_enc_init: str = "zeros"
  b_dec_init: str = "zeros"
  skip_init: str = "ridge"
  subtract_b_dec: bool = False
  train_b_enc: bool = True
  rank_by_norm: bool = False
  loss: str = "mean"
  prefix_weights: str = "mean"
  bias_prefix: bool = False
  multi_topk: float = 0.0
  sparsity: str = "none"
  sparsity_coefficient: float = 0.0
  sparsity_by_norm: bool = True
  sparsity_power: float = 1.0
  sparsity_warmup: float = 0.0
  tanh_scale: float = 4.0
  pre_activation_coefficient: float = 0.0
  bandwidth: float = 0.05
  threshold_init: float = 0.01
  log_threshold: bool = False
  step_sees: str = "pre_activation"
  gradient_to_input: bool = False
  gated_detach: bool = True
  aux_k: int | None = 64
  aux_candidates: int | None = 256
  aux_coefficient: float = 1 / 32
  aux_scale: str = "residual"
  aux_relu: bool = True
  aux_detach: bool = True
  aux_ramp: bool = False
  aux_after_batch: bool = False
  dead_after: int = 50_000
  dead_after_steps: int | None = None
  threshold_decay: float = 0.99
  threshold_start: int = 0
  threshold_from_zero: bool = False
  decoder: str = "free"
  resample_every: int = 0
  k_start: float | None = None
  k_anneal: float = 0.0
  learning_rate: float | None = 3e-3
  skip_learning_rate: float = 0.3
  warmup: float = 0.03
  decay: float = 1.0
  beta1: float = 0.9
  beta2: float = 0.99
  epsilon: float = 1e-10
  clip: float | None = None
  products: str = "float32"

  def __post_init__(self):
    for field in dataclasses.fields(self):
      self._check(field.name, field.type)
    for name, valid in CHOICES.items():
      if getattr(self, name) not in valid:
        raise ValueError(
          f"recipe.{name} {getattr(self, name)!r}; expected one of "
          f"{', '.join(valid)}."
        )
    for name in (
      "bandwidth",
      "sparsity_power",
      "tanh_scale",
      "aux_k",
      "aux_candidates",
      "clip",
      "dead_after",
    ):
      if getattr(self, name) == 0:
        raise ValueError(f"recipe.{name} must be positive.")
    for name in ("beta1", "beta2", "threshold_decay"):
      if not getattr(self, name) < 1:
        raise ValueError(f"recipe.{name} must be less than 1.")
    if (self.k_start is None) != (self.k_anneal == 0):
      raise ValueError(
        f"recipe.k_start={self.k_start} and recipe.k_anneal={self.k_anneal} "
        "go together: from which k, over how many steps."
      )
    if self.log_threshold and self.threshold_init == 0:
      raise ValueError(
        "recipe.log_threshold needs a threshold_init above 0, whose logarithm "
        "is finite."
      )
    if self.decoder_norm == 0 and self.decoder != "free":
      raise ValueError(
        "recipe.decoder_norm must be positive; a free decoder may start at 0."
      )
    if self.target == "input" and self.normalise in normalise_lib.WHITENING:
      raise ValueError(
        f"recipe.target 'input' would whiten the output as well "
        f"(normalise {self.normalise!r}), and errors belong in raw "
        "coordinates. Use target 'variance' or another normalise."
      )

  def _check(self, name, kind) -> None:
    """Raises ValueError unless a value is of its field's type and finite."""
    value = getattr(self, name)
    # True is an int to Python; an int is a float to people.
    fits = isinstance(value, kind) and (kind is bool) == isinstance(value, bool)
    fits |= type(value) is int and isinstance(float(value), kind)
    if not fits:
      kinds = str(getattr(kind, "__name__", kind)).replace(" | ", " or ")
      raise ValueError(f"recipe.{name}={value!r} must be {kinds}.")
    if isinstance(value, int | float) and not 0 <= value < math.inf:
      raise ValueError(f"recipe.{name}={value!r} must be finite, at least 0.")

  def rate(self, width: int) -> float:
    """The learning rate for a dictionary of `width` latents."""
    if self.learning_rate is not None:
      return self.learning_rate
    return 2e-4 / (width / 2**14) ** 0.5
