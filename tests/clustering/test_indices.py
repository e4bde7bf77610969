import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn import metrics

from gemma_jax.clustering import indices
from gemma_jax.metrics import document_interval


def blobs(offset=0.0, *, apart=3.0, spread=1.0, rows=180, seed=0):
  """Rows float32 [N, 7], labels with gaps, -1 and a cluster of one row."""
  rng = np.random.default_rng(seed)
  labels = rng.choice([-1, 0, 3, 4, 9], rows)
  labels[5] = 12
  means = apart * rng.normal(size=(14, 7))
  x = means[labels] + spread * rng.normal(size=(rows, 7)) + offset
  return x.astype(np.float32), labels


# Blobs as they are, far from the origin, and tight ones far from each other.
CASES = {
  "plain": {},
  "offset": {"offset": 1e4},
  "tight": {"apart": 1e3, "spread": 1e-2},
}
cases = pytest.mark.parametrize("case", CASES)


@pytest.fixture
def small_blocks(monkeypatch):
  """Blocks of a few rows, the last of them ragged."""
  monkeypatch.setattr(indices, "_BLOCK", 1_100)


def simplified(x, labels, centroids):
  """The definition, from all distances in float64."""
  distances = cdist(x.astype(np.float64), centroids)
  row = np.arange(len(x))
  a = distances[row, labels]
  distances[row, labels] = np.inf
  distances[:, np.bincount(labels, minlength=len(centroids)) == 0] = np.inf
  b = distances.min(1)
  alone = np.bincount(labels)[labels] == 1
  return np.where(alone, 0, (b - a) / np.maximum(a, b))


@cases
def test_silhouettes_of_all_rows_are_scikit_learns(case):
  x, labels = blobs(**CASES[case])
  found = indices.sampled_silhouette(x, labels, samples=10**6)
  wide = x.astype(np.float64)
  np.testing.assert_array_equal(found.rows, np.arange(len(x)))
  np.testing.assert_allclose(
    found.scores, metrics.silhouette_samples(wide, labels), rtol=1e-4
  )
  expected = metrics.silhouette_score(wide, labels)
  assert found.value == pytest.approx(expected, rel=1e-4)
  assert found.interval is None
  assert found.scores[5] == 0


def test_rows_drawn_have_the_silhouettes_that_they_have_among_all():
  x, labels = blobs()
  expected = metrics.silhouette_samples(x.astype(np.float64), labels)
  found = indices.sampled_silhouette(x, labels, samples=40, seed=1)
  assert len(np.unique(found.rows)) == len(found.rows) == 40
  np.testing.assert_allclose(found.scores, expected[found.rows], rtol=1e-4)
  assert found.value == pytest.approx(expected[found.rows].mean(), rel=1e-4)
  again = indices.sampled_silhouette(x, labels, samples=40, seed=1)
  other = indices.sampled_silhouette(x, labels, samples=40, seed=2)
  np.testing.assert_array_equal(again.rows, found.rows)
  assert (other.rows != found.rows).any()


def test_fewer_reference_rows_change_nothing_where_all_are_equally_far():
  # Within clusters distances are sqrt 2 and 3 sqrt 2, between them sqrt 10.
  x = np.diag([1.0] * 20 + [3.0] * 20)
  labels = np.repeat([0, 1], 20)
  own, other = np.sqrt([2, 18])[labels], np.sqrt(10)
  expected = (other - own) / np.maximum(own, other)
  for against in (15, 39):
    found = indices.sampled_silhouette(x, labels, against=against)
    assert len(found.rows) == 40
    np.testing.assert_allclose(found.scores, expected, rtol=1e-6)


def test_fewer_reference_rows_estimate_the_silhouette():
  x, labels = blobs(rows=1_500)
  exact = indices.sampled_silhouette(x, labels, samples=1_500)
  found = indices.sampled_silhouette(x, labels, samples=1_500, against=500)
  assert found.value == pytest.approx(exact.value, abs=0.02)
  assert found.value != pytest.approx(exact.value, abs=1e-6)
  all_of_them = indices.sampled_silhouette(
    x, labels, samples=1_500, against=1_500
  )
  assert all_of_them.value == exact.value


