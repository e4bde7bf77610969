"""FVU: the answers that are known beforehand."""

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.metrics import RunningFVU, fvu


def normal(*shape, seed=0, mean=0.0):
  return np.random.default_rng(seed).normal(mean, 1, shape)


def two_pass(x, x_hat):
  x, x_hat = np.asarray(x, np.float64), np.asarray(x_hat, np.float64)
  return np.sum((x - x_hat) ** 2) / np.sum((x - x.mean(0)) ** 2)


@pytest.mark.parametrize("mean", [0.0, 5.0, 1e3])
def test_the_mean_predictor_scores_exactly_one(mean):
  x = normal(2_000, 64, mean=mean)
  predicted = np.broadcast_to(x.mean(0), x.shape)
  assert fvu(x, predicted) == 1


def test_a_perfect_reconstruction_scores_zero():
  x = normal(100, 8)
  assert fvu(x, x) == 0


def test_an_offset_costs_its_square_over_the_variance():
  # Var(x - x_hat) / Var(x), which others report, is 0 here.
  x, c = normal(500, 6), np.arange(1.0, 7)
  expected = c @ c / x.var(0).sum()
  assert fvu(x, x + c) == pytest.approx(expected, rel=1e-12)


def test_zeros_score_the_uncentred_square():
  x = normal(500, 6, mean=3.0)
  expected = np.sum(x**2) / np.sum((x - x.mean(0)) ** 2)
  assert fvu(x, np.zeros_like(x)) == pytest.approx(expected, rel=1e-12)


def test_shrinking_the_deviations_by_half_leaves_a_quarter():
  x = normal(500, 6, mean=3.0)
  mean = x.mean(0)
  assert fvu(x, mean + (x - mean) / 2) == pytest.approx(0.25, rel=1e-12)


def test_an_independent_copy_scores_two():
  x, other = normal(200_000, 2), normal(200_000, 2, seed=1)
  assert fvu(x, other) == pytest.approx(2, rel=0.02)


def test_it_is_pooled_over_dims_and_not_a_mean_of_ratios():
  x = normal(1_000, 2) * [10, 0.1]
  x -= x.mean(0)
  rec = x * [1, 0]  # all of the small dim is lost
  small, large = x.var(0)[1], x.var(0)[0]
  assert fvu(x, rec) == pytest.approx(small / (small + large), rel=1e-9)


CHUNKS = [(4_096,), (1,) * 4_096, (1, 4_095), (4_095, 1), (1_000,) * 4 + (96,)]


@pytest.mark.parametrize("sizes", CHUNKS, ids=lambda s: f"{len(s)}x{s[0]}")
@pytest.mark.parametrize("mean", [0.0, 1e3, 1e5])
def test_streaming_equals_two_passes_with_a_mean_far_above_the_spread(
  sizes, mean
):
  x = normal(4_096, 16, mean=mean).astype(np.float32)
  x_hat = (x + 0.3 * normal(4_096, 16, seed=1)).astype(np.float32)
  order = np.random.default_rng(2).permutation(4_096)
  running, start = RunningFVU(), 0
  for size in sizes:
    rows = order[start : start + size]
    running.update(x[rows], x_hat[rows])
    start += size
  assert start == running.count == 4_096
  assert running.compute() == pytest.approx(two_pass(x, x_hat), rel=1e-9)
  x = x.astype(np.float64)
  assert running.variance == pytest.approx(x.var(0).sum(), rel=1e-9)
  np.testing.assert_allclose(running.mean, x.mean(0), rtol=1e-12)


def test_a_first_chunk_that_is_an_outlier_costs_no_digits():
  x = normal(1_000, 4)
  x[0] = 1e4
  x_hat = x + normal(1_000, 4, seed=1)
  running = RunningFVU().update(x[:1], x_hat[:1]).update(x[1:], x_hat[1:])
  assert running.compute() == pytest.approx(two_pass(x, x_hat), rel=1e-9)


def test_leading_axes_are_rows():
  x, x_hat = normal(4, 5, 6), normal(4, 5, 6, seed=1)
  expected = two_pass(x.reshape(20, 6), x_hat.reshape(20, 6))
  assert fvu(x, x_hat) == pytest.approx(expected, rel=1e-12)


def test_jax_arrays_and_bfloat16_are_taken_at_their_value():
  x = jnp.asarray(normal(300, 6), jnp.bfloat16)
  x_hat = jnp.asarray(normal(300, 6, seed=1), jnp.float32)
  assert fvu(x, x_hat) == pytest.approx(two_pass(x, x_hat), rel=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
  ("which", "message"),
  [
    (0, "1 in the target, 0 in the reconstruction"),
    (1, "0 in the target, 1 in the reconstruction"),
  ],
)
def test_a_value_that_is_not_finite_is_an_error_that_says_where(
  which, message, value
):
  pair = [normal(10, 3), normal(10, 3, seed=1)]
  running = RunningFVU().update(*pair)
  before = running.compute()
  pair[which][4, 1] = value
  with pytest.raises(FloatingPointError, match=message):
    running.update(*pair)
  assert running.compute() == before


def test_infinities_that_cancel_are_an_error_too():
  x = normal(10, 3)
  x[0, 0] = np.inf
  with pytest.raises(FloatingPointError, match="1 in the target, 1 in the"):
    fvu(x, x)


@pytest.mark.parametrize(
  ("x", "x_hat"),
  [((4, 3), (4, 2)), ((4, 3), (3,)), ((4, 3), (1, 3)), ((), ())],
)
def test_shapes_that_differ_are_refused_and_not_broadcast(x, x_hat):
  with pytest.raises(ValueError, match="must have one shape"):
    fvu(np.ones(x), np.ones(x_hat))


def test_chunks_of_another_width_are_refused():
  running = RunningFVU().update(normal(5, 3), normal(5, 3))
  with pytest.raises(ValueError, match="width"):
    running.update(normal(5, 1), normal(5, 1))


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
@pytest.mark.parametrize("size", [1, 7, 100])
def test_a_constant_target_has_no_fvu(value, size):
  x = np.full((100, 3), value, np.float32)
  running = RunningFVU()
  for start in range(0, 100, size):
    running.update(x[start : start + size], x[start : start + size] + 1)
  assert np.isnan(running.compute())


def test_no_rows_have_no_fvu():
  assert np.isnan(RunningFVU().compute())
  assert np.isnan(
    RunningFVU().update(np.ones((0, 3)), np.ones((0, 3))).compute()
  )
