"""The aux-k loss: its formula in every variant, and whom it trains."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tests.dictionaries import cases
from tests.dictionaries.cases import B, E, M, f64, run

pytestmark = pytest.mark.usefixtures("quick_compiles")

# Of 24 latents that have not fired for 0, 6, ... tokens, 7 are dead.
DEAD_AFTER = 100
LATENTS = ("W_enc", "b_enc", "W_dec")


def make_recipe(**changes):
  base = {
    "aux_k": 3,
    "aux_candidates": None,
    "aux_coefficient": 1.0,
    "dead_after": DEAD_AFTER,
  }
  return cases.make_recipe(**(base | changes))


def make_case(recipe, activation="topk", seed=0, since=None, **changes):
  """What `run` needs."""
  cfg = cases.make_config(activation, skip=True, **changes)
  params, batch = cases.make_params(cfg, seed), cases.make_batch(cfg, seed)
  return cfg, recipe, params, cases.make_state(cfg, since=since), batch


def oracle(args):
  """The term as a function of parameters, who is dead and who is recruited.

  What is chosen and what is constant is fixed at the given parameters.
  """
  cfg, recipe, params, state, batch = args
  x, y, before = f64(batch["x"]), f64(batch["y"]), f64(params)
  z = x @ before["W_enc"] + before["b_enc"]
  norms = np.linalg.norm(before["W_dec"], axis=1)
  ranked = z * norms if recipe.rank_by_norm else z
  main = cases.kept(ranked, cfg.k, cfg.activation)
  since = np.asarray(state.since_fired)
  if recipe.aux_after_batch:
    since = np.where(main.any(0), 0, since + B)
  limit = recipe.dead_after
  if recipe.dead_after_steps is not None:
    limit = (recipe.dead_after_steps + 1) * B
  dead = np.flatnonzero(since >= limit)
  if recipe.aux_candidates is not None:
    order = np.argsort(-since[dead], kind="stable")
    dead = dead[order[: recipe.aux_candidates]]
  aux_k = E // 2 if recipe.aux_k is None else recipe.aux_k
  chosen = np.zeros(z.shape, bool)
  for row, values in zip(chosen, ranked, strict=True):
    row[dead[np.argsort(-values[dead])][:aux_k]] = True
  if recipe.aux_relu:
    chosen &= z > 0

  def residual(p):
    z = x @ p["W_enc"] + p["b_enc"]
    return y - cases.recs(cfg, p, x, np.where(main, z, 0))[-1]

  fixed = residual(before)
  divisor = {
    "residual": np.sum((fixed - fixed.mean(0)) ** 2),
    "total": np.sum((y - y.mean(0)) ** 2),
    "sum": B,
    "mean": y.size,
  }[recipe.aux_scale]
  count = np.sum(since >= limit)
  ramp = min(count / aux_k, 1) if recipe.aux_ramp else 1

  def term(p):
    acts = np.where(chosen, x @ p["W_enc"] + p["b_enc"], 0)
    left = fixed if recipe.aux_detach else residual(p)
    return ramp * np.sum((left - acts @ p["W_dec"]) ** 2) / divisor

  return term, np.isin(np.arange(M), dead), chosen


def term_of(args, **kwargs):
  """The term's value, and its gradients: those with it less those without."""
  _, on, _, metrics = run(*args, **kwargs)
  _, off, _, _ = run(*args, **kwargs, aux=0.0)
  value = float(metrics["aux_loss"])
  return value, {name: on[name] - off[name] for name in on}


