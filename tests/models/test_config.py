"""`ModelConfig`: what it counts and refuses, and its presets."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from gemma_jax.models import gemma, layers, random, tables
from gemma_jax.models.families import (
  PRESETS,
  from_hf_config,
  to_hf_config,
)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_survives_the_way_to_hugging_face_and_back(preset):
  contents = json.loads(json.dumps(to_hf_config(PRESETS[preset])))
  assert from_hf_config(contents) == PRESETS[preset]


@pytest.mark.parametrize(
  ("preset", "parameters"),
  [
    # As the model cards' safetensors metadata counts them.
    ("gemma2-2b", 2_614_341_888),
    ("gemma2-9b", 9_241_705_984),
    ("gemma2-27b", 27_227_128_320),
    ("gemma3-270m", 268_098_176),
    ("gemma3-1b", 999_885_952),
  ],
)
def test_presets_have_as_many_parameters_as_the_released_models(
  preset, parameters
):
  assert PRESETS[preset].num_parameters() == parameters


@pytest.mark.parametrize("preset", ["gemma2-tiny", "gemma3-tiny"])
def test_parameters_are_counted_as_they_are_made(preset):
  cfg = PRESETS[preset]
  shapes = jax.eval_shape(lambda key: random.init(cfg, key), jax.random.key(0))
  assert cfg.num_parameters() == sum(x.size for x in jax.tree.leaves(shapes))
  per_block = sum(x.size for x in jax.tree.leaves(shapes["blocks"]))
  per_block //= cfg.num_layers
  assert cfg.num_parameters(3) - cfg.num_parameters(1) == 2 * per_block


def test_flops_are_those_that_the_compiler_counts():
  cfg = dataclasses.replace(
    PRESETS["gemma3-tiny"], width=256, mlp_width=1024, head_dim=64
  )
  length = 128
  p = {
    name: jax.ShapeDtypeStruct(shape, jnp.float32)
    for name, shape in tables.shapes(gemma.block(cfg), cfg).items()
  }
  x = jax.ShapeDtypeStruct((1, length, cfg.width), jnp.float32)

  def block(p, x):
    layer = jax.tree.map(lambda a: a[0], layers.stacked(cfg))
    ctx = layers.context(cfg, jnp.arange(length)[None], jnp.float32)
    site = lambda name, value: value  # noqa: E731
    return gemma.Block(cfg).apply({"params": p}, x, layer, ctx, site)

  counted = jax.jit(block).lower(p, x).cost_analysis()["flops"]
  ours = cfg.flops_per_token(1, length, unembed=False) * length
  # The compiler also counts norms, softmax and GELU.
  assert 0.95 < ours / counted < 1
  head = cfg.flops_per_token(1, length, unembed=True) * length - ours
  assert head == 2 * length * cfg.width * cfg.vocab_size


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"num_kv_heads": 3}, r"num_heads=4.*num_kv_heads=3"),
    ({"layer_is_global": (True, False)}, "2 entries for 5 layers"),
    (
      {"rotary_dim": 18},
      "rotary_dim=18 must be an integer of 0 to head_dim=16",
    ),
    ({"rotary_dim": -2}, "rotary_dim=-2 must be"),
    ({"rotary_dim": 4.0}, r"rotary_dim=4\.0 must be"),
    ({"rotary_dim": 5}, "rotary_dim=5 and head_dim=16 must be even"),
    ({"rotary_dim": None, "head_dim": 15}, "rotary_dim=15 and head_dim=15"),
    ({"rotary_dim": 4, "head_dim": 15}, "rotary_dim=4 and head_dim=15"),
    ({"norm_eps": None}, "norm_eps=None must be a positive number"),
    ({"query_scale": None}, "query_scale=None"),
    ({"rope_theta_global": None}, "rope_theta_global=None"),
    ({"bos_id": 2.0}, r"bos_id=2\.0.*integers from 0"),
    ({"pad_id": -1}, "pad_id=-1"),
    ({"eos_ids": (1, -1)}, r"eos_ids=\(1, -1\)"),
    ({"eos_ids": (True,)}, r"eos_ids=\(True,\)"),
    ({"eos_ids": ()}, r"eos_ids=\(\) must be a tuple"),
    ({"eos_ids": [1]}, r"eos_ids=\[1\] must be a tuple"),
  ],
)
def test_a_config_that_cannot_be_is_refused(changes, message):
  cfg = dataclasses.replace(PRESETS["gemma2-tiny"], rotary_dim=None)
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(cfg, **changes)


def test_soft_caps_may_be_none_and_heads_without_rope_odd():
  cfg = dataclasses.replace(
    PRESETS["gemma2-tiny"],
    attn_softcap=None,
    final_softcap=None,
    rotary_dim=0,
    head_dim=15,
  )
  assert cfg.rotary_dim == 0
