"""Running statistics against two passes of NumPy in float64, and SciPy."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from scipy import stats

from gemma_jax import models
from gemma_jax.activations.statistics import (
  LABELS,
  OUTLIERS,
  Statistics,
  block,
  measure,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")

D, T = 40, 10
SOURCES = ("code", "prose", "none")

run = jax.jit(block, static_argnames="covariance")


def make_rows(n=3_000, *, kind="normal", dtype="float32", d=D, seed=0):
  """x [n, d] of one dtype, correlated, with a scale for each dimension."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(n, d)) @ (np.eye(d) + 0.3 * rng.normal(size=(d, d)))
  if kind == "far":
    x = x / x.std(0) + 1_000
  elif kind == "heavy":
    x = rng.standard_t(3, size=(n, d)) * np.geomspace(1e-12, 1e8, d)
  return np.array(jnp.asarray(x, dtype))


def make_labels(n, seed=0):
  rng = np.random.default_rng(seed + 1)
  return {
    "document": np.arange(n, dtype=np.int32) // 7,
    "position": np.arange(n, dtype=np.int32) % T,
    "token": rng.integers(0, 999, n, dtype=np.int32),
    "source": rng.integers(0, 2, n, dtype=np.int32),
  }


def part(labels, rows):
  return {name: x[rows] for name, x in labels.items()}


def make_statistics(d=D, **options):
  return Statistics(d, positions=T, sources=SOURCES, **options)


def add(statistics, x, labels, start, stop, *, covariance=False, size=None):
  """One block of `size` rows, of which start..stop are valid, others NaN."""
  n = stop - start
  padded = np.full((size or n, x.shape[1]), np.nan, x.dtype)
  # Invalid rows stand between the valid ones.
  places = np.sort(np.random.default_rng(n).permutation(len(padded))[:n])
  padded[places] = x[start:stop]
  valid = np.zeros(len(padded), bool)
  valid[places] = True
  sums = jax.device_get(run(padded, valid, covariance=covariance))
  rows = slice(start, stop)
  statistics.update(sums, first_row=start, **part(labels, rows))


def collect(x, labels, sizes, *, order=None, covariance=False, **options):
  """Statistics of blocks of the given sizes, the sizes in a cycle."""
  bounds = [0]
  for size in itertools.cycle(sizes):
    bounds.append(min(bounds[-1] + size, len(x)))
    if bounds[-1] == len(x):
      break
  pairs = list(itertools.pairwise(bounds))
  out = make_statistics(x.shape[1], covariance=covariance, **options)
  for i in order(len(pairs)) if order else range(len(pairs)):
    add(out, x, labels, *pairs[i], covariance=covariance, size=max(sizes) + 3)
  return out


def assert_close(got, expected, scale=1.0, rtol=1e-6):
  got, expected = np.asarray(got, float), np.asarray(expected)
  tolerance = rtol * np.maximum(np.abs(expected), scale)
  assert np.all(np.abs(got - expected) <= tolerance), (
    np.max(np.abs(got - expected) / tolerance) * rtol
  )


def assert_dims(dims, x):
  x = x.astype(np.float64)
  deviation = x.std(0)
  assert_close(dims["mean"], x.mean(0), deviation)
  assert_close(dims["variance"], x.var(0), 0)
  # A third moment cancels: its error is relative to mean |x - mean|^3.
  third = np.mean(np.abs(x - x.mean(0)) ** 3, 0) / deviation**3
  assert_close(dims["skew"], stats.skew(x), third)
  assert_close(np.add(dims["kurtosis"], 3), stats.kurtosis(x) + 3, 0)
  np.testing.assert_array_equal(dims["min"], x.min(0))
  np.testing.assert_array_equal(dims["max"], x.max(0))


def finite_leaves(tree):
  if isinstance(tree, dict):
    return all(map(finite_leaves, tree.values()))
  if isinstance(tree, list):
    return all(map(finite_leaves, tree))
  return tree is None or isinstance(tree, str) or np.isfinite(tree)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["normal", "far", "heavy"])
