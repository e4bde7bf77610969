"""k-means of a shuffled stream."""

import itertools
import logging

import numpy as np
import pytest

from gemma_jax.clustering import kmeans
from gemma_jax.clustering.kmeans import Lloyd
from gemma_jax.clustering.minibatch import minibatch
from tests.clustering.test_kmeans import blobs, cloud, mesh

pytestmark = pytest.mark.usefixtures("quick_compiles")


def iterations(method, count, size, init="k-means++", seed=0):
  """The first `count` mini-batch iterations."""
  going = method.minibatches(method.start(init, seed=seed), size, seed=seed)
  return list(itertools.islice(going, count))


def fitted(x, k, count, size, **options):
  method = Lloyd(x, k, **options)
  return method.finish(iterations(method, count, size)[-1])


def test_blobs_are_clustered_as_well_as_by_lloyd():
  x, _ = blobs(clusters=12, each=100, apart=4)
  whole = kmeans(x, 12, seed=0)
  found = fitted(x, 12, 8, 100)
  assert found.inertia < 1.05 * whole.inertia
  assert found.n_iter == 8


def test_a_cloud_is_clustered_nearly_as_well_as_by_lloyd():
  x = cloud()
  method = Lloyd(x, 20)
  start = method.finish(method.start("k-means++", seed=0)).inertia
  whole = kmeans(x, 20, seed=0).inertia
  found = fitted(x, 20, 10, 200).inertia
  assert found < start
  assert found < 1.05 * whole


def test_a_batch_moves_each_centroid_to_the_mean_of_all_it_has_had():
  x = cloud(60, 3)
  method = Lloyd(x, 4)
  start = method.start("k-means++", seed=0)
  c, seen = np.float64(start.centroids), np.zeros(4)
  batches = [np.float32(x[i : i + 20]) for i in range(0, 60, 20)]
  going = minibatch(iter(batches), start, mesh(1), steps=3, seed=0)
  inertia = 0.0
  for batch in batches:
    labels = ((batch[:, None] - c) ** 2).sum(-1).argmin(1)
    inertia += ((batch - c[labels]) ** 2).sum()
    for i in range(4):
      own = batch[labels == i]
      if len(own):
        c[i] = (seen[i] * c[i] + own.sum(0)) / (seen[i] + len(own))
        seen[i] += len(own)
  now = next(going)
  np.testing.assert_allclose(now.centroids, c, atol=1e-5)
  assert now.counts.tolist() == seen.tolist()
  assert now.inertia == pytest.approx(inertia, rel=1e-5)


def test_it_goes_on_from_an_iteration_as_if_never_stopped():
  x = cloud(1_000)
  whole = iterations(Lloyd(x, 12), 6, 96)
  again = Lloyd(x, 12)
  going = again.minibatches(whole[2], 96, seed=0)
  for expected in whole[3:]:
    found = next(going)
    for name, value in expected._asdict().items():
      np.testing.assert_array_equal(getattr(found, name), value, name)


def test_the_same_seed_gives_the_same_and_another_does_not():
  x = cloud(1_000)
  method = Lloyd(x, 12)
  start = method.start("k-means++", seed=0)
  first, same, other = (
    next(method.minibatches(start, 50, seed=s)).centroids for s in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, same)
  assert (first != other).any()


def test_starved_clusters_go_to_other_rows(caplog):
  x, _ = blobs(clusters=6, each=80)
  start = np.concatenate([x[:5], np.full((3, 5), 1e3, np.float32)])
  method = Lloyd(x, 8)
  with caplog.at_level(logging.INFO, "gemma_jax"):
    first = iterations(method, 1, 80, start)[0]
  assert "3 of 8 clusters go to other rows" in caplog.text
  assert first.moved == 3
  moved = first.centroids[-3:] + x.mean(0)
  apart = np.linalg.norm(moved[:, None] - x, axis=-1).min(1)
  assert (apart < 1e-3).all()  # they are rows now
  found = method.finish(iterations(method, 6, 80, start)[-1])
  assert (found.counts[-3:] > 0).all()


def test_a_moved_cluster_weighs_as_much_as_the_lightest_of_the_others():
  """Of weight 1 it would be starved again in a long run, and never settle."""
  x, _ = blobs(clusters=4, each=100)
  method = Lloyd(x, 4)
  start = method.start(np.concatenate([x[:3], x[:1] + 1e3]), seed=0)
  start = start._replace(counts=np.array([50_000, 40_000, 60_000, 0]))
  now = next(method.minibatches(start, 100, seed=0))
  assert now.moved == 1
  assert now.counts[3] == now.counts[:3].min() >= 40_000
  after = list(itertools.islice(method.minibatches(now, 100, seed=0), 3))
  assert [later.moved for later in after] == [0, 0, 0]


def test_by_angle_centroids_have_norm_one():
  x, labels = blobs(clusters=5, apart=3)
  x += 10 * np.eye(5, dtype=np.float32)[labels]
  found = fitted(x, 5, 4, 60, spherical=True)
  np.testing.assert_allclose(
    np.linalg.norm(found.centroids, axis=1), 1, rtol=1e-6
  )
  whole = kmeans(x, 5, spherical=True)
  assert found.inertia < 1.05 * whole.inertia


@pytest.mark.parametrize("devices", [2, 8])
def test_a_mesh_finds_the_centroids_of_one_device(devices):
  x = cloud(1_001)
  one = iterations(Lloyd(x, 20), 3, 80, x[:20])[-1]
  many = iterations(Lloyd(x, 20, mesh=mesh(devices)), 3, 80, x[:20])[-1]
  np.testing.assert_allclose(many.centroids, one.centroids, atol=1e-5)
  np.testing.assert_array_equal(many.counts, one.counts)
  assert many.inertia == pytest.approx(one.inertia, rel=1e-5)


def test_an_offset_changes_next_to_nothing():
  x = (64 * cloud(1_000)).round() / 64  # what float32 keeps at 1e4 too
  near = fitted(x, 8, 3, 100)
  far = fitted(x + 1e4, 8, 3, 100)
  assert far.inertia == pytest.approx(near.inertia, rel=1e-3)


@pytest.mark.parametrize("size", [0, -1, 101])
def test_batches_that_the_rows_do_not_fill_are_refused(size):
  method = Lloyd(cloud(100, 3), 4)
  start = method.start("random", seed=0)
  with pytest.raises(ValueError, match=f"Mini-batches of {size} from 100 rows"):
    method.minibatches(start, size, seed=0)


def test_batches_that_the_mesh_does_not_divide_are_refused():
  method = Lloyd(cloud(100, 3), 4, mesh=mesh(8))
  start = method.start("random", seed=0)
  with pytest.raises(ValueError, match="a multiple of the 8 devices"):
    method.minibatches(start, 50, seed=0)
