"""Every published formula against its own lines of NumPy."""

import numpy as np
import pytest

from gemma_jax.metrics import RunningReconstruction, fvu
from gemma_jax.metrics.definitions import DEFINITIONS

BATCH_DEPENDENT = {"fvu_batch", "ev_legacy", "relative_bias"}


def normal(*shape, seed=0, mean=0.0):
  return np.random.default_rng(seed).normal(mean, 1, shape)


def pair(rows=300, width=8, mean=2.0, dtype=np.float64):
  """A target with a mean, and a shrunken, shifted, noisy copy of it."""
  x = normal(rows, width, mean=mean) * np.linspace(0.5, 3, width)
  noise = 0.3 * normal(rows, width, seed=1) * np.linspace(0.1, 2, rows)[:, None]
  return x.astype(dtype), (0.8 * x + 0.1 + noise).astype(dtype)


def of(*batches, **options):
  running = RunningReconstruction()
  for x, x_hat in batches:
    running.update(x, x_hat, **options)
  return running.compute()


def cut(x, x_hat, sizes):
  ends = np.cumsum(sizes)[:-1]
  return list(zip(np.split(x, ends), np.split(x_hat, ends), strict=True))


def oracle(batches):
  """Two passes over everything, from the formulas as they were published."""
  batches = [tuple(a.astype(np.float64) for a in b) for b in batches]
  x, r = (np.concatenate(side) for side in zip(*batches, strict=True))
  e, mu = x - r, x.mean(0)
  squares = (x**2).sum(1)
  norms, lengths = np.linalg.norm(x, axis=1), np.linalg.norm(r, axis=1)
  legacy, per_batch, bias = [], [], []
  for a, b in batches:
    spread = ((a - a.mean(0)) ** 2).sum(1)
    legacy.append(1 - ((a - b) ** 2).sum(1) / spread)
    per_batch.append(((a - b) ** 2).sum() / spread.sum())
    bias.append((b**2).sum(1).mean() / (a * b).sum(1).mean())
  return {
    "fvu": (e**2).sum() / ((x - mu) ** 2).sum(),
    "fvu_batch": np.mean(per_batch),
    "fvu_resid_var": np.var(e, 0, ddof=1).sum() / np.var(x, 0, ddof=1).sum(),
    "ev_legacy": np.concatenate(legacy).mean(),
    "ev_2025": 1
    - (e**2).sum(1).mean() / (squares.mean() - (x**2).mean(0).mean() ** 2),
    "nmse0": (e**2).sum() / (x**2).sum(),
    "mse": (e**2).sum() / len(x),
    "cosine": ((x * r).sum(1) / (norms * lengths)).mean(),
    "l2_ratio": (lengths / norms).mean(),
    "relative_bias": np.mean(bias),
    "shrinkage": (r**2).sum() / (x * r).sum(),
  }


@pytest.mark.parametrize("name", sorted(DEFINITIONS))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_number_is_what_its_formula_says(name, dtype):
  batches = cut(*pair(dtype=dtype), (120, 100, 80))
  expected = oracle(batches)
  assert set(expected) == set(DEFINITIONS)
  assert of(*batches)[name] == pytest.approx(expected[name], rel=1e-11)


def test_the_definitions_are_different_numbers():
  values = sorted(of(*cut(*pair(), (120, 180))).values())
  assert np.diff(values).min() > 1e-4


CHUNKS = [(600,), (1,) * 600, (1, 599), (599, 1), (7, 300, 293)]


@pytest.mark.parametrize("sizes", CHUNKS, ids=lambda s: f"{len(s)}x{s[0]}")
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_batches_and_a_mean_of_1000_sigma_cost_no_digits(sizes, mean):
  x = normal(600, 8, mean=mean).astype(np.float32)
  x_hat = (x + 0.3 * normal(600, 8, seed=1) + 0.1).astype(np.float32)
  got, expected = of(*cut(x, x_hat, sizes)), oracle([(x, x_hat)])
  for name in set(DEFINITIONS) - BATCH_DEPENDENT:
    assert got[name] == pytest.approx(expected[name], rel=1e-9), name