def test_moments_are_those_of_two_passes_in_float64(kind, dtype):
  x = make_rows(kind=kind, dtype=dtype)
  got = collect(x, make_labels(len(x)), (700, 33, 256, 1))
  x = x.astype(np.float64)
  varies = x.std(0) > 0  # bfloat16 near 1000 has steps of 4
  dims = {
    name: np.array(values, float)[varies]
    for name, values in got.summary()["dims"].items()
  }
  assert_dims(dims, x[:, varies])
  norm = np.linalg.norm(x, axis=1)
  assert got.mean_norm == pytest.approx(norm.mean(), rel=1e-6)
  assert got.mean_square == pytest.approx(np.mean(norm**2), rel=1e-6)


@pytest.mark.parametrize("seed", [1, 2])
def test_order_and_chunking_do_not_matter(seed):
  x, labels = make_rows(2_000), make_labels(2_000)
  rng = np.random.default_rng(seed)
  sizes = rng.integers(1, 400, 5).tolist()
  kwargs = {"covariance": True, "chunk": 2**20}
  one = collect(x, labels, (2_000,), **kwargs)
  many = collect(x, labels, sizes, order=rng.permutation, **kwargs)
  a, b = one.state(), many.state()
  assert a.keys() == b.keys()
  for name in set(a) - {"moments", "comoment", "outlier_norms", "sources"}:
    # The norms are the same to a rounding, wherever their rows stood.
    np.testing.assert_allclose(
      b[name], a[name], rtol=1e-6, atol=1e-6, err_msg=name
    )
  assert_dims(many.summary()["dims"], x)
  np.testing.assert_allclose(one.covariance, many.covariance, atol=1e-6)
  np.testing.assert_allclose(a["outlier_norms"], b["outlier_norms"], rtol=1e-6)


def test_merged_halves_are_the_whole_and_nothing_adds_nothing():
  x, labels = make_rows(1_500), make_labels(1_500)
  whole = collect(x, labels, (500,), covariance=True)
  first = collect(x[:600], part(labels, slice(600)), (200,), covariance=True)
  second = make_statistics(covariance=True)
  for start in (600, 1_050):
    add(second, x, labels, start, start + 450, covariance=True)
  total = make_statistics(covariance=True)
  total.merge(make_statistics(covariance=True))
  assert total.count == 0
  total.merge(second)
  total.merge(first)
  total.merge(make_statistics(covariance=True))
  assert_dims(total.summary()["dims"], x)
  assert_close(total.covariance, np.cov(x.T.astype(float), bias=True), 1)
  for name, values in whole.state().items():
    if values.dtype.kind == "i":
      np.testing.assert_array_equal(total.state()[name], values, name)
  got, expected = total.summary(), whole.summary()
  assert (
    got["outliers"]["largest"][0]["row"]
    == (expected["outliers"]["largest"][0]["row"])
  )


def test_the_covariance_is_that_of_numpy_also_far_from_zero():
  x = make_rows(2_000, kind="far")
  got = collect(x, make_labels(2_000), (640, 100), covariance=True)
  expected = np.cov(x.T.astype(np.float64), bias=True)
  np.testing.assert_allclose(got.covariance, expected, atol=2e-6)
  np.testing.assert_allclose(np.diag(got.covariance), got.variance, rtol=1e-6)
  values = np.linalg.eigvalsh(expected)
  summary = got.summary()
  assert summary["participation_ratio"] == pytest.approx(
    values.sum() ** 2 / np.sum(values**2), rel=1e-5
  )
  assert summary["largest_eigenvalue_share"] == pytest.approx(
    values[-1] / values.sum(), rel=1e-5
  )
  assert collect(x, make_labels(2_000), (640,)).covariance is None


def test_eight_devices_sum_as_one_does():
  x = make_rows(1_024, dtype="bfloat16")
  valid = np.arange(1_024) % 5 != 2
  mesh = models.make_mesh({"data": 8})
  one = jax.device_get(run(x, valid, covariance=True))
  split = NamedSharding(mesh, P("data"))
  placed = jax.device_put(x, split), jax.device_put(valid, split)
  many = run(*placed, covariance=True)
  assert many["norm"].sharding.is_equivalent_to(split, 1)
  for name, values in jax.device_get(many).items():
    if values.shape == valid.shape:  # NaN stands where a row is not valid
      values, one[name] = values[valid], one[name][valid]
    scale = np.abs(np.asarray(one[name], float)).max()
    np.testing.assert_allclose(values, one[name], atol=1e-6 * scale)


