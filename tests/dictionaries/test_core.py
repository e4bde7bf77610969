"""Reconstruction, counters, thresholds: against NumPy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.dictionaries import core
from gemma_jax.dictionaries.core.objective import FAR
from tests.dictionaries import cases
from tests.dictionaries.cases import B, D, E, M, f64, run

pytestmark = pytest.mark.usefixtures("quick_compiles")

SELECTING = ("topk", "batchtopk")
PREFIXES = (4, 12, M)


def normalised(norm, batch):
  norm = f64(norm)
  x = (f64(batch["x"]) - norm.x_mean) @ norm.x_map
  return x, (f64(batch["y"]) - norm.y_mean) / norm.y_scale


@pytest.mark.parametrize(
  ("activation", "skip"), [("topk", False), ("batchtopk", True)]
)
def test_forward_and_loss_are_those_of_the_sort(activation, skip):
  cfg = cases.make_config(activation, skip=skip, prefix_widths=PREFIXES)
  recipe = cases.make_recipe(loss="mean")
  for seed in range(3):
    norm = cases.make_norm(cfg, seed)
    params, batch = cases.make_params(cfg, seed), cases.make_batch(cfg, seed)
    x, y = normalised(norm, batch)
    p = f64(params)
    z = x @ p["W_enc"] + p["b_enc"]
    acts = np.where(cases.kept(z, 3, activation), z, 0)
    fvus = [np.mean((y - r) ** 2) for r in cases.recs(cfg, p, x, acts)]
    state = cases.make_state(cfg, norm)
    for sparse in (True, False):
      loss, _, _, metrics = run(
        cfg, recipe, params, state, batch, sparse=sparse
      )
      assert loss == pytest.approx(np.mean(fvus), rel=1e-5)
      assert metrics["loss"] == pytest.approx(np.mean(fvus), rel=1e-5)
      assert metrics["l0"] == pytest.approx((acts > 0).sum() / B)
      size = float(norm.y_variance)
      assert metrics["fvu"] == pytest.approx(fvus[-1] / size, rel=1e-5)
      assert metrics["fvu_smallest_prefix"] == pytest.approx(
        fvus[0] / size, rel=1e-5
      )


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "relu"])
def test_gradients_are_those_of_finite_differences(activation):
  cfg = cases.make_config(activation, skip=True, prefix_widths=PREFIXES)
  recipe = cases.make_recipe(loss="mean")
  norm = cases.make_norm(cfg)
  params, batch = cases.make_params(cfg), cases.make_batch(cfg)
  x, y = normalised(norm, batch)
  p = f64(params)
  z = x @ p["W_enc"] + p["b_enc"]
  keep = z > 0 if activation == "relu" else cases.kept(z, 3, activation)

  def value(p):
    acts = np.where(keep, x @ p["W_enc"] + p["b_enc"], 0)
    errors = [np.mean((y - r) ** 2) for r in cases.recs(cfg, p, x, acts)]
    return np.mean(errors)

  state = cases.make_state(cfg, norm)
  loss, gradients, _, _ = run(cfg, recipe, params, state, batch)
  assert loss == pytest.approx(value(p), rel=1e-5)
  cases.close(gradients, cases.slopes(value, params))


@pytest.mark.parametrize("read", ["a", "b"])
def test_only_an_sae_reads_what_is_left_of_the_decoder_bias(read):
  cfg = cases.make_sae("relu", read=read, write="a")
  recipe = cases.make_recipe(subtract_b_dec=True)
  params, batch = cases.make_params(cfg), cases.make_batch(cfg)
  x, y = f64(batch["x"]), f64(batch["y"])

  def value(p):
    read_in = x - p["b_dec"] if read == "a" else x
    acts = np.maximum(read_in @ p["W_enc"] + p["b_enc"], 0)
    return np.sum((y - acts @ p["W_dec"] - p["b_dec"]) ** 2) / B

  state = cases.make_state(cfg)
  loss, gradients, _, _ = run(cfg, recipe, params, state, batch)
  assert loss == pytest.approx(value(f64(params)), rel=1e-5)
  cases.close(gradients, cases.slopes(value, params))


def test_an_encoder_bias_that_is_not_trained_gets_no_gradient():
  cfg = cases.make_config("relu")
  args = cases.make_params(cfg), cases.make_state(cfg), cases.make_batch(cfg)
  _, free, _, _ = run(cfg, cases.make_recipe(), *args)
  recipe = cases.make_recipe(train_b_enc=False)
  _, fixed, _, _ = run(cfg, recipe, *args)
  assert np.abs(free["b_enc"]).min() > 0
  np.testing.assert_array_equal(fixed.pop("b_enc"), 0)
  cases.close(fixed, {name: free[name] for name in fixed}, 1e-6)


def test_layer_norm_trains_on_tokens_of_mean_0_and_deviation_1():
  cfg = cases.make_sae("relu", layer_norm=True)
  recipe = cases.make_recipe(subtract_b_dec=True)
  params, batch = cases.make_params(cfg), cases.make_batch(cfg)
  batch = {name: 5 * x + 3 for name, x in batch.items()}
  raw, p = f64(batch["x"]), f64(params)
  mean, std = raw.mean(1, keepdims=True), raw.std(1, keepdims=True, ddof=1)
  x = (raw - mean) / (std + 1e-5)
  acts = np.maximum((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"], 0)
  left = x - acts @ p["W_dec"] - p["b_dec"]
  loss, _, _, _ = run(cfg, recipe, params, cases.make_state(cfg), batch)
  assert loss == pytest.approx(np.sum(left**2) / B, rel=1e-5)
  got = f64(core.centre_tokens(batch["x"]))
  for ours, theirs in zip(got, (x, mean, std), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_factors_in_bfloat16_are_rounded_and_sums_are_not():
  cfg = cases.make_config("relu")
  params, x = cases.make_params(cfg), cases.make_batch(cfg)["x"]
  rounded = [
    np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (x, params["W_enc"])
  ]
  expected = rounded[0] @ rounded[1] + f64(params["b_enc"])
  z = core.pre_activations(params, x, "bfloat16")
  assert z.dtype == jnp.float32
  np.testing.assert_allclose(z, expected, rtol=1e-5, atol=1e-5)
  plain = core.pre_activations(params, x)
  assert np.abs(np.asarray(z - plain)).max() > 1e-3


# ---------------------------------------------------------------- counters
def test_tokens_since_a_latent_fired_are_counted():
  cfg = cases.make_config("topk")
  recipe = cases.make_recipe(dead_after=100)
  params, batch = cases.make_params(cfg), cases.make_batch(cfg)
  # One that never can, so that both cases are there.
  params["b_enc"] = params["b_enc"].at[0].set(-1e6)
  p = f64(params)
  z = f64(batch["x"]) @ p["W_enc"] + p["b_enc"]
  fired = cases.kept(z, 3, "topk").any(0)
  assert fired.any()
  assert not fired[0]
  state = cases.make_state(cfg)
  before = np.asarray(state.since_fired)
  for n in (1, 2):
    _, _, state, metrics = run(cfg, recipe, params, state, batch)
    expected = np.where(fired, 0, before + n * B)
    np.testing.assert_array_equal(state.since_fired, expected)
    assert metrics["dead_fraction"] == pytest.approx(np.mean(expected >= 100))
    assert int(state.steps) == n


def test_the_count_does_not_wrap_around():
  cfg = cases.make_config("topk")
  recipe = cases.make_recipe(dead_after=100)
  params = cases.make_params(cfg)
  params["b_enc"] = params["b_enc"] - 1e6
  state = cases.make_state(cfg, since=np.full(M, FAR - 1))
  for _ in range(2):
    _, _, state, _ = run(cfg, recipe, params, state, cases.make_batch(cfg))
  np.testing.assert_array_equal(state.since_fired, FAR)


def test_dead_may_be_counted_in_steps():
  cfg = cases.make_config("topk")
  recipe = cases.make_recipe(dead_after_steps=2)
  params = cases.make_params(cfg)
  params["b_enc"] = params["b_enc"] - 1e6
  state = cases.make_state(cfg, since=np.zeros(M))
  dead = []
  for _ in range(3):
    _, _, state, metrics = run(
      cfg, recipe, params, state, cases.make_batch(cfg)
    )
    dead.append(float(metrics["dead_fraction"]))
  assert dead == [0, 0, 1]  # more than two steps without firing


# --------------------------------------------------------------- threshold
@pytest.mark.parametrize("by_norm", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_the_threshold_starts_at_its_first_value_and_then_averages(
  sparse, by_norm
):
  cfg = cases.make_config()
  recipe = cases.make_recipe(
    threshold_decay=0.9, threshold_start=1, rank_by_norm=by_norm
  )
  params = cases.make_params(cfg)
  p = f64(params)
  norms = np.linalg.norm(p["W_dec"], axis=1) if by_norm else 1
  state, expected = cases.make_state(cfg), -1.0
  for seed in range(4):
    batch = cases.make_batch(cfg, seed)
    z = (f64(batch["x"]) @ p["W_enc"] + p["b_enc"]) * norms
    least = z[cases.kept(z, 3, "batchtopk")].min()
    if seed == 1:
      expected = least
    elif seed > 1:
      expected = 0.9 * expected + 0.1 * least
    _, _, state, _ = run(cfg, recipe, params, state, batch, sparse=sparse)
    assert float(state.threshold) == pytest.approx(expected, rel=1e-5)


def test_a_threshold_may_rise_from_0_and_stays_where_nothing_fires():
  cfg = cases.make_config()
  recipe = cases.make_recipe(threshold_decay=0.9, threshold_from_zero=True)
  params, batch = cases.make_params(cfg), cases.make_batch(cfg)
  p = f64(params)
  z = f64(batch["x"]) @ p["W_enc"] + p["b_enc"]
  least = z[cases.kept(z, 3, "batchtopk")].min()
  random = dataclasses.replace(recipe, init="random")
  _, state = core.init(cfg, random, jax.random.key(0), cases.identity(cfg))
  assert float(state.threshold) == 0
  _, _, state, _ = run(cfg, recipe, params, state, batch)
  assert float(state.threshold) == pytest.approx(0.1 * least, rel=1e-5)
  params["b_enc"] = params["b_enc"] - 1e6
  _, _, after, _ = run(cfg, recipe, params, state, batch)
  assert float(after.threshold) == float(state.threshold)


# ------------------------------------------------------- selection, decoding
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("most", [0.01, 7.26])
def test_batchtopk_keeps_the_whole_part_of_k_times_the_batch(most, sparse):
  cfg = cases.make_config(k=most)
  params = cases.make_params(cfg)
  params["b_enc"] = params["b_enc"] + 10  # all positive
  args = params, cases.make_state(cfg), cases.make_batch(cfg)
  recipe = cases.make_recipe()
  for k in (0.01, 0.5, 3, 7.26):
    if k <= most:
      _, _, _, metrics = run(cfg, recipe, *args, sparse=sparse, k=k)
      assert round(float(metrics["l0"]) * B) == max(1, int(k * B))


@pytest.mark.parametrize("activation", SELECTING)
def test_k_falls_to_its_value_in_a_line(activation):
  cfg = cases.make_config(activation, k=2)
  recipe = cases.make_recipe(k_start=10, k_anneal=4)
  params = cases.make_params(cfg)
  params["b_enc"] = params["b_enc"] + 10
  for steps, k in ((0, 10), (1, 8), (3, 4), (4, 2), (9, 2)):
    state = cases.make_state(cfg, steps=steps)
    for sparse in (False, True):
      _, _, _, metrics = run(
        cfg, recipe, params, state, cases.make_batch(cfg), sparse=sparse
      )
      assert float(metrics["l0"]) == k


def test_topk_keeps_k_of_each_token_and_no_negative_one():
  cfg = cases.make_config("topk")
  z = np.random.default_rng(0).normal(size=(B, M)).astype(np.float32)
  z[:2] = -1
  z[1, 5] = 2
  acts = np.asarray(core.select(cfg, {}, jnp.asarray(z)))
  expected = np.where(cases.kept(z, 3, "topk"), z, 0)
  np.testing.assert_array_equal(acts, expected)
  assert list((acts > 0).sum(1)[:3]) == [0, 1, 3]


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu"])
def test_a_trained_dictionary_fires_above_its_thresholds(activation):
  cfg = cases.make_config(activation)
  z = np.random.default_rng(0).normal(size=(B, M)).astype(np.float32)
  theta = np.linspace(0, 1, M, dtype=np.float32)
  z[0] = theta  # at the threshold is not above it
  acts = core.select(cfg, {"threshold": theta}, jnp.asarray(z))
  np.testing.assert_array_equal(acts, np.where(z > theta, z, 0))


def test_a_gate_says_what_fires_and_a_magnitude_how_much():
  cfg = cases.make_config("gated")
  params = cases.make_params(cfg)
  x, p = f64(cases.make_batch(cfg)["x"]), f64(params)
  pi = x @ p["W_enc"]
  magnitude = np.maximum(np.exp(p["r_mag"]) * pi + p["b_mag"], 0)
  expected = np.where(pi + p["b_enc"] > 0, magnitude, 0)
  z = core.pre_activations(params, jnp.asarray(x, jnp.float32))
  acts = core.select(cfg, params, z)
  assert (np.asarray(z) > 0).sum() > (expected > 0).sum() > 100
  np.testing.assert_allclose(acts, expected, atol=1e-5)


@pytest.mark.parametrize("skip", [False, True])
def test_every_prefix_is_the_dictionary_of_its_first_latents(skip):
  cfg = cases.make_config(skip=skip, prefix_widths=PREFIXES)
  params, x = cases.make_params(cfg), cases.make_batch(cfg)["x"]
  z = core.pre_activations(params, x)
  acts = jnp.maximum(z, 0)
  recs = core.decode_prefixes(cfg, params, x, acts)
  for width, rec in zip(PREFIXES, recs, strict=True):
    small = cases.make_config(skip=skip, width=width, prefix_widths=(width,))
    cut = params | {"W_dec": params["W_dec"][:width]}
    (alone,) = core.decode_prefixes(small, cut, x, acts[:, :width])
    np.testing.assert_allclose(rec, alone, atol=2e-5)


# -------------------------------------------------------------- constraints
def test_projected_gradients_do_not_change_the_norm_of_a_row():
  cfg = cases.make_config()
  params = cases.make_params(cfg)
  gradients = cases.make_params(cfg, 1)
  for decoder in ("unit_after_step", "unit_before_step"):
    recipe = cases.make_recipe(decoder=decoder)
    got = f64(core.project(recipe, params, gradients))
    rows, g = f64(params["W_dec"]), f64(gradients["W_dec"])
    share = np.sum(g * rows, 1, keepdims=True) / np.sum(
      rows**2, 1, keepdims=True
    )
    np.testing.assert_allclose(got["W_dec"], g - share * rows, atol=1e-6)
    for name in ("W_enc", "b_enc", "b_dec"):
      np.testing.assert_array_equal(got[name], gradients[name])
  free = core.project(cases.make_recipe(), params, gradients)
  np.testing.assert_array_equal(free["W_dec"], gradients["W_dec"])


def test_constraints_make_rows_unit_and_thresholds_positive():
  cfg = cases.make_config("jumprelu")
  params = cases.make_params(cfg)
  params["threshold"] = params["threshold"].at[0].set(-0.5)
  free = core.constrain(cases.make_recipe(), params)
  np.testing.assert_array_equal(free["W_dec"], params["W_dec"])
  assert float(free["threshold"][0]) == 0
  np.testing.assert_array_equal(free["threshold"][1:], params["threshold"][1:])
  recipe = cases.make_recipe(decoder="unit_after_step", log_threshold=True)
  unit = core.constrain(recipe, params)
  norms = np.linalg.norm(unit["W_dec"], axis=1)
  np.testing.assert_allclose(norms, 1, rtol=1e-6)
  lengths = np.linalg.norm(params["W_dec"], axis=1, keepdims=True)
  np.testing.assert_allclose(
    unit["W_dec"] * lengths, params["W_dec"], atol=1e-6
  )
  # Its logarithm may be negative.
  np.testing.assert_array_equal(unit["threshold"], params["threshold"])


@pytest.mark.parametrize("activation", SELECTING)
def test_steps_along_the_gradient_lower_the_loss(activation):
  cfg = cases.make_config(activation, prefix_widths=PREFIXES)
  recipe = cases.make_recipe(loss="mean")
  params, state = cases.make_params(cfg), cases.make_state(cfg)
  batch = cases.make_batch(cfg)
  first = run(cfg, recipe, params, state, batch)[0]
  for _ in range(60):
    last, gradient, _, _ = run(cfg, recipe, params, state, batch)
    params = jax.tree.map(
      lambda p, g: p - jnp.asarray(0.1 * g, jnp.float32), params, gradient
    )
  assert last < 0.7 * first


# ------------------------------------------------------------------- errors
@pytest.mark.parametrize(
  ("activation", "changes", "message"),
  [
    ("relu", {"sparsity": "l0"}, "sparsity 'l0' needs activation jumprelu"),
    ("topk", {"sparsity": "target_l0"}, "needs activation jumprelu; this is"),
    ("relu", {"multi_topk": 0.1}, "multi_topk needs activation topk or batch"),
    (
      "topk",
      {"pre_activation_coefficient": 0.1},
      "pre_activation_coefficient needs activation jumprelu",
    ),
  ],
)
def test_a_recipe_that_does_not_suit_the_activation_is_refused(
  activation, changes, message
):
  cfg = cases.make_config(activation)
  recipe = cases.make_recipe(**changes)
  args = cases.make_params(cfg), cases.make_state(cfg), cases.make_batch(cfg)
  with pytest.raises(ValueError, match=message):
    run(cfg, recipe, *args)


def test_an_aim_for_l0_needs_k():
  cfg = cases.make_config("jumprelu", k=None)
  recipe = cases.make_recipe(sparsity="target_l0")
  args = cases.make_params(cfg), cases.make_state(cfg), cases.make_batch(cfg)
  with pytest.raises(ValueError, match="sparsity 'target_l0' needs k"):
    run(cfg, recipe, *args)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"activation": "l1"}, "expected one of relu, gated, topk, batchtopk"),
    ({"k": None}, "'batchtopk' needs k"),
    ({"k": 0}, r"k=0 must be in \(0, 24\]"),
    ({"k": 25}, r"k=25 must be in \(0, 24\]"),
    ({"k": 2.5, "activation": "topk"}, "must be whole"),
    ({"prefix_widths": (4, 12)}, "end at the width, 24"),
    ({"prefix_widths": (12, 4, 24)}, "ascend strictly"),
    ({"prefix_widths": (0, 24)}, "must be positive"),
    ({"prefix_widths": ()}, "end at the width, 24"),
    ({"layer_norm": True}, "layer_norm needs one site"),
    ({"parts": (3, 3)}, "add up to d_out, 5"),
  ],
)
def test_a_config_that_makes_no_dictionary_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    cases.make_config(**changes)


def test_a_transcoder_has_two_sites():
  assert not cases.make_config(read="a", write="a", d_in=E).is_transcoder
  assert cases.make_config(read="a", write="b", d_in=D).is_transcoder
