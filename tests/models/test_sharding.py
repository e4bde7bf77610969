"""Meshes, rules and shards, on eight virtual devices."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from gemma_jax import models
from gemma_jax.models import families, random, sharding
from gemma_jax.models.families import PRESETS

PRESET = "gemma2-tiny"
CFG = PRESETS[PRESET]
CAPTURE = ("blocks.*.mlp_in", "blocks.3.attn_z", "blocks.2.resid_post")
SHAPES = families.shapes(CFG)


@pytest.fixture(scope="module")
def tokens():
  return np.random.default_rng(0).integers(4, 1000, (8, 40))


@pytest.fixture(scope="module")
def expected(one_device, tokens):
  model = models.load_model(f"random:{PRESET}", mesh=one_device)
  return model.params, *model.forward(tokens, capture=CAPTURE)


@pytest.mark.parametrize(
  "sizes",
  [
    (8, 1, 1),
    (2, 2, 2),
    pytest.param((1, 8, 1), marks=pytest.mark.slow),
    pytest.param((1, 2, 4), marks=pytest.mark.slow),
  ],
  ids=lambda s: "x".join(map(str, s)),
)
def test_eight_devices_give_what_one_gives_and_hold_only_their_part(
  sizes, tokens, expected
):
  params, logits, found = expected
  mesh = models.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))
  model = models.load_model(f"random:{PRESET}", mesh=mesh)
  flat = model.params | model.params["blocks"]
  for name, shape in SHAPES.items():
    x = flat[name]
    shards = x.addressable_shards
    assert len(shards) == 8
    for shard in shards:
      assert shard.data.shape == _part(name, shape, sizes), name
    np.testing.assert_array_equal(x, (params | params["blocks"])[name])
  got, sites = model.forward(tokens, capture=CAPTURE)
  np.testing.assert_allclose(got, logits, atol=1e-5, rtol=1e-5)
  for name in CAPTURE:
    np.testing.assert_allclose(sites[name], found[name], atol=1e-5, rtol=1e-5)
  # An odd batch cannot be split, and runs all the same.
  some, _ = model.forward(tokens[:3], capture=CAPTURE)
  np.testing.assert_allclose(some, logits[:3], atol=1e-5, rtol=1e-5)


def _part(name, shape, sizes):
  """Shape of one device's part, written down for each tensor by hand."""
  _, f, t = sizes
  kv = t if CFG.num_kv_heads % t == 0 else 1
  divisors = {
    "embed": (t, f),
    "q": (1, f, t, 1),
    "k": (1, f, kv, 1),
    "v": (1, f, kv, 1),
    "o": (1, t, 1, f),
    "gate": (1, f, t),
    "up": (1, f, t),
    "down": (1, t, f),
  }.get(name, (1,) * len(shape))
  return tuple(n // d for n, d in zip(shape, divisors, strict=True))


# Every family on the mesh that has all axes; all of them on one family.
@pytest.mark.parametrize(
  ("preset", "sizes"),
  [
    pytest.param(
      preset,
      sizes,
      marks=()
      if preset == "gemma3" or sizes == (2, 2, 2)
      else pytest.mark.slow,
    )
    for preset in ("gemma3", "gpt2", "neox", "llama")
    for sizes in ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2))
  ],
)
def test_every_family_runs_on_every_mesh(preset, sizes, tokens, one_device):
  """With 8 heads; a device holds 1/n of what is split, and what is not."""
  cfg = PRESETS[f"{preset}-tiny"]
  kv_heads = 2 if cfg.num_kv_heads < cfg.num_heads else 8
  cfg = dataclasses.replace(cfg, num_heads=8, num_kv_heads=kv_heads)
  params = random.init_quickly(cfg, jax.random.key(0))
  expected = _logits(cfg, params, tokens, one_device)
  mesh = models.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))
  places = {
    name: sharding.sharding(name, shape, mesh)
    for name, shape in families.shapes(cfg).items()
  }
  blocks = {name: places.pop(name) for name in params["blocks"]}
  params = jax.device_put(params, {**places, "blocks": blocks})
  held, split, whole = np.zeros(8), 0, 0
  for x in jax.tree.leaves(params):
    held += [shard.data.nbytes for shard in x.addressable_shards]
    if x.is_fully_replicated:
      whole += x.nbytes
    else:
      split += x.nbytes
  n = sizes[1] * sizes[2]
  assert (split > whole) == (n > 1)
  assert max(held) <= split / n + whole
  got = _logits(cfg, params, tokens, mesh)
  np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)


def _logits(cfg, params, tokens, mesh):
  with jax.set_mesh(mesh):
    logits, _ = jax.jit(models.forward, static_argnums=0)(
      cfg, params, sharding.put_batch(tokens, mesh)
    )
  return np.asarray(logits)


def test_a_batch_is_split_over_data_and_fsdp_on_its_way_in_and_out(tokens):
  mesh = models.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  put = sharding.put_batch(tokens, mesh)
  assert {s.data.shape for s in put.addressable_shards} == {(2, 40)}
  np.testing.assert_array_equal(put, tokens)
  model = models.load_model(f"random:{PRESET}", mesh=mesh, layers=1)
  _, found = model.forward(tokens, capture=CAPTURE[:1], stop_at=1)
  rows = {s.data.shape[1] for s in found[CAPTURE[0]].addressable_shards}
  assert rows == {2}


