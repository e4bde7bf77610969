"""Centroids by splitting clusters."""

import numpy as np
import pytest

from gemma_jax.clustering import bisecting, kmeans
from gemma_jax.clustering.bisecting import bisect
from gemma_jax.clustering.kmeans import Lloyd
from gemma_jax.clustering.rows import ArrayRows, Blocks
from tests.clustering.test_kmeans import blobs, cloud, mesh

pytestmark = pytest.mark.usefixtures("quick_compiles")


def starts(x, k, seed=0, **options):
  """Centroids in the coordinates of the rows."""
  method = Lloyd(x, k, **options)
  return method.start("bisecting", seed=seed).centroids + x.mean(0)


def split(x, k, seed=0, devices=1):
  """Centroids, and the labels that they are the means of."""
  kept = []
  real = bisecting._sums

  def keeping(blocks, mesh, labels, clusters):
    out = real(blocks, mesh, labels, clusters)
    kept.append((np.array(labels), *out))
    return out

  m = mesh(devices)
  blocks = Blocks(
    ArrayRows(x), 512, centre=np.zeros(x.shape[1], np.float32), mesh=m
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(bisecting, "_sums", keeping)
    centroids = bisect(blocks, lambda rows: x[rows], k, len(x), m, seed=seed)
  return centroids, *kept[-1]


def test_centroids_are_the_means_of_clusters_that_hold_every_row_once():
  x = cloud(1_200, 4)
  centroids, labels, _, counts, inertia = split(x, 11)
  assert centroids.shape == (11, 4)
  assert counts.tolist() == np.bincount(labels, minlength=11).tolist()
  assert counts.sum() == len(x)
  assert (counts > 0).all()
  for c in range(11):
    own = np.float64(x[labels == c])
    np.testing.assert_allclose(centroids[c], own.mean(0), atol=1e-5)
    spread = ((own - own.mean(0)) ** 2).sum()
    assert inertia[c] == pytest.approx(spread, rel=1e-3, abs=1e-2)


def test_of_two_halves_every_row_is_in_the_nearer():
  """As far as a few passes of 2-means get: rows at the cut still move."""
  x = cloud(1_200, 4)
  centroids, labels, *_ = split(x, 2)
  apart = ((x[:, None] - centroids) ** 2).sum(-1)
  assert (apart.argmin(1) == labels).mean() > 0.95
  # After many passes none does.
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(bisecting, "PASSES", 60)
    centroids, labels, *_ = split(x, 2)
  apart = ((x[:, None] - centroids) ** 2).sum(-1)
  assert (apart.argmin(1) == labels).all()


def test_two_clusters_apart_are_the_two_halves():
  x, labels = blobs(clusters=2, each=50)
  centroids, found, *_ = split(x, 2)
  assert len(np.unique(labels[found == 0])) == 1
  assert len(np.unique(labels[found == 1])) == 1
  for c in range(2):
    np.testing.assert_allclose(centroids[c], x[found == c].mean(0), atol=1e-4)


def test_the_widest_cluster_is_split_first():
  x = np.repeat(np.float32([[0], [1], [100], [130]]), 10, axis=0)
  three, *_ = split(x, 3)
  assert sorted(three[:, 0]) == pytest.approx([0.5, 100, 130], abs=1e-4)
  four, *_ = split(x, 4)
  assert sorted(four[:, 0]) == pytest.approx([0, 1, 100, 130], abs=1e-4)


def test_after_a_few_iterations_it_is_about_as_good_as_k_means_plus_plus():
  x = cloud(2_000, 8)
  ours, theirs = (
    kmeans(x, 50, init=init, max_iter=4).inertia
    for init in ("bisecting", "k-means++")
  )
  assert ours < 1.15 * theirs


def test_many_centroids_take_few_passes(monkeypatch):
  """k-means++ would look at the rows once for each of them."""
  x = cloud(3_000, 6)
  passes = []
  real = bisecting._sums
  monkeypatch.setattr(
    bisecting, "_sums", lambda *a: passes.append(1) or real(*a)
  )
  found = starts(x, 400)
  assert len(passes) < 120
  assert len(np.unique(found, axis=0)) == 400


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("different", [3, 9, 17])
def test_as_many_clusters_as_rows_differ_are_those_rows(different, seed):
  """Whichever row the first cut is made through: it may be the mean."""
  values = np.arange(different, dtype=np.float32)[:, None]
  x = np.repeat(values, 20, axis=0)
  found = starts(x, different, seed)
  np.testing.assert_allclose(np.sort(found, axis=0), values, atol=1e-5)


@pytest.mark.parametrize("scale", [1, 0.1])
@pytest.mark.parametrize("seed", range(4))
def test_more_clusters_than_rows_differ_are_an_error(seed, scale):
  values = scale * np.arange(7, dtype=np.float32)[:, None]
  x = np.repeat(values, 20, axis=0)
  with pytest.raises(ValueError, match="of which only 7 differ"):
    starts(x, 9, seed)
  with pytest.raises(ValueError, match="of which only 1 differ"):
    starts(np.full_like(x, scale), 2, seed)


def test_the_same_seed_gives_the_same_and_another_does_not():
  x = cloud(500, 4)
  np.testing.assert_array_equal(starts(x, 9, 0), starts(x, 9, 0))
  assert (starts(x, 9, 0) != starts(x, 9, 1)).any()


@pytest.mark.parametrize("devices", [2, 8])
def test_a_mesh_gives_the_same(devices):
  x = cloud(1_003, 4)  # which no mesh divides
  one, many = (split(x, 12, devices=d) for d in (1, devices))
  np.testing.assert_array_equal(many[1], one[1])
  np.testing.assert_allclose(many[0], one[0], atol=1e-5)