def test_rows_with_nan_or_inf_are_counted_and_left_out():
  x, labels = make_rows(300), make_labels(300)
  bad = x.copy()
  bad[7, 3] = np.nan
  bad[9, :2] = np.inf, -np.inf
  bad[11, 5:7] = np.inf, np.nan
  got = collect(bad, labels, (128,)).summary()
  assert got["not_finite"] == {"rows": 3, "nan": 2, "inf": 3}
  assert got["tokens"] == 297
  keep = np.delete(np.arange(300), (7, 9, 11))
  assert_dims(got["dims"], x[keep])
  named = {o["row"] for o in got["outliers"]["largest"]}
  assert not named & {7, 9, 11}
  only = collect(np.full_like(x, np.nan), labels, (300,)).summary()
  assert only["not_finite"]["rows"] == 300
  assert finite_leaves(only)


def test_norms_go_by_position_and_by_source():
  x, labels = make_rows(1_000), make_labels(1_000)
  got = collect(x, labels, (130,)).summary()
  norm = np.linalg.norm(x.astype(np.float64), axis=1)
  for t in range(T):
    own = norm[labels["position"] == t]
    table = got["norm_by_position"]
    assert table["count"][t] == len(own)
    assert table["mean"][t] == pytest.approx(own.mean(), rel=1e-6)
    assert table["std"][t] == pytest.approx(own.std(), rel=1e-5)
  for i, name in enumerate(SOURCES[:2]):
    own = norm[labels["source"] == i]
    table = got["norm_by_source"][name]
    assert table["count"] == len(own)
    assert table["mean"] == pytest.approx(own.mean(), rel=1e-6)
  nothing = {"mean": None, "std": None, "count": 0}
  assert got["norm_by_source"]["none"] == nothing
  for share, value in got["norm_quantiles"].items():
    low, high = (
      np.quantile(norm, float(share), method=side)
      for side in ("lower", "higher")
    )
    assert low * 2 ** (-1 / 32) <= value <= high * 2 ** (1 / 32), share
  assert sum(got["norm_histogram"]["counts"]) == 1_000


def is_massive(x):
  size = np.abs(x.astype(np.float64))
  peak = size.max(1)
  return (peak > 100) & (peak > 1_000 * np.median(size, axis=1))


@pytest.mark.parametrize("d", [40, 41])
def test_planted_massive_activations_are_found_and_named(d):
  x = make_rows(500, d=d) * np.float32(0.1)
  x[[3, 50, 400], 17] = (5_000, -6_000, 5_500)
  x[[60, 61], 30] = 4_000
  x[70, 5] = 90  # large beside the median, not large
  x[80] = np.linspace(100, 300, d)  # large, not beside the median
  massive = is_massive(x)
  assert massive.sum() == 5
  got = collect(x, make_labels(500), (64,)).summary()["massive"]
  assert got == {
    "count": 5,
    "share": 0.01,
    "dims": [{"dim": 17, "count": 3}, {"dim": 30, "count": 2}],
  }


def test_massive_rows_are_those_that_the_median_tells():
  rng = np.random.default_rng(3)
  x = rng.normal(size=(2_000, 33)).astype(np.float32)
  x[:, 4] = rng.uniform(50, 1_500, 2_000)  # around both bounds
  sums = jax.device_get(run(x, np.ones(2_000, bool)))
  expected = is_massive(x)
  assert 0.1 < expected.mean() < 0.9
  np.testing.assert_array_equal(sums["massive"], expected)
  np.testing.assert_array_equal(sums["peak_dim"], np.abs(x).argmax(1))
  np.testing.assert_array_equal(sums["peak"], np.abs(x).max(1))


def test_outliers_are_named_with_where_they_stand():
  x, labels = make_rows(2_000), make_labels(2_000)
  x[1_234] *= 50
  x[77] *= 1e-3
  got = collect(x, labels, (300,)).summary()["outliers"]
  norm = np.linalg.norm(x.astype(np.float64), axis=1)
  order = np.argsort(norm)
  rows = {end: [o["row"] for o in found] for end, found in got.items()}
  assert rows["largest"] == order[::-1][:OUTLIERS].tolist()
  assert rows["smallest"] == order[:OUTLIERS].tolist()
  log = np.log2(norm)
  deviation = 1.4826 * np.median(np.abs(log - np.median(log)))
  for end, row in (("largest", 1_234), ("smallest", 77)):
    first = got[end][0]
    assert {name: first[name] for name in LABELS} == {
      name: int(labels[name][row]) for name in LABELS
    }
    assert first["norm"] == pytest.approx(norm[row], rel=1e-6)
    z = (log[row] - np.median(log)) / deviation
    assert first["z"] == pytest.approx(z, rel=0.05)


