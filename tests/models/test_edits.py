"""Edits made by `models.edits`, in every family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from gemma_jax import models
from gemma_jax.models import edits

pytestmark = pytest.mark.usefixtures("quick_compiles")

SITE = "blocks.2.resid_post"


@pytest.fixture(
  scope="module",
  params=["gemma3", pytest.param("neox", marks=pytest.mark.slow)],
)
def model(request, one_device):
  return models.load_model(f"random:{request.param}-tiny", mesh=one_device)


@pytest.fixture(scope="module")
def tokens():
  return np.random.default_rng(0).integers(4, 1000, (2, 20))


@pytest.fixture(scope="module")
def clean(model, tokens):
  logits, found = model.forward(tokens, capture=(SITE,))
  return np.asarray(logits), np.asarray(found[SITE])


@pytest.fixture(scope="module")
def vector(model):
  return np.random.default_rng(1).normal(size=model.config.width)


def edited(model, tokens, edit, site=SITE):
  logits, found = model.forward(tokens, capture=(SITE,), edits={site: edit})
  return np.asarray(logits), np.asarray(found[SITE])


def test_add_scale_and_replace_do_as_they_say(model, tokens, clean, vector):
  x = clean[1]
  for edit, expected in (
    (edits.add(vector), x + vector),
    (edits.add(vector, -2.5), x - 2.5 * vector),
    (edits.scale(0.25), x * 0.25),
    (edits.replace(vector), np.broadcast_to(vector, x.shape)),
    (edits.replace(0.0), np.zeros_like(x)),
  ):
    logits, got = edited(model, tokens, edit)
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=1e-5)
    assert np.abs(logits - clean[0]).max() > 1e-3


def test_what_is_projected_out_is_gone_and_the_rest_is_not(
  model, tokens, clean, vector
):
  _, got = edited(model, tokens, edits.project_out(7 * vector))
  unit = vector / np.linalg.norm(vector)
  np.testing.assert_allclose(got @ unit, 0, atol=1e-5)
  along = (clean[1] @ unit)[..., None] * unit
  np.testing.assert_allclose(got, clean[1] - along, atol=2e-5, rtol=1e-5)


def test_at_edits_positions_by_number_and_by_mask(model, tokens, clean, vector):
  where = np.zeros((2, 20), bool)
  where[0, [3, 7]] = where[1, 5] = True
  _, got = edited(model, tokens, edits.at(where, edits.add(vector)))
  np.testing.assert_allclose(
    got, clean[1] + where[..., None] * vector, atol=2e-5, rtol=1e-5
  )
  _, got = edited(model, tokens, edits.at([3, 7], edits.scale(0.0)))
  kept = np.ones(20)
  kept[[3, 7]] = 0
  np.testing.assert_allclose(got, clean[1] * kept[:, None], atol=2e-5)
  _, got = edited(model, tokens, edits.at(-1, edits.scale(0.0)))
  kept = np.arange(20) < 19
  np.testing.assert_allclose(got, clean[1] * kept[:, None], atol=2e-5)
  _, got = edited(model, tokens, edits.at([20, -21], edits.scale(0.0)))
  np.testing.assert_allclose(got, clean[1], atol=2e-5)


def test_a_splice_with_its_error_changes_nothing_but_the_gradient(
  model, tokens, clean, vector
):
  wrong = Partial(lambda v, x: jnp.tanh(x * v.astype(x.dtype)), vector)
  site = "blocks.2.mlp_out"

  def loss(params, error_of):
    def fn(x):
      return params * wrong(x)

    splice = edits.splice("mlp_in", fn, error_of=fn if error_of else None)
    logits, _ = models.forward(
      model.config, model.params, jnp.asarray(tokens), edits={site: splice}
    )
    return jnp.sum(logits**2), logits

  run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
  (_, with_error), slope = run(1.0, True)
  np.testing.assert_allclose(with_error, clean[0], atol=2e-5, rtol=1e-4)
  assert abs(slope) > 1e-3
  (_, without), _ = run(1.0, False)
  assert np.abs(without - clean[0]).max() > 1e-2


def test_an_intervention_on_top_of_the_error_is_the_change_alone(
  model, tokens, vector
):
  site = "blocks.2.mlp_out"
  rough = Partial(lambda v, x: x * v.astype(x.dtype), vector)
  changed = Partial(
    lambda f, v, x: f(x) + v.astype(x.dtype), rough, jnp.asarray(vector)
  )
  splice = edits.splice("mlp_in", changed, error_of=rough)
  got, _ = edited(model, tokens, splice, site)
  expected, _ = edited(model, tokens, edits.add(vector), site)
  np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)


def test_per_layer_gives_each_layer_its_own_arrays(model, tokens):
  layers = model.config.num_layers
  shifts = np.random.default_rng(2).normal(size=(layers, model.config.width))
  name = "blocks.*.mlp_out"
  edit = models.PerLayer(lambda v, x: x + v.astype(x.dtype), shifts)
  stacked, _ = model.forward(tokens, edits={name: edit})
  one_by_one, _ = model.forward(
    tokens,
    edits={f"blocks.{l}.mlp_out": edits.add(shifts[l]) for l in range(layers)},
  )
  np.testing.assert_allclose(stacked, one_by_one, atol=1e-5, rtol=1e-5)
  splice = models.Splice(
    "mlp_in", models.PerLayer(lambda v, read, x: x + v.astype(x.dtype), shifts)
  )
  spliced, _ = model.forward(tokens, edits={name: splice})
  np.testing.assert_allclose(spliced, stacked, atol=1e-5, rtol=1e-5)


def test_another_vector_or_strength_does_not_compile_again(
  model, tokens, vector
):
  count = []

  def traced(v, x):
    count.append(1)  # runs while tracing only
    return x + v.astype(x.dtype)

  for strength in (1.0, 2.0, -3.0):
    edit = Partial(traced, strength * vector)
    model.forward(tokens, edits={SITE: edit}, stop_at=3)
  assert len(count) == 1


def test_gradients_go_through_the_vector_of_an_edit(model, tokens, vector):
  """Also under a transformation of the user's own."""

  def loss(vector):
    logits, _ = model.forward(tokens, edits={SITE: edits.add(vector)})
    return logits[:, -1, 5].sum()

  slope = jax.grad(loss)(jnp.asarray(vector, jnp.float32))
  direction = np.random.default_rng(4).normal(size=vector.shape)
  ahead, behind = (loss(vector + s * direction) for s in (1e-2, -1e-2))
  np.testing.assert_allclose(
    slope @ direction, (ahead - behind) / 2e-2, rtol=2e-2, atol=1e-3
  )
  np.testing.assert_allclose(jax.jit(loss)(vector), loss(vector), rtol=1e-5)


