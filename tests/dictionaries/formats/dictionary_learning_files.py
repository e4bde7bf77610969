"""dictionary_learning, in its own layout; torch writes it."""

import numpy as np

from tests.dictionaries.formats.files import (
  D,
  K,
  M,
  Written,
  case,
  relu,
  top,
  weights,
  wide,
  write_json,
)


def dictionary_learning(root, kind, w, formula, **trainer):
  """Saved as its training does: a state dict, and the trainer's config."""
  import torch

  path = root / "run" / "trainer_0"
  path.mkdir(parents=True)
  state = {name: torch.tensor(x) for name, x in w.items()}
  torch.save(state, path / "ae.pt")
  config = {
    "dict_class": kind,
    "activation_dim": D,
    "dict_size": M,
    "layer": 8,
    "lm_name": "EleutherAI/pythia-160m",
    "submodule_name": "resid_post_layer_8",
  }
  config |= trainer
  buffer = {"d_submodule": D, "io": "out", "ctx_len": 64}
  write_json(path / "config.json", {"trainer": config, "buffer": buffer})
  return Written(path, formula)


def linear_weights(seed, *, bias="b_dec", encoder_bias=True):
  shapes = {"encoder.weight": (M, D), "decoder.weight": (D, M), bias: D}
  if encoder_bias:
    shapes["encoder.bias"] = M
  return weights(seed, **shapes)


def linear_formula(w, bias, select, *, subtract=True):
  w = wide(w)

  def formula(x):
    read = x - w[bias] if subtract else x
    acts = select(relu(read @ w["encoder.weight"].T + w["encoder.bias"]))
    return acts, acts @ w["decoder.weight"].T + w[bias]

  return formula


@case("dictionary_learning-AutoEncoder")
def _(root):
  w = linear_weights(50, bias="bias")
  formula = linear_formula(w, "bias", lambda a: a)
  return dictionary_learning(root, "AutoEncoder", w, formula)


@case("dictionary_learning-AutoEncoderNew")
def _(root):
  w = linear_weights(51, bias="decoder.bias")
  formula = linear_formula(w, "decoder.bias", lambda a: a, subtract=False)
  return dictionary_learning(root, "AutoEncoderNew", w, formula)


def numbers(threshold):
  return {"k": np.int32(K), "threshold": np.float32(threshold)}


@case("dictionary_learning-AutoEncoderTopK")
def _(root):
  w = linear_weights(52)
  formula = linear_formula(w, "b_dec", top)
  w |= numbers(0.4)
  return dictionary_learning(root, "AutoEncoderTopK", w, formula, k=K)


@case("dictionary_learning-BatchTopKSAE")
def _(root):
  w = linear_weights(53)
  formula = linear_formula(w, "b_dec", lambda a: a * (a > 1.2))
  w |= numbers(1.2)
  return dictionary_learning(root, "BatchTopKSAE", w, formula, k=K)


@case("dictionary_learning-BatchTopKSAE_without_a_threshold")
def _(root):
  w = linear_weights(54)
  formula = linear_formula(w, "b_dec", top)
  w |= numbers(-1)
  return dictionary_learning(root, "BatchTopKSAE", w, formula, k=K)


def plain_formula(w, *, subtract):
  w = wide(w)

  def formula(x):
    z = (x - w["b_dec"] * subtract) @ w["W_enc"] + w["b_enc"]
    acts = relu(z) * (z > w["threshold"])
    return acts, acts @ w["W_dec"] + w["b_dec"]

  return formula


@case("dictionary_learning-MatryoshkaBatchTopKSAE")
def _(root):
  w = weights(55, W_enc=(D, M), b_enc=M, W_dec=(M, D), b_dec=D) | numbers(0.9)
  formula = plain_formula(w, subtract=True)
  w["group_sizes"] = np.array([4, 4, 8])
  return dictionary_learning(root, "MatryoshkaBatchTopKSAE", w, formula, k=K)


@case("dictionary_learning-JumpReluAutoEncoder")
def _(root):
  w = weights(56, W_enc=(D, M), b_enc=M, W_dec=(M, D), b_dec=D, threshold=M)
  formula = plain_formula(w, subtract=False)
  return dictionary_learning(
    root, "JumpReluAutoEncoder", w, formula, target_l0=4
  )


@case("dictionary_learning-GatedAutoEncoder")
def _(root):
  w = linear_weights(57, bias="decoder_bias", encoder_bias=False)
  w |= weights(58, r_mag=M, gate_bias=M, mag_bias=M)
  v = wide(w)

  def formula(x):
    pi = (x - v["decoder_bias"]) @ v["encoder.weight"].T
    acts = relu(np.exp(v["r_mag"]) * pi + v["mag_bias"])
    acts = acts * (pi + v["gate_bias"] > 0)
    return acts, acts @ v["decoder.weight"].T + v["decoder_bias"]

  return dictionary_learning(root, "GatedAutoEncoder", w, formula)