def test_fewer_rows_than_outliers_are_each_named_once():
  x, labels = make_rows(5), make_labels(5)
  got = collect(x, labels, (2,)).summary()["outliers"]
  assert sorted(o["row"] for o in got["largest"]) == [0, 1, 2, 3, 4]
  assert got["smallest"] == got["largest"][::-1]


def test_a_shift_of_the_second_half_is_seen_where_it_begins():
  x, labels = make_rows(4_096), make_labels(4_096)
  make = functools.partial(collect, labels=labels, sizes=(128,), chunk=512)
  still = make(x).summary()["drift"]
  assert still["first_row"] == list(range(0, 4_096, 512))
  assert still["rows"] == [512] * 8
  assert still["shift"][0] is None
  for shift, chance in zip(
    still["shift"][1:], still["chance"][1:], strict=True
  ):
    assert 0.5 * chance < shift < 1.5 * chance
  assert all(0.95 < ratio < 1.05 for ratio in still["norm_ratio"][1:])
  moved = x.copy()
  moved[2_048:] += 2 * x.std(0)
  drift = make(moved).summary()["drift"]
  assert drift["largest"]["first_row"] == 2_048
  before, chunk = moved[:2_048].astype(float), moved[2_048:2_560].astype(float)
  apart = (chunk.mean(0) - before.mean(0)) / moved.astype(float).std(0)
  expected = np.sqrt(np.mean(apart**2))
  assert drift["largest"]["shift"] == pytest.approx(expected, rel=1e-5)
  grown = x * np.where(np.arange(4_096) < 2_048, 1, 3)[:, None]
  assert (
    make(grown.astype(np.float32)).summary()["drift"]["norm_ratio"][4] > 2.7
  )


def test_a_short_last_chunk_is_joined_to_the_one_before():
  x, labels = make_rows(1_200), make_labels(1_200)
  drift = collect(x, labels, (100,), chunk=500).summary()["drift"]
  assert drift["rows"] == [500, 700]
  x = x.astype(np.float64)
  apart = (x[500:].mean(0) - x[:500].mean(0)) / x.std(0)
  shift = np.sqrt(np.mean(apart**2))
  assert drift["shift"][1] == pytest.approx(shift, rel=1e-5)
  norm = np.linalg.norm(x, axis=1)
  ratio = norm[500:].mean() / norm[:500].mean()
  assert drift["norm_ratio"][1] == pytest.approx(ratio, rel=1e-6)
  longer = collect(x[:800].astype(np.float32), labels, (100,), chunk=500)
  assert longer.summary()["drift"]["rows"] == [500, 300]


