"""Whole recipes: our own, and those of other systems.

Systems differ in every field, and coefficients do not carry over from one to
another, so their choices come as wholes: `preset("dictionary_learning",
"batchtopk")`.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from gemma_jax.dictionaries.recipe import Recipe

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
