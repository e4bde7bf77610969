"""Every term of the loss against NumPy in float64, with its gradient."""

import numpy as np
import pytest

from tests.dictionaries import cases
from tests.dictionaries.cases import B, E, M, f64, run

pytestmark = pytest.mark.usefixtures("quick_compiles")

PREFIXES = (4, 12, M)
WEIGHT = 0.3  # of the sparsity term


def make(activation, recipe, seed=0, **changes):
  """A config, its parameters, x and y in float64, and what `run` needs."""
  cfg = cases.make_config(activation, **changes)
  params, batch = cases.make_params(cfg, seed), cases.make_batch(cfg, seed)
  x, y = f64(batch["x"]), f64(batch["y"])
  args = cfg, recipe, params, cases.make_state(cfg), batch
  return cfg, f64(params), x, y, args


def error(cfg, p, x, y, acts):
  """Summed over dims, mean over rows."""
  return np.sum((y - cases.recs(cfg, p, x, acts)[-1]) ** 2) / len(x)


def agree(args, value, **hyper):
  """The loss and all its gradients are those of `value`."""
  loss, gradients, _, metrics = run(*args, **hyper)
  assert loss == pytest.approx(value(f64(args[2])), rel=1e-5)
  cases.close(gradients, cases.slopes(value, args[2]))
  return gradients, metrics


# ----------------------------------------------------------- reconstruction
@pytest.mark.parametrize("kind", ["mean", "sum", "fvu_batch"])
def test_squared_errors_are_divided_as_the_recipe_says(kind):
  _, _, x, y, args = make("relu", cases.make_recipe(loss=kind), skip=True)
  cfg = args[0]
  divisor = {
    "mean": y.size,
    "sum": len(y),
    "fvu_batch": np.sum((y - y.mean(0)) ** 2),
  }[kind]

  def value(p):
    acts = np.maximum(x @ p["W_enc"] + p["b_enc"], 0)
    return error(cfg, p, x, y, acts) * len(x) / divisor

  agree(args, value)


@pytest.mark.parametrize(
  ("weights", "bias"),
  [("mean", False), ("mean", True), ("sum", False), ("mean_of_shares", True)],
)
def test_prefixes_are_weighted_as_the_recipe_says(weights, bias):
  recipe = cases.make_recipe(prefix_weights=weights, bias_prefix=bias)
  _, _, x, y, args = make("relu", recipe, prefix_widths=PREFIXES)
  cfg = args[0]
  n = len(PREFIXES) + bias
  weight = {"mean": 1 / n, "sum": 1, "mean_of_shares": 1 / n**2}[weights]

  def value(p):
    acts = np.maximum(x @ p["W_enc"] + p["b_enc"], 0)
    recs = cases.recs(cfg, p, x, acts)
    if bias:
      recs = [p["b_dec"], *recs]
    return weight * sum(np.sum((y - r) ** 2) / len(x) for r in recs)

  if weights == "mean":
    agree(args, value)
  else:  # the same program but for a factor
    assert run(*args)[0] == pytest.approx(value(f64(args[2])), rel=1e-5)


def test_without_groups_there_is_no_prefix_of_no_latents():
  recipe = cases.make_recipe(bias_prefix=True)
  cfg, p, x, y, args = make("relu", recipe)
  acts = np.maximum(x @ p["W_enc"] + p["b_enc"], 0)
  expected = error(cfg, p, x, y, acts)
  assert run(*args)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
  ("activation", "sparse"),
  [("topk", True), ("batchtopk", True), ("batchtopk", False)],
)
def test_multi_topk_adds_the_error_with_four_times_as_many(activation, sparse):
  recipe = cases.make_recipe(multi_topk=1 / 8, loss="fvu_batch")
  _, p, x, y, args = make(activation, recipe, skip=True, prefix_widths=PREFIXES)
  cfg = args[0]
  z = x @ p["W_enc"] + p["b_enc"]
  few, many = (cases.kept(z, k, activation) for k in (3, 12))
  total = np.sum((y - y.mean(0)) ** 2)

  def value(p):
    z = x @ p["W_enc"] + p["b_enc"]
    recs = cases.recs(cfg, p, x, np.where(few, z, 0))
    main = np.mean([np.sum((y - r) ** 2) for r in recs])
    more = cases.recs(cfg, p, x, np.where(many, z, 0))[-1]
    return (main + np.sum((y - more) ** 2) / 8) / total

  loss, gradients, _, metrics = run(*args, sparse=sparse)
  assert loss == pytest.approx(value(p), rel=1e-5)
  assert metrics["l0"] == few.sum() / B  # of k, not of 4 k
  cases.close(gradients, cases.slopes(value, args[2]))


