"""Hugging Face's eager torch modules, as the oracle of the forward pass."""

import contextlib

import numpy as np
import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from gemma_jax.models import families

TINY = ("gemma2-tiny", "gemma3-tiny", "gpt2-tiny", "neox-tiny", "llama-tiny")

# Hugging Face's value of each site, in layer `{}`. `mlp_norm` is not the
# value of any module; `torch_sites` computes it.
_GEMMA = {
  "resid_pre": "model.layers.{}.input",
  "attn_z": "model.layers.{}.self_attn.o_proj.input",
  "attn_out": "model.layers.{}.post_attention_layernorm.output",
  "resid_mid": "model.layers.{}.pre_feedforward_layernorm.input",
  "mlp_in": "model.layers.{}.mlp.input",
  "mlp_hidden": "model.layers.{}.mlp.down_proj.input",
  "mlp_raw": "model.layers.{}.mlp.output",
  "mlp_out": "model.layers.{}.post_feedforward_layernorm.output",
  "resid_post": "model.layers.{}.output",
}
_LLAMA = {
  "resid_pre": "model.layers.{}.input",
  "attn_z": "model.layers.{}.self_attn.o_proj.input",
  "attn_out": "model.layers.{}.self_attn.output",
  "resid_mid": "model.layers.{}.post_attention_layernorm.input",
  "mlp_in": "model.layers.{}.mlp.input",
  "mlp_hidden": "model.layers.{}.mlp.down_proj.input",
  "mlp_raw": "model.layers.{}.mlp.output",
  "mlp_out": "model.layers.{}.mlp.output",
  "resid_post": "model.layers.{}.output",
}
_GPT2 = {
  "resid_pre": "transformer.h.{}.input",
  "attn_z": "transformer.h.{}.attn.c_proj.input",
  "attn_out": "transformer.h.{}.attn.output",
  "resid_mid": "transformer.h.{}.ln_2.input",
  "mlp_in": "transformer.h.{}.mlp.input",
  "mlp_hidden": "transformer.h.{}.mlp.c_proj.input",
  "mlp_raw": "transformer.h.{}.mlp.output",
  "mlp_out": "transformer.h.{}.mlp.output",
  "resid_post": "transformer.h.{}.output",
}
_NEOX = {
  "resid_pre": "gpt_neox.layers.{}.input",
  "attn_z": "gpt_neox.layers.{}.attention.dense.input",
  "attn_out": "gpt_neox.layers.{}.attention.output",
  "resid_mid": "gpt_neox.layers.{}.post_attention_layernorm.input",
  "mlp_in": "gpt_neox.layers.{}.mlp.input",
  "mlp_hidden": "gpt_neox.layers.{}.mlp.dense_4h_to_h.input",
  "mlp_raw": "gpt_neox.layers.{}.mlp.output",
  "mlp_out": "gpt_neox.layers.{}.mlp.output",
  "resid_post": "gpt_neox.layers.{}.output",
}
MODULES = {
  "gemma2": _GEMMA,
  "gemma3_text": _GEMMA,
  "gpt2": _GPT2,
  "gpt_neox": _NEOX,
  "llama": _LLAMA,
}


def tiny(preset, *, embedding=3.0, matrices=1.0, **changes):
  """A Hugging Face model of the preset in which no parameter is hidden.

  Args:
    preset: a key of PRESETS.
    embedding: scale of the embeddings' weights.
    matrices: scale of the other matrices.
    **changes: of config.json.
  """
  hf = families.to_hf_config(families.PRESETS[preset]) | changes
  cls = getattr(transformers, hf["architectures"][0])
  config = cls.config_class.from_dict(hf)
  model = cls._from_config(config, attn_implementation="eager").eval()
  torch.manual_seed(0)
  with torch.no_grad():
    for name, p in model.named_parameters():
      module = model.get_submodule(name.rpartition(".")[0])
      if p.ndim == 1:  # gains and biases: off the value they start with
        p.add_(torch.randn(p.shape), alpha=0.3)
        continue
      inputs = p.shape[0 if isinstance(module, Conv1D) else 1]
      embeds = isinstance(module, torch.nn.Embedding)
      scale = embedding if embeds else matrices
      p.copy_(torch.randn(p.shape) * scale * inputs**-0.5)
  # Random models never mean the end when they say so.
  model.generation_config.eos_token_id = None
  return model


@contextlib.contextmanager
def in_float64():
  """What is built and run herein is float64 also where its code says float32.

  Hugging Face computes RoPE, the softmax and RMSNorm in float32 even in a
  model of float64, which would leave an error of 1e-7 in the oracle.
  """
  default = torch.get_default_dtype()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(torch, "float32", torch.float64)
    patch.setattr(torch, "float", torch.float64)
    patch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    try:
      yield
    finally:
      torch.set_default_dtype(default)


def torch_run(model, tokens, names, **inputs):
  """Logits and {name: value} by forward hooks.

  Args:
    model: of Hugging Face.
    tokens: int [B, T].
    names: modules' names with `.input` or `.output` appended.
    **inputs: arrays that the model gets besides the tokens.
  """
  found = {}

  def grab(name, which):
    def hook(module, args, kwargs, out):
      x = args[0] if args else kwargs["hidden_states"]
      x = x if which == "input" else out
      found[name] = (x[0] if isinstance(x, tuple) else x).detach().numpy()

    return hook

  with contextlib.ExitStack() as stack:
    for name in names:
      path, _, which = name.rpartition(".")
      handle = model.get_submodule(path).register_forward_hook(
        grab(name, which), with_kwargs=True
      )
      stack.callback(handle.remove)
    with torch.no_grad():
      inputs = {name: torch.tensor(x) for name, x in inputs.items()}
      out = model(torch.tensor(tokens), use_cache=False, **inputs)
  return out.logits.numpy(), found


def torch_sites(model, tokens):
  """Logits and {our site: value}, of all sites that the model has."""
  config = model.config
  modules = MODULES[config.model_type]
  parallel = getattr(config, "use_parallel_residual", False)
  if parallel:
    modules = {k: v for k, v in modules.items() if k != "resid_mid"}
  names = {
    f"blocks.{l}.{name}": module.format(l)
    for l in range(config.num_hidden_layers)
    for name, module in modules.items()
  }
  logits, values = torch_run(model, tokens, set(names.values()))
  found = {name: values[module] for name, module in names.items()}
  for l in range(config.num_hidden_layers):
    x = found[f"blocks.{l}.{'resid_pre' if parallel else 'resid_mid'}"]
    if config.model_type in ("gpt2", "gpt_neox"):
      x = x - x.mean(axis=-1, keepdims=True)
    square = np.mean(np.square(x), axis=-1, keepdims=True)
    found[f"blocks.{l}.mlp_norm"] = x / np.sqrt(square + norm_eps(config))
  return logits, found


def norm_eps(config):
  """The epsilon of a Hugging Face config, under any of its names."""
  for name in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"):
    if hasattr(config, name):
      return getattr(config, name)
  raise AssertionError(f"{config.model_type} has no epsilon")


def relative(x, y):
  """The largest difference over the largest value of y."""
  x, y = np.asarray(x), np.asarray(y)
  assert x.shape == y.shape, (x.shape, y.shape)
  return float(np.abs(x - y).max() / np.abs(y).max())


def worst(got, expected):
  """The largest relative difference of each entry of two dicts."""
  assert got.keys() == expected.keys()
  return {k: relative(got[k], expected[k]) for k in expected}
