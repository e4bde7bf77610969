"""Every site and the logits against Hugging Face's eager torch modules."""

import contextlib

import jax
import numpy as np
import pytest
import torch
import transformers

from gemma_jax import models
from gemma_jax.models import config as config_lib

pytestmark = pytest.mark.torch

LENGTH = 40  # beyond the tiny models' window of 12


def tiny(preset, dtype):
  """A Hugging Face model of the preset with random, non-zero weights."""
  hf = config_lib.to_hf_config(config_lib.PRESETS[preset])
  cls = getattr(transformers, hf["architectures"][0])
  torch.manual_seed(0)
  model = cls._from_config(
    cls.config_class.from_dict(hf), attn_implementation="eager"
  ).to(dtype)
  with torch.no_grad():
    for name, p in model.named_parameters():
      p.normal_(std=0.3 if p.ndim == 1 else p.shape[-1] ** -0.5)
      if "embed" in name:
        p.mul_(3)
  return model.eval()


def torch_sites(model, tokens):
  """Logits and {our site: value} by forward hooks."""
  found = {}

  def grab(name, which):
    def hook(module, args, kwargs, out):
      x = args[0] if args else kwargs["hidden_states"]
      x = x if which == "input" else out
      found[name] = (x[0] if isinstance(x, tuple) else x).detach().numpy()

    return hook

  with contextlib.ExitStack() as stack:
    for l, layer in enumerate(model.model.layers):
      for name, module, which in (
        ("resid_pre", layer, "input"),
        ("attn_z", layer.self_attn.o_proj, "input"),
        ("attn_out", layer.post_attention_layernorm, "output"),
        ("resid_mid", layer.pre_feedforward_layernorm, "input"),
        ("mlp_in", layer.pre_feedforward_layernorm, "output"),
        ("mlp_hidden", layer.mlp.down_proj, "input"),
        ("mlp_raw", layer.mlp, "output"),
        ("mlp_out", layer.post_feedforward_layernorm, "output"),
        ("resid_post", layer, "output"),
      ):
        handle = module.register_forward_hook(
          grab(f"blocks.{l}.{name}", which), with_kwargs=True
        )
        stack.callback(handle.remove)
    with torch.no_grad():
      logits = model(torch.tensor(tokens), use_cache=False).logits.numpy()
  for l in range(len(model.model.layers)):
    x = found[f"blocks.{l}.resid_mid"]
    square = np.mean(np.square(x), axis=-1, keepdims=True)
    found[f"blocks.{l}.mlp_norm"] = x / np.sqrt(square + 1e-6)
  return logits, found


def relative(x, y):
  return float(np.abs(x - y).max() / np.abs(y).max())


@pytest.mark.parametrize("preset", ["gemma2-tiny", "gemma3-tiny"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_site_and_the_logits_equal_hugging_face(
  preset, dtype, tmp_path, one_device
):
  model = tiny(preset, getattr(torch, dtype))
  model.save_pretrained(tmp_path)
  cfg = config_lib.PRESETS[preset]
  tokens = np.random.default_rng(0).integers(4, cfg.vocab_size, (2, LENGTH))
  logits, expected = torch_sites(model, tokens)
  # Float64 tells rounding from a bug: a bug's gap does not shrink.
  tolerance = {"float32": 2e-5, "float64": 1e-6}[dtype]
  wide = dtype == "float64"
  with jax.enable_x64(wide):
    ours = models.load_model(tmp_path, dtype=dtype, mesh=one_device)
    assert ours.config == cfg
    got, sites = ours.forward(tokens, capture=tuple(expected))
    assert relative(np.asarray(got), logits) < tolerance
    worst = {k: relative(np.asarray(sites[k]), v) for k, v in expected.items()}
  assert max(worst.values()) < tolerance, worst


def test_right_padding_does_not_change_what_comes_before_it(
  tmp_path, one_device
):
  model = tiny("gemma3-tiny", torch.float32)
  model.save_pretrained(tmp_path)
  ours = models.load_model(tmp_path, mesh=one_device)
  tokens = np.random.default_rng(0).integers(4, 1000, (1, LENGTH))
  mask = np.arange(LENGTH)[None] < 25
  padded, _ = ours.forward(np.where(mask, tokens, 0), mask=mask)
  short, _ = ours.forward(tokens[:, :25])
  np.testing.assert_allclose(padded[:, :25], short, atol=2e-5)


def test_left_padding_gives_hugging_faces_logits(tmp_path, one_device):
  model = tiny("gemma3-tiny", torch.float32)
  model.save_pretrained(tmp_path)
  ours = models.load_model(tmp_path, mesh=one_device)
  tokens = np.random.default_rng(0).integers(4, 1000, (1, LENGTH))
  mask = np.arange(LENGTH)[None] >= 10
  got, _ = ours.forward(tokens, mask=mask)
  short, _ = ours.forward(tokens[:, 10:])
  np.testing.assert_allclose(got[:, 10:], short, atol=5e-5)


@pytest.mark.parametrize("preset", ["gemma2-tiny", "gemma3-tiny"])
def test_greedy_continuations_agree_with_hugging_face(
  preset, tmp_path, one_device
):
  model = tiny(preset, torch.float32)
  model.save_pretrained(tmp_path)
  ours = models.load_model(tmp_path, mesh=one_device)
  tokens = np.random.default_rng(1).integers(4, 1000, (2, 20))
  model.generation_config.eos_token_id = None
  with torch.no_grad():
    expected = model.generate(
      torch.tensor(tokens),
      attention_mask=torch.ones(tokens.shape, dtype=torch.long),
      do_sample=False,
      max_new_tokens=16,
      pad_token_id=0,
    ).numpy()
  # Random models never mean the end when they say so.
  got = ours.generate(tokens, max_new_tokens=16)
  for row, other in zip(got, expected, strict=True):
    stop = np.flatnonzero(row == ours.config.eos_id)
    end = stop[0] + 1 if len(stop) else len(row)
    assert end > 24
    np.testing.assert_array_equal(row[:end], other[:end])
