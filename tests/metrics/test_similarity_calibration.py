"""Scores against permutations: what is due to chance comes out as chance."""

import logging

import numpy as np
import pytest
from scipy import sparse, stats

from gemma_jax.metrics.similarity import (
  calibrate,
  calibrate_layers,
  kernel_cka,
  linear_cka,
  mutual_knn,
  nearest_neighbours,
  neighbour_overlap,
  permute_kernel,
  permute_neighbours,
  rsa,
)


def correlation(x, y):
  """Of single columns [n, 1] with mean 0 and norm 1."""
  return float(x[:, 0] @ y[:, 0])


def columns(rng, count, n=12):
  x = rng.normal(size=(count, n, 1))
  x -= x.mean(1, keepdims=True)
  return x / np.linalg.norm(x, axis=1, keepdims=True)


def related(n=60, seed=0):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(n, 5))
  return x, x @ rng.normal(size=(5, 7)) + 0.5 * rng.normal(size=(n, 7))


def test_p_is_uniform_under_the_null_and_never_0():
  rng = np.random.default_rng(0)
  draws, found, above = 39, [], 0
  for seed in range(400):
    x, y = columns(rng, 2)
    result = calibrate(x, y, correlation, draws=draws, seed=seed, alpha=0.1)
    found.append(result.p)
    above += result.score > result.threshold
  found = np.array(found)
  assert found.min() >= 1 / 40
  # p is uniform on 1 / 40, ..., 1; a fraction of a step makes it continuous.
  smooth = found - rng.random(400) / 40
  assert stats.kstest(smooth, "uniform").pvalue > 0.01
  assert above <= stats.binom.ppf(0.999, 400, 0.1)


def test_related_rows_have_the_smallest_p_that_there_is():
  x, y = related()
  for measure in (linear_cka, rsa, mutual_knn):
    found = calibrate(x, y, measure, draws=99)
    assert found.p == 1 / 100
    assert found.score == pytest.approx(measure(x, y))
    assert found.null.shape == (99,)
    assert found.null.max() < found.score
    assert found.excess == pytest.approx(found.score - found.null.mean())
    room = 1 - found.threshold
    expected = (found.score - found.threshold) / room
    assert 0 < found.calibrated == pytest.approx(expected)


def test_the_threshold_is_the_order_statistic_of_score_and_null():
  x, y = columns(np.random.default_rng(1), 2)
  for draws, alpha, rank in ((200, 0.05, 191), (199, 0.05, 190), (9, 0.1, 9)):
    found = calibrate(x, y, correlation, draws=draws, alpha=alpha)
    every = np.sort(np.append(found.null, found.score))
    assert found.threshold == every[rank - 1]
    higher = np.sum(found.null >= found.score)
    assert found.p == (1 + higher) / (draws + 1)
    assert (found.p <= alpha) == (found.score > found.threshold)


def test_calibrated_scores_are_cut_to_0_and_1():
  x, y = related()
  same = calibrate(x, x, linear_cka, draws=19)
  assert same.calibrated == pytest.approx(1)
  opposite = calibrate(x, y, lambda x, y: -mutual_knn(x, y), draws=19)
  assert opposite.calibrated == 0
  assert opposite.p == 1
  constant = calibrate(x, y, lambda x, y: 1.0, draws=19)
  assert constant.calibrated == 0
  assert constant.p == 1


def test_another_maximum_stretches_the_scale():
  x, y = related()
  one = calibrate(x, y, linear_cka, draws=19)
  ten = calibrate(
    x, y, lambda x, y: 10 * linear_cka(x, y), draws=19, maximum=10
  )
  assert ten.calibrated == pytest.approx(one.calibrated)
  assert one.calibrated > 0.1


def test_a_biased_score_of_unrelated_rows_is_nothing():
  x, y = np.random.default_rng(2).normal(size=(2, 40, 200))

  def biased(x, y):
    return linear_cka(x, y, debiased=False)

  found = calibrate(x, y, biased, draws=39)
  assert found.score > 0.8
  assert found.calibrated < 0.05
  assert found.p > 0.02


def test_the_best_of_many_layers_is_called_significant_no_more_than_alpha():
  rng = np.random.default_rng(3)
  runs, alpha, draws = 200, 0.1, 39
  corrected = uncorrected = above = 0
  for seed in range(runs):
    xs, ys = columns(rng, 4), columns(rng, 4)
    found = calibrate_layers(
      xs, ys, correlation, draws=draws, seed=seed, alpha=alpha
    )
    corrected += found.p[found.best] <= alpha
    above += (found.calibrated > 0).any()
    each = (1 + (found.null >= found.scores).sum(0)) / (draws + 1)
    uncorrected += each[found.best] <= alpha
  most = stats.binom.ppf(0.999, runs, alpha)
  assert above == corrected <= most
  assert corrected > 0
  assert uncorrected > 2 * most


