"""Bounds spare products and change no label."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from gemma_jax.clustering import bounds, kmeans, lloyd
from gemma_jax.clustering.kmeans import Lloyd
from gemma_jax.clustering.nearest import scores

ROWS, WIDTH, CLUSTERS = 4_000, 40, 64


def cloud(rank, seed=0):
  """Rows [ROWS, WIDTH], most of whose variance is in `rank` directions."""
  rng = np.random.default_rng(seed)
  wide = rng.standard_normal((ROWS, rank)) @ rng.standard_normal((rank, WIDTH))
  rows = 3 * wide + 0.3 * rng.standard_normal((ROWS, WIDTH)) + 7
  rows[17] *= 300  # a massive activation
  return rows.astype(np.float32)


def mesh(devices):
  return jax.make_mesh(
    (devices,),
    ("data",),
    devices=jax.devices()[:devices],
    axis_types=(AxisType.Auto,),
  )


@pytest.fixture
def bounded(monkeypatch):
  """Bounds with few clusters, in small blocks."""
  monkeypatch.setattr(lloyd, "BOUNDED_FROM", 8)
  monkeypatch.setattr(lloyd, "block_size", lambda clusters, mesh: 512)


@pytest.fixture
def calls(monkeypatch):
  """Which programs ran, by name, and how many rows were open."""
  found = {"_assign": 0, "_keep": 0, "open": 0}

  def counted(name, real, *args):
    found[name] += 1
    return real(*args)

  for name in ("_assign", "_keep"):
    real = getattr(lloyd, name)
    monkeypatch.setattr(lloyd, name, functools.partial(counted, name, real))
  real_numbers = lloyd._numbers

  def numbers(open_, ways):
    found["open"] += int(open_.sum())
    return real_numbers(open_, ways)

  monkeypatch.setattr(lloyd, "_numbers", numbers)
  return found


@pytest.mark.parametrize("rank", [3, WIDTH])
def test_bounds_are_never_below_the_scores(rank):
  x = cloud(rank) - 7
  centroids = np.concatenate([x[:30], 5 * x[30:40], np.zeros((1, WIDTH))])
  own = np.linalg.qr(np.random.default_rng(1).normal(size=(WIDTH, 12)))[0]
  for basis in (own, np.eye(WIDTH)[:, :12], np.eye(WIDTH)):
    basis = jnp.asarray(basis, jnp.float32)
    limits = bounds.of_rows(x, basis) @ bounds.of_centroids(centroids, basis).T
    exact = np.float64(x) @ centroids.T - (centroids**2).sum(1) / 2
    assert (np.float64(limits) >= exact).all()
    # And they bound rounded scores, of which labels are made.
    assert (limits >= scores(x, jnp.float32(centroids))).all()


def test_rivals_are_the_bounds_that_reach_the_least(monkeypatch):
  monkeypatch.setattr("gemma_jax.clustering.nearest.chunk_size", lambda: 7)
  rng = np.random.default_rng(0)
  rows, centroids = rng.normal(size=(50, 6)), rng.normal(size=(20, 6))
  least = rng.normal(size=50)
  found = bounds.rivals(*map(jnp.float32, (rows, centroids, least)))
  np.testing.assert_array_equal(
    found, (rows @ centroids.T >= least[:, None]).sum(1)
  )


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("rank", [3, WIDTH])
def test_labels_and_centroids_are_those_of_all_scores(
  rank, devices, spherical, bounded, monkeypatch
):
  x = cloud(rank)
  fit = functools.partial(
    kmeans, x, CLUSTERS, init="random", max_iter=6, spherical=spherical
  )
  got = fit(mesh=mesh(devices))
  monkeypatch.setattr(lloyd, "BOUNDED_FROM", 10**9)
  expected = fit()
  np.testing.assert_array_equal(got.labels, expected.labels)
  np.testing.assert_array_equal(got.counts, expected.counts)
  np.testing.assert_allclose(
    got.centroids, expected.centroids, rtol=1e-5, atol=1e-5
  )
  assert got.inertia == pytest.approx(expected.inertia, rel=1e-6)


def test_most_rows_keep_their_label_without_all_scores(bounded, calls):
  kmeans(cloud(3), CLUSTERS, init="random", max_iter=6)
  blocks = -(-ROWS // 512)
  # The first pass has no labels to go by; then come five and the last.
  assert calls["_assign"] == blocks
  assert calls["_keep"] == 6 * blocks
  assert 0 < calls["open"] < 0.4 * 6 * ROWS


def test_where_bounds_spare_nothing_they_are_left(bounded, calls):
  kmeans(cloud(WIDTH), CLUSTERS, init="random", max_iter=6)
  blocks = -(-ROWS // 512)
  # One block of every pass shows it.
  assert calls["_keep"] == 6
  assert calls["_assign"] == blocks + 6 * (blocks - 1)


@pytest.mark.parametrize("devices", [1, 8])
def test_wrong_labels_only_cost_time(devices, bounded):
  x = cloud(3)
  where = mesh(devices)
  method = Lloyd(x, CLUSTERS, mesh=where)
  start = method.start("random", seed=0)
  guesses = np.random.default_rng(0).integers(0, CLUSTERS, ROWS, np.int32)
  labels, distances, counts, sums = lloyd.assign(
    method._blocks,
    start.centroids,
    where,
    ROWS,
    labels=guesses,
    bounds=method._bounds,
  )
  plain = lloyd.assign(method._blocks, start.centroids, where, ROWS)
  np.testing.assert_array_equal(labels, plain[0])
  np.testing.assert_allclose(distances, plain[1], rtol=1e-5)
  np.testing.assert_array_equal(counts, plain[2])
  np.testing.assert_allclose(sums, plain[3], rtol=1e-4, atol=1e-2)


def test_iterations_go_on_bit_for_bit_where_they_stopped(bounded):
  x = cloud(3)

  def method():
    return Lloyd(x, CLUSTERS, tol=0.0)

  start = method().start("random", seed=0)
  alone = list(itertools.islice(method().iterations(start), 5))
  again = list(itertools.islice(method().iterations(alone[1]), 3))
  for one, other in zip(alone[2:], again, strict=True):
    np.testing.assert_array_equal(one.centroids, other.centroids)
    np.testing.assert_array_equal(one.labels, other.labels)
    assert one.inertia == other.inertia


def test_rows_that_are_read_in_every_pass_are_bounded_too(
  bounded, calls, monkeypatch
):
  monkeypatch.setattr("gemma_jax.clustering.rows.SHARE", 0.0)
  x = cloud(3)
  got = kmeans(x, CLUSTERS, init="random", max_iter=4)
  assert calls["_keep"]
  monkeypatch.setattr(lloyd, "BOUNDED_FROM", 10**9)
  expected = kmeans(x, CLUSTERS, init="random", max_iter=4)
  np.testing.assert_array_equal(got.labels, expected.labels)
