"""Damage against models whose weights or sites were changed by hand."""

import dataclasses

import jax
import numpy as np
import pytest

from gemma_jax import models
from gemma_jax.concepts import damage, interventions
from gemma_jax.models import edits

pytestmark = pytest.mark.usefixtures("quick_compiles")

FAMILIES = ("gemma3", "gpt2")
SLOW = ("gemma2", "neox", "llama")
LAYER, NEURON = 2, 7


@pytest.fixture(
  scope="module",
  params=[
    *FAMILIES,
    *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW),
  ],
)
def model(request, one_device):
  return models.load_model(f"random:{request.param}-tiny", mesh=one_device)


@pytest.fixture(scope="module")
def gemma_tiny(one_device):
  return models.load_model("random:gemma3-tiny", mesh=one_device)


@pytest.fixture(scope="module")
def prompts():
  """Five prompts of different lengths, answers of one to three tokens."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(4, 1000, (5, 24)).astype(np.int32)
  mask = np.ones((5, 24), bool)
  mask[1, :9] = mask[4, :3] = False
  answers = rng.integers(4, 1000, (5, 3)).astype(np.int32)
  answers[0, 1:] = answers[3, 2:] = -1
  at = np.array(
    [[23, 23, 23], [21, 22, 23], [21, 22, 23], [22, 23, 23], [20, 21, 22]]
  )
  return damage.Prompts(
    tokens, mask, mask.copy(), answers, at.astype(np.int32), np.ones(5)
  )


def log_probs(model, prompts, edits=None, params=None):
  changed = (
    model if params is None else dataclasses.replace(model, params=params)
  )
  logits, _ = changed.forward(prompts.tokens, mask=prompts.mask, edits=edits)
  return jax.nn.log_softmax(np.asarray(logits, np.float64))


def answered(found, prompts):
  """Sum of log-probabilities of each answer, by a loop."""
  return np.array(
    [
      sum(found[p, at, a] for a, at in zip(own, where, strict=True) if a >= 0)
      for p, (own, where) in enumerate(
        zip(prompts.answers, prompts.at, strict=True)
      )
    ]
  )


def with_down(model, neurons, vectors):
  """Parameters in which neurons of LAYER write other vectors."""
  down = (
    model.params["blocks"]["down"].at[LAYER, np.array(neurons)].set(vectors)
  )
  return {**model.params, "blocks": {**model.params["blocks"], "down": down}}


def test_the_clean_model_is_the_model(model, prompts):
  found = log_probs(model, prompts)
  before = damage.clean(model, prompts)
  np.testing.assert_allclose(
    before.log_prob, answered(found, prompts), atol=1e-4
  )
  own = [
    max(
      int((found[p, at] > found[p, at, a]).sum())
      for a, at in zip(prompts.answers[p], prompts.at[p], strict=True)
      if a >= 0
    )
    for p in range(5)
  ]
  np.testing.assert_array_equal(before.rank, own)


def test_changes_are_those_of_changed_weights(model, prompts):
  """Zero, scaled, replaced, noisy, and two at once."""
  one = interventions.neurons(model, LAYER, [NEURON])
  two = interventions.neurons(model, LAYER, [NEURON, 11])
  other = interventions.random_directions(one, seed=3)
  noise = interventions.noise(one, 0.5, seed=4)
  np.testing.assert_allclose(
    np.linalg.norm(other), np.linalg.norm(one.vectors), rtol=1e-5
  )
  cases = [
    (one, interventions.scale(one, 0), [NEURON], 0 * one.vectors),
    (one, interventions.scale(one, -2), [NEURON], -2 * one.vectors),
    (one, interventions.replace(one, other), [NEURON], other),
    (one, noise, [NEURON], one.vectors + noise.vectors),
    (two, interventions.scale(two, 0), [NEURON, 11], 0 * two.vectors),
  ]
  before = damage.clean(model, prompts)
  clean = log_probs(model, prompts)
  for target, change, neurons, vectors in cases:
    got = damage.run(model, prompts, before, target, [change])
    found = log_probs(model, prompts, params=with_down(model, neurons, vectors))
    np.testing.assert_allclose(
      got.log_prob[0], answered(found, prompts), atol=2e-4
    )
    kl = (np.exp(clean) * (clean - found)).sum(-1)
    expected = [
      np.mean([kl[p, at] for a, at in zip(*pair, strict=True) if a >= 0])
      for p, pair in enumerate(zip(prompts.answers, prompts.at, strict=True))
    ]
    np.testing.assert_allclose(got.kl[0], expected, atol=2e-5)
    assert np.abs(got.log_prob[0] - before.log_prob).max() > 1e-3


def test_a_batch_of_changes_is_each_of_them(gemma_tiny, prompts, monkeypatch):
  target = interventions.neurons(gemma_tiny, LAYER, [NEURON])
  changes = [
    interventions.scale(target, 0),
    interventions.set_to(target, [0.7]),
    interventions.norm_only(target, [0.7]),
    *(interventions.noise(target, 2.0, seed) for seed in range(3)),
  ]
  before = damage.clean(gemma_tiny, prompts)
  together = damage.run(gemma_tiny, prompts, before, target, changes)
  monkeypatch.setattr(damage, "ANSWERS", 7)  # two rows at a time
  alone = [
    damage.run(gemma_tiny, prompts, before, target, [change])
    for change in changes
  ]
  for field in damage.Damage._fields:
    np.testing.assert_allclose(
      getattr(together, field),
      np.concatenate([getattr(one, field) for one in alone]),
      atol=1e-5,
    )


def test_a_mean_takes_the_coefficients_place(model, prompts):
  target = interventions.neurons(model, LAYER, [NEURON])
  before = damage.clean(model, prompts)
  got = damage.run(
    model, prompts, before, target, [interventions.set_to(target, [0.3])]
  )
  found = log_probs(
    model,
    prompts,
    {f"blocks.{LAYER}.mlp_hidden": lambda x: x.at[..., NEURON].set(0.3)},
  )
  np.testing.assert_allclose(
    got.log_prob[0], answered(found, prompts), atol=2e-4
  )


def test_positions_that_are_not_edited_stay(gemma_tiny, prompts):
  target = interventions.neurons(gemma_tiny, LAYER, [NEURON])
  nowhere = dataclasses.replace(prompts, edited=np.zeros_like(prompts.edited))
  before = damage.clean(gemma_tiny, prompts)
  got = damage.run(
    gemma_tiny, nowhere, before, target, [interventions.scale(target, 0)]
  )
  np.testing.assert_allclose(got.log_prob[0], before.log_prob, atol=1e-5)
  np.testing.assert_allclose(got.kl, 0, atol=1e-6)
  assert not got.flipped.any()


def test_the_norms_share_is_only_a_scale(model, prompts):
  target = interventions.neurons(model, LAYER, [NEURON])
  before = damage.clean(model, prompts)
  got = damage.run(
    model, prompts, before, target, [interventions.norm_only(target, [40.0])]
  )
  if "post_mlp_norm" not in model.params["blocks"]:
    np.testing.assert_allclose(got.log_prob[0], before.log_prob, atol=1e-5)
    return
  sites = [f"blocks.{LAYER}.{name}" for name in ("mlp_hidden", "mlp_raw")]
  _, found = model.forward(prompts.tokens, mask=prompts.mask, capture=sites)
  hidden, raw = (np.asarray(found[site], np.float64) for site in sites)
  changed = raw + (40.0 - hidden[..., [NEURON]]) * target.vectors
  eps = model.config.norm_eps

  def length(x):
    return np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)

  scaled = log_probs(
    model,
    prompts,
    {
      sites[0].replace("hidden", "out"): edits.scale(
        length(raw) / length(changed)
      )
    },
  )
  np.testing.assert_allclose(
    got.log_prob[0], answered(scaled, prompts), atol=2e-4
  )
  assert np.abs(got.log_prob[0] - before.log_prob).max() > 1e-3


def test_a_direction_is_projected_out(model, prompts):
  vector = np.random.default_rng(5).normal(size=model.config.width)
  target = interventions.direction(LAYER, "resid_post", 9 * vector)
  before = damage.clean(model, prompts)
  got = damage.run(
    model, prompts, before, target, [interventions.scale(target, 0)]
  )
  found = log_probs(
    model, prompts, {f"blocks.{LAYER}.resid_post": edits.project_out(vector)}
  )
  np.testing.assert_allclose(
    got.log_prob[0], answered(found, prompts), atol=2e-4
  )


def test_latents_of_a_dictionary_are_damaged_likewise(gemma_tiny, prompts):
  rng = np.random.default_rng(6)
  encoder = rng.normal(size=(gemma_tiny.config.width, 9)).astype(np.float32)
  decoder = rng.normal(size=(9, gemma_tiny.config.width)).astype(np.float32)

  def encode(x):
    return jax.nn.relu(x @ encoder)

  target = interventions.latents(
    LAYER, "mlp_in", "mlp_out", encode, [2, 5], decoder[[2, 5]]
  )
  before = damage.clean(gemma_tiny, prompts)
  got = damage.run(
    gemma_tiny, prompts, before, target, [interventions.scale(target, 0)]
  )
  found = log_probs(
    gemma_tiny,
    prompts,
    {
      f"blocks.{LAYER}.mlp_out": models.Splice(
        "mlp_in",
        lambda x, y: y - encode(x)[..., np.array([2, 5])] @ decoder[[2, 5]],
      )
    },
  )
  np.testing.assert_allclose(
    got.log_prob[0], answered(found, prompts), atol=2e-4
  )


def test_a_part_of_a_vector_can_be_taken_away(gemma_tiny, prompts):
  """As features are: minus the vector's part in the span of some of them."""
  target = interventions.neurons(gemma_tiny, LAYER, [NEURON])
  features = np.linalg.qr(
    np.random.default_rng(7).normal(size=(gemma_tiny.config.width, 4))
  )[0]
  part = target.vectors @ features @ features.T
  before = damage.clean(gemma_tiny, prompts)
  got = damage.run(
    gemma_tiny, prompts, before, target, [interventions.add(target, -part)]
  )
  found = log_probs(
    gemma_tiny,
    prompts,
    params=with_down(gemma_tiny, [NEURON], target.vectors - part),
  )
  np.testing.assert_allclose(
    got.log_prob[0], answered(found, prompts), atol=2e-4
  )


