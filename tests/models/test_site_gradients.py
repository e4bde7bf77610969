"""Gradients of a loss with respect to sites."""

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import models
from gemma_jax.models import edits

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module", params=["gemma2", "neox"])
def model(request, one_device):
  return models.load_model(f"random:{request.param}-tiny", mesh=one_device)


@pytest.fixture(scope="module")
def tokens():
  return np.random.default_rng(0).integers(4, 1000, (2, 20))


def loss(logits, found):
  return jnp.mean(logits[:, -1, :7] ** 2)


def test_gradients_are_the_slopes_of_finite_differences(model, tokens):
  site = "blocks.2.mlp_out"
  value, slopes, found = model.site_gradients(
    tokens, (site,), loss, capture=(site,)
  )
  logits, clean = model.forward(tokens, capture=(site,))
  np.testing.assert_allclose(value, loss(logits, {}), rtol=1e-5)
  np.testing.assert_allclose(found[site], clean[site], atol=1e-5)
  rng = np.random.default_rng(3)
  for _ in range(3):
    direction = rng.normal(size=slopes[site].shape).astype(np.float32)
    at = {}
    for step in (1e-2, -1e-2):
      logits, _ = model.forward(
        tokens, edits={site: edits.add(direction, step)}
      )
      at[step] = loss(np.asarray(logits, np.float64), {})
    expected = (at[1e-2] - at[-1e-2]) / 2e-2
    np.testing.assert_allclose(
      np.sum(slopes[site] * direction), expected, rtol=2e-2, atol=1e-4
    )


def test_gradients_of_all_layers_are_those_of_each(model, tokens):
  layers = model.config.num_layers
  names = tuple(f"blocks.{l}.resid_post" for l in range(layers))
  _, slopes, _ = model.site_gradients(
    tokens, ("blocks.*.resid_post", *names), loss
  )
  whole = slopes["blocks.*.resid_post"]
  assert whole.shape == (layers, 2, 20, model.config.width)
  for l, name in enumerate(names):
    np.testing.assert_allclose(whole[l], slopes[name], atol=1e-7, rtol=1e-4)
  # Only the last position of the last layer's output can reach the loss.
  assert np.abs(whole[-1][:, :-1]).max() == 0 < np.abs(whole[-1][:, -1]).max()


def test_a_gradient_is_taken_after_the_edit_of_its_site(model, tokens):
  """An edit that replaces the value cuts what comes before it, not itself."""
  site, before = "blocks.2.resid_post", "blocks.1.resid_post"
  value, slopes, found = model.site_gradients(
    tokens,
    (site, before),
    loss,
    capture=(site,),
    edits={site: edits.replace(0.5)},
  )
  assert np.all(np.asarray(found[site]) == 0.5)
  assert np.abs(slopes[site]).max() > 0
  assert np.abs(slopes[before]).max() == 0
  assert np.isfinite(value)


def test_a_loss_of_sites_alone_stops_with_them(model, tokens):
  site = "blocks.1.mlp_out"

  def of_site(logits, found):
    assert logits is None
    return jnp.sum(found[site] ** 2) / 2

  _, slopes, found = model.site_gradients(
    tokens, (site,), of_site, capture=(site,), stop_at=site
  )
  np.testing.assert_allclose(slopes[site], found[site], rtol=1e-6)
