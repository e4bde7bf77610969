"""Selection of active pairs against a sort; the sparse step against dense."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.dictionaries import core, pairs
from gemma_jax.dictionaries.presets import PRESETS, preset
from tests.dictionaries import cases
from tests.dictionaries.cases import M, run

pytestmark = pytest.mark.usefixtures("quick_compiles")

per_row = jax.jit(pairs.per_row, static_argnums=2)
per_batch = jax.jit(pairs.per_batch, static_argnums=2)


def make_z(rows, width, positive=0.5, seed=0):
  """About that share of it is positive."""
  rng = np.random.default_rng(seed)
  size = rng.exponential(size=(rows, width)) + 0.01
  sign = np.where(rng.random(size=size.shape) < positive, 1, -1)
  return (size * sign).astype(np.float32)


def as_dense(found, shape):
  """The list of pairs as an array; no pair is there twice."""
  row, latent, value = map(np.asarray, found[:3])
  there = value > 0
  out = np.zeros(shape, np.float32)
  np.add.at(out, (row[there], latent[there]), value[there])
  assert (out > 0).sum() == there.sum()
  # What sums along the list skip must hold nothing.
  assert not there[int(found.count) :].any()
  return out


# Widths of less than one chunk, of several, and of parts of one; more pairs
# than one block holds; more that fill up a chunk than there is room for.
@pytest.mark.parametrize(
  ("rows", "width", "most"),
  [(5, 7, 3), (40, 40, 16), (9, 48, 48), (40, 3, 3)],
)
@pytest.mark.parametrize("positive", [0.03, 0.5, 1.0])
@pytest.mark.parametrize("which", ["topk", "batchtopk"])
def test_exactly_the_largest_positive_values_are_listed(
  which, positive, rows, width, most
):
  z = make_z(rows, width, positive)
  select = per_row if which == "topk" else per_batch
  for k in {1, 2, most // 2, most}:
    found = select(jnp.asarray(z), jnp.asarray(k, jnp.float32), most)
    expected = np.where(cases.kept(z, k, which), z, 0)
    np.testing.assert_array_equal(as_dense(found, z.shape), expected)
    counts = np.asarray(pairs.fired(found, width))
    np.testing.assert_array_equal(counts, (expected > 0).sum(0))


def test_the_largest_of_a_batch_may_lie_in_one_row_or_one_chunk():
  z = make_z(10, 64)
  z[4, :32] += 100
  found = per_batch(jnp.asarray(z), jnp.asarray(3.0), 3)
  got = as_dense(found, z.shape)
  assert (got[4, :32] > 0).sum() == 30 == (got > 0).sum()
  np.testing.assert_array_equal(got, np.where(z >= np.sort(z[4])[-30], z, 0))


@pytest.mark.parametrize("positive", [0, 3])
def test_a_batch_with_hardly_a_positive_value_gives_what_there_is(positive):
  z = np.full((10, 40), -1, np.float32)
  z.flat[[7, 100, 333][:positive]] = [1, 2, 3][:positive]
  for select in (per_row, per_batch):
    found = select(jnp.asarray(z), jnp.asarray(4.0), 4)
    np.testing.assert_array_equal(as_dense(found, z.shape), np.maximum(z, 0))


def test_of_equal_values_in_a_row_the_first_are_kept():
  z = np.random.default_rng(0).integers(0, 3, (20, 100)).astype(np.float32)
  found = per_row(jnp.asarray(z), jnp.asarray(40.0), 40)
  values, index = jax.lax.top_k(z, 40)
  expected = np.zeros_like(z)
  np.put_along_axis(expected, np.asarray(index), np.asarray(values), axis=1)
  np.testing.assert_array_equal(as_dense(found, z.shape), expected)


def test_k_below_one_in_the_whole_batch_keeps_the_largest():
  z = make_z(10, 40)
  found = per_batch(jnp.asarray(z), jnp.asarray(0.01), 0.01)
  expected = np.where(z == z.max(), z, 0)
  np.testing.assert_array_equal(as_dense(found, z.shape), expected)


def test_a_decoder_row_of_zeros_is_ranked_last_and_breaks_nothing():
  cfg = cases.make_config("topk")
  recipe = cases.make_recipe(rank_by_norm=True)
  params = cases.make_params(cfg)
  params["W_dec"] = params["W_dec"].at[0].set(0)
  args = params, cases.make_state(cfg), cases.make_batch(cfg)
  hyper = core.hyper(cfg, recipe)
  found = [
    core.loss(cfg, recipe, *args, hyper, sparse=sparse)[0]
    for sparse in (True, False)
  ]
  np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


# ------------------------------------------------- sparse and dense training
def same(cfg, recipe, *, raised=0.0, tolerance=1e-5, **hyper):
  """Loss, gradients, state and metrics agree; returns state and metrics."""
  params = cases.make_params(cfg)
  params["b_enc"] = params["b_enc"] + raised
  args = params, cases.make_state(cfg), cases.make_batch(cfg)
  sparse, dense = (
    run(cfg, recipe, *args, sparse=way, **hyper) for way in (True, False)
  )
  assert sparse[0] == pytest.approx(dense[0], rel=tolerance)
  cases.close(sparse[1], dense[1], tolerance)
  np.testing.assert_array_equal(sparse[2].since_fired, dense[2].since_fired)
  assert float(sparse[2].threshold) == pytest.approx(
    float(dense[2].threshold), rel=tolerance
  )
  assert sparse[3].keys() == dense[3].keys()
  for name, value in dense[3].items():
    assert sparse[3][name] == pytest.approx(value, rel=tolerance)
  return sparse[2:]


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
@pytest.mark.parametrize(("width", "prefixes"), [(40, (40,)), (M, (4, 12, M))])
def test_the_sparse_step_is_the_dense_one(activation, width, prefixes):
  cfg = cases.make_config(
    activation, k=15, width=width, prefix_widths=prefixes, skip=True
  )
  recipe = cases.make_recipe(aux_coefficient=1.0, aux_k=3, dead_after=100)
  counts = set()
  # 600 pairs, more than a block; and k below the largest that is possible.
  for k in (15, 2, 7.26 if activation == "batchtopk" else 1):
    _, metrics = same(cfg, recipe, k=k)
    assert metrics["aux_loss"] > 0
    counts.add(float(metrics["l0"]))
  assert len(counts) == 3


@pytest.mark.parametrize(
  ("name", "activation"),
  [
    # Of a system with both, BatchTopK always runs.
    pytest.param(
      name,
      activation,
      marks=pytest.mark.slow
      if activation == "topk" and "batchtopk" in recipes
      else (),
    )
    for name, recipes in PRESETS.items()
    for activation in ("topk", "batchtopk")
    if activation in recipes
  ],
)
def test_the_sparse_step_is_the_dense_one_for_every_preset(name, activation):
  changes = {"aux_coefficient": 0.5, "threshold_start": 0}
  if PRESETS[name][activation].get("dead_after_steps") is None:
    changes["dead_after"] = 100
  else:
    changes["dead_after_steps"] = 1
  recipe = preset(name, activation, changes)
  make = cases.make_config if "transcoder" in name else cases.make_sae
  cfg = make(
    activation,
    prefix_widths=(4, 12, M),
    layer_norm=recipe.layer_norm,
    skip="transcoder" in name,
  )
  state, metrics = same(cfg, recipe)
  assert metrics["aux_loss"] > 0
  assert metrics["l0"] == 3
  if activation == "batchtopk":
    assert float(state.threshold) > 0


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_the_sparse_step_is_the_dense_one_with_few_positive_values(activation):
  cfg = cases.make_config(activation, k=8)
  _, metrics = same(cfg, cases.make_recipe(), raised=-1.5)
  assert 0 < metrics["l0"] < 5


def test_terms_that_need_all_activations_are_never_sparse():
  cfg = cases.make_config("topk")
  recipe = cases.make_recipe(sparsity="l1")
  _, metrics = same(cfg, recipe, sparsity=0.5)
  assert metrics["sparsity_loss"] > 0
