"""Weights changed by known amounts."""

import jax
import numpy as np
import pytest

from gemma_jax import models
from gemma_jax.activations import fingerprints
from gemma_jax.models import perturb


@pytest.fixture(
  scope="module",
  params=["gemma3", pytest.param("gpt2", marks=pytest.mark.slow)],
)
def model(request, one_device):
  return models.load_model(f"random:{request.param}-tiny", mesh=one_device)


def leaves(model):
  flat = jax.tree_util.tree_leaves_with_path(model.params)
  return {path[-1].key: np.asarray(x, np.float64) for path, x in flat}


def is_small(name):
  return name.endswith(("norm", "bias"))


def test_noise_has_the_size_that_was_asked_for(model):
  before, after = leaves(model), leaves(perturb.add_noise(model, 0.25))
  for name, x in before.items():
    change = after[name] - x
    if is_small(name):
      assert not change.any()
      continue
    layers = [slice(None)] if name in model.params else range(len(x))
    for layer in layers:
      assert change[layer].std() == pytest.approx(
        0.25 * x[layer].std(), rel=0.05
      )
      correlation = np.corrcoef(change[layer].ravel(), x[layer].ravel())[0, 1]
      assert abs(correlation) < 0.1


def test_noise_differs_by_seed_layer_and_matrix_and_is_repeatable(model):
  one, again, other = (
    leaves(perturb.add_noise(model, 0.1, seed=seed)) for seed in (0, 0, 1)
  )
  own = leaves(model)
  for name in own:
    np.testing.assert_array_equal(one[name], again[name])
    if not is_small(name):
      assert (one[name] != other[name]).mean() > 0.99
  noise = one["q"] - own["q"]
  assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.1
  beside = one["k"] - own["k"]
  width = min(noise[0].size, beside[0].size)
  pair = noise[0].ravel()[:width], beside[0].ravel()[:width]
  assert abs(np.corrcoef(*pair)[0, 1]) < 0.1


def test_noise_of_a_layer_does_not_depend_on_how_many_are_loaded(one_device):
  name = "random:gemma3-tiny"
  whole = leaves(perturb.add_noise(models.load_model(name, mesh=one_device), 1))
  part = models.load_model(name, mesh=one_device, layers=2)
  part = leaves(perturb.add_noise(part, 1))
  np.testing.assert_array_equal(part["embed"], whole["embed"])
  np.testing.assert_array_equal(part["down"], whole["down"][:2])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_requantised_weights_lie_on_equal_steps(model, bits):
  before, after = leaves(model), leaves(perturb.requantise(model, bits))
  for name, x in before.items():
    if is_small(name):
      np.testing.assert_array_equal(after[name], x)
      continue
    size = np.gcd(perturb.GROUP, x.shape[-1])
    old, new = x.reshape(-1, size), after[name].reshape(-1, size)
    largest = np.abs(old).max(1, keepdims=True)
    step = largest / (2 ** (bits - 1) - 1)
    np.testing.assert_allclose(new / step, np.round(new / step), atol=1e-4)
    assert (np.abs(new - old) <= step * 0.5001).all()
    np.testing.assert_allclose(np.abs(new).max(1), largest[:, 0], rtol=1e-6)


def test_redrawn_weights_keep_mean_and_spread_and_nothing_else(model):
  before, after = leaves(model), leaves(perturb.redraw(model, seed=3))
  for name, x in before.items():
    if is_small(name):
      np.testing.assert_array_equal(after[name], x)
      continue
    assert after[name].std() == pytest.approx(x.std(), rel=0.05)
    assert abs(np.corrcoef(after[name].ravel(), x.ravel())[0, 1]) < 0.1


def test_a_changed_model_runs_and_does_not_touch_the_first(model):
  tokens = np.arange(8)[None] + 4
  before, _ = model.forward(tokens)
  changed, _ = perturb.add_noise(model, 0.1).forward(tokens)
  after, _ = model.forward(tokens)
  np.testing.assert_array_equal(before, after)
  assert not np.allclose(before, changed)
  same, _ = perturb.add_noise(model, 0.0).forward(tokens)
  np.testing.assert_array_equal(before, same)


def test_changed_weights_do_not_pass_for_those_of_the_directory(model):
  changed = perturb.requantise(perturb.add_noise(model, 0.1), 4)
  assert changed.changes == ("noise 0.1, seed 0", "4 bits")
  ours, theirs = (fingerprints.describe(m) for m in (model, changed))
  assert ours["model_fingerprint"] != theirs["model_fingerprint"]


def test_weights_stay_where_they_are_on_a_mesh():
  mesh = models.make_mesh({"fsdp": 2, "tensor": 2, "data": 2})
  model = models.load_model("random:gemma3-tiny", mesh=mesh)
  changed = perturb.add_noise(model, 0.1)
  for x, y in zip(
    jax.tree.leaves(model.params), jax.tree.leaves(changed.params), strict=True
  ):
    assert y.sharding.is_equivalent_to(x.sharding, x.ndim)
  one = models.make_mesh({"data": 1}, jax.devices()[:1])
  alone = models.load_model("random:gemma3-tiny", mesh=one)
  alone = leaves(perturb.add_noise(alone, 0.1))
  for name, x in leaves(changed).items():
    np.testing.assert_allclose(x, alone[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda m: perturb.add_noise(m, -1.0), "scale"),
    (lambda m: perturb.add_noise(m, float("nan")), "scale"),
    (lambda m: perturb.requantise(m, 1), "2 to 8 bits"),
    (lambda m: perturb.requantise(m, 9), "2 to 8 bits"),
    (lambda m: perturb.requantise(m, 4.0), "2 to 8 bits"),
  ],
)
def test_bad_amounts_are_refused(model, change, message):
  with pytest.raises(ValueError, match=message):
    change(model)
