"""Maps between models: planted ones, scikit-learn's, SciPy's."""

import jax
import numpy as np
import pytest
from scipy import linalg, stats
from sklearn import linear_model

from gemma_jax.alignment.maps import (
  fit_cca,
  fit_mean,
  fit_procrustes,
  fit_reduced_rank,
  fit_ridge,
)
from gemma_jax.alignment.moments import Moments

pytestmark = pytest.mark.usefixtures("quick_compiles")

FITS = {
  "mean": fit_mean,
  "procrustes": fit_procrustes,
  "ridge": fit_ridge,
  "reduced_rank": lambda x, y=None: fit_reduced_rank(x, y, 2),
  "cca": lambda x, y=None: fit_cca(x, y, 2),
}


def planted(n, d, noise, seed=0):
  """Gaussian rows, and the same rotated, with noise."""
  rng = np.random.default_rng(seed)
  rotation = stats.ortho_group.rvs(d, random_state=9)
  x = rng.normal(size=(n, d))
  return x, x @ rotation + noise * rng.normal(size=(n, d))


def related(n=300, d=6, e=4, *, mean=0.0, seed=0):
  """Rows of unequal variance, y partly linear in x."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(n, d)) @ rng.normal(size=(d, d))
  y = x @ rng.normal(size=(d, e)) + 2 * rng.normal(size=(n, e))
  return x + mean, y - mean


def r2(found, x, y, mean):
  return 1 - np.sum((y - found(x)) ** 2) / np.sum((y - mean) ** 2)


def cosine(x, y):
  norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
  return np.mean(np.sum(x * y, axis=1) / norms)


def centred(x):
  return x - x.mean(0)


# ------------------------------------------------------------------- procrustes
@pytest.mark.parametrize(
  ("noise", "expected"), [(0, 1), (0.1, 0.99), (0.5, 0.79), (1, 0.48)]
)
def test_a_planted_rotation_is_found_up_to_the_ceiling_of_its_noise(
  noise, expected
):
  x, y = planted(1_000, 64, noise)
  test = planted(4_000, 64, noise, seed=1)
  ceiling = 1 / (1 + noise**2)
  for found in (fit_procrustes(x, y), fit_procrustes(x, y, scaled=True)):
    held_out = r2(found, *test, y.mean(0))
    assert held_out == pytest.approx(expected, abs=0.02)
    assert held_out < ceiling + 0.01
  ridge = r2(fit_ridge(x, y), *test, y.mean(0))
  assert expected - 0.05 < ridge < ceiling + 0.01


def test_of_unrelated_rows_procrustes_looks_aligned_in_sample_alone():
  d, n = 64, 512
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(2, n, d))
  found = fit_procrustes(x, y)
  in_sample = cosine(found(x) - y.mean(0), y - y.mean(0))
  assert in_sample == pytest.approx(0.85 * np.sqrt(d / n), rel=0.05)
  x, y = rng.normal(size=(2, 20_000, d))
  assert abs(cosine(found(x) - found.bias, y)) < 0.01


def test_of_unrelated_rows_ridge_predicts_the_mean():
  x, y = np.random.default_rng(0).normal(size=(2, 400, 32))
  test = np.random.default_rng(1).normal(size=(2, 2_000, 32))
  assert abs(r2(fit_ridge(x, y), *test, y.mean(0))) < 0.01
  barely = fit_ridge(x, y, alpha=0)
  assert r2(barely, *test, y.mean(0)) < -0.05


def test_a_square_rotation_is_scipys():
  x, y = related(d=5, e=5, mean=50.0)
  found = fit_procrustes(x, y)
  rotation, scale = linalg.orthogonal_procrustes(centred(x), centred(y))
  np.testing.assert_allclose(found.weights, rotation, atol=1e-6)
  expected = y.mean(0) - x.mean(0) @ rotation
  np.testing.assert_allclose(found.bias, expected, rtol=1e-5)
  scale /= np.sum(centred(x) ** 2)
  scaled = fit_procrustes(x, y, scaled=True)
  assert scaled.about["scale"] == pytest.approx(scale, rel=1e-6)
  np.testing.assert_allclose(scaled.weights, scale * rotation, atol=1e-6)


@pytest.mark.parametrize(("d", "e"), [(4, 7), (7, 4)])
def test_no_nearby_semi_orthogonal_map_is_better(d, e):
  x, y = related(d=d, e=e)
  found = np.float64(fit_procrustes(x, y).weights)
  narrow = found @ found.T if d < e else found.T @ found
  np.testing.assert_allclose(narrow, np.eye(4), atol=1e-6)
  x, y = centred(x), centred(y)
  # For D > E, y is padded: the error is of all that the rotation makes of x.
  best = np.sum((x @ found) * y)
  rng = np.random.default_rng(0)
  for size in (0.01, 0.1, 1) * 20:
    turn = rng.normal(size=(max(d, e),) * 2) * size
    turn = linalg.expm(turn - turn.T)
    other = found @ turn if d < e else turn @ found
    assert np.sum((x @ other) * y) < best
    if d < e:
      error = np.sum((x @ found - y) ** 2)
      assert error < np.sum((x @ other - y) ** 2)


def test_the_scale_is_that_of_least_squares_for_any_widths():
  for d, e in ((4, 7), (7, 4), (5, 5)):
    x, y = related(d=d, e=e)
    made = centred(x) @ np.float64(fit_procrustes(x, y).weights)
    expected = np.linalg.lstsq(made.reshape(-1, 1), centred(y).ravel())[0]
    scaled = fit_procrustes(x, y, scaled=True)
    assert scaled.about["scale"] == pytest.approx(expected[0], rel=1e-5)


# ------------------------------------------------------------------------ ridge
@pytest.mark.parametrize("alpha", [0.0, 1e-2, 1.0, 1e4])
def test_ridge_is_scikit_learns(alpha):
  x, y = related(mean=30.0)
  found = fit_ridge(x, y, alpha=alpha)
  expected = linear_model.Ridge(alpha=alpha).fit(x, y)
  np.testing.assert_allclose(found.weights, expected.coef_.T, atol=1e-5)
  np.testing.assert_allclose(found.bias, expected.intercept_, rtol=1e-5)
  assert found.about["alpha"] == alpha


def test_ridge_is_scikit_learns_with_fewer_rows_than_dims():
  x, y = related(n=40, d=60)
  found = fit_ridge(np.float32(x), np.float32(y), alpha=5.0)
  expected = linear_model.Ridge(alpha=5.0).fit(x, y)
  np.testing.assert_allclose(found.weights, expected.coef_.T, atol=1e-4)
  np.testing.assert_allclose(found.bias, expected.intercept_, atol=1e-3)


def gcv(x, y, alpha):
  """From the hat matrix, with the intercept in it."""
  n, d = x.shape
  design = np.concatenate([np.ones((n, 1)), centred(x)], axis=1)
  penalty = alpha * np.diag([0.0] + [1.0] * d)
  hat = design @ np.linalg.solve(design.T @ design + penalty, design.T)
  return n * np.sum((y - hat @ y) ** 2) / np.trace(np.eye(n) - hat) ** 2


@pytest.mark.parametrize(
  ("n", "d", "noise"), [(200, 30, 1), (200, 30, 10), (41, 40, 3), (40, 90, 3)]
)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_penalty_is_that_of_least_generalised_cross_validation_error(
  n, d, noise, dtype
):
  rng = np.random.default_rng(n + d + noise)
  x = rng.normal(size=(n, d))
  y = x @ rng.normal(size=(d, 3)) + noise * rng.normal(size=(n, 3)) + 7
  alphas = np.logspace(-2, 5, 15)
  errors = [gcv(x, y, alpha) for alpha in alphas]
  found = fit_ridge(x.astype(dtype), y.astype(dtype), alphas=alphas)
  assert found.about["alpha"] == alphas[np.argmin(errors)]
  # Leave-one-out, which needs all rows, agrees to a step of a coarser grid.
  theirs = linear_model.RidgeCV(alphas[::2]).fit(x, y).alpha_
  ours = fit_ridge(x, y, alphas=alphas[::2]).about["alpha"]
  assert abs(np.log10(ours / theirs)) < 1.01


@pytest.mark.parametrize(("n", "d"), [(300, 40), (60, 200)])
def test_the_penalty_that_is_found_without_a_grid_predicts_as_the_best_one(
  n, d
):
  rng = np.random.default_rng(0)
  true = rng.normal(size=(d, 5)) / np.sqrt(d)

  def rows(n):
    x = 100 * rng.normal(size=(n, d)).astype(np.float32)
    return x, (x @ true + 50 * rng.normal(size=(n, 5))).astype(np.float32)

  train, test = rows(n), rows(3_000)
  mean = train[1].mean(0)
  best = max(
    r2(fit_ridge(*train, alpha=alpha), *test, mean)
    for alpha in np.logspace(2, 9, 15)
  )
  assert r2(fit_ridge(*train), *test, mean) > best - 0.01


def test_the_freedom_is_the_trace_of_the_hat_matrix():
  x, y = related()
  away = centred(x)
  hat = away @ np.linalg.solve(away.T @ away + 50 * np.eye(6), away.T)
  found = fit_ridge(x, y, alpha=50.0).about["freedom"]
  assert found == pytest.approx(np.trace(hat), rel=1e-9)


def test_dims_that_never_vary_or_are_copies_do_not_blow_up():
  x, y = related(n=2_000)
  wide = np.concatenate([x, x[:, :1], np.full((2_000, 2), 7.0)], axis=1)
  expected = fit_ridge(x, y)(x)
  for rows in (wide, np.float32(wide)):
    found = fit_ridge(rows, np.float32(y))
    np.testing.assert_allclose(found(wide), expected, atol=0.02)
    np.testing.assert_allclose(found.weights[-2:], 0, atol=1e-6)


def test_a_constant_input_predicts_the_mean():
  y = related()[1]
  found = fit_ridge(np.full((300, 5), 3.0), y)
  np.testing.assert_array_equal(found.weights, 0)
  np.testing.assert_allclose(found.bias, y.mean(0), rtol=1e-5)


# ----------------------------------------------------------------- reduced rank
def test_of_full_rank_it_is_the_ridge_map():
  x, y = related()
  for options in ({"alpha": 3.0}, {}):
    ridge, found = (
      fit(x, y, **options) for fit in (fit_ridge, fit_reduced_rank)
    )
    np.testing.assert_allclose(found.weights, ridge.weights, atol=1e-5)
    np.testing.assert_allclose(found.bias, ridge.bias, atol=1e-5)
    assert found.about["alpha"] == ridge.about["alpha"]


@pytest.mark.parametrize("alpha", [0.0, 20.0])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_no_other_map_of_the_rank_fits_better(rank, alpha):
  x, y = related(d=6, e=5)
  found = np.float64(fit_reduced_rank(x, y, rank, alpha=alpha).weights)
  full = np.float64(fit_ridge(x, y, alpha=alpha).weights)
  x, y = centred(x), centred(y)

  def loss(weights):
    return np.sum((y - x @ weights) ** 2) + alpha * np.sum(weights**2)

  def truncated(a):
    u, s, vt = np.linalg.svd(a, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]

  # With the penalty as rows of x, the best fit is a truncated SVD of rows.
  rows = np.concatenate([x, np.sqrt(alpha) * np.eye(6)])
  expected = np.linalg.lstsq(rows, truncated(rows @ full))[0]
  np.testing.assert_allclose(found, expected, atol=1e-5)
  assert np.linalg.matrix_rank(found, tol=1e-5) == rank
  rng = np.random.default_rng(0)
  others = [truncated(full)]
  for a in [y, *rng.normal(size=(20, 50, 5))]:
    top = np.linalg.svd(a, full_matrices=False)[2][:rank]
    others.append(full @ top.T @ top)
  others += [truncated(found + 0.1 * rng.normal(size=(6, 5))) for _ in "12345"]
  assert loss(found) < min(map(loss, others)) * (1 + 1e-9)


def test_a_planted_bottleneck_is_worth_its_rank():
  rng = np.random.default_rng(0)
  x, test = rng.normal(size=(2, 400, 40))
  true = rng.normal(size=(40, 3)) @ rng.normal(size=(3, 30))
  y, held_out = (a @ true + 8 * rng.normal(size=(400, 30)) for a in (x, test))
  found = [
    r2(fit_reduced_rank(x, y, rank), test, held_out, y.mean(0))
    for rank in (2, 3, 30)
  ]
  assert max(found) == found[1]


# -------------------------------------------------------------------------- cca
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(("d", "e"), [(6, 4), (4, 6)])
def test_canonical_correlations_are_cosines_between_the_columns_spans(
  d, e, dtype
):
  x, y = related(d=d, e=e, mean=20.0)
  x[:, 0] *= 1e4
  x, y = x.astype(dtype), y.astype(dtype)
  found = fit_cca(x, y).about["correlations"]
  angles = linalg.subspace_angles(
    *(centred(np.float64(rows)) for rows in (x, y))
  )
  np.testing.assert_allclose(found, np.sort(np.cos(angles))[::-1], atol=1e-4)


def test_of_full_rank_cca_is_least_squares():
  x, y = related(mean=5.0)
  expected = linear_model.LinearRegression().fit(x, y)
  found = fit_cca(x, y)
  np.testing.assert_allclose(found.weights, expected.coef_.T, atol=1e-5)
  np.testing.assert_allclose(found.bias, expected.intercept_, atol=1e-4)


def test_cca_keeps_what_agrees_and_reduced_rank_what_varies():
  rng = np.random.default_rng(0)
  shared, loud, noise = rng.normal(size=(3, 5_000))
  x = np.stack([shared, loud], axis=1)
  y = np.stack([0.1 * shared, 10 * loud + 20 * noise], axis=1)
  cca, reduced = fit_cca(x, y, 1), fit_reduced_rank(x, y, 1)
  assert cca.about["correlations"][0] == pytest.approx(1, abs=1e-6)
  assert cca.weights[0, 0] == pytest.approx(0.1, rel=1e-5)
  np.testing.assert_allclose(cca.weights[1], 0, atol=1e-6)
  assert reduced.weights[1, 1] == pytest.approx(10, rel=0.1)
  assert np.linalg.matrix_rank(cca.weights, tol=1e-4) == 1


def test_shrinkage_divides_the_correlation_of_single_dims():
  x, y = related(d=1, e=1)
  expected = abs(stats.pearsonr(x[:, 0], y[:, 0]).statistic) / 1.5
  found = fit_cca(x, y, shrinkage=0.5)
  assert found.about["correlations"] == pytest.approx([expected], rel=1e-9)
  slope = stats.linregress(x[:, 0], y[:, 0]).slope
  np.testing.assert_allclose(found.weights, [[slope / 1.5]], rtol=1e-5)


def test_constant_dims_have_no_canonical_directions():
  x, y = related()
  # Rounding leaves some of these a variance.
  constant = np.broadcast_to(1e3 * np.sqrt(np.arange(2, 22)), (300, 20))
  wide = np.concatenate([x, constant], axis=1)
  found, expected = fit_cca(wide, y), fit_cca(x, y)
  np.testing.assert_allclose(found(wide), expected(x), atol=1e-4)
  np.testing.assert_array_equal(found.weights[6:], 0)


# --------------------------------------------------------------------- all maps
def test_the_mean_has_no_weights():
  x, y = related(mean=9.0)
  found = fit_mean(x, y)
  expected = np.broadcast_to(y.mean(0), y.shape)
  np.testing.assert_allclose(found(x), expected, rtol=1e-6)


@pytest.mark.parametrize("name", FITS)
def test_arrays_and_their_moments_give_one_map(name):
  x, y = (np.float32(rows) for rows in related(mean=3.0))
  m = Moments().update(x[:100], y[:100]).update(x[100:], y[100:])
  a, b = FITS[name](x, y), FITS[name](m)
  assert a.name == b.name == name
  assert a.about["rows"] == b.about["rows"] == 300
  # Products about another mean are rounded otherwise, which the directions
  # of least variance show most.
  np.testing.assert_allclose(a(x), b(x), atol=2e-3)


@pytest.mark.parametrize("name", FITS)
def test_jit_equals_no_jit_and_leading_axes_are_rows(name):
  x, y = related()
  found = FITS[name](x, y)
  expected = found(x)
  for made in (jax.jit(found)(x), jax.jit(lambda m, x: m(x))(found, x)):
    np.testing.assert_allclose(made, expected, rtol=1e-6, atol=1e-6)
  made = found(x.reshape(20, 15, 6)).reshape(300, 4)
  np.testing.assert_allclose(made, expected, rtol=1e-6, atol=1e-6)


def test_parameters_are_the_numbers_that_a_map_takes_to_store():
  x, y = related(d=6, e=4)
  expected = {"mean": 4, "procrustes": 28, "ridge": 28}
  expected |= {"reduced_rank": 2 * 10 + 4, "cca": 2 * 10 + 4}
  assert {n: fit(x, y).parameters for n, fit in FITS.items()} == expected
  assert fit_reduced_rank(x, y, 4).parameters == 28
  assert fit_procrustes(x, y, scaled=True).parameters == 29


@pytest.mark.parametrize(
  "fit",
  [
    fit_procrustes,
    lambda x, y: fit_ridge(x, y, alpha=0),
    lambda x, y: fit_ridge(x, y, alphas=[0, 1]),
    lambda x, y: fit_reduced_rank(x, y, 2, alpha=0),
    lambda x, y: fit_cca(x, y, 2),
  ],
)
def test_maps_without_a_penalty_want_more_rows_than_dims(fit):
  x, y = related(n=6)
  with pytest.raises(ValueError, match=r"at least .* got 6 .* use fit_ridge"):
    fit(x, y)
  x, y = related(n=11)
  fit(x, y)


@pytest.mark.parametrize("fit", FITS.values())
def test_rows_that_are_not_paired_or_not_finite_are_refused(fit):
  x, y = related()
  with pytest.raises(ValueError, match="pair the rows first"):
    fit(x, y[:-1])
  with pytest.raises(ValueError, match="got none"):
    fit(x[:0], y[:0])
  with pytest.raises(ValueError, match="Moments alone"):
    fit(Moments().update(x, y), y)
  x[3, 2] = np.nan
  with pytest.raises(ValueError, match="1 rows of x, first in row 3"):
    fit(x, y)


@pytest.mark.parametrize("fit", [fit_reduced_rank, fit_cca])
@pytest.mark.parametrize("rank", [0, 5])
def test_a_rank_beyond_the_narrower_side_is_refused(fit, rank):
  with pytest.raises(ValueError, match=rf"1 to 4, .* got {rank}"):
    fit(*related(), rank)


@pytest.mark.parametrize(
  "options",
  [{"alpha": -1}, {"alpha": np.nan}, {"alphas": []}, {"alpha": 1, "alphas": 2}],
)
def test_penalties_that_are_none_are_refused(options):
  with pytest.raises(ValueError, match="alpha >= 0"):
    fit_ridge(*related(), **options)


def test_what_has_no_answer_is_refused():
  x, y = related()
  with pytest.raises(ValueError, match="vary together"):
    fit_procrustes(x, np.ones((300, 2)))
  with pytest.raises(ValueError, match="shrinkage of 0 or more"):
    fit_cca(x, y, shrinkage=-0.1)
  with pytest.raises(ValueError, match="full=True"):
    fit_cca(Moments(full=False).update(x, y))