def test_most_of_a_model_is_nowhere_whole():
  """Shards of all tensors on one device, against all of the model."""
  mesh = models.make_mesh({"fsdp": 4, "tensor": 2})
  cfg = PRESETS["gemma2-2b"]
  here = sum(
    math.prod(sharding.sharding(name, shape, mesh).shard_shape(shape))
    for name, shape in families.shapes(cfg).items()
  )
  norms = (4 * cfg.num_layers + 1) * cfg.width
  assert here == (cfg.num_parameters() - norms) / 8 + norms


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 8}])
def test_every_preset_fits_the_meshes_of_a_host(preset, sizes):
  cfg, mesh = PRESETS[preset], models.make_mesh(sizes)
  for name, shape in families.shapes(cfg).items():
    part = sharding.sharding(name, shape, mesh).shard_shape(shape)
    if name in families.of(cfg).block(cfg):
      assert part[0] == cfg.num_layers


def test_every_rule_has_an_entry_for_each_dim_of_its_tensor():
  shapes = {}
  for preset in PRESETS:
    shapes |= families.shapes(PRESETS[preset])
  assert set(sharding.RULES) <= set(shapes)
  whole = set(shapes) - set(sharding.RULES)
  assert all(n.endswith(("norm", "bias")) for n in whole)
  for name, rule in sharding.RULES.items():
    assert len(rule.split()) == len(shapes[name])
    axes = [dim.split(":")[1] for dim in rule.split() if ":" in dim]
    assert len(axes) == len(set(axes))


# Meshes.


@pytest.mark.parametrize(
  ("sizes", "shape"),
  [
    (None, (8, 1, 1)),
    ({"data": -1}, (8, 1, 1)),
    ({"tensor": 2, "data": -1}, (4, 1, 2)),
    ({"fsdp": -1, "tensor": 4, "data": 2}, (2, 1, 4)),
    ({"tensor": 8}, (1, 1, 8)),
    ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
  ],
)
def test_a_mesh_has_three_axes_and_infers_what_is_left(sizes, shape):
  mesh = models.make_mesh(sizes)
  assert mesh.axis_names == ("data", "fsdp", "tensor")
  assert tuple(mesh.shape.values()) == shape
  assert mesh.axis_types == (AxisType.Auto,) * 3


def test_a_mesh_may_be_of_some_devices():
  mesh = models.make_mesh({"fsdp": -1}, jax.devices()[2:5])
  assert dict(mesh.shape) == {"data": 1, "fsdp": 3, "tensor": 1}
  assert set(mesh.devices.flat) == set(jax.devices()[2:5])


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ({"model": 2}, r"Unknown mesh axes \['model'\].*'data', 'fsdp', 'tensor'"),
    ({"data": 3}, "'data': 3.*of 3 devices; there are 8"),
    ({"data": 2, "tensor": 2}, "'tensor': 2.*of 4 devices; there are 8"),
    ({"data": 16}, "'data': 16.*of 16 devices; there are 8"),
    ({"data": -1, "tensor": 3}, "'tensor': 3.*of 3 devices; there are 8"),
    ({"data": -1, "tensor": 16}, "'tensor': 16.*of 16 devices; there are 8"),
    ({"data": -1, "fsdp": -1}, "at most one -1"),
    ({"data": 0}, "must be positive"),
    ({"data": -2}, "must be positive"),
  ],
)
def test_a_mesh_that_cannot_be_is_an_error_that_names_its_axes(sizes, message):
  with pytest.raises(ValueError, match=message):
    models.make_mesh(sizes)


@pytest.mark.parametrize(
  ("name", "devices", "axis", "dim", "size"),
  [
    ("q", 8, "tensor", "N", 4),
    ("gate", 5, "tensor", "F", 96),
    ("q", 5, "fsdp", "D", 48),
  ],
)
def test_an_axis_that_does_not_divide_a_dim_is_an_error_that_names_both(
  name, devices, axis, dim, size
):
  mesh = models.make_mesh({axis: devices}, jax.devices()[:devices])
  message = (
    f"{name} has {size} entries in dimension {dim}.*'{axis}' of {devices}"
  )
  with pytest.raises(ValueError, match=message):
    sharding.spec(name, SHAPES[name], mesh)


def test_a_model_that_a_mesh_does_not_divide_is_an_error_of_load_model():
  mesh = models.make_mesh({"tensor": 8})
  with pytest.raises(ValueError, match=r"q has 4 entries.*'tensor' of 8"):
    models.load_model(f"random:{PRESET}", mesh=mesh)


@pytest.mark.parametrize(
  "mesh",
  [
    lambda: jax.make_mesh((8,), ("x",)),
    lambda: jax.make_mesh(
      (8, 1, 1), sharding.AXES, axis_types=(AxisType.Explicit,) * 3
    ),
  ],
)
def test_a_mesh_of_another_kind_is_refused_before_loading(mesh):
  with pytest.raises(ValueError, match=r"Make it with models\.make_mesh"):
    models.load_model(f"random:{PRESET}", mesh=mesh())


def test_what_is_replicated_is_said(caplog):
  mesh = models.make_mesh({"data": 2, "tensor": 4})
  with caplog.at_level("INFO", logger="gemma_jax"):
    models.load_model(f"random:{PRESET}", mesh=mesh)
  said = [r.getMessage() for r in caplog.records]
  assert "k: dimension K (2) is replicated over 'tensor' (4)" in said
  assert "v: dimension K (2) is replicated over 'tensor' (4)" in said
  assert not any(s.startswith(("q:", "embed:")) for s in said)


def test_key_value_heads_and_vocabulary_replicate_where_they_must():
  mesh = models.make_mesh({"tensor": 3}, jax.devices()[:3])
  assert sharding.spec("k", (5, 48, 2, 16), mesh) == P(None, "fsdp", None, None)
  assert sharding.spec("v", (5, 48, 3, 16), mesh)[2] == "tensor"
  assert sharding.spec("embed", (1000, 48), mesh) == P(None, "fsdp")
  assert sharding.spec("embed", (999, 48), mesh) == P("tensor", "fsdp")
