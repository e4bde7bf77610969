"""How neurons are used, against all coefficients at once."""

import numpy as np
import pytest

from gemma_jax import models
from gemma_jax.concepts import usage


@pytest.fixture(scope="module")
def model(one_device):
  return models.load_model("random:gemma3-tiny", mesh=one_device)


@pytest.fixture(scope="module")
def windows():
  rng = np.random.default_rng(0)
  tokens = rng.integers(4, 1000, (7, 20)).astype(np.int32)
  mask = rng.random((7, 20)) < 0.8
  mask[:, 0] = False
  return tokens, mask


def test_sums_and_extremes_are_those_of_all_coefficients(model, windows):
  tokens, mask = windows
  got = usage.measure(model, tokens, mask, contexts=3, batch_size=3)
  site = "blocks.*.mlp_hidden"
  _, found = model.forward(tokens, capture=(site,))
  a = np.asarray(found[site], np.float64)  # [L, W, T, F]
  counted = a[:, mask]
  assert got.tokens == mask.sum()
  np.testing.assert_allclose(got.mean, counted.mean(1), atol=1e-5)
  np.testing.assert_allclose(got.mass, np.abs(counted).mean(1), atol=1e-5)
  share = np.maximum(counted, 0).sum(1) / np.abs(counted).sum(1)
  np.testing.assert_allclose(got.positive, share, atol=1e-4)
  for sign, values, places in (
    (1, got.high, got.high_at),
    (-1, got.low, got.low_at),
  ):
    masked = np.where(mask[..., None], sign * a, -np.inf)
    best = -np.sort(-masked.max(2), axis=1)[:, :3]  # one a window
    np.testing.assert_allclose(
      sign * values, np.moveaxis(best, 1, 2), atol=1e-5
    )
    layer, unit = 3, 11
    for value, (window, position) in zip(
      values[layer, unit], places[layer, unit], strict=True
    ):
      assert value == pytest.approx(a[layer, window, position, unit], abs=1e-5)
      assert mask[window, position]


def test_fewer_windows_than_contexts_leave_infinity(model, windows):
  tokens, mask = windows
  got = usage.measure(model, tokens[:2], mask[:2], contexts=4, batch_size=2)
  assert np.isfinite(got.high[..., :2]).all()
  assert got.high.shape[2] == 2
  blank = mask[:2].copy()
  blank[1] = False
  got = usage.measure(model, tokens[:2], blank, contexts=2, batch_size=2)
  assert (got.high[..., 1] == -np.inf).all()
  assert (got.low[..., 1] == np.inf).all()


def test_bad_windows_are_refused(model, windows):
  tokens, mask = windows
  with pytest.raises(ValueError, match="positions that count"):
    usage.measure(model, tokens, np.zeros_like(mask))
  with pytest.raises(ValueError, match="positions that count"):
    usage.measure(model, tokens, mask[:3])