def test_batch_means_flatter_small_batches():
  x, x_hat = pair()
  by = {size: of(*cut(x, x_hat, (size,) * (300 // size))) for size in (3, 300)}
  assert by[3]["fvu_batch"] > 1.2 * by[300]["fvu_batch"]
  assert by[300]["fvu_batch"] == pytest.approx(by[300]["fvu"], rel=1e-12)
  assert by[3]["fvu"] == pytest.approx(by[300]["fvu"], rel=1e-12)


@pytest.mark.parametrize("sizes", CHUNKS, ids=lambda s: f"{len(s)}x{s[0]}")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("mean", [0.0, 5.0, 1e3, 1e5])
def test_the_mean_predictor_scores_exactly_one(sizes, dtype, mean):
  x = normal(600, 16, mean=mean).astype(dtype)
  predicted = np.broadcast_to(x.mean(0, dtype=np.float64), x.shape)
  got = of(*cut(x, predicted, sizes))
  assert got["fvu"] == 1
  assert got["fvu_resid_var"] == 1


def test_a_mean_in_float32_scores_one_where_float32_holds_it():
  x = np.random.default_rng(0).integers(-9, 9, (512, 16)).astype(np.float32)
  mean = x.mean(0)
  assert mean.dtype == np.float32
  assert of((x, np.broadcast_to(mean, x.shape)))["fvu"] == 1
  # Elsewhere its rounding is an error like any other, and counted.
  x = normal(500, 16, mean=1e4).astype(np.float32)
  wrong = x.mean(0, dtype=np.float64).astype(np.float32)
  gap = wrong - x.mean(0, dtype=np.float64)
  expected = gap @ gap / x.astype(np.float64).var(0).sum()
  got = of((x, np.broadcast_to(wrong, x.shape)))["fvu"] - 1
  assert got == pytest.approx(expected, rel=1e-4)
  assert got > 1e-10


def test_a_perfect_reconstruction_is_perfect_to_the_bit():
  x = normal(300, 8, mean=1e3)
  got = of(*cut(x, x, (100, 1, 199)))
  assert got["fvu"] == got["fvu_resid_var"] == got["mse"] == got["nmse0"] == 0
  assert got["ev_legacy"] == got["ev_2025"] == got["shrinkage"] == 1
  assert got["cosine"] == pytest.approx(1, abs=1e-15)


def test_predicting_the_mean_looks_excellent_to_the_formula_of_2025():
  # E|x|^2 = 64 * 26; 1 - 64 / (64 * 26 - 26^2) = 0.93522. Right is 0.
  x = normal(20_000, 64, mean=5.0)
  got = of((x, np.broadcast_to(x.mean(0), x.shape)))
  assert got["ev_2025"] == pytest.approx(1 - 64 / (1664 - 676), abs=5e-4)
  assert got["fvu"] == 1


def test_a_mean_of_ratios_calls_a_ruin_a_success():
  # The toy of reference/methods.md, appendix A: -20.4 against +0.34.
  rng = np.random.default_rng(2)
  norm = rng.lognormal(size=(20_000, 1))
  x = norm * rng.normal(size=(20_000, 64)) / 8
  noise = 0.3 * norm**2 * rng.normal(size=(20_000, 64)) / 8
  got = of((x, x + noise))
  assert 1 - got["fvu"] == pytest.approx(-20.4, rel=0.05)
  assert got["ev_legacy"] == pytest.approx(0.34, abs=0.04)


def test_a_constant_offset_is_free_for_the_residual_variance_alone():
  x, x_hat = pair()
  x_hat = x_hat - (x_hat - x).mean(0)
  plain, offset = of((x, x_hat)), of((x, x_hat + 5))
  assert offset["fvu_resid_var"] == pytest.approx(
    plain["fvu_resid_var"], rel=1e-12
  )
  extra = 25 * 8 / x.var(0).sum()
  assert offset["fvu"] == pytest.approx(plain["fvu"] + extra, rel=1e-12)
  assert of((x, x + 5))["fvu_resid_var"] < 1e-25


def test_shrinkage_is_the_factor_that_reconstructions_are_short_by():
  x = normal(300, 8, mean=1.0)
  got = of((x, 0.7 * x))
  for name in ("shrinkage", "relative_bias", "l2_ratio"):
    assert got[name] == pytest.approx(0.7, rel=1e-12)
  assert got["cosine"] == pytest.approx(1, rel=1e-12)


def test_shrinkage_is_pooled_and_relative_bias_a_mean_over_batches():
  x = normal(200, 8) * np.repeat([1, 10], 100)[:, None]
  x_hat = x * np.repeat([0.5, 0.9], 100)[:, None]
  got = of(*cut(x, x_hat, (100, 100)))
  assert got["relative_bias"] == pytest.approx(0.7, rel=1e-12)
  assert got["shrinkage"] > 0.89


def test_fvu_is_the_function_of_that_name():
  x, x_hat = pair()
  assert of((x, x_hat))["fvu"] == fvu(x, x_hat)


def test_masked_rows_count_for_nothing_whatever_they_hold():
  x, x_hat = (a.reshape(10, 30, 8) for a in pair())
  mask = np.random.default_rng(0).random((10, 30)) < 0.7
  expected = of((x[mask], x_hat[mask]))
  x, x_hat = x.copy(), x_hat.copy()
  x[~mask], x_hat[~mask] = np.nan, np.inf
  running = RunningReconstruction().update(x, x_hat, mask=mask)
  assert running.count == mask.sum()
  assert running.compute() == expected
  before = running.compute()
  running.update(x, x_hat, mask=np.zeros_like(mask))
  assert running.compute() == before


def test_zero_vectors_have_no_direction():
  x, x_hat = normal(100, 4), normal(100, 4, seed=1)
  expected = of((x[20:], x_hat[20:]))
  x[:10] = 0  # no ratio and no angle
  got = of((x[:10], x_hat[:10]), (x[20:], x_hat[20:]))
  for name in ("cosine", "l2_ratio"):
    assert got[name] == pytest.approx(expected[name], rel=1e-12)
  x_hat[20:] = 0  # a reconstruction of nothing
  got = of((x[20:], x_hat[20:]))
  assert got["cosine"] == got["l2_ratio"] == 0
  assert np.isnan(got["shrinkage"])
  assert np.isnan(got["relative_bias"])


@pytest.mark.parametrize("last", [1, 5])
def test_batches_without_a_spread_are_left_out_of_means_over_batches(last):
  x, x_hat = pair()
  expected = of((x, x_hat))
  constant = np.full((last, 8), 0.1)
  got = of((x, x_hat), (constant, constant + 1))
  for name in ("fvu_batch", "ev_legacy"):
    assert got[name] == expected[name]
  assert got["fvu"] != expected["fvu"]
  alone = of((x[:1], x_hat[:1]), (x[1:2], x_hat[1:2]))
  assert np.isnan(alone["fvu_batch"])
  assert np.isnan(alone["ev_legacy"])
  assert np.isfinite(alone["fvu"])


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_an_error_and_changes_nothing(
  which, value
):
  arrays = [a.copy() for a in pair()]
  running = RunningReconstruction().update(*arrays)
  before = running.compute()
  arrays[which][3, 2] = value
  with pytest.raises(FloatingPointError, match="1 in the"):
    running.update(*arrays)
  assert running.compute() == before


def test_what_does_not_belong_together_is_refused():
  x, x_hat = pair(10, 3)
  running = RunningReconstruction()
  with pytest.raises(ValueError, match="must have one shape"):
    running.update(x, x_hat[:, :2])
  with pytest.raises(ValueError, match="mask is"):
    running.update(x, x_hat, mask=np.ones(9, bool))
  with pytest.raises(ValueError, match="must be bool"):
    running.update(x, x_hat, mask=np.ones(10))
  with pytest.raises(ValueError, match="document is"):
    running.update(x, x_hat, np.zeros(3, int))
  with pytest.raises(ValueError, match="whole numbers >= 0"):
    running.update(x, x_hat, np.full(10, -1))
  with pytest.raises(ValueError, match="whole numbers >= 0"):
    running.update(x, x_hat, np.zeros(10))
  assert running.count == 0
  running.update(x, x_hat)
  with pytest.raises(ValueError, match="others had none"):
    running.update(x, x_hat, np.zeros(10, int))
  with pytest.raises(ValueError, match="width"):
    running.update(x[:, :2], x_hat[:, :2])
  running = RunningReconstruction().update(x, x_hat, np.zeros(10, int))
  with pytest.raises(ValueError, match="others had"):
    running.update(x, x_hat)


def test_nothing_to_measure_is_an_error():
  with pytest.raises(ValueError, match="No row"):
    RunningReconstruction().compute()
  with pytest.raises(ValueError, match="No row"):
    of((np.ones((0, 3)), np.ones((0, 3))))


@pytest.mark.parametrize("sizes", [(100,), (7,) * 14 + (2,), (1,) * 100])
def test_a_constant_target_is_an_error(sizes):
  x = np.full((100, 3), 0.1)
  with pytest.raises(ValueError, match="no variance"):
    of(*cut(x, x + 1, sizes))