VARIANTS = [
  {},
  {"aux_k": None},
  {"aux_candidates": 8},
  {"aux_candidates": 5},
  {"aux_scale": "total"},
  {"aux_scale": "sum", "aux_relu": False, "rank_by_norm": True},
  {"aux_scale": "mean", "aux_detach": False},
  {"aux_ramp": True, "aux_k": 9},
  {"aux_after_batch": True, "dead_after_steps": 2},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_the_term_and_its_gradients_are_those_of_the_formula(changes):
  args = make_case(make_recipe(**changes))
  recipe = args[1]
  term, dead, chosen = oracle(args)
  used = chosen.any(0)
  assert 0 < dead.sum() < M
  assert used.sum() >= 3
  value, gradients = term_of(args)
  assert value == pytest.approx(term(f64(args[2])), rel=1e-5)
  expected = cases.slopes(term, args[2])
  if not recipe.aux_detach:
    cases.close(gradients, expected, 2e-5)
    assert np.abs(gradients["W_skip"]).max() > 1e-3
    return
  # Every dead latent that any row recruits learns, no other one, and nothing
  # that made the residual.
  for name in ("b_dec", "W_skip"):
    np.testing.assert_allclose(gradients.pop(name), 0, atol=3e-6)
    np.testing.assert_array_equal(expected.pop(name), 0)
  assert (np.abs(expected["W_enc"][:, used]).max(0) > 1e-4).all()
  for name, axis in (("W_enc", 1), ("b_enc", 0), ("W_dec", 0)):
    others = np.take(gradients[name], np.flatnonzero(~used), axis)
    np.testing.assert_allclose(others, 0, atol=1e-6)
  cases.close(gradients, expected, 2e-5)


@pytest.mark.parametrize("activation", ["batchtopk", "relu", "jumprelu"])
def test_the_term_is_the_same_for_every_activation(activation):
  args = make_case(make_recipe(), activation, k=24)
  cfg, recipe, params, state, batch = args
  if activation == "jumprelu":
    params["threshold"] = jnp.zeros(M)
  # Whatever fires where it is positive, as with k = M.
  whole = dataclasses.replace(cfg, activation="topk")
  term, _, _ = oracle((whole, recipe, params, state, batch))
  value, gradients = term_of(args)
  assert value == pytest.approx(term(f64(params)), rel=1e-5)
  expected = cases.slopes(
    term, {n: params[n] for n in (*LATENTS, "b_dec", "W_skip")}
  )
  cases.close(
    {n: gradients[n] for n in LATENTS}, {n: expected[n] for n in LATENTS}, 5e-5
  )


def test_the_encoder_s_input_trains_the_bias_that_it_subtracts():
  recipe = make_recipe(subtract_b_dec=True)
  cfg = cases.make_sae("topk")
  params, batch = cases.make_params(cfg), cases.make_batch(cfg)
  args = cfg, recipe, params, cases.make_state(cfg), batch
  shifted = dict(params)
  shifted["b_enc"] = params["b_enc"] - params["b_dec"] @ params["W_enc"]
  same = dataclasses.replace(recipe, subtract_b_dec=False)
  value, gradients = term_of(args)
  other, plain = term_of((cfg, same, shifted, *args[3:]))
  assert value == pytest.approx(other, rel=1e-5)
  expected = -f64(params["W_enc"]) @ plain["b_enc"]
  np.testing.assert_allclose(gradients["b_dec"], expected, atol=2e-5)


@pytest.mark.parametrize(("aux_k", "candidates"), [(3, 2), (8, 8), (100, 1000)])
def test_the_term_is_its_formula_for_any_sizes(aux_k, candidates):
  recipe = make_recipe(aux_k=aux_k, aux_candidates=candidates)
  args = make_case(recipe, seed=3)
  term, _, _ = oracle(args)
  assert run(*args)[3]["aux_loss"] == pytest.approx(
    term(f64(args[2])), rel=1e-5
  )


@pytest.mark.parametrize("candidates", [None, 8])
def test_without_dead_latents_the_term_is_silent(candidates):
  recipe = make_recipe(aux_candidates=candidates)
  args = make_case(recipe, since=np.zeros(M))
  value, gradients = term_of(args)
  assert value == 0
  for gradient in gradients.values():
    np.testing.assert_array_equal(gradient, 0)


def test_a_residual_of_zero_gives_finite_numbers():
  args = make_case(make_recipe(), since=np.full(M, 1000))
  cfg, recipe, params, state, batch = args
  params = {name: jnp.zeros_like(x) for name, x in params.items()}
  batch = batch | {"y": jnp.zeros((B, E))}
  loss, gradients, _, _ = run(cfg, recipe, params, state, batch)
  assert np.isfinite(loss)
  assert all(np.isfinite(g).all() for g in gradients.values())


def test_a_coefficient_of_zero_in_the_recipe_leaves_the_term_out():
  args = make_case(make_recipe(aux_coefficient=0.0))
  loss, _, _, metrics = run(*args)
  assert "aux_loss" not in metrics
  assert loss == metrics["loss"]
