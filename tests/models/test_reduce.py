"""Reductions of captures inside the forward pass."""

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import models
from gemma_jax.models import reduce

pytestmark = pytest.mark.usefixtures("quick_compiles")

LAYERS = 8


@pytest.fixture(scope="module")
def model(one_device):
  return models.load_model("random:gemma3-tiny", mesh=one_device)


@pytest.fixture(scope="module")
def tokens():
  return np.random.default_rng(0).integers(4, 1000, (2, 20))


@pytest.fixture(scope="module")
def mask():
  return np.arange(20)[None] < np.array([[20], [13]])


@pytest.fixture(scope="module")
def full(model, tokens):
  _, found = model.forward(tokens, capture=("blocks.*.resid_post",))
  return np.asarray(found["blocks.*.resid_post"])


CASES = {
  "take_one": (lambda m: reduce.take(-1), lambda x, m: x[:, -1]),
  "take": (lambda m: reduce.take([0, 5]), lambda x, m: x[:, [0, 5]]),
  "mean": (lambda m: reduce.mean(), lambda x, m: x.mean((0, 1))),
  "mean_mask": (reduce.mean, lambda x, m: x[m].mean(0)),
  "take_beyond": (
    lambda m: reduce.take([-1, 20]),
    lambda x, m: np.stack([x[:, -1], np.nan * x[:, 0]], axis=1),
  ),
  "mean_of_row": (
    lambda m: reduce.mean(m[1:]),
    lambda x, m: x[:, :13].mean((0, 1)),
  ),
  "cast": (
    lambda m: reduce.cast("bfloat16"),
    lambda x, m: x.astype(jnp.bfloat16),
  ),
  "chain": (
    lambda m: reduce.chain(reduce.take([2]), lambda x: x * 2),
    lambda x, m: x[:, [2]] * 2,
  ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
  "layers",
  [
    (3,),
    ("*",),
    pytest.param(tuple(range(LAYERS)), marks=pytest.mark.slow),
    pytest.param((0, 2, 4, 5, 7), marks=pytest.mark.slow),
  ],
)
def test_a_reduced_capture_is_the_reduction_of_the_capture(
  model, tokens, mask, full, case, layers
):
  make, expected = CASES[case]
  reduction = make(mask)
  names = {f"blocks.{l}.resid_post": reduction for l in layers}
  _, found = model.forward(tokens, capture=names, stop_at=LAYERS)
  assert tuple(found) == tuple(names)
  for l, name in zip(layers, names, strict=True):
    if l == "*":
      want = np.stack([expected(x, mask) for x in full])
    else:
      want = expected(full[l], mask)
    assert found[name].dtype == want.dtype
    np.testing.assert_allclose(
      np.asarray(found[name], np.float32),
      want.astype(np.float32),
      atol=1e-5,
      rtol=1e-2 if case == "cast" else 1e-5,
    )


def test_top_k_gives_values_and_indices(model, tokens, full):
  _, found = model.forward(
    tokens, capture={"blocks.*.resid_post": reduce.top_k(3)}, stop_at=LAYERS
  )
  values, indices = found["blocks.*.resid_post"]
  assert values.shape == indices.shape == (LAYERS, 2, 20, 3)
  order = np.argsort(-full, axis=-1)[..., :3]
  np.testing.assert_array_equal(indices, order)
  np.testing.assert_allclose(
    values, np.take_along_axis(full, order, -1), atol=1e-5
  )


def test_reductions_differ_from_site_to_site_and_none_keeps_all(model, tokens):
  a, b, c = (f"blocks.{l}.resid_post" for l in (1, 4, 6))
  capture = {c: None, a: reduce.take(0), b: reduce.mean()}
  _, found = model.forward(tokens, capture=capture, stop_at=7)
  assert tuple(found) == (c, a, b)
  _, whole = model.forward(tokens, capture=(a, b, c), stop_at=7)
  np.testing.assert_allclose(found[c], whole[c], atol=1e-5)
  np.testing.assert_allclose(found[a], whole[a][:, 0], atol=1e-5)
  np.testing.assert_allclose(found[b], whole[b].mean((0, 1)), atol=1e-5)


def test_many_layers_of_two_sites_in_one_scan_do_not_mix(model, tokens):
  """Past four layers, captures by number share buffers."""
  names = [f"blocks.{l}.mlp_in" for l in (0, 1, 3, 4, 6)]
  names += [f"blocks.{l}.mlp_out" for l in (7, 2, 0)]
  _, found = model.forward(tokens, capture=names)
  whole = ("blocks.*.mlp_in", "blocks.*.mlp_out")
  _, stacks = model.forward(tokens, capture=whole)
  for name in names:
    _, layer, short = name.split(".")
    np.testing.assert_allclose(
      found[name], stacks[f"blocks.*.{short}"][int(layer)], atol=1e-5
    )
