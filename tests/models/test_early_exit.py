"""What stopping early costs, by XLA's own accounts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from gemma_jax import models
from gemma_jax.models import families

LAYERS = 8


def lowered(cfg, stop_at, unroll, length=64):
  params = abstract(cfg)
  tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
  run = functools.partial(
    models.forward,
    cfg,
    stop_at=stop_at,
    unroll=unroll,
    capture={f"blocks.{stop_at - 1}.resid_post": models.reduce.mean()}
    if stop_at
    else (),
  )
  return jax.jit(run).lower(params, tokens)


def abstract(cfg):
  family = families.of(cfg)
  shapes = {
    name: jax.ShapeDtypeStruct(shape, jnp.float32)
    for name, shape in families.shapes(cfg).items()
  }
  blocks = {name: shapes.pop(name) for name in family.block(cfg)}
  return {**shapes, "blocks": blocks}


def deep(preset, layers):
  cfg = models.PRESETS[preset]
  local = cfg.window is not None
  return dataclasses.replace(
    cfg,
    num_layers=layers,
    layer_is_global=tuple(not local or l % 3 == 2 for l in range(layers)),
  )


@pytest.mark.parametrize(
  "preset",
  [
    "gemma3-tiny",
    pytest.param("gpt2-tiny", marks=pytest.mark.slow),
    pytest.param("neox-tiny", marks=pytest.mark.slow),
  ],
)
def test_stopping_costs_its_share_of_the_blocks(preset):
  """Unrolled, because XLA counts the body of a scan once."""
  cfg = deep(preset, LAYERS)

  def flops(stop_at):
    return lowered(cfg, stop_at, True).compile().cost_analysis()["flops"]

  whole = flops(LAYERS)
  for stop_at in (2, 4, 7):
    share = flops(stop_at) / whole
    assert share == pytest.approx(stop_at / LAYERS, rel=0.03)


@pytest.mark.parametrize("preset", ["gemma3-tiny", "gpt2-tiny"])
def test_what_is_compiled_does_not_grow_with_depth(preset):
  """The number of operations of the program, which XLA's time goes by."""

  def operations(layers, stop_at):
    cfg = deep(preset, layers)
    return lowered(cfg, stop_at, False).as_text().count(" = ")

  assert operations(12, 12) == operations(48, 48) == operations(48, 20)
  assert operations(12, 4) < 1.1 * operations(48, 4)


def test_a_part_of_the_layers_is_not_a_copy_of_their_parameters():
  """Beyond the arguments, a numbered capture needs less than three layers."""
  cfg = dataclasses.replace(
    deep("gemma3-tiny", LAYERS), width=256, mlp_width=2048
  )
  params = abstract(cfg)
  size = sum(4 * x.size for x in jax.tree.leaves(params["blocks"]))

  def needs(stop_at, **kwargs):
    run = functools.partial(models.forward, cfg, stop_at=stop_at, **kwargs)
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    compiled = jax.jit(run).lower(params, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert needs(LAYERS, capture=("blocks.6.resid_post",)) < 3 * size / LAYERS
  assert needs(7, capture=("blocks.*.resid_post",)) < 3 * size / LAYERS
