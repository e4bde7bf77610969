"""The training step on meshes and for many members, against one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gemma_jax import models
from gemma_jax.dictionaries import DictionaryConfig, core
from gemma_jax.dictionaries.presets import preset
from trainers import dictionary_step
from trainers.dictionary_members import Member
from trainers.dictionary_plan import AXES

pytestmark = pytest.mark.usefixtures("quick_compiles")

D, M, B, STEPS = 24, 128, 64, 50


def config(activation="batchtopk", k=4.0, **changes):
  base = {
    "d_in": D,
    "d_out": D,
    "width": M,
    "activation": activation,
    "k": k,
    "prefix_widths": (24, 64, M),
  }
  return DictionaryConfig(**(base | changes))


def recipe(activation="batchtopk", system="default", **changes):
  base = {"dead_after": 8 * B, "aux_candidates": 24, "aux_k": 8}
  return preset(system, activation, base | changes)


def member(cfg, *, name="", rate=3e-3, sparsity=0.1, seed=0):
  return Member(name, cfg, rate, sparsity, seed)


@functools.cache
def rows(n=4096):
  """A planted dictionary of 96 directions, 4 at once, and a little noise."""
  rng = np.random.default_rng(0)
  truth = rng.normal(size=(96, D))
  truth /= np.linalg.norm(truth, axis=1, keepdims=True)
  acts = (rng.random((n, 96)) < 4 / 96) * rng.uniform(0.5, 2, (n, 96))
  return (acts @ truth + 0.01 * rng.normal(size=(n, D))).astype(np.float32)


def norm():
  raw = core.Normalisation.identity(D, D)
  return raw._replace(y_variance=jnp.asarray(0.2))


def start(groups, how):
  """The state of all members at step 0, on one device."""
  x = jnp.asarray(rows())
  first = jnp.ones(len(x), bool)
  keys = dictionary_step.keys(groups)
  return dictionary_step.start(groups, how, keys, norm(), None, (x, x, first))


def train(groups, how, shape=(1, 1, 1), steps=STEPS, at_once=1, sparse=True):
  """Metrics of every step [S] and the state after the last."""
  sizes = dict(zip(AXES, shape, strict=True))
  devices = jax.devices()[: int(np.prod(shape))]
  mesh = models.make_mesh(sizes, devices, AXES)
  step = dictionary_step.make(
    groups, how, mesh, steps=steps, at_once=at_once, sparse=sparse
  )
  state = start(groups, how)
  splits = jax.tree_util.tree_map_with_path(
    lambda path, x: NamedSharding(
      mesh, dictionary_step.rule(jax.tree_util.keystr(path), x.shape)
    ),
    state,
  )
  state = jax.device_put(state, splits)
  run = jax.jit(step, donate_argnums=(0, 1, 2))
  found = []
  for i in range(steps):
    x = rows()[np.arange(i * B, (i + 1) * B) % len(rows())]
    x = jax.device_put(x, NamedSharding(mesh, P("data")))
    *state, finite, metrics = run(*state, {"x": x, "y": x}, jnp.asarray(i))
    found.append({"finite": finite, **metrics})
  return jax.device_get(found), jax.device_get(state)


def column(found, name):
  return np.stack([row[name] for row in found])


CASES = {
  "batchtopk": ("default", {}),
  "topk": ("default", {}),
  "jumprelu": (
    "default",
    {
      "threshold_init": 0.2,
      "bandwidth": 0.3,
      "pre_activation_coefficient": 0.1,
    },
  ),
  "gated": ("default", {}),
  "relu": ("sae_lens", {"dead_after_steps": None}),
}


@functools.cache
def alone(activation):
  system, changes = CASES[activation]
  how = recipe(activation, system, **changes)
  return train([(member(config(activation)),)], how)


@pytest.mark.parametrize(
  ("activation", "shape"),
  [
    *((a, (1, 2, 4)) for a in CASES),
    ("batchtopk", (1, 1, 8)),
    *(
      pytest.param(a, s, marks=pytest.mark.slow)
      for a, s in [
        ("batchtopk", (1, 8, 1)),
        ("topk", (1, 8, 1)),
        ("topk", (1, 1, 8)),
        ("jumprelu", (1, 1, 8)),
      ]
    ),
  ],
)
def test_a_mesh_gives_the_losses_of_one_device(activation, shape):
  one, last = alone(activation)
  system, changes = CASES[activation]
  how = recipe(activation, system, **changes)
  many, end = train([(member(config(activation)),)], how, shape)
  for name in one[0]:
    np.testing.assert_allclose(
      column(many, name), column(one, name), rtol=1e-5, atol=1e-6, err_msg=name
    )
  for name, x in last[0][0].items():
    np.testing.assert_allclose(end[0][0][name], x, rtol=2e-4, atol=2e-5)
  # The same latents fired at the same times.
  np.testing.assert_array_equal(
    end[2]["states"][0].since_fired, last[2]["states"][0].since_fired
  )


def test_dead_latents_take_part_in_what_meshes_are_compared_by():
  found, _ = alone("batchtopk")
  assert column(found, "aux_loss").max() > 0
  assert column(found, "dead_fraction").max() > 0
  assert column(found, "fvu")[-1] < 0.8 * column(found, "fvu")[0]


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_touching_active_latents_only_gives_the_losses_of_all(activation):
  sparse, _ = alone(activation)
  dense, _ = train(
    [(member(config(activation)),)], recipe(activation), sparse=False
  )
  np.testing.assert_allclose(
    column(sparse, "loss"), column(dense, "loss"), rtol=1e-5
  )


def sweep():
  return [
    (
      member(config(k=2.0), name="a"),
      member(config(k=4.0), name="b", rate=1e-3, seed=1),
      member(config(k=6.0), name="c", rate=5e-3),
      member(config(k=4.0), name="d", seed=2),
    ),
    (
      member(config(width=64, prefix_widths=(16, 32, 64)), name="e"),
      member(config(width=64, k=3.0, prefix_widths=(16, 32, 64)), name="f"),
    ),
  ]


@functools.cache
def swept_alone(i):
  own = [m for group in sweep() for m in group][i]
  return train([(own,)], recipe(), steps=12)[0]


@pytest.mark.parametrize(
  ("shape", "at_once"),
  [((1, 1, 1), 4), pytest.param((2, 2, 2), 1, marks=pytest.mark.slow)],
)
def test_a_member_trains_in_company_as_alone(shape, at_once):
  found, _ = train(sweep(), recipe(), shape, steps=12, at_once=at_once)
  for i in (0, 2, 5):
    own = swept_alone(i)
    for name in ("loss", "l0", "learning_rate"):
      np.testing.assert_allclose(
        column(found, name)[:, i], column(own, name)[:, 0], rtol=2e-5
      )
  np.testing.assert_allclose(column(found, "l0")[0], [2, 4, 6, 4, 4, 3])


def test_a_member_that_diverges_stays_behind_and_the_others_go_on():
  groups = [
    (
      member(config(), name="good"),
      member(config(), name="bad", rate=float("nan")),
    )
  ]
  found, state = train(groups, recipe(), steps=6)
  finite = column(found, "finite")
  assert finite[:, 0].all()
  assert not finite[2:, 1].any()
  assert np.isfinite(state[0][0]["W_enc"][0]).all()
  own, _ = train([(groups[0][0],)], recipe(), steps=6)
  np.testing.assert_allclose(
    column(found, "loss")[:, 0], column(own, "loss")[:, 0], rtol=1e-5
  )


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 4)])
def test_dead_latents_restart_at_inputs_and_forget_their_moments(shape):
  how = recipe(aux_coefficient=0.0, resample_every=8, encoder_norm=0.3)
  groups = [(member(config(k=1.0)),)]
  _, before = train(groups, how, shape, steps=8)
  _, after = train(groups, how, shape, steps=9)
  dead = before[2]["states"][0].since_fired[0] >= 4 * B
  assert 0 < dead.sum() < M
  sizes = np.linalg.norm(after[0][0]["W_enc"][0], axis=0)
  # Nine steps: the ninth restarts (step 8), after its own update.
  restarted = np.abs(after[1][0].mu["W_enc"][0]).sum(0) == 0
  assert restarted.sum() >= dead.sum() - 5
  assert np.abs(after[1][0].nu["W_dec"][0][restarted]).sum() == 0
  np.testing.assert_allclose(
    sizes[restarted], sizes[restarted].mean(), rtol=1e-4
  )
  unit = after[0][0]["W_dec"][0][restarted]
  np.testing.assert_allclose(
    np.linalg.norm(unit, axis=1), how.decoder_norm, rtol=1e-4
  )


def test_clipping_bounds_the_gradient_over_all_devices():
  tight = recipe(clip=1e-4, beta1=0.0, beta2=0.0, epsilon=1.0)
  groups = [(member(config(), rate=1.0),)]
  for shape in ((1, 1, 1), (1, 2, 4)):
    _, state = train(groups, tight, shape, steps=1)
    moved = start(groups, tight)[0][0]
    total = sum(
      np.sum((state[0][0][name] - moved[name]) ** 2) for name in moved
    )
    # With no memory and epsilon 1, Adam moves by the gradient itself, times
    # the schedule.
    share = float(dictionary_step.schedule(tight, 1)(0))
    np.testing.assert_allclose(np.sqrt(total), 1e-4 * share, rtol=0.05)


@pytest.mark.parametrize(
  ("warmup", "decay", "at", "share"),
  [
    (0.1, 0.0, 0, 0.1),
    (0.1, 0.0, 99, 1.0),
    (10, 0.0, 4, 0.5),
    (0.0, 1.0, 0, 1.0),
    (0.0, 1.0, 50, 0.5),
    (0.0, 0.2, 90, 0.5),
    (0.0, 20, 90, 0.5),
    (0.0, 0.2, 10, 1.0),
  ],
)
def test_the_learning_rate_rises_and_falls_as_asked(warmup, decay, at, share):
  shape = dictionary_step.schedule(recipe(warmup=warmup, decay=decay), 100)
  np.testing.assert_allclose(shape(at), share, rtol=1e-6)


def test_a_share_of_the_training_becomes_steps():
  how = dictionary_step.in_steps(
    recipe(sparsity_warmup=0.25, k_start=9.0, k_anneal=30.0), 200
  )
  assert (how.sparsity_warmup, how.k_anneal) == (50, 30)