# ---------------------------------------------------------- activations' size
@pytest.mark.parametrize(
  ("power", "by_norm"), [(1.0, False), (1.0, True), (0.5, True), (2.0, False)]
)
def test_l1_and_other_powers_are_those_of_the_formula(power, by_norm):
  recipe = cases.make_recipe(
    sparsity="l1", sparsity_power=power, sparsity_by_norm=by_norm
  )
  _, _, x, y, args = make("relu", recipe)
  cfg = args[0]

  def term(p):
    acts = np.maximum(x @ p["W_enc"] + p["b_enc"], 0)
    if by_norm:
      acts = acts * np.linalg.norm(p["W_dec"], axis=1)
    return np.mean(np.sum(acts**power, axis=1) ** (1 / power))

  def value(p):
    acts = np.maximum(x @ p["W_enc"] + p["b_enc"], 0)
    return error(cfg, p, x, y, acts) + WEIGHT * term(p)

  _, metrics = agree(args, value, sparsity=WEIGHT)
  assert metrics["sparsity_loss"] == pytest.approx(term(f64(args[2])), rel=1e-5)


@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_tanh_saturates_what_an_activation_costs(activation):
  recipe = cases.make_recipe(sparsity="tanh", tanh_scale=0.7)
  _, p, x, y, args = make(activation, recipe)
  cfg = args[0]
  z = x @ p["W_enc"] + p["b_enc"]
  keep = z > 0 if activation == "relu" else cases.kept(z, 3, activation)

  def value(p):
    acts = np.where(keep, x @ p["W_enc"] + p["b_enc"], 0)
    size = acts * np.linalg.norm(p["W_dec"], axis=1)
    term = np.tanh(0.7 * size).sum() / B
    return error(cfg, p, x, y, acts) + WEIGHT * term

  agree(args, value, sparsity=WEIGHT)


def test_a_crosscoder_s_latent_weighs_the_sum_of_its_norms():
  recipe = cases.make_recipe(sparsity="l1")
  _, _, x, y, args = make("relu", recipe, parts=(2, E - 2))
  cfg = args[0]

  def value(p):
    acts = np.maximum(x @ p["W_enc"] + p["b_enc"], 0)
    norms = np.linalg.norm(p["W_dec"][:, :2], axis=1)
    norms = norms + np.linalg.norm(p["W_dec"][:, 2:], axis=1)
    return error(cfg, p, x, y, acts) + WEIGHT * np.sum(acts * norms) / B

  agree(args, value, sparsity=WEIGHT)


def test_a_row_of_zeros_has_a_finite_gradient():
  recipe = cases.make_recipe(sparsity="l1")
  for parts in ((), (2, E - 2)):
    _, _, _, _, args = make("relu", recipe, parts=parts)
    args[2]["W_dec"] = args[2]["W_dec"].at[3].set(0)
    _, gradients, _, _ = run(*args, sparsity=WEIGHT)
    assert all(np.isfinite(g).all() for g in gradients.values())


def test_the_sparsity_term_rises_from_0_in_a_line():
  recipe = cases.make_recipe(sparsity="l1", sparsity_warmup=8)
  cfg, p, x, y, args = make("relu", recipe)
  acts = np.maximum(x @ p["W_enc"] + p["b_enc"], 0)
  main = error(cfg, p, x, y, acts)
  term = np.sum(acts * np.linalg.norm(p["W_dec"], axis=1)) / B
  for steps, ramp in ((0, 0), (2, 0.25), (8, 1), (20, 1)):
    state = cases.make_state(cfg, steps=steps)
    loss = run(*args[:3], state, args[4], sparsity=WEIGHT)[0]
    assert loss == pytest.approx(main + ramp * WEIGHT * term, rel=1e-5)


# -------------------------------------------------------------------- gated
@pytest.mark.parametrize("detach", [False, True])
def test_the_gate_alone_reconstructs_too(detach):
  recipe = cases.make_recipe(
    sparsity="l1", gated_detach=detach, subtract_b_dec=True
  )
  cfg = cases.make_sae("gated", skip=True)
  params, batch = cases.make_params(cfg), cases.make_batch(cfg)
  args = cfg, recipe, params, cases.make_state(cfg), batch
  x, before = f64(batch["x"]), f64(params)

  def value(p):
    pi = (x - p["b_dec"]) @ p["W_enc"]
    open_ = (x - before["b_dec"]) @ before["W_enc"] + before["b_enc"] > 0
    magnitude = np.maximum(np.exp(p["r_mag"]) * pi + p["b_mag"], 0)
    gate = np.maximum(pi + p["b_enc"], 0)
    fixed = before if detach else p  # what the second one does not train
    main = error(cfg, p, x, x, np.where(open_, magnitude, 0))
    second = error(cfg, fixed, x, x, gate)
    size = np.sum(gate * np.linalg.norm(p["W_dec"], axis=1)) / B
    return main + second + WEIGHT * size

  agree(args, value, sparsity=WEIGHT)