def test_a_map_of_layers_is_that_of_its_pairs():
  x, y = related()
  noise = np.random.default_rng(4).normal(size=(3, 60, 6))
  xs, ys = [noise[0], x], [noise[1], y, noise[2]]
  found = calibrate_layers(xs, ys, linear_cka, draws=39)
  expected = [[linear_cka(a, b) for b in ys] for a in xs]
  np.testing.assert_allclose(found.scores, expected)
  assert found.null.shape == (39, 2, 3)
  assert found.best == (1, 1)
  assert found.p[1, 1] == 1 / 40
  assert found.calibrated[1, 1] > 0.1
  top = found.null.max((1, 2))
  for at in np.ndindex(2, 3):
    assert found.p[at] == (1 + np.sum(top >= found.scores[at])) / 40
    assert (found.calibrated[at] > 0) == (found.scores[at] > found.threshold)
  # One permutation for all layers: the same as of the pair alone.
  pair = calibrate(x, y, linear_cka, draws=39)
  np.testing.assert_array_equal(pair.null, found.null[:, 1, 1])


def test_one_permutation_serves_all_layers():
  rows = np.arange(20.0)[:, None]
  seen = []

  def measure(x, y):
    seen.append((x[0, 0], tuple(y[:, 0] % 100)))
    return 0.0

  calibrate_layers([rows, rows + 100], [rows, rows + 100], measure, draws=19)
  calls = np.array([order for _, order in seen]).reshape(20, 4, 20)
  assert (calls == calls[:, :1]).all()
  assert len(np.unique(calls[:, 0], axis=0)) == 20
  assert (np.sort(calls[:, 0]) == np.arange(20)).all()
  # x stays as it is.
  assert {first for first, _ in seen} == {0, 100}


def test_rows_stay_within_their_blocks():
  blocks = np.array(["b", "a", "b", "c", "a", "b"] * 5)
  names, own = np.unique(blocks, return_inverse=True)
  rows = np.stack([np.arange(30), own], axis=1).astype(float)
  orders = []

  def measure(x, y):
    np.testing.assert_array_equal(x[:, 1], y[:, 1])
    orders.append(y[:, 0])
    return 0.0

  calibrate(rows, rows, measure, draws=50, blocks=blocks)
  orders = np.stack(orders)
  assert (np.sort(orders, 1) == np.arange(30)).all()
  moved = (orders[1:] != np.arange(30)).mean(0)
  assert moved.min() > 0.5
  assert len(names) == 3


def test_what_blocks_share_is_chance_within_them():
  rng = np.random.default_rng(5)
  blocks = np.repeat(np.arange(8), 10)
  across, within = [], []
  for seed in range(20):
    centres = 5 * rng.normal(size=(8, 6))
    x, y = (centres[blocks] + rng.normal(size=(80, 6)) for _ in range(2))
    for found, b in ((across, None), (within, blocks)):
      one = calibrate(x, y, linear_cka, draws=19, blocks=b, seed=seed)
      found.append(one.p)
  assert max(across) == 1 / 20
  assert stats.kstest(within - rng.random(20) / 20, "uniform").pvalue > 0.01


def test_kernels_and_neighbours_need_not_be_computed_again():
  x, y = related()
  rows = calibrate(x, y, linear_cka, draws=19)
  kernels = calibrate(
    x @ x.T, y @ y.T, kernel_cka, draws=19, permute=permute_kernel
  )
  np.testing.assert_allclose(kernels.null, rows.null, rtol=1e-9, atol=1e-12)
  assert kernels.p == rows.p
  rows = calibrate(x, y, mutual_knn, draws=19)
  near = calibrate(
    nearest_neighbours(x),
    nearest_neighbours(y),
    neighbour_overlap,
    draws=19,
    permute=permute_neighbours,
  )
  np.testing.assert_array_equal(near.null, rows.null)
  assert near.score == rows.score


def test_sparse_rows_and_seeds():
  x, y = related()
  codes = sparse.csr_array(np.maximum(y, 0))

  def measure(x, y):
    return linear_cka(x, y.toarray())

  a, b = (calibrate(x, codes, measure, draws=19, seed=s) for s in (0, 1))
  dense = calibrate(x, codes.toarray(), linear_cka, draws=19)
  np.testing.assert_array_equal(a.null, dense.null)
  assert (a.null != b.null).any()


def test_a_massive_row_is_warned_of_once_not_for_each_permutation(caplog):
  x, y = related()
  x[3] *= 1000
  with caplog.at_level(logging.WARNING, "gemma_jax"):
    calibrate(x, y, linear_cka, draws=19)
    assert len(caplog.records) == 1
    linear_cka(x, y)
  assert len(caplog.records) == 2


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"draws": 18}, "at least 1 / alpha - 1 draws"),
    ({"alpha": 0}, "alpha in"),
    ({"alpha": 1.0}, "alpha in"),
    ({"blocks": np.arange(60)}, "60 blocks of one row each"),
    ({"blocks": np.zeros(59)}, r"60 rows, got \(59,\)"),
    ({"measure": lambda x, y: np.nan}, "finite scores, got 1 others"),
  ],
)
def test_calibrations_that_say_nothing_are_errors(options, message):
  x, y = related()
  with pytest.raises(ValueError, match=message):
    calibrate(x, y, **({"measure": linear_cka, "draws": 19} | options))


def test_layers_of_other_rows_are_an_error():
  x, y = related()
  for xs, ys in (([x, x[1:]], [y]), ([x], [y[1:]]), ([], [y]), ([x], [])):
    with pytest.raises(ValueError, match="same number of rows"):
      calibrate_layers(xs, ys, linear_cka)
