"""Shared neighbours, against sorted distances."""

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from gemma_jax.metrics.similarity import (
  cknna,
  mutual_knn,
  nearest_neighbours,
  neighbour_overlap,
  neighbours,
)


@pytest.fixture
def rows():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(120, 6))
  y = x @ rng.normal(size=(6, 9)) + rng.normal(size=(120, 9))
  return x, y


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("block", [1, 120 * 50, 2**24])
def test_neighbours_are_those_of_scikit_learn(rows, metric, block, monkeypatch):
  monkeypatch.setattr(neighbours, "_BLOCK", block)
  x = rows[0] + 0.5
  nearest = NearestNeighbors(n_neighbors=7, metric=metric, algorithm="brute")
  expected = nearest.fit(x).kneighbors(return_distance=False)
  found = nearest_neighbours(x, k=7, metric=metric)
  np.testing.assert_array_equal(np.sort(found, 1), np.sort(expected, 1))


def test_far_from_the_origin_euclidean_neighbours_are_the_same(rows):
  x = rows[0]
  near = nearest_neighbours(x, metric="euclidean")
  moved = nearest_neighbours(x + 1e6, metric="euclidean")
  assert neighbour_overlap(near, moved) == 1


def test_the_overlap_counts_neighbours_in_any_order(rows):
  a, b = (nearest_neighbours(x, k=10) for x in rows)
  expected = np.mean(
    [len(set(p) & set(q)) / 10 for p, q in zip(a, b, strict=True)]
  )
  assert 0 < expected < 1
  assert mutual_knn(*rows) == pytest.approx(expected)
  assert neighbour_overlap(a[:, ::-1], b) == pytest.approx(expected)


def test_independent_rows_share_k_of_n_less_one():
  rng = np.random.default_rng(1)
  n, k, scores = 60, 8, []
  for _ in range(200):
    x, y = rng.normal(size=(2, n, 20))
    scores.append(mutual_knn(x, y, k=k))
  error = np.std(scores) / np.sqrt(len(scores))
  assert error < 0.002
  assert np.mean(scores) == pytest.approx(k / (n - 1), abs=4 * error)


def test_identical_rows_share_all(rows):
  x = rows[0]
  turn = np.linalg.qr(np.random.default_rng(2).normal(size=(6, 6)))[0]
  assert mutual_knn(x, x) == 1
  assert mutual_knn(x, 5 * x @ turn) == 1
  assert mutual_knn(x, x + 3, metric="euclidean") == 1
  assert cknna(x, x) == pytest.approx(1)
  assert cknna(x, 5 * x @ turn) == pytest.approx(1)


def dense_cknna(x, y, k):
  """The definition with n x n matrices."""
  n = len(x)
  kernels, masks = [], []
  for a in (x, y):
    a = a / np.linalg.norm(a, axis=1, keepdims=True)
    kernel = a @ a.T
    np.fill_diagonal(kernel, -np.inf)
    order = np.argsort(-kernel, axis=1)
    masks.append((np.argsort(order, axis=1) < k).astype(float))
    np.fill_diagonal(kernel, 0)
    kernels.append(kernel)

  def hsic(k, l):
    found = np.trace(k @ l) + k.sum() * l.sum() / ((n - 1) * (n - 2))
    return (found - 2 * (k @ l).sum() / (n - 2)) / (n * (n - 3))

  both = masks[0] * masks[1]
  own = [hsic(k * m, k * m) for k, m in zip(kernels, masks, strict=True)]
  return hsic(kernels[0] * both, kernels[1] * both) / np.sqrt(own[0] * own[1])


@pytest.mark.parametrize("k", [2, 10, 119])
@pytest.mark.parametrize("block", [1, 2**24])
def test_cknna_is_its_definition(rows, k, block, monkeypatch):
  monkeypatch.setattr(neighbours, "_BLOCK", block)
  assert cknna(*rows, k=k) == pytest.approx(dense_cknna(*rows, k), rel=1e-9)


def test_neighbours_at_right_angles_are_neighbours():
  x = np.eye(3)[[0, 1, 2, 0, 1, 2]]
  y = np.random.default_rng(6).normal(size=(6, 4)) + x @ np.ones((3, 4))
  assert cknna(x, y, k=5) == pytest.approx(dense_cknna(x, y, 5), rel=1e-9)


def test_cknna_of_unrelated_rows_is_about_their_share_of_neighbours(rows):
  unrelated = np.random.default_rng(5).normal(size=(120, 6))
  assert cknna(rows[0], unrelated) == pytest.approx(10 / 119, abs=0.03)
  assert cknna(*rows) > 0.2


@pytest.mark.parametrize(
  ("x", "options", "message"),
  [
    (np.eye(5), {"k": 5}, "1 <= k < n"),
    (np.eye(5), {"k": 0}, "1 <= k < n"),
    (np.ones(5), {"k": 2}, r"\[n, D\]"),
    (np.eye(5), {"k": 2, "metric": "dot"}, "cosine"),
    (np.diag([1.0, 1, 0, 1]), {"k": 2}, "row 2 .* all zeros"),
    (np.full((5, 2), np.nan), {"k": 2}, "finite"),
  ],
)
def test_rows_without_neighbours_are_an_error(x, options, message):
  with pytest.raises(ValueError, match=message):
    nearest_neighbours(x, **options)


def test_rows_and_lists_that_do_not_fit_are_errors(rows):
  with pytest.raises(ValueError, match="row i of both"):
    mutual_knn(rows[0], rows[1][1:])
  with pytest.raises(ValueError, match="row i of both"):
    cknna(rows[0], rows[1][1:])
  near = nearest_neighbours(rows[0])
  with pytest.raises(ValueError, match="two lists"):
    neighbour_overlap(near, near[:, 1:])
  with pytest.raises(ValueError, match="say something"):
    cknna(np.eye(9), np.eye(9), k=3)
