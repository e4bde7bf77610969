"""Maps that a network writes: those of a layer that it has not seen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import linalg, stats

from gemma_jax.alignment import hypernetwork
from gemma_jax.alignment.hypernetwork import Config, Route, SiteScale
from gemma_jax.alignment.maps import fit_ridge
from gemma_jax.alignment.moments import Moments
from gemma_jax.alignment.objective import activation_losses, total

pytestmark = pytest.mark.usefixtures("quick_compiles")

D, E, LAYERS, HELD, ROWS = 24, 20, 9, 4, 300
TRAIN = [l for l in range(LAYERS) if l != HELD]
CONFIG = Config((("a", "b", D, E), ("b", "a", E, D)), rank=8)


@functools.cache
def planted(layer, n, seed):
  """Rows of both models: a's directions turn with depth, b's do not.

  Both grow with depth, about means that wander.
  """
  shared = stats.ortho_group.rvs(D, random_state=5)
  planes = stats.ortho_group.rvs(D, random_state=1)
  depth = (layer + 1) / LAYERS
  turn = np.zeros((D, D))
  for i, speed in enumerate((5.25, 6.4, 7.5)):
    turn[2 * i, 2 * i + 1] = speed * depth
  turn = planes @ linalg.expm(turn - turn.T) @ planes.T
  rng = np.random.default_rng([layer, seed])
  a, b = rng.normal(size=(n, D)), rng.normal(size=(n, E))
  a = (b @ shared[:E]) @ turn + 0.2 * a
  b = b + 0.2 * rng.normal(size=b.shape)
  a = (1 + layer) * (a + 3 * np.sin(5 * depth + np.arange(D)))
  b = (1 + layer) ** 1.5 * (b + 5 * np.cos(4 * depth + np.arange(E)))
  return np.float32(a), np.float32(b)


@functools.cache
def scale(side, layer):
  """Of rows that are not those of the maps, nor paired."""
  rows = np.float64(planted(layer, 4_000, 10 + side)[side])
  return SiteScale.of(rows.mean(0), rows.var(0))


def route(direction, layer):
  names = [f"{model}:blocks.{layer}.resid_post" for model in "ab"]
  source, target = names[::-1] if direction else names
  return Route(source, target, direction, ((layer + 1) / LAYERS,) * 2)


def scales(direction, layer):
  return scale(direction, layer), scale(1 - direction, layer)


def pair(direction, layer, n=ROWS, seed=1):
  x, y = planted(layer, n, seed)
  return (y, x) if direction else (x, y)


@functools.cache
def base(direction):
  return hypernetwork.pooled_base(
    (Moments().update(*pair(direction, l)), *scales(direction, l))
    for l in TRAIN
  )


@pytest.fixture(scope="module")
def trained():
  """Both directions at once, all layers but one, from the pooled bases."""
  steps = 400
  optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
  data = []
  for direction in (0, 1):
    rows = [
      (route(direction, l).depths, scales(direction, l), pair(direction, l))
      for l in TRAIN
    ]
    data.append(jax.tree.map(lambda *a: jnp.stack(a), *rows))

  def loss(params):
    def of_route(direction, depths, sites, rows):
      x, y = rows
      source, target = sites
      there = Route("", "", direction, depths)
      made = hypernetwork.apply(CONFIG, params, there, source, target, x)
      losses = activation_losses(made, y, target.mean, np.mean(target.scale**2))
      return total(losses, {"reconstruction": 1.0})

    return sum(
      jax.vmap(functools.partial(of_route, direction))(*rows).mean()
      for direction, rows in enumerate(data)
    )

  @jax.jit
  def train(params):
    def step(carry, _):
      params, state = carry
      updates, state = optimizer.update(jax.grad(loss)(params), state)
      return (optax.apply_updates(params, updates), state), None

    start = params, optimizer.init(params)
    return jax.lax.scan(step, start, length=steps)[0][0]

  return train(hypernetwork.init(jax.random.key(0), CONFIG, [base(0), base(1)]))


def written(params, direction, layer):
  there = route(direction, layer)
  return hypernetwork.as_map(CONFIG, params, there, *scales(direction, layer))


def fvu(made, y):
  y = np.float64(y)
  return np.sum((y - made) ** 2) / np.sum((y - y.mean(0)) ** 2)


def random_parameters():
  """Of a network that has learnt something, anything."""
  params = hypernetwork.init(jax.random.key(0), CONFIG)
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  return tree.unflatten(
    [
      a + 0.1 * jax.random.normal(key, a.shape)
      for a, key in zip(leaves, keys, strict=True)
    ]
  )


# -------------------------------------------------------------- an unseen layer
@pytest.mark.parametrize("direction", [0, 1])
def test_an_unseen_layer_gets_nearly_the_map_that_is_fitted_there(
  trained, direction
):
  x, y = pair(direction, HELD, 4_000, 2)
  found = fvu(written(trained, direction, HELD)(x), y)
  there = fvu(fit_ridge(*pair(direction, HELD))(x), y)
  assert found < 1.1 * there
  # What else there is without a pair of that layer: its neighbours' maps, in
  # its own coordinates, which flatters them.
  start, end = scales(direction, HELD)
  made = []
  for layer in (HELD - 1, HELD + 1):
    source, target = scales(direction, layer)
    near = fit_ridge(*pair(direction, layer))
    moved = near((x - start.mean) / start.scale * source.scale + source.mean)
    made.append((moved - target.mean) / target.scale * end.scale + end.mean)
  assert found < 0.95 * fvu(np.mean(made, axis=0), y)
  pooled = hypernetwork.init(jax.random.key(0), CONFIG, [base(0), base(1)])
  assert found < 0.5 * fvu(written(pooled, direction, HELD)(x), y)


@pytest.mark.parametrize("direction", [0, 1])
def test_layers_that_it_has_seen_lose_nothing(trained, direction):
  for layer in TRAIN:
    x, y = pair(direction, layer, 4_000, 2)
    there = fvu(fit_ridge(*pair(direction, layer))(x), y)
    assert fvu(written(trained, direction, layer)(x), y) < 1.05 * there


# ----------------------------------------------------------------- what it says
def test_at_first_every_route_has_the_base():
  rng = np.random.default_rng(0)
  bases = [rng.normal(size=(D, E)), rng.normal(size=(E, D))]
  params = hypernetwork.init(jax.random.key(0), CONFIG, bases)
  for direction in (0, 1):
    for layer in (0, 7):
      weights, bias = hypernetwork.written(
        CONFIG, params, route(direction, layer)
      )
      np.testing.assert_array_equal(weights, np.float32(bases[direction]))
      np.testing.assert_array_equal(bias, 0)
  zeros = hypernetwork.init(jax.random.key(0), CONFIG, [None, bases[1]])
  found = written(zeros, 0, 2)(pair(0, 2)[0])
  np.testing.assert_allclose(
    found, np.tile(scale(1, 2).mean, (ROWS, 1)), rtol=1e-5
  )


@pytest.mark.parametrize("direction", [0, 1])
def test_the_map_is_what_is_applied_and_its_factors_multiply(direction):
  params, there = random_parameters(), route(direction, 5)
  x = pair(direction, 5)[0]
  sites = scales(direction, 5)
  expected = hypernetwork.apply(CONFIG, params, there, *sites, x)
  found = written(params, direction, 5)
  size = np.abs(expected).max()
  np.testing.assert_allclose(found(x), expected, atol=1e-5 * size)
  read, write, bias = hypernetwork.factors(CONFIG, params, there)
  weights = params["maps"][direction]["base"] + read @ write
  source, target = sites
  by_hand = (x - source.mean) / source.scale @ weights + bias
  by_hand = by_hand * target.scale + target.mean
  np.testing.assert_allclose(by_hand, expected, atol=1e-5 * size)
  one = hypernetwork.apply(CONFIG, params, there, *sites, x[3])
  np.testing.assert_allclose(one, expected[3], atol=1e-5 * size)
  assert found.name == "hypernetwork"
  assert found.parameters == 8 * (D + E) + bias.size
  assert found.about["rank"] == np.linalg.matrix_rank(read @ write) == 8
  assert (found.about["source_depth"], found.about["target_depth"]) == (
    there.depths
  )


def test_depths_and_directions_tell_routes_apart():
  params = random_parameters()

  def map_of(direction, *depths):
    there = Route("a:x", "b:y", direction, depths)
    return hypernetwork.written(CONFIG, params, there)[0]

  near = [map_of(0, 0.5, 0.5), map_of(0, 0.51, 0.5), map_of(0, 0.5, 0.51)]
  far = map_of(0, 0.5, 0.9)
  gaps = [np.linalg.norm(a - near[0]) for a in (*near[1:], far)]
  assert 0 < max(gaps[:2]) < gaps[2] / 3
  traced = jax.jit(lambda depths: map_of(0, *depths))(jnp.array([0.5, 0.9]))
  np.testing.assert_allclose(traced, far, atol=1e-5)


def test_both_directions_share_the_embedding_of_their_pair():
  config = Config(
    (("b", "a", 3, 4), ("a", "b", 4, 3), ("a", "a", 4, 4)), rank=2
  )
  assert config.pairs == (("a", "a"), ("a", "b"))
  params = hypernetwork.init(jax.random.key(0), config)
  for maps in params["maps"]:
    maps["write"]["weights"] += 0.1

  def size(params, direction):
    there = Route("", "", direction, (0.2, 0.4))
    return jnp.sum(hypernetwork.written(config, params, there)[0] ** 2)

  gradient = jax.jit(jax.grad(size), static_argnums=1)
  reads = [gradient(params, k) for k in range(3)]
  used = [np.abs(g["pair"]).max(1) > 0 for g in reads]
  np.testing.assert_array_equal(used, [[0, 1], [0, 1], [1, 0]])
  used = [np.abs(g["direction"]).max(1) > 0 for g in reads]
  np.testing.assert_array_equal(used, np.eye(3))


def test_gradients_are_finite_and_reach_everything():
  params = random_parameters()

  def loss(params):
    found = 0.0
    for direction in (0, 1):
      x, y = pair(direction, 3)
      source, target = scales(direction, 3)
      made = hypernetwork.apply(
        CONFIG, params, route(direction, 3), source, target, x
      )
      losses = activation_losses(made, y, target.mean, np.mean(target.scale**2))
      found += total(losses, {"reconstruction": 1.0, "cosine": 0.5})
    return found

  gradient = jax.jit(jax.grad(loss))
  for leaf in jax.tree.leaves(gradient(params)):
    assert np.isfinite(leaf).all()
    assert np.abs(leaf).max() > 0
  first = gradient(hypernetwork.init(jax.random.key(0), CONFIG))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(first))
  assert np.abs(first["maps"][0]["write"]["weights"]).max() > 0


# ------------------------------------------------------------------------ bases
@pytest.mark.parametrize("full", [True, False])
def test_the_pooled_base_is_the_ridge_map_of_all_normalised_rows(full):
  xs, ys, fitted = [], [], []
  for layer in TRAIN:
    # More rows of deeper layers, which count by their number.
    x, y = (rows[: 100 + 20 * layer] for rows in pair(0, layer))
    source, target = scales(0, layer)
    fitted.append((Moments(full=full).update(x, y), source, target))
    xs.append((np.float64(x) - source.mean) / source.scale)
    ys.append((np.float64(y) - target.mean) / target.scale)
  expected = fit_ridge(np.concatenate(xs), np.concatenate(ys))
  found = hypernetwork.pooled_base(iter(fitted))
  np.testing.assert_allclose(found, expected.weights, atol=1e-5)


def test_the_scale_is_the_distance_from_the_mean():
  rows = np.float64(planted(3, ROWS, 1)[0])
  found = SiteScale.of(rows.mean(0), rows.var(0))
  away = (rows - found.mean) / found.scale
  assert np.mean(np.sum(away**2, 1)) == pytest.approx(1, rel=1e-5)
  np.testing.assert_allclose(away.var(0), 1 / len(away.T), rtol=1e-5)


# ----------------------------------------------------------------------- errors
@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"rank": 21}, "rank of 1 to 20, .* got 21"),
    ({"rank": 0}, "rank of 1 to 20, .* got 0"),
    ({"directions": ()}, "expected directions"),
    ({"directions": CONFIG.directions * 2}, "only once"),
    ({"frequencies": 0}, "got 64, 8, 0"),
  ],
)
def test_sizes_out_of_range_are_refused(options, message):
  given = {"directions": CONFIG.directions, "rank": 8}
  with pytest.raises(ValueError, match=message):
    Config(**given | options)


def test_what_does_not_fit_is_refused():
  params = hypernetwork.init(jax.random.key(0), CONFIG)
  with pytest.raises(ValueError, match="direction of 0 to 1, got 2 for a:x"):
    hypernetwork.written(CONFIG, params, Route("a:x", "b:y", 2, (0, 1)))
  for depths in ((1.1, 0.5), (0.5, -0.1), (np.nan, 0.5)):
    with pytest.raises(ValueError, match=r"depths of 0 to 1, .* a:x to b:y"):
      hypernetwork.written(CONFIG, params, Route("a:x", "b:y", 0, depths))
  x = np.zeros((5, D))
  with pytest.raises(ValueError, match=r"\[..., 20\], got \(5, 24\)"):
    hypernetwork.apply(CONFIG, params, route(1, 2), *scales(1, 2), x)
  for bases in ([x], [None, x], [None] * 3):
    with pytest.raises(ValueError, match=r"of shapes \[\(24, 20\), \(20, 24\)"):
      hypernetwork.init(jax.random.key(0), CONFIG, bases)
  with pytest.raises(ValueError, match=r"got shapes .* summed variance"):
    SiteScale.of(x[0], x[0])
  with pytest.raises(ValueError, match=r"\(24,\) and \(23,\)"):
    SiteScale.of(x[0], np.ones(23))
  with pytest.raises(ValueError, match="expected paired rows, got none"):
    hypernetwork.pooled_base([])
