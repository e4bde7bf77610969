import numpy as np
import pytest
import scipy.stats

from gemma_jax.probing import random


def test_every_feature_fires_as_often_as_it_is_told():
  x = np.random.default_rng(0).standard_normal((1_000, 16)) * 5 + 2
  density = np.array([0.0, 0.001, 0.02, 0.5, 0.999])
  z = random.random_latents(x, density, seed=0)
  assert z.shape == (1_000, 5)
  assert z.dtype == np.float32
  fired = np.asarray((z > 0).sum(0)).ravel()
  np.testing.assert_array_equal(fired, [0, 1, 20, 500, 999])
  assert z.min() >= 0


def test_features_are_shifted_projections_of_standardised_activations(
  monkeypatch,
):
  rng = np.random.default_rng(0)
  scale = np.array([1, 1, 1, 1000.0])
  x = rng.standard_normal((500, 4)) * scale
  z = random.random_latents(x, np.full(30, 0.9), seed=3).toarray()
  on = z > 0
  # An affine map of x explains each feature wherever it fires.
  design = np.column_stack([x / scale, np.ones(500)])
  massive = []
  for j in range(30):
    fit, residual, _, _ = np.linalg.lstsq(
      design[on[:, j]], z[on[:, j], j], rcond=None
    )
    assert residual < 1e-6
    massive.append(np.abs(fit[3]) / np.linalg.norm(fit[:4]))
  # The massive dimension is one of four, no more.
  assert (
    scipy.stats.binomtest(int(np.sum(np.array(massive) > 0.7)), 30, 0.26).pvalue
    > 1e-3
  )
  monkeypatch.setattr(random, "ROWS", 2_000)  # four at a time
  parts = random.random_latents(x, np.full(30, 0.9), seed=3).toarray()
  np.testing.assert_allclose(parts, z, atol=1e-5)


def test_impossible_densities_are_refused():
  x = np.ones((10, 2))
  with pytest.raises(ValueError, match=r"in \[0, 1\), got 0\.5 to 1"):
    random.random_latents(x, np.array([0.5, 1.0]), seed=0)
  with pytest.raises(
    ValueError, match=r"density \[M\], got \(10, 2\) and \(\)"
  ):
    random.random_latents(x, 0.5, seed=0)
  with pytest.raises(FloatingPointError, match="not finite"):
    random.random_latents(x * np.inf, np.array([0.5]), seed=0)
