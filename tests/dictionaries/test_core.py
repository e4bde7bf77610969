"""The functional core against NumPy in float64, written from the papers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.activations.normalise import KINDS as KINDS_OF_NORMALISATION
from gemma_jax.activations.normalise import Measured, fit
from gemma_jax.dictionaries import Dictionary, DictionaryConfig, core, linear

D, E, M, B = 6, 5, 24, 40
KINDS = ("topk", "batchtopk")


def make_config(activation="batchtopk", **changes):
  base = {
    "d_in": D,
    "d_out": E,
    "width": M,
    "activation": activation,
    "k": 3,
    "prefix_widths": (4, 12, M),
    "skip": True,
    "aux_k": 3,
    "aux_candidates": 8,
    "aux_coefficient": 1.0,
    "dead_after": 100,
    "threshold_decay": 0.9,
  }
  return DictionaryConfig(**(base | changes))


def make_norm(seed=0):
  rng = np.random.default_rng(seed)
  a = rng.normal(size=(D, D)) / np.sqrt(D)
  return core.Normalisation(
    *(
      jnp.asarray(v, jnp.float32)
      for v in (
        3 * rng.normal(size=D),
        a @ a.T + 0.3 * np.eye(D),
        3 * rng.normal(size=E),
        rng.uniform(0.5, 2),
      )
    )
  )


def make_params(cfg, seed=0):
  rng = np.random.default_rng(seed)
  return {
    name: jnp.asarray(rng.normal(size=shape) * 0.5, jnp.float32)
    for name, shape in cfg.shapes().items()
  }


def make_case(cfg, seed=0, since=None, threshold=-1.0):
  """(params, state, batch) with about a third of the latents dead."""
  rng = np.random.default_rng(seed + 100)
  if since is None:
    since = rng.permutation(np.arange(M) * 6)  # 100 and more: 7 of 24
  state = core.State(
    make_norm(seed),
    jnp.asarray(since, jnp.int32),
    jnp.asarray(threshold, jnp.float32),
  )
  batch = {
    "x": jnp.asarray(rng.normal(size=(B, D)), jnp.float32),
    "y": jnp.asarray(rng.normal(size=(B, E)), jnp.float32),
  }
  return make_params(cfg, seed), state, batch


def f64(tree):
  return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def normalised(state, batch):
  norm = f64(state.norm)
  x = (f64(batch["x"]) - norm.x_mean) @ norm.x_map
  return x, (f64(batch["y"]) - norm.y_mean) / norm.y_scale


def oracle_acts(cfg, z):
  """The k largest of each row or k * B of all, by sorting; then ReLU."""
  keep = np.zeros(z.shape, bool)
  if cfg.activation == "topk":
    order = np.argsort(-z, axis=1)[:, : int(cfg.k)]
    np.put_along_axis(keep, order, True, axis=1)
  else:
    keep.flat[np.argsort(-z, axis=None)[: int(cfg.k * len(z))]] = True
  return np.where(keep, np.maximum(z, 0), 0)


def oracle_recs(cfg, p, x, acts):
  affine = p["b_dec"] + (x @ p["W_skip"] if cfg.skip else 0)
  return [acts[:, :w] @ p["W_dec"][:w] + affine for w in cfg.prefix_widths]


@dataclasses.dataclass
class Aux:
  """The aux-k term and its gradients, by hand."""

  value: float
  enc: np.ndarray
  bias: np.ndarray
  dec: np.ndarray
  used: np.ndarray  # latents with any candidate activation


def oracle_aux(cfg, params, state, batch):
  p = f64(params)
  x, y = normalised(state, batch)
  z = x @ p["W_enc"] + p["b_enc"]
  residual = y - oracle_recs(cfg, p, x, oracle_acts(cfg, z))[-1]
  since = np.asarray(state.since_fired)
  longest = np.argsort(-since, kind="stable")[: cfg.aux_candidates]
  dead = longest[since[longest] >= cfg.dead_after]
  acts = np.zeros_like(z)
  for row, values in zip(acts, z, strict=True):
    best = dead[np.argsort(-values[dead])][: cfg.aux_k]
    row[best] = np.maximum(values[best], 0)
  spread = np.sum((residual - residual.mean(0)) ** 2)
  rest = residual - acts @ p["W_dec"]
  d_acts = np.where(acts > 0, -2 * rest @ p["W_dec"].T / spread, 0)
  return Aux(
    np.sum(rest**2) / spread if len(dead) else 0.0,
    x.T @ d_acts,
    d_acts.sum(0),
    -2 * acts.T @ rest / spread,
    (acts > 0).any(0),
  )


def gradients(cfg, params, state, batch, coefficient):
  hyper = {"aux_coefficient": jnp.asarray(coefficient, jnp.float32)}

  def value(params):
    return core.loss(cfg, params, state, batch, hyper)[0]

  return f64(jax.jit(jax.grad(value))(params))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_forward_and_loss_are_those_of_the_sort(activation, skip, seed):
  cfg = make_config(activation, skip=skip)
  params, state, batch = make_case(cfg, seed)
  p = f64(params)
  x, y = normalised(state, batch)
  expected = oracle_acts(cfg, x @ p["W_enc"] + p["b_enc"])
  xn, yn = core.normalise(state.norm, batch["x"], batch["y"])
  np.testing.assert_allclose(xn, x, atol=2e-5)
  np.testing.assert_allclose(yn, y, atol=2e-5)
  acts, _ = core.select(cfg, core.pre_activations(params, xn))
  np.testing.assert_array_equal(np.asarray(acts) > 0, expected > 0)
  np.testing.assert_allclose(acts, expected, atol=5e-5)
  recs = oracle_recs(cfg, p, x, expected)
  for got, rec in zip(
    core.decode_prefixes(cfg, params, xn, acts), recs, strict=True
  ):
    np.testing.assert_allclose(got, rec, atol=2e-4)
  fvus = [np.mean((y - rec) ** 2) for rec in recs]
  loss, (_, metrics) = jax.jit(core.loss, static_argnums=0)(
    cfg, params, state, batch, {"aux_coefficient": jnp.asarray(0.5)}
  )
  aux = oracle_aux(cfg, params, state, batch).value
  assert aux > 0
  assert float(loss) == pytest.approx(np.mean(fvus) + 0.5 * aux, rel=1e-4)
  assert float(metrics["loss"]) == pytest.approx(np.mean(fvus), rel=1e-4)
  assert float(metrics["fvu"]) == pytest.approx(fvus[-1], rel=1e-4)
  assert float(metrics["fvu_smallest_prefix"]) == pytest.approx(
    fvus[0], rel=1e-4
  )
  assert float(metrics["aux_loss"]) == pytest.approx(aux, rel=1e-4)
  assert float(metrics["l0"]) == pytest.approx((expected > 0).sum() / B)


@pytest.mark.parametrize("k", [0.5, 3, 7.25])
def test_batchtopk_keeps_k_times_the_batch(k):
  cfg = make_config(k=k)
  z = jnp.asarray(
    np.random.default_rng(0).exponential(size=(B, M)), jnp.float32
  )
  acts, cut = core.select(cfg, z)
  assert int((acts > 0).sum()) == int(np.ceil(k * B))
  np.testing.assert_array_equal(acts, np.where(z >= cut, z, 0))


def test_topk_keeps_k_of_each_token_and_no_negative_one():
  cfg = make_config("topk")
  z = np.random.default_rng(0).normal(size=(B, M)).astype(np.float32)
  z[0] = -1
  z[1] = -1
  z[1, 5] = 2
  acts, _ = core.select(cfg, jnp.asarray(z))
  counts = np.asarray((acts > 0).sum(1))
  assert list(counts[:2]) == [0, 1]
  np.testing.assert_array_equal(counts[2:], 3)


def test_a_threshold_replaces_the_choice_within_the_batch():
  cfg = make_config()
  z = np.random.default_rng(0).normal(size=(B, M)).astype(np.float32)
  for threshold in (-1.0, 0.0, 0.7):
    acts, _ = core.select(cfg, jnp.asarray(z), threshold)
    expected = np.where(z >= max(threshold, 0), np.maximum(z, 0), 0)
    np.testing.assert_array_equal(acts, expected)


@pytest.mark.parametrize("skip", [False, True])
def test_every_prefix_is_the_dictionary_of_its_first_latents(skip):
  cfg = make_config(skip=skip)
  params, state, batch = make_case(cfg)
  x, _ = core.normalise(state.norm, batch["x"], batch["y"])
  acts, _ = core.select(cfg, core.pre_activations(params, x))
  recs = core.decode_prefixes(cfg, params, x, acts)
  for width, rec in zip(cfg.prefix_widths, recs, strict=True):
    small = make_config(skip=skip, width=width, prefix_widths=(width,))
    cut = params | {"W_dec": params["W_dec"][:width]}
    (alone,) = core.decode_prefixes(small, cut, x, acts[:, :width])
    np.testing.assert_allclose(rec, alone, atol=2e-5)


@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_the_aux_gradient_is_that_of_its_formula_and_nothing_else(
  activation, seed
):
  cfg = make_config(activation)
  params, state, batch = make_case(cfg, seed)
  on = gradients(cfg, params, state, batch, 1.0)
  off = gradients(cfg, params, state, batch, 0.0)
  aux = {name: on[name] - off[name] for name in on}
  expected = oracle_aux(cfg, params, state, batch)
  dead = np.asarray(state.since_fired) >= cfg.dead_after
  assert 0 < dead.sum() < M
  # Every dead latent that any token recruits learns, and no live one does.
  assert expected.used.sum() >= 3
  assert (np.abs(aux["W_enc"][:, expected.used]).max(0) > 1e-5).all()
  for name, axis in (("W_enc", 1), ("b_enc", 0), ("W_dec", 0)):
    live = np.take(aux[name], np.flatnonzero(~dead), axis)
    np.testing.assert_allclose(live, 0, atol=1e-6)
  # The residual is detached: what made it gets no gradient.
  np.testing.assert_allclose(aux["b_dec"], 0, atol=1e-6)
  np.testing.assert_allclose(aux["W_skip"], 0, atol=1e-6)
  for name, want in (
    ("W_enc", expected.enc),
    ("b_enc", expected.bias),
    ("W_dec", expected.dec),
  ):
    np.testing.assert_allclose(aux[name], want, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize(
  ("aux_k", "candidates"), [(3, 2), (3, 8), (8, 8), (3, M), (100, 1000)]
)
def test_the_aux_term_is_its_formula_for_any_sizes(aux_k, candidates):
  cfg = make_config(aux_k=aux_k, aux_candidates=candidates)
  params, state, batch = make_case(cfg, 3)
  hyper = {"aux_coefficient": jnp.asarray(1.0)}
  _, (_, metrics) = core.loss(cfg, params, state, batch, hyper)
  expected = oracle_aux(cfg, params, state, batch).value
  assert float(metrics["aux_loss"]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("activation", KINDS)
def test_without_dead_latents_the_aux_term_is_silent(activation):
  cfg = make_config(activation)
  params, state, batch = make_case(cfg, since=np.zeros(M))
  _, (_, metrics) = core.loss(
    cfg, params, state, batch, {"aux_coefficient": jnp.asarray(1.0)}
  )
  assert float(metrics["aux_loss"]) == 0
  on = gradients(cfg, params, state, batch, 1.0)
  off = gradients(cfg, params, state, batch, 0.0)
  for name, gradient in on.items():
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(gradient, off[name], atol=1e-7)


def test_a_residual_of_zero_gives_finite_numbers():
  cfg = make_config("topk")
  params, state, batch = make_case(cfg, since=np.full(M, 1000))
  params = {name: jnp.zeros_like(x) for name, x in params.items()}
  batch["y"] = jnp.broadcast_to(state.norm.y_mean, (B, E))
  gradient = gradients(cfg, params, state, batch, 1.0)
  assert all(np.isfinite(g).all() for g in gradient.values())


def test_a_coefficient_of_zero_in_the_config_leaves_the_term_out():
  cfg = make_config(aux_coefficient=0.0)
  params, state, batch = make_case(cfg)
  _, (_, metrics) = core.loss(
    cfg, params, state, batch, {"aux_coefficient": jnp.asarray(1.0)}
  )
  assert float(metrics["aux_loss"]) == 0


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", KINDS)
def test_gradients_are_those_of_finite_differences(activation, skip):
  cfg = make_config(activation, skip=skip)
  params, state, batch = make_case(cfg)
  gradient = gradients(cfg, params, state, batch, 0.0)
  x, y = normalised(state, batch)

  def value(p):
    acts = oracle_acts(cfg, x @ p["W_enc"] + p["b_enc"])
    recs = oracle_recs(cfg, p, x, acts)
    return np.mean([np.mean((y - rec) ** 2) for rec in recs])

  rng = np.random.default_rng(0)
  p, h = f64(params), 1e-7
  for name in params:
    step = rng.normal(size=p[name].shape)
    rise = value(p | {name: p[name] + h * step})
    fall = value(p | {name: p[name] - h * step})
    slope = np.sum(gradient[name] * step)
    assert slope == pytest.approx((rise - fall) / (2 * h), rel=1e-3, abs=1e-4)


def test_tokens_since_a_latent_fired_are_counted():
  cfg = make_config("topk")
  params, state, batch = make_case(cfg)
  hyper = {"aux_coefficient": jnp.asarray(0.0)}
  x, _ = core.normalise(state.norm, batch["x"], batch["y"])
  acts, _ = core.select(cfg, core.pre_activations(params, x))
  fired = np.asarray((acts > 0).any(0))
  # One that never can, so that both cases are there.
  assert fired.any()
  params["b_enc"] = params["b_enc"].at[0].set(-1e6)
  before = np.asarray(state.since_fired)
  x, _ = core.normalise(state.norm, batch["x"], batch["y"])
  acts, _ = core.select(cfg, core.pre_activations(params, x))
  fired = np.asarray((acts > 0).any(0))
  assert not fired[0]
  _, (state, metrics) = core.loss(cfg, params, state, batch, hyper)
  expected = np.where(fired, 0, before + B)
  np.testing.assert_array_equal(state.since_fired, expected)
  assert float(metrics["dead_fraction"]) == pytest.approx(
    np.mean(expected >= cfg.dead_after)
  )
  _, (state, _) = core.loss(cfg, params, state, batch, hyper)
  expected = np.where(fired, 0, before + 2 * B)
  np.testing.assert_array_equal(state.since_fired, expected)


def test_the_count_does_not_wrap_around():
  cfg = make_config()
  params, state, batch = make_case(cfg, since=np.full(M, 2**30))
  params["b_enc"] = params["b_enc"] - 1e6
  hyper = {"aux_coefficient": jnp.asarray(0.0)}
  for _ in range(2):
    _, (state, _) = core.loss(cfg, params, state, batch, hyper)
  np.testing.assert_array_equal(state.since_fired, 2**30)


@pytest.mark.parametrize("activation", KINDS)
def test_the_threshold_starts_at_its_first_value_and_then_averages(activation):
  cfg = make_config(activation)
  params, state, batch = make_case(cfg)
  hyper = {"aux_coefficient": jnp.asarray(0.0)}
  cuts, running = [], []
  for seed in range(3):
    batch = make_case(cfg, seed)[2]
    x, _ = core.normalise(state.norm, batch["x"], batch["y"])
    z = np.asarray(core.pre_activations(params, x))
    if activation == "topk":
      cuts.append((np.sort(z, axis=1)[:, -3].mean(),) * 2)
    else:
      ordered = np.sort(z, axis=None)[::-1]
      cuts.append((ordered[3 * B], ordered[3 * B - 1]))
    _, (state, _) = core.loss(cfg, params, state, batch, hyper)
    running.append(float(state.threshold))
  bounds = np.asarray(cuts)  # [3, 2]: below and at the last kept
  expected = [bounds[0]]
  for cut in bounds[1:]:
    expected.append(0.9 * expected[-1] + 0.1 * cut)
  for value, (low, high) in zip(running, expected, strict=True):
    assert low - 1e-5 <= value <= high + 1e-5


def make_moments(n=4_000, seed=0):
  rng = np.random.default_rng(seed)
  scales = np.geomspace(0.03, 10, D)
  x = (
    rng.normal(size=(n, D)) * scales @ np.linalg.qr(rng.normal(size=(D, D)))[0]
    + 20
  )
  y = x @ rng.normal(size=(D, E)) + rng.normal(size=(n, E)) - 5
  x, y = x.astype(np.float32), y.astype(np.float32)
  return x, y, linear.moments([(x, y)])


def test_whitening_makes_the_covariance_the_identity():
  x, y, m = make_moments()
  norm = core.normalisation(m, "whiten", epsilon=1e-7)
  xn, yn = core.normalise(norm, jnp.asarray(x), jnp.asarray(y))
  np.testing.assert_allclose(np.cov(np.asarray(xn).T), np.eye(D), atol=0.03)
  np.testing.assert_allclose(np.mean(xn, 0), 0, atol=0.02)
  assert np.mean(np.square(yn)) == pytest.approx(1, rel=1e-4)
  np.testing.assert_allclose(np.mean(yn, 0), 0, atol=1e-4)


@pytest.mark.parametrize("epsilon", [1e-4, 0.1, 10.0])
def test_whitening_raises_every_eigenvalue_and_keeps_unit_mean_square(epsilon):
  x, y, m = make_moments()
  norm = core.normalisation(m, "whiten", epsilon=epsilon)
  xn, _ = core.normalise(norm, jnp.asarray(x), jnp.asarray(y))
  assert np.mean(np.square(xn)) == pytest.approx(1, rel=1e-3)
  before = np.linalg.eigvalsh(np.cov(x.T, bias=True))
  after = np.linalg.eigvalsh(np.cov(np.asarray(xn).T, bias=True))
  expected = before / (before + epsilon * before.mean())
  expected /= expected.mean()
  np.testing.assert_allclose(after, expected, rtol=0.02, atol=1e-4)


def test_zca_turns_nothing():
  _, _, m = make_moments()
  x_map = np.asarray(core.normalisation(m, "whiten", epsilon=0.01).x_map)
  np.testing.assert_allclose(x_map, x_map.T, rtol=1e-5, atol=1e-6)
  assert np.linalg.eigvalsh(x_map).min() > 0


def test_scaling_divides_by_one_number():
  x, y, m = make_moments()
  norm = core.normalisation(m, "scale", epsilon=0.0)
  xn, _ = core.normalise(norm, jnp.asarray(x), jnp.asarray(y))
  size = np.sqrt(x.astype(np.float64).var(0).mean())
  np.testing.assert_allclose(
    xn, (x - x.mean(0, dtype=np.float64)) / size, atol=1e-4
  )


def test_a_direction_without_variance_stays_finite():
  x, y, _ = make_moments()
  x[:, 0] = 3
  norm = core.normalisation(linear.moments([(x, y)]), "whiten", epsilon=1e-3)
  assert all(np.isfinite(a).all() for a in norm)


@pytest.mark.parametrize("constant", ["x", "y"])
def test_a_constant_site_is_refused(constant):
  x, y, _ = make_moments()
  (x if constant == "x" else y)[:] = 2
  with pytest.raises(ValueError, match="constant over the training tokens"):
    core.normalisation(linear.moments([(x, y)]), "whiten", epsilon=0.1)


def test_another_kind_of_normalisation_lists_those_there_are():
  with pytest.raises(ValueError, match="'l2'; expected one of none, mean_squ"):
    core.normalisation(make_moments()[2], "l2", epsilon=0.1)


@pytest.mark.parametrize("epsilon", [1e-4, 0.01, 0.5])
def test_whiten_and_scale_keep_their_bits(epsilon):
  m = make_moments()[2]
  values, vectors = np.linalg.eigh(m.covariance)
  mean = values.mean()
  raised = values + epsilon * mean
  after = np.mean(values / raised)
  expected = {
    "whiten": (vectors / np.sqrt(raised)) @ vectors.T / np.sqrt(after),
    "scale": np.eye(D) / np.sqrt(mean),
  }
  for kind, x_map in expected.items():
    got = core.normalisation(m, kind, epsilon=epsilon)
    np.testing.assert_array_equal(got.x_map, x_map.astype(np.float32))
    np.testing.assert_array_equal(got.x_mean, m.mean_x.astype(np.float32))


@pytest.mark.parametrize("kind", KINDS_OF_NORMALISATION)
def test_every_kind_trains_in_its_coordinates_and_folds_back(kind):
  x, y, m = make_moments()
  size = float(np.linalg.norm(x, axis=1).mean())
  norm = core.normalisation(m, kind, epsilon=0.01, mean_norm=size)
  measured = Measured(len(x), x.mean(0), x.var(0), np.cov(x.T), size)
  xn, _ = core.normalise(norm, x, y)
  expected = np.asarray(fit(measured, kind, shrinkage=0.01).apply(x))
  np.testing.assert_allclose(xn, expected, rtol=0.01, atol=0.01)

  cfg = make_config("topk")
  ridge = linear.fit_ridge(m, m)
  params, state = core.init(cfg, jax.random.key(0), norm, ridge)
  acts, _ = core.select(cfg, core.pre_activations(params, xn))
  rec = core.decode_prefixes(cfg, params, xn, acts)[-1]
  rec = np.asarray(rec) * float(norm.y_scale) + np.asarray(norm.y_mean)
  folded = core.fold(cfg, params, norm, state.threshold)
  dictionary = Dictionary(cfg, jax.tree.map(jnp.asarray, folded))
  np.testing.assert_allclose(
    dictionary.reconstruct(x), rec, atol=2e-3 * np.abs(rec).max()
  )


@pytest.mark.parametrize("from_examples", [False, True])
def test_before_any_latent_acts_the_skip_is_the_ridge_map(from_examples):
  x, y, m = make_moments()
  rng = np.random.default_rng(1)
  ridge = linear.Ridge(
    rng.normal(size=(D, E)).astype(np.float32),
    rng.normal(size=E).astype(np.float32),
    0.0,
  )
  cfg = make_config()
  norm = core.normalisation(m, "whiten", epsilon=0.01)
  params, state = core.init(
    cfg,
    jax.random.key(0),
    norm,
    ridge,
    (x[:100], y[:100], np.ones(100, bool)) if from_examples else None,
  )
  assert {n: p.shape for n, p in params.items()} == cfg.shapes()
  params["W_dec"] = jnp.zeros_like(params["W_dec"])
  folded = core.fold(cfg, params, norm, state.threshold)
  got = Dictionary(cfg, jax.tree.map(jnp.asarray, folded)).reconstruct(x)
  expected = x.astype(np.float64) @ ridge.linear + ridge.bias
  np.testing.assert_allclose(got, expected, atol=2e-3 * np.abs(expected).max())


def test_latents_start_from_examples_and_what_is_left_of_them():
  x, y, m = make_moments()
  cfg = make_config()
  norm = core.normalisation(m, "whiten", epsilon=0.01)
  ridge = linear.fit_ridge(m, m)
  params, state = core.init(
    cfg,
    jax.random.key(0),
    norm,
    ridge,
    (x[:50], y[:50], np.arange(50) % 10 != 3),
    encoder_norm=2.0,
    decoder_norm=0.25,
  )
  xn, yn = f64(core.normalise(norm, x[:50], y[:50]))
  rest = yn - (y[:50] * 0 + ridge(x[:50]) - f64(norm.y_mean)) / f64(
    norm.y_scale
  )
  unit_x = xn / np.linalg.norm(xn, axis=1, keepdims=True)
  unit_r = rest / np.linalg.norm(rest, axis=1, keepdims=True)
  like_x = unit_x @ f64(params["W_enc"]) / 2  # [50, M]
  like_r = unit_r @ f64(params["W_dec"]).T / 0.25
  origin = like_x.argmax(0)
  assert len(set(origin)) == M  # each from an example of its own
  assert not (origin % 10 == 3).any()  # and from none that is a repeat
  np.testing.assert_allclose(like_x.max(0), 1, atol=1e-4)
  np.testing.assert_allclose(like_r[origin, np.arange(M)], 1, atol=1e-2)
  assert not np.asarray(params["b_enc"]).any()
  assert not np.asarray(state.since_fired).any()
  assert float(state.threshold) < 0


def test_random_starts_have_the_norms_asked_for():
  cfg = make_config(skip=False)
  params, _ = core.init(
    cfg,
    jax.random.key(0),
    make_norm(),
    encoder_norm=3.0,
    decoder_norm=0.5,
  )
  assert {n: p.shape for n, p in params.items()} == cfg.shapes()
  np.testing.assert_allclose(
    np.linalg.norm(params["W_enc"], axis=0), 3, rtol=1e-5
  )
  np.testing.assert_allclose(
    np.linalg.norm(params["W_dec"], axis=1), 0.5, rtol=1e-5
  )


def test_too_few_examples_are_refused():
  x, y, _ = make_moments(n=M - 1)
  with pytest.raises(ValueError, match="23 examples cannot start 24 latents"):
    core.init(
      make_config(),
      jax.random.key(0),
      make_norm(),
      None,
      (x, y, np.ones(len(x), bool)),
    )


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_folding_changes_neither_what_is_active_nor_what_comes_out(
  activation, skip, seed
):
  cfg = make_config(activation, skip=skip)
  params, state, batch = make_case(cfg, seed)
  rng = np.random.default_rng(seed)
  scale = 10.0 ** rng.uniform(-2, 2, (M, 1))  # rows of very different norms
  params["W_dec"] = params["W_dec"] * jnp.asarray(scale, jnp.float32)
  threshold = 0.4
  p = f64(params)
  x, _ = normalised(state, batch)
  z = x @ p["W_enc"] + p["b_enc"]
  if activation == "topk":
    ordered = np.sort(z, axis=1)
    cut, other = ordered[:, -3:-2], ordered[:, -4:-3]
    clear = (cut - other > 1e-3).all(1) & (np.abs(z) > 1e-4).all(1)
  else:
    cut = np.full((B, 1), threshold)
    clear = (np.abs(z - cut) > 1e-4).all(1)
  assert clear.mean() > 0.8  # the rest is decided by rounding
  acts = np.where((z >= cut) & (z > 0), z, 0)
  rec = oracle_recs(cfg, p, x, acts)[-1]
  norm = f64(state.norm)
  expected = norm.y_mean + norm.y_scale * rec
  folded = core.fold(
    cfg, params, state.norm, threshold if activation == "batchtopk" else None
  )
  d = Dictionary(cfg, jax.tree.map(jnp.asarray, folded))
  got = np.asarray(d.encode(batch["x"]))
  np.testing.assert_array_equal((got > 0)[clear], (acts > 0)[clear])
  np.testing.assert_allclose(
    np.asarray(d.reconstruct(batch["x"]))[clear],
    expected[clear],
    atol=1e-5 * np.abs(expected).max(),
  )
  if activation == "batchtopk":
    np.testing.assert_allclose(
      np.linalg.norm(folded["W_dec"], axis=1), 1, rtol=1e-5
    )
    # Activations are in raw units: norms of what the latents write.
    size = norm.y_scale * np.linalg.norm(p["W_dec"], axis=1)
    np.testing.assert_allclose(
      got[clear], (acts * size)[clear], rtol=1e-2, atol=1e-4 * size.max()
    )
  else:
    assert "threshold" not in folded


def test_folding_a_latent_that_writes_nothing_stays_finite():
  cfg = make_config()
  params, state, batch = make_case(cfg)
  params["W_dec"] = params["W_dec"].at[3].set(0)
  folded = core.fold(cfg, params, state.norm, 0.4)
  assert all(np.isfinite(x).all() for x in folded.values())
  d = Dictionary(cfg, jax.tree.map(jnp.asarray, folded))
  assert np.isfinite(d.reconstruct(batch["x"])).all()


@pytest.mark.parametrize("activation", KINDS)
def test_steps_along_the_gradient_lower_the_loss(activation):
  cfg = make_config(activation)
  params, state, batch = make_case(cfg)
  hyper = {"aux_coefficient": jnp.asarray(0.0)}
  value = jax.jit(
    jax.value_and_grad(lambda p: core.loss(cfg, p, state, batch, hyper)[0])
  )
  first, _ = value(params)
  for _ in range(60):
    last, gradient = value(params)
    params = jax.tree.map(lambda p, g: p - 0.02 * g, params, gradient)
  assert float(last) < 0.7 * float(first)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"activation": "relu"}, "expected one of topk, batchtopk"),
    ({"k": 0}, r"k=0 must be in \(0, 24\]"),
    ({"k": 25}, r"k=25 must be in \(0, 24\]"),
    ({"k": 2.5, "activation": "topk"}, "must be whole"),
    ({"prefix_widths": (4, 12)}, "end at the width, 24"),
    ({"prefix_widths": (12, 4, 24)}, "ascend strictly"),
    ({"prefix_widths": (0, 24)}, "must be positive"),
    ({"prefix_widths": ()}, "end at the width, 24"),
  ],
)
def test_a_config_that_makes_no_dictionary_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    make_config(**changes)


def test_a_transcoder_has_two_sites():
  assert not make_config(read="a", write="a").is_transcoder
  assert make_config(read="a", write="b").is_transcoder
