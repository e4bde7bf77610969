"""Recipes: what they refuse, and whole ones whose system is not on PyPI."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.dictionaries import core
from gemma_jax.dictionaries.presets import PRESETS, preset
from gemma_jax.dictionaries.recipe import CHOICES, Recipe
from tests.dictionaries import cases
from tests.dictionaries.cases import B, E, M, f64, run

pytestmark = pytest.mark.usefixtures("quick_compiles")

ALL = [(name, a) for name, recipes in PRESETS.items() for a in recipes]


# ------------------------------------------------------------------ recipes
@pytest.mark.parametrize(("name", "activation"), ALL)
def test_every_preset_starts_and_has_a_loss(name, activation):
  recipe = preset(name, activation)
  make = cases.make_config if "transcoder" in name else cases.make_sae
  cfg = make(activation, layer_norm=recipe.layer_norm)
  batch = cases.make_batch(cfg)
  examples = *map(np.asarray, batch.values()), np.ones(B, bool)

  def value():
    norm = cases.identity(cfg)
    key = jax.random.key(0)
    params, state = core.init(cfg, recipe, key, norm, None, examples)
    return core.loss(cfg, recipe, params, state, batch, core.hyper(cfg, recipe))

  loss, (state, _) = jax.eval_shape(value)
  assert loss.shape == ()
  assert state.since_fired.shape == (M,)


def test_a_preset_can_be_changed():
  recipe = preset("sae_lens", "topk", {"aux_coefficient": 0.5, "clip": None})
  plain = preset("sae_lens", "topk")
  assert plain.aux_coefficient == 1
  assert recipe == dataclasses.replace(plain, aux_coefficient=0.5, clip=None)


def test_the_learning_rate_may_follow_the_width():
  recipe = preset("dictionary_learning", "topk")
  assert recipe.rate(2**14) == pytest.approx(2e-4)
  assert recipe.rate(2**16) == pytest.approx(1e-4)
  assert preset("sae_lens", "topk").rate(2**16) == 3e-4


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (("saelens", "topk"), "preset 'saelens' is unknown; expected one of def"),
    (("sparsify", "relu"), "sparsify has no 'relu'; it has topk"),
    (("default", "topk", {"axu_k": 3}), "no field 'axu_k'. Did you mean 'au"),
    (("default", "topk", {"colour": 3}), "A recipe has no field 'colour'.$"),
  ],
)
def test_what_is_no_preset_is_refused(args, message):
  with pytest.raises(ValueError, match=message):
    preset(*args)


@pytest.mark.parametrize("field", CHOICES)
def test_another_choice_lists_those_there_are(field):
  with pytest.raises(ValueError, match=rf"recipe.{field} 'x'; expected one of"):
    Recipe(**{field: "x"})


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"bandwidth": 0}, "recipe.bandwidth must be positive"),
    ({"sparsity_power": 0.0}, "recipe.sparsity_power must be positive"),
    ({"aux_k": 0}, "recipe.aux_k must be positive"),
    ({"beta2": 1}, "recipe.beta2 must be less than 1"),
    ({"decoder_norm": -1.0}, "recipe.decoder_norm=-1.0 must be finite, at l"),
    ({"learning_rate": np.nan}, "recipe.learning_rate=nan must be finite"),
    ({"aux_k": 2.5}, "recipe.aux_k=2.5 must be int or None"),
    ({"layer_norm": 1}, "recipe.layer_norm=1 must be bool"),
    ({"dead_after": True}, "recipe.dead_after=True must be int"),
    ({"loss": None}, "recipe.loss=None must be str"),
    (
      {"decoder_norm": 0.0, "decoder": "unit_after_step"},
      "a free decoder may start at 0",
    ),
    ({"target": "input"}, "would whiten the output as well"),
    ({"dead_after": 0}, "recipe.dead_after must be positive"),
    ({"k_start": 9.0}, "k_start=9.0 and recipe.k_anneal=0.0 go together"),
    ({"k_anneal": 0.5}, "k_start=None and recipe.k_anneal=0.5 go together"),
    (
      {"log_threshold": True, "threshold_init": 0.0},
      "log_threshold needs a threshold_init above 0",
    ),
  ],
)
def test_a_recipe_that_cannot_be_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    Recipe(**changes)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"normalise": "mean_norm"}, "normalise 'mean_norm' is of one site"),
    ({"layer_norm": True}, "layer_norm is of one site; a crosscoder has 2"),
  ],
)
def test_what_is_of_one_site_is_refused_for_a_crosscoder(changes, message):
  cfg = cases.make_sae(
    "topk",
    parts=(2, E - 2),
    layer_norm=changes.get("layer_norm", False),
  )
  with pytest.raises(ValueError, match=message):
    core.check(cfg, cases.make_recipe(**changes))


# ----------------------------------------------------------- matryoshka_sae
def make_case(activation, changes, **config):
  """A batch with tokens far from mean 0, and what `run` needs."""
  recipe = preset("matryoshka_sae", activation, changes)
  cfg = cases.make_sae(activation, layer_norm=True, **config)
  params = cases.make_params(cfg)
  x = 3 * cases.make_batch(cfg)["x"] + 1
  # Some hardly fire. Dead after 20 batches, with this one: not the first two.
  weak = np.arange(1, M, 3)
  params["W_enc"] = params["W_enc"].at[:, weak].multiply(0.05)
  since = np.zeros(M)
  since[weak] = 19 * B
  since[weak[:2]] = 18 * B
  state = cases.make_state(cfg, since=since, threshold=0.5)
  return cfg, recipe, params, state, {"x": x, "y": x}


def tokens(x):
  """Every token centred and divided by its deviation, D - 1 below it."""
  x = f64(x) - f64(x).mean(1, keepdims=True)
  return x / (x.std(1, keepdims=True, ddof=1) + 1e-5)


@pytest.mark.parametrize(
  ("activation", "prefixes"),
  [("topk", (M,)), ("batchtopk", (M,)), ("batchtopk", (4, 12, M))],
)
def test_the_top_k_classes_of_matryoshka_sae(activation, prefixes):
  args = make_case(activation, {"aux_k": 4}, prefix_widths=prefixes)
  cfg, _, params, state, batch = args
  params["b_enc"] = jnp.zeros(M)
  x, before = tokens(batch["x"]), f64(params)
  acts = np.maximum((x - before["b_dec"]) @ before["W_enc"], 0)
  keep = cases.kept(acts, 3, activation)
  count = np.where(keep.any(0), 0, np.asarray(state.since_fired) // B + 1)
  dead = np.flatnonzero(count >= 20)
  assert len(dead) == 6
  recruited = np.zeros(keep.shape, bool)
  for row, values in zip(recruited, acts, strict=True):
    row[dead[np.argsort(-values[dead])][:4]] = True
  recruited &= acts > 0

  def value(p):
    acts = (x - p["b_dec"]) @ p["W_enc"]
    recs = cases.recs(cfg, p, x, np.where(keep, acts, 0))
    # Matryoshka counts the bias alone as a prefix, the plain classes do not.
    levels = [p["b_dec"], *recs] if len(prefixes) > 1 else recs
    main = np.mean([np.mean((x - rec) ** 2) for rec in levels])
    again = np.where(recruited, acts, 0) @ p["W_dec"]
    return main + np.mean((x - recs[-1] - again) ** 2) / 32

  loss, gradients, after, metrics = run(*args)
  assert loss == pytest.approx(value(before), rel=1e-5)
  assert metrics["aux_loss"] > 0
  wanted = cases.slopes(value, params)
  np.testing.assert_array_equal(gradients["b_enc"], 0)
  np.testing.assert_array_equal(wanted["b_enc"], 0)  # it is never added
  cases.close(gradients, wanted)
  np.testing.assert_array_equal(after.since_fired, count * B)
  if activation == "batchtopk":
    expected = 0.99 * 0.5 + 0.01 * acts[keep].min()
    assert float(after.threshold) == pytest.approx(expected, rel=1e-5)


def test_the_vanilla_class_of_matryoshka_sae():
  args = make_case("relu", {"sparsity_coefficient": 0.02})
  cfg, _, params, _, batch = args
  x = tokens(batch["x"])

  def value(p):
    acts = np.maximum((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"], 0)
    rec = cases.recs(cfg, p, x, acts)[-1]
    return np.mean((x - rec) ** 2) + 0.02 * acts.sum() / B

  loss, gradients, _, _ = run(*args)
  assert loss == pytest.approx(value(f64(params)), rel=1e-5)
  cases.close(gradients, cases.slopes(value, params))


def test_the_jumprelu_class_of_matryoshka_sae():
  # Where its thresholds start, their logarithm's gradient is their own.
  changes = {"bandwidth": 0.3, "sparsity_coefficient": 0.02}
  args = make_case("jumprelu", changes)
  _, _, params, _, batch = args
  params["threshold"] = jnp.zeros(M)
  x, p = tokens(batch["x"]), f64(params)
  z = np.maximum(x @ p["W_enc"] + p["b_enc"], 0)  # b_dec is not subtracted
  acts = np.where(z > 1, z, 0)
  left = x - acts @ p["W_dec"] - p["b_dec"]
  loss = np.mean(left**2) + 0.02 * np.sum(acts > 1) / B
  to_acts = -2 * left @ p["W_dec"].T / x.size
  near, near_acts = np.abs(z - 1) < 0.15, np.abs(acts - 1) < 0.15
  assert near.sum() > near_acts.sum() > 5
  d_theta = -(near * to_acts + near_acts * 0.02 / B).sum(0) / 0.3
  got, gradients, _, _ = run(*args)
  assert got == pytest.approx(loss, rel=1e-5)
  cases.close(
    gradients,
    {
      "W_enc": x.T @ ((z > 1) * to_acts),
      "b_enc": ((z > 1) * to_acts).sum(0),
      "W_dec": -2 * acts.T @ left / x.size,
      "b_dec": -2 * left.sum(0) / x.size,
      "threshold": d_theta,
    },
  )


# -------------------------------------------------------------- gemma_scope
def test_the_recipe_of_gemma_scope():
  recipe = preset(
    "gemma_scope",
    "jumprelu",
    {"bandwidth": 0.3, "sparsity_coefficient": 0.1, "sparsity_warmup": 4},
  )
  cfg = cases.make_sae("jumprelu")
  params, batch = cases.make_params(cfg), cases.make_batch(cfg)
  theta = f64(params["threshold"])
  params["threshold"] = jnp.log(params["threshold"])
  x, p = f64(batch["x"]), f64(params)
  z = x @ p["W_enc"] + p["b_enc"]
  acts = np.where(z > theta, z, 0)
  left = x - acts @ p["W_dec"] - p["b_dec"]
  weight = 0.1 * 3 / 4  # three steps into a warm-up of four
  to_acts = -2 * left @ p["W_dec"].T / B
  near = np.abs(z - theta) < 0.15
  by_jump = theta / 0.3 * near * to_acts
  by_step = weight / 0.3 * near / B
  state = cases.make_state(cfg, steps=3)
  loss, gradients, _, _ = run(cfg, recipe, params, state, batch)
  expected = np.sum(left**2) / B + weight * np.sum(z > theta) / B
  assert loss == pytest.approx(expected, rel=1e-5)
  d_z = (z > theta) * to_acts
  cases.close(
    gradients,
    {
      "W_enc": x.T @ d_z,
      "b_enc": d_z.sum(0),
      "W_dec": -2 * acts.T @ left / B,
      "b_dec": -2 * left.sum(0) / B,
      "threshold": -(by_jump + by_step).sum(0) * theta,
    },
  )


def test_starts_of_the_presets_are_those_of_their_systems():
  root = np.sqrt
  norms = {  # of encoders and of decoders
    ("sae_lens", "batchtopk"): (0.1, 0.1),
    ("dictionary_learning", "relu"): (0.1, 0.1),
    ("dictionary_learning", "jumprelu"): (1, 1),
    ("matryoshka_sae", "batchtopk"): (root(2 * E / M), 1),
    ("sparsify", "topk"): (root(1 / 3), 1),
    ("sparsify_transcoder", "topk"): (root(1 / 3), 0),
    ("gemma_scope", "jumprelu"): (1, 1),
    ("anthropic", "jumprelu"): (0.1, 0.1),
  }
  for (name, activation), expected in norms.items():
    recipe = preset(name, activation)
    cfg = cases.make_sae(activation)
    x = np.asarray(cases.make_batch(cfg)["x"])
    norm = cases.identity(cfg)
    key, examples = jax.random.key(0), (x, x, np.ones(B, bool))
    params, _ = core.init(cfg, recipe, key, norm, None, examples)
    for size, rows in zip(
      expected, (params["W_enc"].T, params["W_dec"]), strict=True
    ):
      lengths = np.linalg.norm(rows, axis=1)
      np.testing.assert_allclose(lengths, size, rtol=1e-5)
