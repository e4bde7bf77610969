"""Codes and what they give back, against NumPy."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.activations.normalise import Measured
from gemma_jax.activations.normalise import fit as normalisation
from gemma_jax.clustering import kmeans, quantise
from gemma_jax.clustering.quantise import Quantiser

pytestmark = pytest.mark.usefixtures("quick_compiles")

LLOYD_MAX_4 = 0.1175  # of a standard normal: Max 1960, table I


def cloud(rows=2_000, width=6, seed=0):
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((rows, width)) * np.linspace(0.4, 2, width)
  return x.astype(np.float32)


def grid(x):
  """`x` on steps that float32 keeps at 1e4 too."""
  return (64 * x).round() / 64


def closest(x, centroids):
  """The nearest of [C, D] by the direct form, in float64."""
  apart = np.float64(x)[:, None] - np.float64(centroids)[None]
  return (apart**2).sum(-1).argmin(1)


def coordinates(x, kind):
  about = Measured(len(x), x.mean(0), x.var(0), np.cov(x.T, bias=True))
  return normalisation(about, kind)


def mse(quantiser, x):
  apart = np.float64(x) - np.asarray(quantiser.reconstruct(x), np.float64)
  return (apart**2).sum(1).mean()


def written_out(kind, x, centroids):
  """Codes and reconstructions of what `kind` says it does."""
  x = np.float64(x)
  if kind == "product":
    parts = np.split(x, len(centroids), axis=1)
    codes = [closest(p, c) for p, c in zip(parts, centroids, strict=True)]
    made = [c[n] for c, n in zip(centroids, codes, strict=True)]
    return np.stack(codes, 1), np.concatenate(made, axis=1)
  if kind == "spherical":
    codes = (x @ centroids[0].T).argmax(1)
    way = centroids[0][codes]
    return codes[:, None], np.maximum((x * way).sum(1), 0)[:, None] * way
  left, codes = x, []
  for stage in centroids:
    codes.append(closest(left, stage))
    left = left - stage[codes[-1]]
  return np.stack(codes, 1), x - left


def some_centroids(kind, offset=0.0):
  rng = np.random.default_rng(1)
  if kind == "product":
    return grid(rng.standard_normal((3, 5, 2))) + offset
  if kind == "spherical":
    c = rng.standard_normal((1, 8, 6))
    return c / np.linalg.norm(c, axis=-1, keepdims=True)
  c = grid(rng.standard_normal((2, 7, 6)) * np.array([1.5, 0.4])[:, None, None])
  c[0] += offset
  return c


@pytest.mark.parametrize("kind", quantise.KINDS)
def test_codes_and_reconstructions_are_those_of_numpy(kind):
  x, centroids = cloud(500), some_centroids(kind)
  q = Quantiser(kind, quantise.RAW, jnp.asarray(centroids, jnp.float32))
  codes, made = written_out(kind, x, centroids)
  np.testing.assert_array_equal(q.encode(x), codes)
  np.testing.assert_allclose(q.reconstruct(x), made, atol=1e-5)
  if kind == "spherical":
    np.testing.assert_allclose(
      q.decode(codes), centroids[0][codes[:, 0]], atol=1e-6
    )
  else:
    np.testing.assert_allclose(q.decode(codes), made, atol=1e-5)


@pytest.mark.parametrize("kind", ["residual", "product"])
def test_far_from_the_origin_codes_are_still_those_of_numpy(kind):
  x, centroids = grid(cloud(500)) + 1e4, some_centroids(kind, offset=1e4)
  found = iter(centroids)

  class Found:
    def __init__(self, x):
      x = x.read(0, len(x))
      self.centroids = next(found)
      self.labels = closest(x, self.centroids)

  fit = {"residual": quantise.fit_residual, "product": quantise.fit_product}
  q = fit[kind](
    x,
    centroids.shape[1],
    len(centroids),
    fit=lambda rows, k, *, seed: Found(rows),
  )
  codes, made = written_out(kind, x, centroids)
  same = np.asarray(q.encode(x)) == codes
  assert same.mean() > 0.998  # the mean itself is rounded to 1e-3
  close = np.abs(np.asarray(q.reconstruct(x)) - made) < 3e-3
  assert close[same.all(1)].all()


def test_far_from_the_origin_a_fit_loses_nothing():
  x = grid(cloud())
  near = mse(quantise.fit_residual(x, 8, 3), x)
  far = mse(quantise.fit_residual(x + 1e4, 8, 3), x + 1e4)
  assert far == pytest.approx(near, rel=0.05)
  near = mse(quantise.fit_product(x, 8, 3), x)
  far = mse(quantise.fit_product(x + 1e4, 8, 3), x + 1e4)
  assert far == pytest.approx(near, rel=0.05)


def test_one_stage_is_k_means():
  x = cloud()
  q = quantise.fit_residual(x, 9, 1, seed=3)
  found = kmeans(x, 9, seed=3)
  np.testing.assert_array_equal(q.encode(x)[:, 0], found.labels)
  assert mse(q, x) == pytest.approx(found.inertia / len(x), rel=1e-5)
  of = quantise.of_centroids(found.centroids)
  np.testing.assert_array_equal(of.encode(x), q.encode(x))


def test_the_distortion_falls_with_every_stage():
  x = cloud()
  q = quantise.fit_residual(x, 8, 5)
  distortions = [
    mse(Quantiser("residual", q.coordinates, q.centroids[:s]), x)
    for s in range(1, 6)
  ]
  assert (np.diff(distortions) < -0.05 * np.array(distortions[:-1])).all()
  shorter = quantise.fit_residual(x, 8, 2)
  assert mse(shorter, x) == pytest.approx(distortions[1], rel=1e-5)


def test_every_stage_is_k_means_of_what_was_left():
  x, seen = cloud(), []

  def fit(rows, k, *, seed):
    seen.append(rows.read(0, len(rows)).copy())
    return kmeans(rows, k, seed=seed)

  q = quantise.fit_residual(x, 8, 3, fit=fit)
  for stage in (1, 2):
    so_far = Quantiser("residual", q.coordinates, q.centroids[:stage])
    np.testing.assert_allclose(
      seen[stage], x - so_far.reconstruct(x), atol=1e-5
    )


def test_a_product_has_the_distortion_of_lloyd_and_max_in_each_dim():
  x = np.random.default_rng(0).standard_normal((20_000, 3), np.float32)
  q = quantise.fit_product(x, 4, 3)
  each = ((x - np.asarray(q.reconstruct(x))) ** 2).mean(0)
  np.testing.assert_allclose(each, LLOYD_MAX_4, rtol=0.03)


def test_a_direction_times_its_gain_scales_with_the_vector():
  x = cloud() + 1
  found = kmeans(x, 8, spherical=True)
  q = quantise.of_centroids(found.centroids, spherical=True)
  np.testing.assert_array_equal(q.encode(x)[:, 0], found.labels)
  made = np.asarray(q.reconstruct(x))
  np.testing.assert_allclose(q.reconstruct(8 * x), 8 * made, rtol=1e-5)
  np.testing.assert_array_equal(q.encode(8 * x), q.encode(x))
  # What is left has nothing along the direction.
  way = found.centroids[found.labels]
  np.testing.assert_allclose(((x - made) * way).sum(1), 0, atol=1e-5)
  # A vector that all directions oppose is better left out than turned.
  one = quantise.of_centroids(np.eye(6)[:1], spherical=True)
  assert not np.asarray(one.reconstruct(-np.ones((1, 6)))).any()


@pytest.mark.parametrize("normalise", ["mean_square", "standardise", "zca"])
@pytest.mark.parametrize("kind", quantise.KINDS)
def test_reconstructions_are_raw_whatever_the_coordinates(kind, normalise):
  rng = np.random.default_rng(2)
  x = cloud() @ rng.standard_normal((6, 6)).astype(np.float32) + 5
  about = coordinates(x, normalise)
  z = np.asarray(about.apply(x))
  if kind == "residual":
    q = quantise.fit_residual(z, 16, 2, coordinates=about)
  elif kind == "product":
    q = quantise.fit_product(z, 16, 3, coordinates=about)
  else:
    c = kmeans(z, 16, spherical=True).centroids
    q = quantise.of_centroids(c, about, spherical=True)
  mean, to, back = (
    np.asarray(a, np.float64) for a in (about.mean, about.map, about.inverse)
  )
  mean = np.broadcast_to(mean, (6,))
  to, back = (a if a.ndim == 2 else np.eye(6) * a for a in (to, back))
  # The quantiser's centroids are about its own mean.
  moved = np.asarray(q.coordinates.mean, np.float64)
  codes, made = written_out(kind, (x - moved) @ to, np.float64(q.centroids))
  assert (np.asarray(q.encode(x)) == codes).mean() > 0.999
  same = (np.asarray(q.encode(x)) == codes).all(1)
  np.testing.assert_allclose(
    np.asarray(q.reconstruct(x))[same], (made @ back + moved)[same], atol=2e-4
  )
  # In the coordinates of the fit it is as near as the fit found.
  fvu = ((x - q.reconstruct(x)) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
  assert fvu < {"residual": 0.4, "product": 0.5, "spherical": 0.8}[kind]


@pytest.mark.parametrize("kind", quantise.KINDS)
def test_vectors_in_windows_are_coded_under_jit_as_one_by_one(kind):
  x = cloud(60)
  q = Quantiser(kind, quantise.RAW, jnp.float32(some_centroids(kind)))

  @jax.jit
  def both(q, x):
    return q.encode(x), q.reconstruct(x)

  codes, made = both(q, x.reshape(3, 20, 6))
  assert codes.shape == (3, 20, q.stages)
  assert codes.dtype == jnp.int32
  assert made.dtype == jnp.float32
  np.testing.assert_array_equal(codes.reshape(60, -1), q.encode(x))
  np.testing.assert_allclose(
    made.reshape(60, 6), q.reconstruct(x), rtol=1e-6, atol=1e-6
  )
  one = q.encode(x[7])
  np.testing.assert_array_equal(one, q.encode(x)[7])


@pytest.mark.parametrize(
  ("kind", "stages", "clusters", "width", "parameters"),
  [
    ("residual", 2, 7, 6, 2 * 7 * 6),
    ("product", 3, 5, 6, 5 * 6),
    ("spherical", 1, 8, 6, 8 * 6),
  ],
)
def test_sizes_are_those_of_the_code(kind, stages, clusters, width, parameters):
  q = Quantiser(kind, quantise.RAW, jnp.float32(some_centroids(kind)))
  assert (q.stages, q.clusters, q.width) == (stages, clusters, width)
  assert q.bits == pytest.approx(stages * np.log2(clusters))
  assert q.parameters == parameters
  # A product and a sum for each number of each centroid.
  assert q.encode_flops == 2 * parameters


@pytest.mark.parametrize("kind", quantise.KINDS)
def test_what_is_saved_is_loaded_bit_for_bit(kind, tmp_path):
  x = cloud()
  about = coordinates(x, "zca")
  q = Quantiser(kind, about, jnp.float32(some_centroids(kind)))
  q.save(tmp_path / "deep/quantiser")
  found = Quantiser.load(tmp_path / "deep/quantiser")
  assert found.kind == kind
  assert found.coordinates.kind == "zca"
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(q), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)
  np.testing.assert_array_equal(found.reconstruct(x), q.reconstruct(x))


@pytest.mark.parametrize("change", [{"format": 2}, {"kind": "lattice"}])
def test_another_format_is_refused(change, tmp_path):
  q = Quantiser("product", quantise.RAW, jnp.ones((2, 3, 4)))
  q.save(tmp_path)
  path = tmp_path / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(ValueError, match="no quantiser of format 1"):
    Quantiser.load(tmp_path)


def test_nothing_there_is_an_error(tmp_path):
  with pytest.raises(FileNotFoundError):
    Quantiser.load(tmp_path / "nowhere")


@pytest.mark.parametrize("parts", [4, 5, 7])
def test_parts_that_are_not_equal_are_refused(parts):
  with pytest.raises(ValueError, match=f"{parts} parts of vectors of 6"):
    quantise.fit_product(cloud(), 4, parts)
