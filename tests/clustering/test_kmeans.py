import logging
import warnings

import jax
import numpy as np
import pytest
from sklearn.cluster import KMeans as Sklearn
from sklearn.cluster import kmeans_plusplus
from sklearn.metrics import adjusted_rand_score

from gemma_jax.clustering import kmeans
from gemma_jax.clustering.kmeans import Lloyd
from gemma_jax.clustering.lloyd import nearest
from gemma_jax.clustering.rows import ArrayRows

# Lloyd-Max distortions of a standard normal: Max 1960, table I.
LLOYD_MAX = {2: 0.3634, 4: 0.1175, 8: 0.03454, 16: 0.009497}


def blobs(clusters=7, each=60, width=5, apart=30.0, seed=0):
  """Rows of separated clusters, and whose each is."""
  rng = np.random.default_rng(seed)
  centres = apart * rng.standard_normal((clusters, width))
  labels = np.repeat(np.arange(clusters), each)
  x = centres[labels] + rng.standard_normal((len(labels), width))
  order = rng.permutation(len(x))
  return x[order].astype(np.float32), labels[order]


def cloud(rows=3_000, width=12, seed=0):
  """Rows without clusters, of unequal variances."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((rows, width)) * np.linspace(0.3, 2, width)
  return x.astype(np.float32)


def mesh(devices):
  return jax.make_mesh(
    (devices,),
    ("data",),
    devices=jax.devices()[:devices],
    axis_types=(jax.sharding.AxisType.Auto,),
  )


@pytest.mark.parametrize("clusters", sorted(LLOYD_MAX))
def test_one_dimension_reaches_the_distortions_of_lloyd_and_max(clusters):
  x = np.random.default_rng(0).standard_normal((200_000, 1), np.float32)
  found = kmeans(x, clusters, max_iter=300, tol=1e-7)
  assert found.inertia / len(x) == pytest.approx(LLOYD_MAX[clusters], rel=0.02)


def test_separated_blobs_are_found():
  x, labels = blobs()
  assert adjusted_rand_score(labels, kmeans(x, 7).labels) == 1


@pytest.mark.parametrize("init", ["k-means++", "k-means||", "bisecting"])
def test_every_careful_start_finds_separated_blobs(init):
  x, labels = blobs(clusters=20, each=40)
  assert adjusted_rand_score(labels, kmeans(x, 20, init=init).labels) == 1


@pytest.mark.parametrize("iterations", [1, 2, 7, 300])
@pytest.mark.parametrize("clusters", [2, 17, 100])
def test_labels_and_inertia_are_those_of_scikit_learn(clusters, iterations):
  x = cloud()
  start = x[:clusters]
  theirs = Sklearn(
    clusters, init=start, n_init=1, max_iter=iterations, algorithm="lloyd"
  )
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that it has not converged
    theirs.fit(x)
  ours = kmeans(x, clusters, init=start, max_iter=iterations)
  assert ours.n_iter == theirs.n_iter_
  np.testing.assert_array_equal(ours.labels, theirs.labels_)
  assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-5)
  np.testing.assert_allclose(ours.centroids, theirs.cluster_centers_, atol=1e-5)


def test_empty_clusters_go_where_scikit_learn_sends_them():
  x = cloud(500, 4)
  start = np.concatenate([x[:5], np.full((3, 4), 1e3, np.float32)])
  theirs = Sklearn(8, init=start, n_init=1, max_iter=50).fit(x)
  ours = kmeans(x, 8, init=start, max_iter=50)
  assert (ours.counts > 0).all()
  assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-5)


def test_an_offset_changes_nothing():
  x = (64 * cloud()).round() / 64  # what float32 keeps at 1e4 too
  plain = kmeans(x, 9, init=x[:9])
  far = kmeans(x + 1e4, 9, init=x[:9] + 1e4)
  np.testing.assert_array_equal(plain.labels, far.labels)
  assert far.inertia == pytest.approx(plain.inertia, rel=1e-4)


def test_the_inertia_is_that_of_the_direct_form_far_from_the_origin():
  x = cloud(2_000, 3) + 1e4
  found = kmeans(x, 16)
  apart = x.astype(np.float64) - found.centroids[found.labels]
  assert found.inertia == pytest.approx((apart**2).sum(), rel=1e-4)


def test_four_rows_close_together_have_an_inertia_above_zero():
  """The expanded form gives 0 here: scikit-learn-intelex issue 25."""
  x = np.array([[1.0], [1.0002], [1.0004], [1.0006]], np.float32)
  found = kmeans(x, 2, init=x[[0, 3]])
  assert found.inertia == pytest.approx(4.0e-8, rel=0.01)


def test_rows_beyond_what_float32_counts_are_counted():
  x = np.zeros((2**25 + 3, 1), np.float32)
  x[-3:] = 1
  found = kmeans(x, 2, init=np.array([[0.0], [1.0]]), max_iter=1)
  assert found.counts.tolist() == [2**25, 3]
  np.testing.assert_allclose(found.centroids, [[0], [1]], atol=1e-6)


def test_many_equal_rows_have_their_own_mean():
  """Sums of float32 would stop growing, or round the same way each time."""
  x = np.full((2**20, 1), 0.1, np.float32)
  x[: 2**19] = -7.7
  found = kmeans(x, 2, init=np.array([[-1.0], [1.0]]))
  np.testing.assert_allclose(found.centroids, [[-7.7], [0.1]], atol=1e-6)


@pytest.mark.parametrize("devices", [2, 8])
def test_a_mesh_finds_the_centroids_of_one_device(devices):
  x = cloud(3_001)  # which no mesh divides
  one = kmeans(x, 40, init=x[:40], max_iter=20)
  many = kmeans(x, 40, init=x[:40], max_iter=20, mesh=mesh(devices))
  np.testing.assert_allclose(many.centroids, one.centroids, atol=1e-5)
  assert many.inertia == pytest.approx(one.inertia, rel=1e-5)


def test_rows_that_are_read_again_in_every_pass_give_the_same(monkeypatch):
  x = cloud(40_000, 4)
  kept = kmeans(x, 5, init=x[:5], max_iter=5)
  monkeypatch.setattr("gemma_jax.clustering.rows.SHARE", 0.0)
  again = kmeans(x, 5, init=x[:5], max_iter=5)
  np.testing.assert_array_equal(again.centroids, kept.centroids)
  np.testing.assert_array_equal(again.labels, kept.labels)


def test_rows_are_compared_with_some_centroids_at_a_time(monkeypatch):
  x, centroids = cloud(100), cloud(90, seed=1)
  whole = nearest(x, centroids)
  monkeypatch.setattr("gemma_jax.clustering.lloyd.chunk_size", lambda _: 7)
  np.testing.assert_array_equal(nearest(x, centroids), whole)


def test_the_nearest_of_equals_is_the_first():
  centroids = np.array([[1.0, 0], [1, 0], [0, 1]], np.float32)
  x = np.array([[2.0, 0], [0, 3]], np.float32)
  assert nearest(x, centroids).tolist() == [0, 2]


def test_by_angle_the_length_of_rows_does_not_matter():
  x, labels = blobs(clusters=5, apart=3)
  x += 10 * np.eye(5, dtype=np.float32)[labels]
  length = np.random.default_rng(1).uniform(0.1, 10, (len(x), 1))
  plain = kmeans(x, 5, init=x[:5], spherical=True)
  scaled = kmeans(x * length, 5, init=x[:5], spherical=True)
  np.testing.assert_array_equal(plain.labels, scaled.labels)
  np.testing.assert_allclose(
    np.linalg.norm(plain.centroids, axis=1), 1, rtol=1e-6
  )
  unit = x / np.linalg.norm(x, axis=1, keepdims=True)
  cosines = unit @ plain.centroids.T
  np.testing.assert_array_equal(plain.labels, cosines.argmax(1))
  assert plain.inertia == pytest.approx((2 - 2 * cosines.max(1)).sum(), 1e-5)


def test_careful_starts_are_better_than_random_ones():
  x, _ = blobs(clusters=50, each=30, apart=5)
  starts = {
    init: np.mean(
      [kmeans(x, 50, init=init, seed=s, max_iter=1).inertia for s in range(2)]
    )
    for init in ("random", "k-means++", "k-means||", "bisecting")
  }
  for init in ("k-means++", "k-means||", "bisecting"):
    assert starts[init] < 0.7 * starts["random"], starts


def test_k_means_plus_plus_starts_nearer_than_that_of_scikit_learn():
  x = cloud()

  def inertia(init, seed):
    method = Lloyd(x, 150)
    return next(method.iterations(method.start(init, seed=seed))).inertia

  ours = [inertia("k-means++", s) for s in range(3)]
  theirs = [
    inertia(kmeans_plusplus(x, 150, random_state=s)[0], s) for s in range(3)
  ]
  assert np.mean(ours) < 0.99 * np.mean(theirs), (ours, theirs)


def test_the_same_seed_gives_the_same_and_another_does_not():
  x = cloud()
  first, same, other = (kmeans(x, 10, seed=s) for s in (0, 0, 1))
  np.testing.assert_array_equal(first.centroids, same.centroids)
  assert (first.centroids != other.centroids).any()


def test_lloyd_goes_on_from_an_iteration_as_if_never_stopped():
  x = cloud()
  method = Lloyd(x, 12)
  whole = list(method.iterations(method.start("k-means++", seed=0)))
  resumed = list(Lloyd(x, 12).iterations(whole[2]))
  assert len(whole) == 3 + len(resumed)
  np.testing.assert_array_equal(whole[-1].centroids, resumed[-1].centroids)


@pytest.mark.parametrize("init", ["k-means++", "k-means||", "bisecting"])
def test_fewer_different_rows_than_clusters_is_an_error(init):
  x = np.repeat(np.arange(5, dtype=np.float32)[:, None], 20, axis=0)
  with pytest.raises(ValueError, match="differ"):
    kmeans(x, 8, init=init)


def test_bad_rows_and_numbers_are_refused():
  x = cloud(50, 3)
  with pytest.raises(ValueError, match="51 clusters of 50 rows"):
    kmeans(x, 51)
  with pytest.raises(ValueError, match="0 clusters of 50 rows"):
    kmeans(x, 0)
  with pytest.raises(ValueError, match=r"\[N, D\]"):
    kmeans(x[0], 2)
  with pytest.raises(ValueError, match="expected centroids"):
    kmeans(x, 2, init=np.zeros((3, 3)))
  with pytest.raises(ValueError, match="expected one of k-means"):
    kmeans(x, 2, init="kmeans++")
  with pytest.raises(ValueError, match="max_iter=0"):
    kmeans(x, 2, max_iter=0)
  with pytest.raises(FloatingPointError, match="init"):
    kmeans(x, 2, init=np.full((2, 3), np.nan))
  bad = x.copy()
  bad[17, 1] = np.nan
  with pytest.raises(FloatingPointError, match="Row 17 is not finite"):
    kmeans(bad, 2)
  bad = x.copy()
  bad[17] = 0
  with pytest.raises(ValueError, match="Row 17 is zero"):
    kmeans(bad, 2, spherical=True)


def test_the_log_says_that_clusters_were_empty(caplog):
  x = cloud(200, 2)
  start = np.concatenate([x[:4], np.full((2, 2), 1e3, np.float32)])
  with caplog.at_level(logging.INFO, "gemma_jax"):
    kmeans(x, 6, init=start)
  assert "2 of 6 clusters are empty" in caplog.text


def test_rows_of_an_array_are_float32():
  rows = ArrayRows(np.arange(12).reshape(4, 3))
  assert rows.read(1, 3).dtype == np.float32
  assert rows.take(np.array([3, 0])).tolist() == [[9, 10, 11], [0, 1, 2]]
