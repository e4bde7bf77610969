"""Two training steps of other systems' own trainers, for `test_peers`.

  PEER/bin/python tests/dictionaries/peers/make.py DIRECTORY [CASE ...]

PEER has sae-lens 6.54.12, dictionary-learning 0.1.0 and eai-sparsify 1.3.3.
Each case becomes DIRECTORY/CASE.npz, in our names and orientations:

  case                JSON: preset, activation, changes of the recipe, config
  versions            JSON
  x, y                batches [S, B, D], [S, B, E]
  since_fired, threshold, steps    the state before
  before/S/NAME       parameters of step S when its loss is taken
  gradients/S/NAME    of the loss, before projection and clipping
  loss, rate          [S]; the loss and the learning rate of every step
  parts/NAME          [S]; terms of the loss that the system names
  after/NAME          parameters after the last step
  since_fired_after, threshold_after    [S, M], [S]
"""

import pathlib
import sys

import torch
from systems import (
  LINEAR,
  MATRICES,
  K,
  M,
  dictionary_learning,
  sae_lens,
  sparsify,
)

WIDTHS = (6, 15, M)  # of Matryoshka prefixes
GROUPS = (6 / 36, 9 / 36, 21 / 36)
FEW, MANY = (3, 9, 20, 33), (0, 4, 7, 12, 13, 18, 25, 31, 35)
JUMP = {"extra": ("threshold",), "jumprelu_bandwidth": 0.4}
CASES = {
  "sae_lens_relu": lambda: sae_lens(
    1,
    "StandardTrainingSAE",
    "relu",
    l1_coefficient=0.7,
    l1_warm_up_steps=4,
    changes={"sparsity_coefficient": 0.7, "sparsity_warmup": 4},
  ),
  "sae_lens_gated": lambda: sae_lens(
    2,
    "GatedTrainingSAE",
    "gated",
    extra=("r_mag", "b_mag"),
    l1_coefficient=0.7,
    changes={"sparsity_coefficient": 0.7},
  ),
  "sae_lens_topk": lambda: sae_lens(
    3, "TopKTrainingSAE", "topk", k=K, dead=FEW
  ),
  "sae_lens_batchtopk": lambda: sae_lens(
    4,
    "BatchTopKTrainingSAE",
    "batchtopk",
    k=3.3,
    dead=MANY,
    config={"k": 3.3},
  ),
  "sae_lens_matryoshka": lambda: sae_lens(
    5,
    "MatryoshkaBatchTopKTrainingSAE",
    "batchtopk",
    k=K,
    dead=MANY,
    matryoshka_widths=list(WIDTHS),
    config={"prefix_widths": WIDTHS},
  ),
  "sae_lens_jumprelu_step": lambda: sae_lens(
    6, "JumpReLUTrainingSAE", "jumprelu", **JUMP, changes={"bandwidth": 0.4}
  ),
  "sae_lens_jumprelu_tanh": lambda: sae_lens(
    7,
    "JumpReLUTrainingSAE",
    "jumprelu",
    **JUMP,
    dead=MANY,
    jumprelu_sparsity_loss_mode="tanh",
    jumprelu_ste_to_input=True,
    jumprelu_tanh_scale=0.6,
    pre_act_loss_coefficient=0.3,
    changes={
      "bandwidth": 0.4,
      "sparsity": "tanh",
      "tanh_scale": 0.6,
      "pre_activation_coefficient": 0.3,
      "gradient_to_input": True,
    },
  ),
  "sae_lens_jumprelu_quadratic": lambda: sae_lens(
    8,
    "JumpReLUTrainingSAE",
    "jumprelu",
    **JUMP,
    jumprelu_sparsity_loss_mode="quadratic",
    target_l0=K,
    l0_coefficient=0.2,
    changes={
      "bandwidth": 0.4,
      "sparsity": "target_l0_token",
      "sparsity_coefficient": 0.2,
    },
  ),
  "dictionary_learning_relu": lambda: dictionary_learning(
    11,
    "standard",
    "StandardTrainer",
    "relu",
    LINEAR | {"b_dec": ("bias", False)},
    unit=False,
    first=1500,  # three quarters of the sparsity warm-up
  ),
  "dictionary_learning_gated": lambda: dictionary_learning(
    12,
    "gdm",
    "GatedSAETrainer",
    "gated",
    LINEAR
    | {
      "b_enc": ("gate_bias", False),
      "b_dec": ("decoder_bias", False),
      "r_mag": ("r_mag", False),
      "b_mag": ("mag_bias", False),
    },
    first=1500,
  ),
  "dictionary_learning_topk": lambda: dictionary_learning(
    13, "top_k", "TopKTrainer", "topk", LINEAR, k=K, dead=FEW
  ),
  "dictionary_learning_batchtopk": lambda: dictionary_learning(
    14, "batch_top_k", "BatchTopKTrainer", "batchtopk", LINEAR, k=K, dead=MANY
  ),
  "dictionary_learning_matryoshka": lambda: dictionary_learning(
    15,
    "matryoshka_batch_top_k",
    "MatryoshkaBatchTopKTrainer",
    "batchtopk",
    MATRICES,
    k=K,
    dead=MANY,
    group_fractions=list(GROUPS),
    config={"prefix_widths": WIDTHS},
  ),
  "dictionary_learning_jumprelu": lambda: dictionary_learning(
    16,
    "jumprelu",
    "JumpReluTrainer",
    "jumprelu",
    MATRICES | {"threshold": ("threshold", False)},
    bandwidth=0.4,
    target_l0=K,
    changes={"bandwidth": 0.4},
    first=1500,
  ),
  "sparsify_sae": lambda: sparsify(21),
  "sparsify_transcoder": lambda: sparsify(22, transcode=True, skip=True),
  "sparsify_transcoder_start": lambda: sparsify(
    23, transcode=True, skip=True, start=True
  ),
  # The encoder gets no gradient of the aux-k loss there.
  "sparsify_aux": lambda: sparsify(
    24, dead=FEW, auxk_alpha=0.5, changes={"aux_coefficient": 0.5}
  ),
  "sparsify_multi_topk": lambda: sparsify(
    25, own={"multi_topk": True}, changes={"multi_topk": 1 / 8}
  ),
}


def main(directory, *names):
  torch.set_num_threads(1)
  for name in names or CASES:
    torch.manual_seed(0)
    CASES[name]().save(pathlib.Path(directory) / f"{name}.npz")


if __name__ == "__main__":
  main(*sys.argv[1:])
