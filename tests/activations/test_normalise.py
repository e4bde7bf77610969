"""Normalisations against what they promise, in float64 where it matters."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import gemma2b_transcoder
from gemma_jax import metrics
from gemma_jax.activations.normalise import (
  CENTRED,
  KINDS,
  WHITENING,
  Measured,
  Normalisation,
  fit,
  oas,
)
from gemma_jax.activations.statistics import Statistics, block
from trainers import dictionary_plan

D, M = 12, 30


def make_rows(n=4_000, d=D, seed=0):
  """x [n, d] with a mean and variances from 1e-2 to 1e2, turned."""
  rng = np.random.default_rng(seed)
  turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
  x = rng.normal(size=(n, d)) * np.geomspace(0.1, 10, d) @ turn
  return x + 3 * rng.normal(size=d)


def make_measured(x, *, covariance=True):
  return Measured(
    len(x),
    x.mean(0),
    x.var(0),
    np.cov(x.T, bias=True) if covariance else None,
    np.linalg.norm(x, axis=1).mean(),
  )


def covariance(z):
  return np.cov(np.asarray(z, np.float64).T, bias=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_inverting_gives_back_the_raw_rows(kind, power):
  x = make_rows()
  norm = fit(make_measured(x), kind, shrinkage=1e-3, power=power)
  z = norm.apply(jnp.asarray(x, jnp.float32))
  assert z.dtype == jnp.float32
  np.testing.assert_allclose(norm.invert(z), x, atol=2e-4)
  mean = np.asarray(z).mean(0)
  assert (np.abs(mean).max() < 1e-3) == (kind in CENTRED)


def test_each_kind_has_the_size_that_it_promises():
  x = make_rows()
  z = {kind: np.asarray(fit(make_measured(x), kind).apply(x)) for kind in KINDS}
  norms = {kind: np.linalg.norm(a, axis=1) for kind, a in z.items()}
  np.testing.assert_allclose(z["none"], x, rtol=1e-6)
  assert np.mean(norms["mean_square"] ** 2) == pytest.approx(D, rel=1e-5)
  assert np.mean(norms["mean_norm"]) == pytest.approx(np.sqrt(D), rel=1e-5)
  assert np.mean(z["scale"].var(0)) == pytest.approx(1, rel=1e-5)
  np.testing.assert_allclose(z["standardise"].var(0), 1, rtol=1e-5)
  np.testing.assert_allclose(
    z["standardise"], (x - x.mean(0)) / x.std(0), atol=1e-4
  )
  for kind in WHITENING:
    np.testing.assert_allclose(covariance(z[kind]), np.eye(D), atol=1e-3)


def test_cheap_kinds_stay_cheap():
  shapes = {k: fit(make_measured(make_rows()), k).map.shape for k in KINDS}
  assert shapes == {
    **dict.fromkeys(KINDS[:5], ()),
    "standardise": (D,),
    **dict.fromkeys(WHITENING, (D, D)),
  }


def test_principal_components_come_largest_first_and_zca_turns_nothing():
  x = make_rows()
  plain = fit(make_measured(x), "pca", power=0.0)
  z = np.asarray(plain.apply(x))
  np.testing.assert_allclose(
    z.var(0), np.linalg.eigvalsh(covariance(x))[::-1], rtol=1e-4
  )
  zca = np.asarray(fit(make_measured(x), "zca").map)
  np.testing.assert_allclose(zca, zca.T, atol=1e-5)
  assert np.linalg.eigvalsh(zca).min() > 0


@pytest.mark.parametrize("kind", ["pca", "zca"])
@pytest.mark.parametrize(("shrinkage", "power"), [(0.1, 1), (0, 0.3), (2, 0.7)])
def test_shrinkage_and_power_change_every_variance_as_they_say(
  kind, shrinkage, power
):
  x = make_rows()
  before = np.linalg.eigvalsh(covariance(x))
  norm = fit(make_measured(x), kind, shrinkage=shrinkage, power=power)
  after = np.linalg.eigvalsh(covariance(norm.apply(x)))
  expected = before / (before + shrinkage * before.mean()) ** power
  np.testing.assert_allclose(np.sort(expected), after, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("n", [20, 200])
def test_oas_is_the_formula_of_the_paper_and_near_the_best_share(n):
  rng = np.random.default_rng(4)
  p = 30
  true = np.diag(np.geomspace(0.5, 2, p))
  x = rng.normal(size=(n, p)) @ np.sqrt(true)
  s = np.cov(x.T, bias=True)
  squares, trace = np.trace(s @ s), np.trace(s)
  expected = min(
    1,
    ((1 - 2 / p) * squares + trace**2)
    / ((n + 1 - 2 / p) * (squares - trace**2 / p)),
  )
  share = oas(np.linalg.eigvalsh(s), n)
  assert share == pytest.approx(expected, rel=1e-9)

  # The share of the identity that is nearest to the true covariance.
  target = np.eye(p) * trace / p
  best = np.sum((s - true) * (s - target)) / np.sum((s - target) ** 2)
  assert share == pytest.approx(best, abs=0.1)
  norm = fit(make_measured(x), "zca", shrinkage="oas")
  shrunk = (1 - share) * s + share * target
  to = np.asarray(norm.map, np.float64)
  np.testing.assert_allclose(to @ shrunk @ to, np.eye(p), atol=1e-4)


def test_oas_of_a_sphere_is_the_whole_mean():
  assert oas(np.ones(7), 100) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_folded_dictionary_has_the_same_latents_and_reconstructions(kind):
  x = make_rows(200)
  norm = fit(make_measured(x), kind, shrinkage=0.01)
  rng = np.random.default_rng(1)
  W_enc, b_enc = rng.normal(size=(D, M)), rng.normal(size=M)
  W_dec, b_dec = rng.normal(size=(M, D)), rng.normal(size=D)
  z = np.asarray(norm.apply(x), np.float64)
  latents = np.maximum(z @ W_enc + b_enc, 0)
  expected = np.asarray(norm.invert(latents @ W_dec + b_dec))

  W, b = norm.fold_encoder(W_enc, b_enc)
  assert (W.dtype, W.shape, b.shape) == (np.float32, (D, M), (M,))
  folded = np.maximum(x @ W + b, 0)
  np.testing.assert_allclose(folded, latents, atol=1e-3)
  W, b = norm.fold_decoder(W_dec, b_dec)
  assert (W.dtype, W.shape, b.shape) == (np.float32, (M, D), (D,))
  np.testing.assert_allclose(
    folded @ W + b, expected, atol=1e-4 * np.abs(expected).max()
  )


def test_fvu_belongs_in_raw_space_where_it_is_another_number():
  x = make_rows()
  norm = fit(make_measured(x), "pca")
  z = np.asarray(norm.apply(x), np.float64)
  kept = z * (np.arange(D) < 3)  # the three largest components
  raw = metrics.fvu(x, norm.invert(kept))
  values = np.linalg.eigvalsh(covariance(x))
  assert raw == pytest.approx(values[:-3].sum() / values.sum(), rel=1e-3)
  assert metrics.fvu(z, kept) == pytest.approx(9 / 12, rel=1e-3)
  assert raw < 0.3


def test_constant_dims_are_named_and_nothing_is_divided_by_zero(caplog):
  x = make_rows()
  x[:, [2, 7]] = 5.0
  for kind in ("standardise", *WHITENING):
    with caplog.at_level(logging.WARNING, "gemma_jax"):
      norm = fit(make_measured(x), kind)
    assert "2 of 12 dims are constant: 2, 7" in caplog.text
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(norm))
    np.testing.assert_allclose(norm.invert(norm.apply(x)), x, atol=2e-3)
    if kind == "standardise":
      assert "beyond rounding" not in caplog.text
  assert "2 of 12 directions have no variance beyond rounding" in caplog.text


def test_shrinkage_makes_a_singular_covariance_regular(caplog):
  x = make_rows(8)  # fewer rows than dims
  with caplog.at_level(logging.WARNING, "gemma_jax"):
    norm = fit(make_measured(x), "zca", shrinkage="oas")
    fit(make_measured(x), "zca", shrinkage=0.1)
  assert not caplog.text
  assert np.linalg.cond(np.asarray(norm.map, np.float64)) < 100


def test_statistics_measured_on_the_device_do_as_well():
  x = make_rows().astype(np.float32)
  labels = dict.fromkeys(
    ("position", "source", "document", "token"), np.zeros(len(x), np.int32)
  )
  statistics = Statistics(D, positions=1, sources=("all",), covariance=True)
  sums = block(x, np.ones(len(x), bool), covariance=True)
  statistics.update(jax.device_get(sums), first_row=0, **labels)
  for kind in KINDS:
    got = fit(statistics, kind)
    expected = fit(make_measured(x.astype(np.float64)), kind)
    np.testing.assert_allclose(
      got.apply(x), expected.apply(x), rtol=1e-3, atol=1e-3, err_msg=kind
    )


def test_a_normalisation_is_a_pytree_that_programs_take():
  x = make_rows(50).astype(np.float32)
  norm = fit(make_measured(x.astype(np.float64)), "zca")
  apply = jax.jit(Normalisation.apply)
  np.testing.assert_allclose(apply(norm, x), norm.apply(x), atol=1e-4)
  moved = jax.tree.map(lambda a: a * 1, norm)
  assert moved.kind == "zca"
  half = norm.apply(x.astype(jnp.bfloat16))
  assert half.dtype == jnp.float32


@pytest.mark.parametrize(
  ("kind", "options", "message"),
  [
    ("l2", {}, "'l2'; expected one of none, mean_square, mean_norm, unit"),
    ("pca", {}, "needs the covariance.*covariance=True"),
    ("mean_norm", {}, "needs the mean norm"),
    ("zca", {"power": 1.5}, r"power=1\.5; expected 0"),
  ],
)
def test_what_cannot_be_fitted_says_why(kind, options, message):
  measured = make_measured(make_rows(), covariance=False)
  with pytest.raises(ValueError, match=message):
    fit(measured._replace(mean_norm=None), kind, **options)


@pytest.mark.parametrize("shrinkage", ["ledoit", -0.1, float("nan")])
def test_another_shrinkage_is_refused(shrinkage):
  with pytest.raises(ValueError, match="expected 'oas' or a number from 0"):
    fit(make_measured(make_rows()), "zca", shrinkage=shrinkage)


def test_sites_without_anything_to_scale_are_refused():
  x = np.full((10, D), 2.0)
  for kind in CENTRED:
    with pytest.raises(ValueError, match="constant over the rows"):
      fit(make_measured(x), kind)
  for kind in ("mean_square", "mean_norm", "unit_square"):
    assert np.isfinite(fit(make_measured(x), kind).map)
    with pytest.raises(ValueError, match="Every activation is zero"):
      fit(make_measured(0 * x), kind)


def test_a_config_with_another_kind_is_refused_before_any_work():
  config = gemma2b_transcoder.get_config("smoke").to_dict()
  for kind in KINDS:
    config["recipe"]["normalise"] = kind
    dictionary_plan.prepare(config)
  config["recipe"]["normalise"] = "l2"
  with pytest.raises(ValueError, match=r"recipe\.normalise 'l2'; .*none, mean"):
    dictionary_plan.prepare(config)