# What is refused.


def test_a_mask_of_at_that_does_not_fit_is_an_error(model, tokens):
  edit = edits.at(np.ones((2, 19), bool), edits.scale(0.0))
  with pytest.raises(ValueError, match=r"is \(2, 19\); expected .*\(2, 20\)"):
    edited(model, tokens, edit)


@pytest.mark.parametrize("site", [SITE, "blocks.*.mlp_out"])
def test_an_edit_that_changes_the_dtype_is_an_error(model, tokens, site):
  with pytest.raises(
    ValueError, match=r"returned bfloat16 .*; expected float32 .*astype"
  ):
    edited(model, tokens, lambda x: x.astype(jnp.bfloat16), site)


def test_per_layer_arrays_must_have_an_entry_for_each_layer(model, tokens):
  layers = model.config.num_layers
  edit = models.PerLayer(lambda v, x: x + v, np.zeros((layers - 1, 1)))
  with pytest.raises(ValueError, match=rf"leading axis of {layers}"):
    edited(model, tokens, edit, "blocks.*.mlp_out")
  with pytest.raises(ValueError, match=r"PerLayer, for `blocks\.\*`"):
    edited(model, tokens, edit, SITE)


def test_at_refuses_a_token_that_comes_alone(model, tokens, vector):
  edit = edits.at([3], edits.add(vector))
  with pytest.raises(ValueError, match="cache=False"):
    model.generate(tokens, max_new_tokens=3, edits={SITE: edit})
  model.generate(tokens, max_new_tokens=3, edits={SITE: edit}, cache=False)