# ----------------------------------------------------------------- JumpReLU
BANDWIDTH = 0.5


def jumprelu(recipe, x, p, seen_acts=False):
  """Activations and kernel of a JumpReLU."""
  theta = np.exp(p["threshold"]) if recipe.log_threshold else p["threshold"]
  z = x @ p["W_enc"] + p["b_enc"]
  acts = np.where(z > theta, z, 0)
  at = acts if seen_acts else z
  return (
    theta,
    z,
    acts,
    np.abs(z - theta) < BANDWIDTH / 2,
    np.abs(at - theta) < BANDWIDTH / 2,
  )


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"gradient_to_input": True},
    {"log_threshold": True},
    {"step_sees": "activation"},
    {"sparsity": "target_l0"},
    {"sparsity": "target_l0_token", "gradient_to_input": True},
    {"sparsity": "tanh", "gradient_to_input": True},
  ],
  ids=str,
)
def test_a_jumprelu_s_gradients_are_those_of_its_estimators(changes):
  recipe = cases.make_recipe(
    **({"sparsity": "l0", "bandwidth": BANDWIDTH} | changes)
  )
  _, p, x, y, args = make("jumprelu", recipe)
  if recipe.log_threshold:
    args[2]["threshold"] = np.log(args[2]["threshold"])
    p = f64(args[2])
  seen = recipe.step_sees == "activation"
  theta, z, acts, near, near_step = jumprelu(recipe, x, p, seen)
  assert near.sum() > 20
  fires = (z > theta).astype(np.float64)
  norms = np.linalg.norm(p["W_dec"], axis=1)
  left = y - acts @ p["W_dec"] - p["b_dec"]
  k, count = 3.0, fires.sum(1)
  tanh = np.tanh(4 * acts * norms)
  term, to_fires = {
    "l0": (count.mean(), np.ones((B, 1)) / B),
    "target_l0": (
      (count.mean() / k - 1) ** 2,
      np.full((B, 1), 2 * (count.mean() / k - 1) / k / B),
    ),
    "target_l0_token": (
      np.mean(2 / k * (count - k) ** 2),
      (4 / k * (count - k) / B)[:, None],
    ),
    "tanh": (tanh.sum() / B, 0),
  }[recipe.sparsity]
  # Chain rule, term by term.
  to_acts = -2 * left @ p["W_dec"].T / B
  d_dec = -2 * acts.T @ left / B
  if recipe.sparsity == "tanh":
    inner = WEIGHT * (1 - tanh**2) * 4 / B
    to_acts = to_acts + inner * norms
    d_dec += (inner * acts).sum(0)[:, None] * p["W_dec"] / norms[:, None]
  by_jump = theta / BANDWIDTH * near * to_acts
  by_step = WEIGHT * near_step / BANDWIDTH * to_fires
  d_z = fires * to_acts
  if recipe.gradient_to_input:
    d_z = d_z + by_jump + by_step
  d_theta = -(by_jump + by_step).sum(0)
  if recipe.log_threshold:
    d_theta = d_theta * theta
  loss, gradients, _, metrics = run(*args, sparsity=WEIGHT)
  assert loss == pytest.approx(np.sum(left**2) / B + WEIGHT * term, rel=1e-5)
  assert metrics["sparsity_loss"] == pytest.approx(term, rel=1e-5)
  assert metrics["l0"] == pytest.approx(count.mean())
  cases.close(
    gradients,
    {
      "W_enc": x.T @ d_z,
      "b_enc": d_z.sum(0),
      "W_dec": d_dec,
      "b_dec": -2 * left.sum(0) / B,
      "threshold": d_theta,
    },
  )


def test_dead_latents_are_pulled_up_to_their_thresholds():
  recipe = cases.make_recipe(
    pre_activation_coefficient=0.2, dead_after=100, sparsity_warmup=100
  )
  cfg, p, x, y, args = make("jumprelu", recipe)
  dead = np.asarray(args[3].since_fired) >= 100
  assert 0 < dead.sum() < M

  def value(p):
    z = x @ p["W_enc"] + p["b_enc"]
    below = np.maximum(p["threshold"] - z, 0) * dead
    below = np.sum(below * np.linalg.norm(p["W_dec"], axis=1)) / B
    keep = x @ p0["W_enc"] + p0["b_enc"] > p0["threshold"]
    return error(cfg, p, x, y, np.where(keep, z, 0)) + 0.2 * below

  p0 = p
  loss, gradients, _, _ = run(*args)
  assert loss == pytest.approx(value(p), rel=1e-5)
  # Thresholds get the jump's estimate besides.
  _, plain, _, _ = run(cfg, cases.make_recipe(), *args[2:])
  gradients["threshold"] -= plain["threshold"]
  cases.close(gradients, cases.slopes(value, args[2]))
