"""The five families against Hugging Face's eager torch modules."""

import contextlib
import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

from gemma_jax import models
from gemma_jax.models import families, layers, sites, weights
from tests.models.torch_models import (
  TINY,
  in_float64,
  relative,
  tiny,
  torch_run,
  torch_sites,
  worst,
)

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("quick_compiles")]

LENGTH = 40  # beyond the tiny models' window of 12
# Of rows of a padded batch: one with more padding than a window, one without.
LENGTHS = np.array([40, 27, 9])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
  """Torch spends longer waking threads than these models take."""
  threads = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def save(tmp_path_factory):
  """Writes a Hugging Face model as its users do; where."""

  def save(model):
    directory = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(directory)
    return directory

  return save


@pytest.fixture(scope="module", params=TINY)
def theirs(request):
  return tiny(request.param)


@pytest.fixture(scope="module")
def ours(theirs, save, one_device):
  return models.load_model(save(theirs), mesh=one_device)


@pytest.fixture(scope="module")
def tokens():
  return np.random.default_rng(0).integers(4, 1000, (3, LENGTH))


def distance(got, logits):
  """The largest difference of logits, which are about 3 in size."""
  assert got.shape == logits.shape
  return np.abs(np.asarray(got) - logits).max()


# The whole model.


@pytest.mark.parametrize("preset", TINY)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_site_and_the_logits_equal_hugging_face(
  preset, dtype, tokens, save, one_device
):
  # Float64 tells rounding from a bug: a bug's gap does not shrink.
  wide = dtype == "float64"
  with in_float64() if wide else contextlib.nullcontext():
    theirs = tiny(preset)
    logits, expected = torch_sites(theirs, tokens)
  assert {x.dtype.name for x in (logits, *expected.values())} == {dtype}
  cfg = families.PRESETS[preset]
  with jax.enable_x64(wide):
    ours = models.load_model(save(theirs), dtype=dtype, mesh=one_device)
    assert ours.config == cfg
    got, found = ours.forward(tokens, capture=tuple(expected))
    assert distance(got, logits) < (1e-9 if wide else 1e-4)
    errors = worst(found, expected)
  assert max(errors.values()) < (1e-9 if wide else 1e-4), errors
  names = {name.split(".")[2] for name in expected}
  assert names == set(sites.names(cfg))


def test_a_site_named_as_in_hugging_face_is_that_modules_value(
  theirs, ours, tokens
):
  family = families.of(ours.config)
  names = tuple(f"{family.ROOT}.1.{name}" for name in family.SITES)
  _, expected = torch_run(theirs, tokens, names)
  _, got = ours.forward(tokens, capture=names, stop_at=2)
  assert max(worst(got, expected).values()) < 1e-4


def test_what_we_save_is_the_file_of_hugging_face(ours, tmp_path):
  weights.save(tmp_path, ours.params, ours.config)
  got, expected = (
    safetensors.numpy.load_file(directory / "model.safetensors")
    for directory in (tmp_path, ours.directory)
  )
  assert got.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_array_equal(got[name], x, strict=True)


# Padding: only what is not padded is compared.


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_padded_on_either_side_give_hugging_faces_logits(
  theirs, ours, tokens, side
):
  mask = np.arange(LENGTH) < LENGTHS[:, None]
  mask = mask[:, ::-1] if side == "left" else mask
  expected, _ = torch_run(
    theirs,
    tokens,
    (),
    attention_mask=mask.astype(int),
    position_ids=np.maximum(np.cumsum(mask, axis=1) - 1, 0),
  )
  got, _ = ours.forward(tokens, mask=mask)
  assert distance(got[mask], expected[mask]) < 1e-4


# Each part of a block on its own, with Hugging Face's own input to it.


def identity(name, x):
  return x