def test_eight_devices_and_one_do_the_same_damage(gemma_tiny, prompts):
  wide = models.load_model(
    "random:gemma3-tiny",
    mesh=models.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}),
  )
  found = []
  for model in (gemma_tiny, wide):
    target = interventions.neurons(model, LAYER, [NEURON])
    before = damage.clean(model, prompts)
    changes = [
      interventions.scale(target, 0),
      interventions.noise(target, 1.0, 0),
    ]
    found.append(damage.run(model, prompts, before, target, changes))
  np.testing.assert_allclose(found[0].log_prob, found[1].log_prob, atol=1e-4)


def test_what_cannot_be_damaged_is_refused(gemma_tiny, prompts):
  with pytest.raises(ValueError, match=r"neurons must be some of 0\.\.95"):
    interventions.neurons(gemma_tiny, LAYER, [96])
  with pytest.raises(ValueError, match="finite vector"):
    interventions.direction(LAYER, "resid_post", np.zeros(48))
  before = damage.clean(gemma_tiny, prompts)
  target = interventions.direction(LAYER, "resid_past", np.ones(48))
  with pytest.raises(ValueError, match="there is no 'resid_past'"):
    damage.run(
      gemma_tiny, prompts, before, target, [interventions.scale(target, 0)]
    )
  target = interventions.neurons(gemma_tiny, LAYER, [NEURON])
  broken = interventions.add(target, np.full_like(target.vectors, np.inf))
  with pytest.raises(FloatingPointError, match="1 of 1 changes at layer 2"):
    damage.run(gemma_tiny, prompts, before, target, [broken])