def test_a_long_store_has_longer_chunks_and_a_small_state(tmp_path):
  n = 2_304
  x, labels = make_rows(n, d=4), make_labels(n)
  got = collect(x, labels, (16,), chunk=16)
  drift = got.summary()["drift"]
  assert drift["chunk"] == 128
  assert drift["rows"] == [128] * 18
  whole = collect(x, labels, (128,), chunk=128).summary()["drift"]
  np.testing.assert_allclose(drift["shift"][1:], whole["shift"][1:], rtol=1e-4)
  short = collect(x, labels, (16,), chunk=64, order=lambda n: range(n // 3))
  short.merge(
    collect(x, labels, (16,), chunk=16, order=lambda n: range(n // 3, n))
  )
  np.testing.assert_allclose(
    short.summary()["drift"]["shift"][1:], whole["shift"][1:], rtol=1e-4
  )
  wide = Statistics(2_304, positions=1_024, sources=SOURCES)
  wide._add_chunks(np.arange(32), np.ones((32, 2)), np.ones((32, 2_304)))
  np.savez(tmp_path / "wide.npz", **wide.state())
  assert (tmp_path / "wide.npz").stat().st_size < 0.8 * 2**20


@pytest.mark.parametrize("covariance", [False, True])
def test_a_saved_state_goes_on_to_the_same_bits(covariance, tmp_path):
  x, labels = make_rows(900), make_labels(900)
  x[5] *= 1e4
  whole = make_statistics(covariance=covariance, chunk=256)
  half = make_statistics(covariance=covariance, chunk=256)
  for start in range(0, 900, 100):
    add(whole, x, labels, start, start + 100, covariance=covariance)
    if start < 500:
      add(half, x, labels, start, start + 100, covariance=covariance)
  np.savez(tmp_path / "s.npz", **half.state())
  with np.load(tmp_path / "s.npz", allow_pickle=False) as state:
    half = Statistics.from_state(state)
  for start in range(500, 900, 100):
    add(half, x, labels, start, start + 100, covariance=covariance)
  assert half.sources == SOURCES
  for name, values in whole.state().items():
    np.testing.assert_array_equal(half.state()[name], values, name)
  assert half.summary() == whole.summary()


def test_a_state_is_a_copy():
  got = collect(make_rows(50), make_labels(50), (50,))
  state = got.state()
  before = got.summary()
  for values in state.values():
    if values.ndim:
      values[...] = np.zeros((), values.dtype)
  assert got.summary() == before


def test_the_summary_is_finite_json_also_of_nothing_and_of_constants():
  constant = np.full((64, D), 0.3, np.float32)
  summaries = [
    make_statistics(covariance=True).summary(),
    collect(constant, make_labels(64), (30,), covariance=True).summary(),
    collect(0 * constant, make_labels(64), (30,), covariance=True).summary(),
    collect(make_rows(70), make_labels(70), (30,), covariance=True).summary(),
  ]
  for summary in summaries:
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert finite_leaves(summary)
    unexplained = set(summary) - set(summary["definitions"]) - {"definitions"}
    assert not unexplained
  assert summaries[0]["dims"]["min"] == [None] * D
  dims = summaries[1]["dims"]
  assert dims["variance"] == [0.0] * D
  assert dims["skew"] == dims["kurtosis"] == [None] * D
  assert dims["mean"] == dims["min"] == [float(np.float32(0.3))] * D


class Store:
  """The least that `measure` needs."""

  sources = SOURCES

  def __init__(self, x, labels):
    self.sites = {"site": x.shape[1]}
    self.arrays = labels | {"site": x}

  def __len__(self):
    return len(self.arrays["site"])

  def read(self, start, stop, name):
    return self.arrays[name][start:stop]


def test_measuring_a_store_is_updating_with_its_rows():
  x, labels = make_rows(700, dtype="bfloat16"), make_labels(700)
  got = measure(Store(x, labels), "site", covariance=True, batch=256)
  assert_dims(got.summary()["dims"], x)
  assert got.covariance.shape == (D, D)
  some = measure(Store(x, labels), "site", start=100, stop=333)
  assert_dims(some.summary()["dims"], x[100:333])
  largest = some.summary()["outliers"]["largest"][0]
  norm = np.linalg.norm(x.astype(np.float64), axis=1)
  assert largest["row"] == 100 + norm[100:333].argmax()
  assert measure(Store(x, labels), "site", stop=0).count == 0


def test_mismatches_say_what_was_expected():
  x, labels = make_rows(20), make_labels(20)
  one = make_statistics()
  sums = jax.device_get(run(x, np.ones(20, bool)))
  short = part(labels, slice(19))
  with pytest.raises(ValueError, match="labels of the 20 valid rows"):
    one.update(sums, first_row=0, **short)
  far = labels | {"position": labels["position"] + 1}
  with pytest.raises(
    ValueError, match="positions from 1 to 10, expected 0 to 9"
  ):
    one.update(sums, first_row=0, **far)
  with pytest.raises(ValueError, match="sums over 41 dims, received 40"):
    make_statistics(41).update(sums, first_row=0, **labels)
  with pytest.raises(ValueError, match="covariance=True"):
    make_statistics(covariance=True).update(sums, first_row=0, **labels)
  assert one.rows == 0
  with pytest.raises(ValueError, match="cannot take in"):
    one.merge(make_statistics(41))
  with pytest.raises(ValueError, match="the same `chunk`"):
    make_statistics(chunk=10).merge(make_statistics(chunk=15))
  with pytest.raises(ValueError, match="format None"):
    Statistics.from_state({})
  state = one.state()
  del state["histogram"]
  with pytest.raises(ValueError, match="without histogram"):
    Statistics.from_state(state)
  with pytest.raises(ValueError, match="flatten batch and position"):
    block(jnp.zeros((2, 3, 4)), jnp.ones((2, 3), bool))
