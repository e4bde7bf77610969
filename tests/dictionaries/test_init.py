"""Coordinates of training, and where parameters start."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from gemma_jax.activations.normalise import KINDS, WHITENING, Measured, fit
from gemma_jax.dictionaries import core, linear
from gemma_jax.dictionaries.presets import preset
from tests.dictionaries import cases
from tests.dictionaries.cases import D, E, M, f64

pytestmark = pytest.mark.usefixtures("quick_compiles")


def make_moments(n=4_000, seed=0):
  rng = np.random.default_rng(seed)
  scales = np.geomspace(0.03, 10, D)
  turned = np.linalg.qr(rng.normal(size=(D, D)))[0]
  x = rng.normal(size=(n, D)) * scales @ turned + 20
  y = x @ rng.normal(size=(D, E)) + rng.normal(size=(n, E)) - 5
  x, y = x.astype(np.float32), y.astype(np.float32)
  return x, y, linear.moments([(x, y)])


def examples_of(x, y):
  return x, y, np.ones(len(x), bool)


# -------------------------------------------------------------- coordinates
def test_whitening_makes_the_covariance_the_identity():
  x, y, m = make_moments()
  norm = core.normalisation(m, cases.make_recipe(whiten_epsilon=1e-7))
  xn, yn = core.normalise(norm, jnp.asarray(x), jnp.asarray(y))
  np.testing.assert_allclose(np.cov(np.asarray(xn).T), np.eye(D), atol=0.03)
  np.testing.assert_allclose(np.mean(xn, 0), 0, atol=0.02)
  assert np.mean(np.square(yn)) == pytest.approx(1, rel=1e-4)
  assert float(norm.y_variance) == pytest.approx(1, rel=1e-4)
  np.testing.assert_allclose(np.mean(yn, 0), 0, atol=1e-4)


@pytest.mark.parametrize("epsilon", [1e-4, 0.1, 10.0])
def test_whitening_raises_every_eigenvalue_and_keeps_unit_mean_square(epsilon):
  x, y, m = make_moments()
  norm = core.normalisation(m, cases.make_recipe(whiten_epsilon=epsilon))
  xn, _ = core.normalise(norm, jnp.asarray(x), jnp.asarray(y))
  assert np.mean(np.square(xn)) == pytest.approx(1, rel=1e-3)
  before = np.linalg.eigvalsh(np.cov(x.T, bias=True))
  after = np.linalg.eigvalsh(np.cov(np.asarray(xn).T, bias=True))
  expected = before / (before + epsilon * before.mean())
  expected /= expected.mean()
  np.testing.assert_allclose(after, expected, rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_the_one_of_the_activations(kind):
  x, y, m = make_moments()
  size = float(np.linalg.norm(x, axis=1).mean())
  recipe = cases.make_recipe(normalise=kind, whiten_epsilon=0.01)
  norm = core.normalisation(m, recipe, mean_norms=(size, size))
  measured = Measured(len(x), x.mean(0), x.var(0), np.cov(x.T), size)
  expected = np.asarray(fit(measured, kind, shrinkage=0.01).apply(x))
  xn, yn = core.normalise(norm, jnp.asarray(x), jnp.asarray(y))
  np.testing.assert_allclose(xn, expected, rtol=0.01, atol=0.01)
  assert np.var(f64(yn), axis=0).mean() == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in WHITENING])
def test_a_target_like_the_input_goes_the_input_s_way(kind):
  x, _, _ = make_moments()
  m = linear.moments([(x, x)])
  size = float(np.linalg.norm(x, axis=1).mean())
  recipe = cases.make_recipe(normalise=kind, target="input")
  norm = core.normalisation(m, recipe, mean_norms=(size, size))
  xn, yn = core.normalise(norm, jnp.asarray(x), jnp.asarray(x))
  np.testing.assert_allclose(xn, yn, rtol=1e-4, atol=1e-4)
  variance = np.var(f64(yn), axis=0).mean()
  assert float(norm.y_variance) == pytest.approx(variance, rel=1e-3)
  if kind == "unit_square":
    squares = np.sum(np.square(f64(xn)), axis=1)
    assert squares.mean() == pytest.approx(1, rel=1e-4)


def test_another_target_goes_the_input_s_way_by_its_own_measure():
  x, y, m = make_moments()
  for kind, aim in (("unit_square", 1.0), ("mean_norm", y.shape[1] ** 0.5)):
    lengths = np.linalg.norm(f64(y), axis=1)
    size = {"unit_square": np.sqrt(np.mean(lengths**2))}.get(
      kind, lengths.mean()
    )
    recipe = cases.make_recipe(normalise=kind, target="input")
    norms = float(np.linalg.norm(x, axis=1).mean()), float(lengths.mean())
    norm = core.normalisation(m, recipe, mean_norms=norms)
    _, yn = core.normalise(norm, jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(yn, y * aim / size, rtol=1e-3, atol=1e-5)


def test_every_site_of_a_crosscoder_has_its_own_scale():
  x, _, _ = make_moments()
  x = np.concatenate([x[:, :2], 100 * x[:, 2:]], axis=1)
  m = linear.moments([(x, x)])
  parts = (2, D - 2)
  for kind in ("scale", "whiten"):
    recipe = cases.make_recipe(normalise=kind, whiten_epsilon=0.01)
    norm = core.normalisation(m, recipe, parts=parts)
    xn, yn = core.normalise(norm, jnp.asarray(x), jnp.asarray(x))
    for part in (slice(0, 2), slice(2, None)):
      for side in (xn, yn):
        variance = np.var(f64(side)[:, part], axis=0).mean()
        assert variance == pytest.approx(1, rel=1e-2)
    assert not np.asarray(norm.x_map)[:2, 2:].any()  # sites are not mixed
  with pytest.raises(ValueError, match="needs one site; use 'mean_square'"):
    core.normalisation(
      m,
      cases.make_recipe(normalise="mean_norm"),
      mean_norms=(1.0, 1.0),
      parts=parts,
    )


def test_a_direction_without_variance_stays_finite():
  x, y, _ = make_moments()
  x[:, 0] = 3
  recipe = cases.make_recipe(whiten_epsilon=1e-3)
  norm = core.normalisation(linear.moments([(x, y)]), recipe)
  assert all(np.isfinite(a).all() for a in norm)


@pytest.mark.parametrize("constant", ["x", "y"])
def test_a_constant_site_is_refused(constant):
  x, y, _ = make_moments()
  (x if constant == "x" else y)[:] = 2
  with pytest.raises(ValueError, match="constant over the training tokens"):
    core.normalisation(linear.moments([(x, y)]), cases.make_recipe())


# --------------------------------------------------------------- parameters
@pytest.mark.parametrize("init", ["examples", "random"])
def test_before_any_latent_acts_the_skip_is_the_ridge_map(init):
  x, y, m = make_moments()
  rng = np.random.default_rng(1)
  ridge = linear.Ridge(
    rng.normal(size=(D, E)).astype(np.float32),
    rng.normal(size=E).astype(np.float32),
    0.0,
  )
  cfg = cases.make_config("topk", skip=True)
  recipe = cases.make_recipe(init=init, whiten_epsilon=0.01)
  norm = core.normalisation(m, recipe)
  key, examples = jax.random.key(0), examples_of(x[:100], y[:100])
  params, _ = core.init(cfg, recipe, key, norm, ridge, examples)
  assert {n: p.shape for n, p in params.items()} == cfg.shapes()
  xn, _ = core.normalise(norm, jnp.asarray(x), jnp.asarray(y))
  got = f64(xn) @ f64(params["W_skip"]) + f64(params["b_dec"])
  got = got * f64(norm.y_scale) + f64(norm.y_mean)
  expected = x.astype(np.float64) @ ridge.linear + ridge.bias
  np.testing.assert_allclose(got, expected, atol=1e-3 * np.abs(expected).max())
  zeros = dataclasses.replace(recipe, skip_init="zeros")
  params, _ = core.init(cfg, zeros, key, norm, ridge, examples)
  assert not np.asarray(params["W_skip"]).any()
  assert not np.asarray(params["b_dec"]).any()


def test_latents_start_from_examples_and_what_is_left_of_them():
  x, y, m = make_moments()
  cfg = cases.make_config(skip=True)
  recipe = cases.make_recipe(
    whiten_epsilon=0.01, encoder_norm=2.0, decoder_norm=0.25
  )
  norm = core.normalisation(m, recipe)
  ridge = linear.fit_ridge(m, m)
  params, state = core.init(
    cfg,
    recipe,
    jax.random.key(0),
    norm,
    ridge,
    (x[:50], y[:50], np.arange(50) % 10 != 3),
  )
  xn, yn = f64(core.normalise(norm, jnp.asarray(x[:50]), jnp.asarray(y[:50])))
  rest = yn - (f64(ridge(x[:50])) - f64(norm.y_mean)) / f64(norm.y_scale)
  unit_x = xn / np.linalg.norm(xn, axis=1, keepdims=True)
  unit_r = rest / np.linalg.norm(rest, axis=1, keepdims=True)
  like_x = unit_x @ f64(params["W_enc"]) / 2  # [50, M]
  like_r = unit_r @ f64(params["W_dec"]).T / 0.25
  origin = like_x.argmax(0)
  assert len(set(origin)) == M  # each from an example of its own
  assert not (origin % 10 == 3).any()  # and from none that is a repeat
  np.testing.assert_allclose(like_x.max(0), 1, atol=1e-4)
  np.testing.assert_allclose(like_r[origin, np.arange(M)], 1, atol=1e-2)
  assert not np.asarray(params["b_enc"]).any()
  assert not np.asarray(state.since_fired).any()
  assert float(state.threshold) < 0
  assert int(state.steps) == 0


def start(recipe, activation="topk", *, sae=True, examples=None):
  make = cases.make_sae if sae else cases.make_config
  cfg = make(activation, skip=not sae)
  norm = cases.identity(cfg)
  params, _ = core.init(cfg, recipe, jax.random.key(0), norm, None, examples)
  return f64(params)


@pytest.mark.parametrize("encoder_init", ["independent", "decoder", "he"])
def test_random_starts_have_the_norms_asked_for(encoder_init):
  recipe = cases.make_recipe(
    init="random",
    encoder_init=encoder_init,
    encoder_norm=3.0,
    decoder_norm=0.5,
  )
  params = start(recipe)
  norms = np.linalg.norm(params["W_dec"], axis=1)
  np.testing.assert_allclose(norms, 0.5, rtol=1e-5)
  # kaiming_uniform_ fills [D, M] with U(-b, b), of variance b^2 / 3 = 2 / M.
  expected = np.sqrt(E * 2 / M) if encoder_init == "he" else 3
  norms = np.linalg.norm(params["W_enc"], axis=0)
  np.testing.assert_allclose(norms, expected, rtol=1e-5)
  cosine = np.sum(params["W_enc"].T * params["W_dec"], 1) / (0.5 * expected)
  alike = np.abs(cosine - 1) < 1e-5
  assert alike.all() if encoder_init != "independent" else not alike.any()


def test_without_its_own_norm_the_encoder_has_the_decoder_s():
  recipe = cases.make_recipe(
    init="random", encoder_norm=None, encoder_init="decoder", decoder_norm=0.3
  )
  params = start(recipe)
  np.testing.assert_allclose(params["W_enc"].T, params["W_dec"], atol=1e-7)


def test_thresholds_start_where_the_recipe_says():
  recipe = cases.make_recipe(init="random", threshold_init=0.3)
  np.testing.assert_allclose(start(recipe, "jumprelu")["threshold"], 0.3)
  recipe = dataclasses.replace(recipe, log_threshold=True)
  got = start(recipe, "jumprelu")["threshold"]
  np.testing.assert_allclose(got, np.log(0.3), rtol=1e-6)
  gated = start(recipe, "gated")
  assert not gated["r_mag"].any()
  assert not gated["b_mag"].any()


def test_a_transcoder_of_sparsify_starts_at_the_mean_output():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(30, D)).astype(np.float32) + 2
  y = rng.normal(size=(30, E)).astype(np.float32) - 1
  recipe = preset("sparsify_transcoder", "topk")
  params = start(recipe, sae=False, examples=examples_of(x, y))
  assert not params["W_dec"].any()
  assert not params["W_skip"].any()
  np.testing.assert_allclose(params["b_dec"], y.mean(0), rtol=1e-5)
  z = x @ params["W_enc"] + params["b_enc"]
  np.testing.assert_allclose(z.mean(0), 0, atol=1e-5)
  norms = np.linalg.norm(params["W_enc"], axis=0)
  np.testing.assert_allclose(norms, 3**-0.5, rtol=1e-5)


def test_the_geometric_median_has_the_least_summed_distance():
  rng = np.random.default_rng(0)
  y = rng.standard_t(2, size=(200, E)) + np.arange(E)
  y[:10] += 100  # which the mean follows

  def distance(at):
    return np.linalg.norm(y - at, axis=1).sum()

  expected = scipy.optimize.minimize(distance, y.mean(0), tol=1e-10).x
  got = core.geometric_median(jnp.asarray(y, jnp.float32))
  np.testing.assert_allclose(got, expected, atol=1e-3)
  recipe = cases.make_recipe(init="random", b_dec_init="geometric_median")
  rows = y.astype(np.float32)
  params = start(recipe, examples=examples_of(rows, rows))
  np.testing.assert_allclose(params["b_dec"], expected, atol=1e-3)


def test_too_few_examples_are_refused():
  x, y, _ = make_moments(n=M - 1)
  with pytest.raises(ValueError, match="23 examples cannot start 24 latents"):
    start(cases.make_recipe(), sae=False, examples=examples_of(x, y))


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"init": "random", "b_dec_init": "mean"},
    {"init": "random", "b_enc_init": "centre"},
  ],
)
def test_what_starts_from_examples_needs_some(changes):
  with pytest.raises(ValueError, match="starts from examples; pass some"):
    start(cases.make_recipe(**changes))
