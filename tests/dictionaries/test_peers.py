"""Presets against the systems: their trainers' own steps, recorded.

`peers/make.py` ran two steps of each system's trainer from weights of ours;
here the preset does the same from the same weights.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gemma_jax.dictionaries import core
from gemma_jax.dictionaries.presets import preset
from tests.dictionaries import cases
from tests.dictionaries.cases import f64

pytestmark = pytest.mark.usefixtures("quick_compiles")

PEERS = pathlib.Path(__file__).parent / "peers"
CASES = sorted(path.stem for path in PEERS.glob("*.npz"))
STEPS = 2
# sparsify's fused encoder lets no gradient of these terms through.
DECODER_ONLY = {
  "sparsify_aux": {"aux_coefficient": 0.0},
  "sparsify_multi_topk": {"multi_topk": 0.0},
}


class Case:
  """What a file holds, and the preset that should do the same."""

  def __init__(self, name, **changes):
    with np.load(PEERS / f"{name}.npz", allow_pickle=False) as file:
      self.arrays = dict(file)
    case = json.loads(str(self.arrays["case"]))
    activation = case["activation"]
    changes = case["changes"] | changes
    self.recipe = preset(case["preset"], activation, changes)
    d, m = self.arrays["before/0/W_enc"].shape
    config = {"d_in": d, "d_out": d, "width": m, "prefix_widths": (m,)}
    config |= {n: _tuple(v) for n, v in case["config"].items()}
    self.cfg = cases.make_sae(activation, **config)

  def __getitem__(self, name):
    return self.arrays[name]

  def under(self, prefix):
    """Arrays whose names begin with it, by the rest of their names."""
    return {
      name.removeprefix(prefix): x
      for name, x in self.arrays.items()
      if name.startswith(prefix)
    }

  def state(self, step):
    """As it is before a step."""
    since, threshold = self["since_fired"], self["threshold"]
    if step:
      since = self["since_fired_after"][step - 1]
      threshold = self["threshold_after"][step - 1]
    return cases.make_state(
      self.cfg,
      since=since,
      threshold=threshold,
      steps=int(self["steps"]) + step,
    )

  def run(self, step):
    """Loss, gradients, state and metrics, from the recorded parameters."""
    params = jax.tree.map(jnp.asarray, self.under(f"before/{step}/"))
    batch = {name: jnp.asarray(self[name][step]) for name in ("x", "y")}
    args = params, self.state(step), batch
    return params, *cases.run(self.cfg, self.recipe, *args)


def _tuple(value):
  return tuple(value) if isinstance(value, list) else value


def adam(recipe):
  """Clipping and Adam as the recipe says, without the learning rate."""
  clip = optax.identity()
  if recipe.clip is not None:
    clip = optax.clip_by_global_norm(recipe.clip)
  moments = optax.scale_by_adam(recipe.beta1, recipe.beta2, recipe.epsilon)
  return optax.chain(clip, moments)


def train_step(recipe, params, moments, gradients, rate):
  """One update in the order that `recipe.decoder` asks for."""
  if recipe.decoder == "unit_before_step":
    params = core.constrain(recipe, params)
  gradients = core.project(recipe, params, gradients)
  updates, moments = adam(recipe).update(gradients, moments)
  params = {
    name: params[name]
    - rate * (recipe.skip_learning_rate if name == "W_skip" else 1) * update
    for name, update in updates.items()
  }
  if recipe.decoder != "unit_before_step":
    params = core.constrain(recipe, params)
  return params, moments


@pytest.mark.parametrize("name", CASES)
def test_a_preset_trains_as_its_system_does(name):
  case = Case(name)
  recipe, moments = case.recipe, None
  for step in range(STEPS):
    params, loss, gradients, state, metrics = case.run(step)
    # ----------------------------------------------------- loss and its terms
    assert loss == pytest.approx(case["loss"][step], rel=1e-5)
    terms = {n: x[step] for n, x in case.under("parts/").items()}
    if "reconstruction" in terms:
      expected = terms["reconstruction"]
      assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    if "aux" in terms:
      assert terms["aux"] > 0
      assert metrics["aux_loss"] == pytest.approx(terms["aux"], rel=1e-5)
    for term in {"l1_loss", "l0_loss"} & terms.keys():
      rising = recipe.sparsity_warmup
      ramp = (int(case["steps"]) + step) / rising if rising else 1
      got = metrics["sparsity_loss"] * recipe.sparsity_coefficient * ramp
      assert got == pytest.approx(terms[term], rel=1e-5)
    # --------------------------------------------------------------- its state
    # With Multi-TopK sparsify takes the 4 k for those that fire.
    if "topk" in case.cfg.activation and not recipe.multi_topk:
      since = case["since_fired_after"][step]
      np.testing.assert_array_equal(state.since_fired, since)
    if case.cfg.activation == "batchtopk":
      expected = case["threshold_after"][step]
      assert float(state.threshold) == pytest.approx(expected, rel=1e-5)
    # ----------------------------------------------------------- its gradients
    wanted = case.under(f"gradients/{step}/")
    if name in DECODER_ONLY:
      _, _, without, _, _ = Case(name, **DECODER_ONLY[name]).run(step)
      own = {"W_dec": gradients["W_dec"]}
      own |= {n: without[n] for n in ("W_enc", "b_enc")}
      cases.close(own, {n: wanted[n] for n in own})
      continue
    cases.close(gradients, wanted)
    # ------------------------------------------------- what they are turned to
    if moments is None:
      moments = adam(recipe).init(params)
    f32 = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), gradients)
    new, moments = train_step(
      recipe, params, moments, f32, float(case["rate"][step])
    )
    last = step == STEPS - 1
    after = case.under("after/" if last else f"before/{step + 1}/")
    if name == "sparsify_sae":  # which makes rows unit when it reads them
      after = core.constrain(recipe, after)
    # At the start b_dec is the mean already, and Adam divides noise by noise.
    moved = [n for n, g in wanted.items() if np.abs(g).max() > 1e-6]
    cases.close(f64({n: new[n] for n in moved}), {n: after[n] for n in moved})


@pytest.mark.parametrize("name", CASES)
def test_the_recorded_steps_show_what_they_should(name):
  case = Case(name)
  recipe = case.recipe
  versions = json.loads(str(case["versions"]))
  assert versions["sae-lens"] == "6.54.12"
  assert versions["dictionary-learning"] == "0.1.0"
  assert versions["eai-sparsify"] == "1.3.3"
  assert all(x.dtype.kind in "fiU" for x in case.arrays.values())
  # Every parameter is trained (from zeros, only after the first step).
  for gradient in case.under(f"gradients/{STEPS - 1}/").values():
    assert np.abs(gradient).max() > 1e-4
  if recipe.clip is not None:  # and clipped
    squares = (np.sum(g**2) for g in case.under("gradients/1/").values())
    assert sum(squares) > 1
  if recipe.decoder == "free" and "start" not in name:
    norms = np.linalg.norm(case["before/0/W_dec"], axis=1)
    assert np.ptp(norms) > 0.5
  if recipe.aux_coefficient:
    fired = case["since_fired_after"][0] == 0
    assert 0 < fired.sum() < len(fired)
  if "threshold" in case.under("before/0/"):
    p = case.under("before/0/")
    shift = p["b_dec"] if recipe.subtract_b_dec else 0
    z = (case["x"][0] - shift) @ p["W_enc"] + p["b_enc"]
    inside = np.abs(z - p["threshold"]) < recipe.bandwidth / 2
    assert 50 < inside.sum() < 400


def test_a_transcoder_starts_as_sparsify_starts_it():
  case = Case("sparsify_transcoder_start")
  x, y = case["x"][0], case["y"][0]
  W_enc = case["before/0/W_enc"]
  examples = x, y, np.ones(len(x), bool)
  params, _ = core.init(
    case.cfg,
    case.recipe,
    jax.random.key(0),
    cases.identity(case.cfg),
    None,
    examples,
  )
  for name in ("W_dec", "W_skip", "b_dec"):
    np.testing.assert_allclose(
      params[name], case[f"before/0/{name}"], atol=1e-6
    )
  for W, b in (
    (W_enc, case["before/0/b_enc"]),
    (f64(params["W_enc"]), f64(params["b_enc"])),
  ):
    np.testing.assert_allclose(b, -x.mean(0) @ W, atol=1e-6)
    size = np.sqrt(np.mean(np.sum(W**2, axis=0)))
    assert size == pytest.approx(3**-0.5, rel=0.05)
