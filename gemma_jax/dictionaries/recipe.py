"""How dictionaries are trained: every choice by name, and other systems' sets.

A `Recipe` fixes what a dictionary's loss, start and constraints are. Systems
differ in all of these, and coefficients do not carry over from one to
another, so their choices come as wholes: `preset("dictionary_learning",
"batchtopk")`.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

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
    aux_candidates: the longest dead, among which they are; None: all dead.
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
  learning_rate: float | None = 4e-3
  skip_learning_rate: float = 0.3
  warmup: float = 0.03
  decay: float = 1.0
  beta1: float = 0.9
  beta2: float = 0.99
  epsilon: float = 1e-10
  clip: float | None = None
  products: str = "float32"

  def __post_init__(self):
    for name, valid in CHOICES.items():
      if getattr(self, name) not in valid:
        raise ValueError(
          f"recipe.{name} {getattr(self, name)!r}; expected one of "
          f"{', '.join(valid)}."
        )
    for name in ("bandwidth", "sparsity_power", "tanh_scale"):
      if getattr(self, name) <= 0:
        raise ValueError(f"recipe.{name} must be positive.")
    if self.decoder_norm < 0 or (
      self.decoder_norm == 0 and self.decoder != "free"
    ):
      raise ValueError(
        "recipe.decoder_norm must be positive; a free decoder may start at 0."
      )
    if self.target == "input" and self.normalise in normalise_lib.WHITENING:
      raise ValueError(
        f"recipe.target 'input' would whiten the output as well "
        f"(normalise {self.normalise!r}), and errors belong in raw "
        "coordinates. Use target 'variance' or another normalise."
      )

  def rate(self, width: int) -> float:
    """The learning rate for a dictionary of `width` latents."""
    if self.learning_rate is not None:
      return self.learning_rate
    return 2e-4 / (width / 2**14) ** 0.5


# For every activation: what the default recipe changes.
_DEFAULT = {
  "relu": {
    "sparsity": "l1",
    "sparsity_coefficient": 0.05,
    "sparsity_warmup": 0.05,
    "aux_coefficient": 0.0,
  },
  "gated": {
    "sparsity": "l1",
    "sparsity_coefficient": 0.05,
    "sparsity_warmup": 0.05,
    "aux_coefficient": 0.0,
  },
  "topk": {},
  "batchtopk": {},
  "jumprelu": {
    "sparsity": "target_l0",
    "sparsity_coefficient": 1.0,
    "sparsity_warmup": 0.1,
    "gradient_to_input": True,
    # Activations begin at about 0.7 sqrt(D).
    "threshold_init": 1.0,
    "bandwidth": 2.0,
  },
}

_ADAM = {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}

# SAELens 6.54.12: sae_lens/saes/{standard,gated,topk,batchtopk,
# matryoshka_batchtopk,jumprelu}_sae.py, training/{sae_trainer,optim}.py,
# config.py. Not here: Matryoshka's optional aux-k for every level.
_SAE_LENS = {
  **_ADAM,
  "normalise": "none",
  "target": "input",
  "init": "random",
  "encoder_init": "decoder",
  "encoder_norm": None,
  "decoder_norm": 0.1,
  "subtract_b_dec": True,
  "loss": "sum",
  "aux_coefficient": 0.0,
  "dead_after_steps": 1000,
  "learning_rate": 3e-4,
  "warmup": 0.0,
  "decay": 0.0,
  "clip": 1.0,
}
_SAE_LENS_TOPK = _SAE_LENS | {
  "rank_by_norm": True,
  "prefix_weights": "sum",
  "aux_k": None,
  "aux_candidates": None,
  "aux_coefficient": 1.0,
  "aux_scale": "sum",
  "aux_relu": False,
  "aux_ramp": True,
  "threshold_decay": 0.99,
  "threshold_from_zero": True,
}
_SAE_LENS_JUMPRELU = _SAE_LENS | {
  "sparsity": "l0",
  "sparsity_coefficient": 1.0,
  "threshold_init": 0.01,
  "bandwidth": 0.05,
}

# dictionary_learning 0.1.0: trainers/{standard,gdm,top_k,batch_top_k,
# matryoshka_batch_top_k,jumprelu,trainer}.py, training.py. It differs in that
# its first step has a learning rate of 0, its top_k also tracks a threshold,
# and its JumpReLU thresholds may fall below 0 while they are trained.
_DICTIONARY_LEARNING = {
  **_ADAM,
  "normalise": "unit_square",
  "target": "input",
  "init": "random",
  "encoder_init": "decoder",
  "encoder_norm": None,
  "decoder_norm": 1.0,
  "subtract_b_dec": True,
  "loss": "sum",
  "aux_coefficient": 0.0,
  "dead_after": 10_000_000,
  "decoder": "unit_after_step",
  "warmup": 1000,
  "decay": 0.0,
}
_DICTIONARY_LEARNING_L1 = _DICTIONARY_LEARNING | {
  "sparsity": "l1",
  "sparsity_coefficient": 0.1,
  "sparsity_by_norm": False,
  "sparsity_warmup": 2000,
}
_DICTIONARY_LEARNING_TOPK = _DICTIONARY_LEARNING | {
  "b_dec_init": "geometric_median",
  "prefix_weights": "mean_of_shares",
  "aux_k": None,
  "aux_candidates": None,
  "aux_coefficient": 1 / 32,
  "aux_after_batch": True,
  "threshold_decay": 0.999,
  "threshold_start": 1001,
  "learning_rate": None,
  "clip": 1.0,
}

# bartbussmann/matryoshka_sae c7c5787 and BatchTopK b9aab1c: sae.py,
# training.py, config.py. Their L1 and L0 coefficients are 0 until they are
# chosen. It differs in that the gradient of JumpReLU's log threshold lacks the
# threshold as a factor (the same where it starts, at 1), and in Matryoshka's
# aux-k, which is 0 while no dead latent is active.
_MATRYOSHKA_SAE = _ADAM | {
  "beta2": 0.99,
  "normalise": "none",
  "target": "input",
  "layer_norm": True,
  "init": "random",
  "encoder_init": "he",
  "decoder_norm": 1.0,
  "subtract_b_dec": True,
  "loss": "mean",
  "aux_coefficient": 0.0,
  "dead_after_steps": 19,
  "decoder": "unit_before_step",
  "learning_rate": 3e-4,
  "warmup": 0.0,
  "decay": 0.0,
  "clip": 1e5,
}
_MATRYOSHKA_SAE_TOPK = _MATRYOSHKA_SAE | {
  "train_b_enc": False,
  "prefix_weights": "mean",
  "bias_prefix": True,
  "aux_k": 512,
  "aux_candidates": None,
  "aux_coefficient": 1 / 32,
  "aux_scale": "mean",
  "aux_detach": False,
  "aux_after_batch": True,
  "threshold_decay": 0.99,
  "threshold_from_zero": True,
}

# eai-sparsify 1.3.3: sparse_coder.py, fused_encoder.py, trainer.py, config.py.
# With multi_topk it has the weight 1/8, with auxk_alpha any. It differs in
# that its fused encoder gets no gradient of these two terms, that Multi-TopK
# leaves out the skip and takes the 4 k for those that fire, and that the decay
# begins where the warm-up ends. Adam is one of its optimisers; by default it
# follows signs, free of schedules, at 5e-3 / sqrt(M / 2^14).
_SPARSIFY = {
  **_ADAM,
  "normalise": "none",
  "target": "input",
  "init": "random",
  "encoder_init": "decoder",
  "encoder_norm": 3**-0.5,  # of a torch.nn.Linear
  "decoder_norm": 1.0,
  "b_dec_init": "mean",
  "skip_init": "zeros",
  "subtract_b_dec": True,
  "loss": "fvu_batch",
  "aux_k": None,
  "aux_candidates": None,
  "aux_coefficient": 0.0,
  "aux_scale": "total",
  "aux_ramp": True,
  "dead_after": 10_000_001,
  "decoder": "unit_after_step",
  "learning_rate": None,
  "skip_learning_rate": 1.0,
  "warmup": 1000,
  "decay": 1.0,
}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
  "default": _DEFAULT,
  "sae_lens": {
    "relu": _SAE_LENS | {"sparsity": "l1", "sparsity_coefficient": 1.0},
    "gated": _SAE_LENS
    | {
      "sparsity": "l1",
      "sparsity_coefficient": 1.0,
      "gated_detach": False,
    },
    "topk": _SAE_LENS_TOPK,
    "batchtopk": _SAE_LENS_TOPK,
    "jumprelu": _SAE_LENS_JUMPRELU,
  },
  "dictionary_learning": {
    "relu": _DICTIONARY_LEARNING_L1
    | {"decoder_norm": 0.1, "learning_rate": 1e-3},
    "gated": _DICTIONARY_LEARNING_L1 | {"learning_rate": 5e-5, "beta1": 0.0},
    "topk": _DICTIONARY_LEARNING_TOPK,
    "batchtopk": _DICTIONARY_LEARNING_TOPK,
    "jumprelu": _DICTIONARY_LEARNING
    | {
      "subtract_b_dec": False,
      "sparsity": "target_l0",
      "sparsity_coefficient": 1.0,
      "sparsity_warmup": 2000,
      "threshold_init": 1e-3,
      "bandwidth": 1e-3,
      "step_sees": "activation",
      "learning_rate": 7e-5,
      "beta1": 0.0,
      "clip": 1.0,
    },
  },
  "matryoshka_sae": {
    "relu": _MATRYOSHKA_SAE | {"sparsity": "l1", "sparsity_by_norm": False},
    "topk": _MATRYOSHKA_SAE_TOPK,
    "batchtopk": _MATRYOSHKA_SAE_TOPK,
    "jumprelu": _MATRYOSHKA_SAE
    | {
      "subtract_b_dec": False,
      "sparsity": "l0",
      "log_threshold": True,
      "threshold_init": 1.0,
      "bandwidth": 1e-3,
      "step_sees": "activation",
    },
  },
  "sparsify": {"topk": _SPARSIFY},
  # Its transcoders, and skip transcoders.
  "sparsify_transcoder": {
    "topk": _SPARSIFY
    | {
      "decoder_norm": 0.0,
      "b_enc_init": "centre",
      "subtract_b_dec": False,
      "decoder": "free",
    }
  },
  # Rajamanoharan et al. 2024 (arXiv 2407.14435), Lieberum et al. 2024 (arXiv
  # 2408.05147); their trainer is not public. The coefficient was chosen for
  # each dictionary, and the learning rate rose along a cosine.
  "gemma_scope": {
    "jumprelu": _ADAM
    | {
      "beta1": 0.0,
      "normalise": "unit_square",
      "target": "input",
      "init": "random",
      "encoder_init": "decoder",
      "encoder_norm": None,
      "decoder_norm": 1.0,
      "loss": "sum",
      "sparsity": "l0",
      "sparsity_warmup": 10_000,
      "threshold_init": 1e-3,
      "bandwidth": 1e-3,
      "log_threshold": True,
      "aux_coefficient": 0.0,
      "decoder": "unit_after_step",
      "learning_rate": 7e-5,
      "warmup": 1000,
      "decay": 0.0,
    }
  },
  # Conerly et al. 2025 (transformer-circuits.pub, January update), in the
  # form that SAELens 6.54.12 gives it: docs/training_saes.md.
  "anthropic": {
    "jumprelu": _SAE_LENS_JUMPRELU
    | {
      "normalise": "mean_norm",
      "sparsity": "tanh",
      "sparsity_coefficient": 5.0,
      "sparsity_warmup": 1.0,
      "tanh_scale": 4.0,
      "pre_activation_coefficient": 3e-6,
      "threshold_init": 0.1,
      "bandwidth": 2.0,
      "gradient_to_input": True,
      "decay": 0.2,
    }
  },
}


def preset(
  name: str, activation: str, changes: Mapping[str, Any] | None = None
) -> Recipe:
  """A system's recipe for an architecture.

  Args:
    name: one of `PRESETS`.
    activation: one of `config.ACTIVATIONS`.
    changes: fields to set otherwise.

  Raises:
    ValueError: an unknown system, one that has no such architecture, an
      unknown field.
  """
  if name not in PRESETS:
    raise ValueError(
      f"preset {name!r} is unknown; expected one of {', '.join(PRESETS)}."
    )
  if activation not in PRESETS[name]:
    raise ValueError(
      f"{name} has no {activation!r}; it has {', '.join(PRESETS[name])}."
    )
  changes = dict(changes or {})
  known = [field.name for field in dataclasses.fields(Recipe)]
  for field in changes:
    if field not in known:
      near = difflib.get_close_matches(field, known, n=1)
      hint = f" Did you mean {near[0]!r}?" if near else ""
      raise ValueError(f"A recipe has no field {field!r}.{hint}")
  return Recipe(**{**PRESETS[name][activation], **changes})