def test_rows_without_a_reference_row_of_their_cluster_are_left_out():
  x = np.random.default_rng(0).normal(size=(60, 3))
  labels = np.array([0] * 28 + [1] * 28 + [2, 2, 3, 3])
  found = indices.sampled_silhouette(x, labels, against=20)
  missing = np.setdiff1d(np.arange(60), found.rows)
  assert 0 < len(missing) <= 4
  assert missing.min() >= 56
  with pytest.raises(ValueError, match="raise against"):
    indices.sampled_silhouette(x, np.arange(60) // 2, against=1)


@cases
def test_the_simplified_silhouette_is_its_definition(case):
  x, labels = blobs(**CASES[case])
  _, labels = np.unique(labels, return_inverse=True)
  rng = np.random.default_rng(1)
  centroids = np.stack([x[labels == i].mean(0, np.float64) for i in range(6)])
  centroids += 0.1 * CASES[case].get("spread", 1) * rng.normal(size=(6, 7))
  found = indices.simplified_silhouette(x, labels, centroids)
  expected = simplified(x, labels, centroids)
  np.testing.assert_allclose(found.scores, expected, rtol=1e-4, atol=1e-6)
  assert found.value == pytest.approx(expected.mean(), rel=1e-4)
  assert found.scores[5] == 0


def test_a_near_centroid_far_from_the_mean_is_told_from_the_own():
  # |x|^2 - 2 x.c + |c|^2 has no digits left here in float32.
  rng = np.random.default_rng(0)
  labels = np.arange(400) % 4
  centroids = np.array([[3e3, 0], [3e3, 1], [-3e3, 0], [-3e3, 1]])
  x = centroids[labels] + 0.2 * rng.normal(size=(400, 2))
  x = x.astype(np.float32)
  found = indices.simplified_silhouette(x, labels, centroids)
  expected = simplified(x, labels, centroids)
  np.testing.assert_allclose(found.scores, expected, atol=2e-3)


def test_centroids_of_clusters_without_rows_are_ignored():
  x, labels = blobs()
  _, labels = np.unique(labels, return_inverse=True)
  centroids = np.stack([x[labels == i].mean(0) for i in range(6)])
  plain = indices.simplified_silhouette(x, labels, centroids)
  # Nearer to everything than the rest, and one that is not even a number.
  more = np.insert(centroids, [2, 6], [x.mean(0), np.full(7, np.nan)], axis=0)
  found = indices.simplified_silhouette(x, labels + (labels >= 2), more)
  np.testing.assert_array_equal(found.scores, plain.scores)


def test_far_blobs_score_1_and_random_labels_0():
  x, labels = blobs(apart=1e4)
  x, labels = np.delete(x, 5, axis=0), np.abs(np.delete(labels, 5))
  centroids = np.zeros((10, 7))
  for i in np.unique(labels):
    centroids[i] = x[labels == i].mean(0)
  assert indices.sampled_silhouette(x, labels).value > 0.999
  assert indices.simplified_silhouette(x, labels, centroids).value > 0.999
  random = np.random.default_rng(0).permutation(labels)
  assert abs(indices.sampled_silhouette(x, random).value) < 0.2


@cases
def test_davies_bouldin_and_calinski_harabasz_are_scikit_learns(case):
  x, labels = blobs(**CASES[case])
  wide = x.astype(np.float64)
  assert indices.davies_bouldin(x, labels) == pytest.approx(
    metrics.davies_bouldin_score(wide, labels), rel=1e-4
  )
  assert indices.calinski_harabasz(x, labels) == pytest.approx(
    metrics.calinski_harabasz_score(wide, labels), rel=1e-4
  )


def test_clusters_of_equal_rows_have_the_values_of_scikit_learn():
  x = np.repeat(np.eye(3, 4, dtype=np.float32), 5, axis=0)
  labels = np.repeat(range(3), 5)
  assert indices.calinski_harabasz(x, labels) == 1
  assert indices.davies_bouldin(x, labels) == pytest.approx(0, abs=1e-6)
  same = indices.simplified_silhouette(x, labels, np.ones((3, 4)))
  assert same.value == 0
  found = indices.sampled_silhouette(x, labels)
  np.testing.assert_allclose(found.scores, 1, atol=1e-6)


def test_blocks_change_nothing(small_blocks):
  x, labels = blobs()
  wide = x.astype(np.float64)
  _, own = np.unique(labels, return_inverse=True)
  centroids = np.stack([wide[own == i].mean(0) for i in range(6)])
  np.testing.assert_allclose(
    indices.sampled_silhouette(x, labels).scores,
    metrics.silhouette_samples(wide, labels),
    rtol=1e-4,
  )
  np.testing.assert_allclose(
    indices.simplified_silhouette(x, own, centroids).scores,
    simplified(x, own, centroids),
    rtol=1e-4,
    atol=1e-6,
  )
  assert indices.calinski_harabasz(x, labels) == pytest.approx(
    metrics.calinski_harabasz_score(wide, labels), rel=1e-4
  )
  many = np.arange(180) % 61
  assert indices.davies_bouldin(x, many) == pytest.approx(
    metrics.davies_bouldin_score(wide, many), rel=1e-4
  )


def test_the_interval_is_over_documents():
  x, labels = blobs()
  documents = np.repeat(np.arange(18) * 7, 10)
  found = indices.sampled_silhouette(x, labels, documents=documents)
  sums = found.scores.reshape(18, 10).sum(1)
  np.testing.assert_allclose(
    found.interval, document_interval(sums, np.full(18, 10))
  )
  assert found.interval[0] < found.value < found.interval[1]
  some = indices.sampled_silhouette(x, labels, samples=90, documents=documents)
  tops = np.bincount(some.rows // 10, some.scores, minlength=18)
  np.testing.assert_allclose(
    some.interval,
    document_interval(tops, np.bincount(some.rows // 10, minlength=18)),
  )
  _, own = np.unique(labels, return_inverse=True)
  centroids = np.zeros((6, 7))
  found = indices.simplified_silhouette(
    x, own, centroids + np.arange(6)[:, None], documents=documents
  )
  sums = found.scores.reshape(18, 10).sum(1)
  np.testing.assert_allclose(
    found.interval, document_interval(sums, np.full(18, 10))
  )


def test_what_cannot_be_scored_is_refused():
  x, labels = blobs()
  scores = (
    indices.sampled_silhouette,
    indices.davies_bouldin,
    indices.calinski_harabasz,
    lambda x, labels: indices.simplified_silhouette(x, labels, x),
  )
  bad = x.copy()
  bad[17, 2] = np.nan
  for score in scores:
    for few in (np.zeros(180, int), np.arange(180)):
      with pytest.raises(ValueError, match="expected 2 to 179 clusters"):
        score(x, few)
    for wrong in (labels[:-1], labels.astype(float)):
      with pytest.raises(ValueError, match=r"labels as whole numbers \[180\]"):
        score(x, wrong)
    with pytest.raises(FloatingPointError, match="17"):
      score(bad, np.abs(labels))
  with pytest.raises(ValueError, match="documents as whole numbers"):
    indices.sampled_silhouette(x, labels, documents=labels[:9])
  with pytest.raises(ValueError, match="at least 1 row"):
    indices.sampled_silhouette(x, labels, samples=0)
  with pytest.raises(ValueError, match="labels from 0 to 13"):
    indices.simplified_silhouette(x, labels, x[:14])
  with pytest.raises(ValueError, match="labels from 0 to 11"):
    indices.simplified_silhouette(x, np.abs(labels), x[:12])
  with pytest.raises(ValueError, match=r"centroids \[C, 7\]"):
    indices.simplified_silhouette(x, np.abs(labels), x[:13, :6])
  with pytest.raises(FloatingPointError, match="centroid"):
    indices.simplified_silhouette(x, np.abs(labels), np.full((13, 7), np.inf))


def test_gini_is_half_the_mean_difference_over_the_mean():
  counts = np.random.default_rng(0).integers(0, 50, 30)
  apart = np.abs(counts[:, None] - counts).mean()
  assert indices.size_gini(counts) == pytest.approx(apart / 2 / counts.mean())
  assert indices.size_gini([7] * 9) == pytest.approx(0)
  assert indices.size_gini([0, 0, 0, 12]) == pytest.approx(3 / 4)


def test_entropy_of_sizes_is_in_bits_beside_its_maximum():
  assert indices.size_entropy([5] * 8) == pytest.approx((3, 3))
  assert indices.size_entropy([2, 1, 1]) == pytest.approx((1.5, np.log2(3)))
  assert indices.size_entropy([9, 9, 0, 0]) == pytest.approx((1, 2))
  for wrong in ([], [0, 0], [3, -1], [[1, 2]], [np.nan]):
    for size in (indices.size_entropy, indices.size_gini):
      with pytest.raises(ValueError, match="expected sizes"):
        size(wrong)
