"""One network learns the maps of both directions and several layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import models
from gemma_jax.alignment import Moments, fit_ridge, hypernetwork, objective
from gemma_jax.alignment.hypernetwork import Config, Route, SiteScale
from tests.trainers.pairs import (
  WIDTHS,
  dictionary,
  interrupt,
  rows,
  scale,
  site,
  statistics,
  write,
)
from trainers import loop
from trainers.hypernetwork import train
from trainers.translator import encoder

pytestmark = pytest.mark.usefixtures("quick_compiles")

LAYERS, DEPTH = (0, 2), 3
ACROSS = [site(m, i) for m in "ab" for i in LAYERS]
WITHIN = [site("a", i) for i in LAYERS]
DIRECTIONS = (("a", "b"), ("b", "a"), ("a", "a"))
ABOUT = Config(
  tuple((*d, *(WIDTHS[m] for m in d)) for d in DIRECTIONS), 6, 16, 4, 2
)
CONFIG = {
  "rank": 6,
  "width": 16,
  "embedding": 4,
  "frequencies": 2,
  "steps": 240,
  "batch_size": 128,
  "learning_rate": 1e-2,
  "weights": dict.fromkeys(objective.TERMS, 1.0) | {"firing": 10.0},
  "sampled": 16,
  "buffer_rows": 1_024,
  "log_every": 60,
  "checkpoint_every": 60,
  "keep": 1,
  "kl_windows": 1,
}


def route(source, target):
  depths = tuple((int(s.split(".")[1]) + 1) / DEPTH for s in (source, target))
  direction = DIRECTIONS.index((source[0], target[0]))
  return Route(source, target, direction, depths)


# Both ways between the models, and upwards in one of them.
ROUTES = [
  *(
    route(*way)
    for i in LAYERS
    for pair in [(site("a", i), site("b", i))]
    for way in (pair, pair[::-1])
  ),
  route(*WITHIN),
]


@functools.cache
def scales():
  return {name: scale(x) for name, x in rows(ACROSS).items()}


@functools.cache
def encoders():
  """Of one site of each model."""
  out = {}
  for name, kind in ((site("a", 0), "batchtopk"), (site("b", 2), "jumprelu")):
    x = rows([name])[name]
    own = dictionary(x, activation=kind)
    out[name] = encoder(own, statistics(own, x))
  return out


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
  """Of each route: two files, one for the two models, one for the first."""
  where = tmp_path_factory.mktemp("rows")
  across = write(where / "across", rows(ACROSS))
  within = write(where / "within", rows(WITHIN))
  return [across] * 4 + [within]


def run(
  stores,
  workdir,
  mesh,
  routes=ROUTES,
  known=None,
  bases=None,
  encoders=None,
  **changes,
):
  return train(
    CONFIG | changes,
    ABOUT,
    routes,
    stores,
    scales() if known is None else known,
    bases,
    encoders or {},
    workdir,
    mesh=mesh,
    seed=0,
  )


@pytest.fixture(scope="module")
def alone(stores, one_device, tmp_path_factory):
  """(workdir, parameters) of a training on activations and codes."""
  workdir = tmp_path_factory.mktemp("alone")
  return workdir, run(stores, workdir, one_device, encoders=encoders())


@pytest.fixture(scope="module")
def of_activations(stores, one_device, tmp_path_factory):
  """The same without encoders."""
  workdir = tmp_path_factory.mktemp("activations")
  return workdir, run(stores, workdir, one_device)


def predicted(params, r, x):
  own = (scales()[name] for name in r[:2])
  return hypernetwork.apply(ABOUT, params, r, *own, x[r.source])


def fvu(y, found):
  return float(np.square(y - found).sum() / np.square(y - y.mean(0)).sum())


def test_every_route_comes_near_the_ridge_map_that_is_fitted_there(
  of_activations,
):
  fitted, new = rows(ACROSS), rows(ACROSS, seed=1)
  for r in ROUTES:
    x, y = (fitted[name] for name in r[:2])
    least = fvu(new[r.target], fit_ridge(Moments().update(x, y))(new[r.source]))
    assert least < 0.1
    got = fvu(new[r.target], predicted(of_activations[1], r, new))
    assert got < 1.1 * least, r


def test_a_layer_in_between_gets_a_map_too(of_activations):
  between = route(site("a", 1), site("b", 1))
  x = rows([site("a", 1), site("b", 1)], seed=1)
  own = (scale(x[name]) for name in between[:2])
  found = hypernetwork.apply(
    ABOUT, of_activations[1], between, *own, x[between.source]
  )
  assert fvu(x[between.target], found) < 0.3


def test_the_firing_term_makes_the_right_latents_fire(alone, of_activations):
  new = rows(ACROSS, seed=1)
  for r in ROUTES:
    if r.target not in encoders():
      continue
    read = encoders()[r.target]
    with_codes, without = (
      objective.code_losses(
        *read(predicted(params, r, new)),
        read(new[r.target])[0],
        read.about,
        jnp.arange(32),
      )
      for _, params in (alone, of_activations)
    )
    assert with_codes["firing"] < 0.97 * without["firing"]


def test_metrics_say_how_activations_and_codes_are_met(alone, of_activations):
  terms = {"loss", "fvu", "cosine"}
  codes = {f"code_{name}" for name in objective.TERMS}
  for (workdir, _), names in (
    (of_activations, terms),
    (alone, terms | codes),
  ):
    written = loop.read_metrics(workdir / "metrics.jsonl")
    assert [row["step"] for row in written] == [60, 120, 180, 240]
    assert names == {n for n in written[0] if n in terms | codes}
    assert written[-1]["fvu"] < 0.1 < written[0]["fvu"]


def test_a_training_that_broke_off_ends_bit_for_bit_as_one_left_alone(
  stores, alone, one_device, tmp_path, monkeypatch
):
  with monkeypatch.context() as patch:
    interrupt(patch, at=130)
    with pytest.raises(InterruptedError):
      run(stores, tmp_path, one_device, encoders=encoders())
  assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["120"]
  found = run(stores, tmp_path, one_device, encoders=encoders())
  jax.tree.map(np.testing.assert_array_equal, found, alone[1])


def test_a_finished_training_is_restored(
  stores, alone, one_device, monkeypatch
):
  interrupt(monkeypatch, at=0)
  found = run(stores, alone[0], one_device, encoders=encoders())
  jax.tree.map(np.testing.assert_array_equal, found, alone[1])


def test_a_mesh_gives_the_parameters_of_one_device(
  stores, one_device, tmp_path
):
  one, many = (
    run(
      stores[:1],
      tmp_path / str(mesh.size),
      mesh,
      routes=[route(site("a", 2), site("b", 2))],
      encoders=encoders(),
      steps=6,
      learning_rate=1e-3,
    )
    for mesh in (
      one_device,
      models.make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4]),
    )
  )
  for a, b in zip(
    *(jax.tree.leaves(tree) for tree in (many, one)), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_loss_that_is_not_finite_stops_and_names_the_step(
  one_device, tmp_path
):
  arrays = rows(ACROSS)
  arrays[site("a", 0)][5] = np.nan
  store = write(tmp_path / "store", arrays)
  with pytest.raises(FloatingPointError, match="not finite at step"):
    run([store], tmp_path / "run", one_device, routes=ROUTES[:1])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"steps": 0}, "steps of 1 or more, got 0"),
    ({"batch_size": 0}, "batch_size of 1 or more, got 0"),
    ({"rank": 8}, "expected a network of {'rank': 8.*got one of {'rank': 6"),
    ({"weights": {"firing": 1.0}}, "encoders of targets"),
    ({"known": {}}, f"a scale of {ACROSS[0]} and its 12 dims, got none"),
    (
      {"known": {n: SiteScale.of(np.zeros(3), np.ones(3)) for n in ACROSS}},
      r"its 12 dims, got \(3,\)",
    ),
    (
      {"routes": [r._replace(direction=7) for r in ROUTES]},
      r"direction of widths \(12, 10\), got number 7",
    ),
    (
      {"routes": [r._replace(direction=0) for r in ROUTES]},
      r"direction of widths \(10, 12\), got number 0",
    ),
    (
      {"routes": [r._replace(depths=(0.5, 1.5)) for r in ROUTES]},
      "depths of 0 to 1",
    ),
    ({"bases": [np.ones((12, 10))]}, r"of shapes .* got \[\(12, 10\)\]"),
    ({"routes": ROUTES[:2]}, "got 2 routes and 5 stores"),
    (
      {"routes": [*ROUTES[:4], ROUTES[0]]},
      f"expected {site('b', 0)} in the store",
    ),
  ],
)
def test_what_does_not_fit_is_refused(
  changes, message, stores, one_device, tmp_path
):
  with pytest.raises(ValueError, match=message):
    run(stores, tmp_path, one_device, **changes)
  assert not (tmp_path / "config.json").exists()


def test_an_encoder_of_another_site_is_refused(stores, one_device, tmp_path):
  swapped = {site("b", 2): encoders()[site("a", 0)]}
  with pytest.raises(ValueError, match="reads 10 dims, got one of 12"):
    run(stores, tmp_path, one_device, encoders=swapped)