PARTS = {
  "norm": lambda cfg, p, x, layer, ctx: families.of(cfg).norm(
    cfg, p, "pre_attn_norm", x
  ),
  "attention": lambda cfg, p, x, layer, ctx: layers.self_attention(
    cfg, p, x, layer, ctx, identity
  )[0],
  "mlp": lambda cfg, p, x, layer, ctx: layers.mlp(cfg, p, x, identity),
  "block": lambda cfg, p, x, layer, ctx: (
    families.of(cfg).Block(cfg).apply({"params": p}, x, layer, ctx, identity)[0]
  ),
}
MODULES = {"norm": "input_layernorm", "attention": "self_attn", "mlp": "mlp"}
NAMES = {
  "gemma2": MODULES,
  "gemma3": MODULES,
  "gpt2": {"norm": "ln_1", "attention": "attn", "mlp": "mlp"},
  "neox": MODULES | {"attention": "attention"},
  "llama": MODULES,
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def in_every_layer(part, cfg, blocks, x):
  positions = jnp.arange(x.shape[2])[None]
  ctx = layers.context(cfg, positions, x.dtype)

  def run(p, layer, x):
    return PARTS[part](cfg, p, x, layer, ctx)

  return jax.vmap(run)(blocks, layers.stacked(cfg), x)


@pytest.fixture(scope="module")
def parts(theirs, ours, tokens):
  """{part: its inputs and its outputs in Hugging Face, [L, B, T, D]}."""
  cfg = ours.config
  root = families.of(cfg).ROOT
  inner = {k: f".{name}" for k, name in NAMES[cfg.family].items()}
  names = {
    (part, which, l): f"{root}.{l}{module}.{which}"
    for part, module in (inner | {"block": ""}).items()
    for which in ("input", "output")
    for l in range(cfg.num_layers)
  }
  _, found = torch_run(theirs, tokens, names.values())
  return {
    part: [
      np.stack([found[names[part, w, l]] for l in range(cfg.num_layers)])
      for w in ("input", "output")
    ]
    for part in PARTS
  }


@pytest.mark.parametrize(
  ("part", "tolerance"),
  [("norm", 1e-6), ("attention", 1e-5), ("mlp", 1e-5), ("block", 1e-5)],
)
def test_each_part_of_a_block_equals_hugging_faces_module(
  ours, parts, part, tolerance
):
  x, expected = parts[part]
  got = in_every_layer(part, ours.config, ours.params["blocks"], x)
  errors = [relative(*pair) for pair in zip(got, expected, strict=True)]
  assert max(errors) < tolerance, errors


def rotate(theirs, q, positions, kind):
  """Queries [B, T, N, H] as Hugging Face turns them."""
  q = torch.tensor(q).transpose(1, 2)
  which = {"layer_type": kind} if kind else {}
  cos, sin = theirs.base_model.rotary_emb(q, torch.tensor(positions), **which)
  apply = sys.modules[type(theirs).__module__].apply_rotary_pos_emb
  return apply(q, q, cos, sin)[0].transpose(1, 2).numpy()


@pytest.mark.parametrize("preset", [x for x in TINY if x != "gpt2-tiny"])
def test_rotary_embeddings_equal_hugging_faces(preset):
  theirs, cfg = tiny(preset), families.PRESETS[preset]
  starts = np.array([[0], [100], [cfg.max_context - LENGTH]])
  positions = starts + np.arange(LENGTH)
  q = np.random.default_rng(0).normal(size=(3, LENGTH, 2, cfg.head_dim))
  q = q.astype(np.float32)
  ctx = layers.context(cfg, jnp.asarray(positions), jnp.float32)
  for is_global in set(cfg.layer_is_global):
    which = int(is_global)
    kind = None
    if preset == "gemma3-tiny":
      kind = ("sliding_attention", "full_attention")[which]
    expected = rotate(theirs, q, positions, kind)
    got = layers.rope(jnp.asarray(q), ctx.cos[which], ctx.sin[which])
    assert relative(got, expected) < 1e-6
    rest = slice(cfg.rope_dim, None)
    np.testing.assert_array_equal(got[..., rest], q[..., rest])


# Features that no preset has.


@pytest.mark.parametrize(
  ("preset", "there", "here"),
  [
    (
      "neox-tiny",
      {"use_parallel_residual": False},
      {"parallel_residual": False},
    ),
    (
      "neox-tiny",
      {
        "hidden_act": "gelu_new",
        "tie_word_embeddings": True,
        "rotary_pct": 0.5,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
      },
      {
        "activation": "gelu_tanh",
        "tied": True,
        "rotary_dim": 8,
        "rope_factor_global": 4.0,
      },
    ),
    (
      "llama-tiny",
      {"tie_word_embeddings": True, "num_key_value_heads": 1},
      {"tied": True, "num_kv_heads": 1},
    ),
    ("gpt2-tiny", {"n_inner": None}, {"mlp_width": 4 * 48}),
    (
      "gemma2-tiny",
      {"attn_logit_softcapping": None, "final_logit_softcapping": None},
      {"attn_softcap": None, "final_softcap": None},
    ),
  ],
  ids=["sequential", "neox", "llama", "gpt2", "gemma2"],
)
def test_features_that_no_preset_has_equal_hugging_faces(
  preset, there, here, tokens, save, one_device
):
  theirs = tiny(preset, **there)
  logits, expected = torch_sites(theirs, tokens)
  ours = models.load_model(save(theirs), mesh=one_device)
  assert ours.config == dataclasses.replace(families.PRESETS[preset], **here)
  got, found = ours.forward(tokens, capture=tuple(expected))
  assert distance(got, logits) < 1e-4
  errors = worst(found, expected)
  assert max(errors.values()) < 1e-4, errors
  assert len(errors) == ours.config.num_layers * len(sites.names(ours.config))


def same_parameters(directory, expected, mesh):
  got = models.load_model(directory, mesh=mesh)
  assert got.config == expected.config
  jax.tree.map(np.testing.assert_array_equal, got.params, expected.params)


def rewrite(directory, change):
  path = directory / "model.safetensors"
  safetensors.numpy.save_file(change(safetensors.numpy.load_file(path)), path)


def test_gpt2_without_a_head_prefix_or_with_old_buffers_is_the_same(
  save, one_device
):
  theirs = tiny("gpt2-tiny")
  expected = models.load_model(save(theirs), mesh=one_device)
  bare = save(theirs.transformer)

  def change(tensors):
    assert "h.0.ln_1.weight" in tensors
    old = {}
    for l in range(5):
      old[f"h.{l}.attn.bias"] = np.tri(256, dtype=np.float32)[None, None]
      old[f"h.{l}.attn.masked_bias"] = np.full((), -1e4, np.float32)
    return tensors | old

  same_parameters(bare, expected, one_device)
  rewrite(bare, change)
  same_parameters(bare, expected, one_device)


def test_neox_with_the_buffers_of_old_files_is_the_same(save, one_device):
  directory = save(tiny("neox-tiny"))
  expected = models.load_model(directory, mesh=one_device)

  def change(tensors):
    old = {}
    for l in range(5):
      here = f"gpt_neox.layers.{l}.attention."
      old[f"{here}bias"] = np.tri(256, dtype=bool)[None, None]
      old[f"{here}masked_bias"] = np.full((), -1e9, np.float32)
      old[f"{here}rotary_emb.inv_freq"] = np.ones(2, np.float32)
    return tensors | old

  rewrite(directory, change)
  same_parameters(directory, expected, one_device)
