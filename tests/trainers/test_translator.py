"""Translators learn codes of another dictionary, each route by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import models
from gemma_jax.alignment import objective, translator
from tests.trainers.pairs import (
  dictionary,
  interrupt,
  rows,
  site,
  statistics,
  write,
)
from trainers import loop
from trainers.translator import train

pytestmark = pytest.mark.usefixtures("quick_compiles")

A, B, C = site("a", 0), site("b", 1), site("b", 2)
SITES = (A, B, C)
ROUTES = ((A, B), (B, A))
CONFIG = {
  "width": 64,
  "dropout": 0.1,
  "steps": 200,
  "batch_size": 128,
  "learning_rate": 3e-3,
  "weights": dict.fromkeys(objective.TERMS, 1.0),
  "sampled": 16,
  "buffer_rows": 1_024,
  "log_every": 50,
  "checkpoint_every": 50,
  "keep": 1,
}


@functools.cache
def known():
  """Dictionaries of three widths, and statistics of their codes."""
  own = {
    name: dictionary(x, width, kind)
    for (name, x), width, kind in zip(
      rows(SITES).items(),
      (32, 24, 40),
      ("jumprelu", "topk", "batchtopk"),
      strict=True,
    )
  }
  return own, {
    name: statistics(own[name], x) for name, x in rows(SITES).items()
  }


@pytest.fixture(scope="module")
def store(tmp_path_factory):
  return write(tmp_path_factory.mktemp("rows") / "store", rows(SITES))


def run(store, workdir, mesh, routes=ROUTES, **changes):
  stores = [store] * len(routes)
  return train(
    CONFIG | changes, routes, stores, *known(), workdir, mesh=mesh, seed=0
  )


@pytest.fixture(scope="module")
def alone(store, one_device, tmp_path_factory):
  """(workdir, parameters) of a training that nothing interrupted."""
  workdir = tmp_path_factory.mktemp("alone")
  return workdir, run(store, workdir, one_device)


def assert_same(found, expected, **tolerance):
  for a, b in zip(
    *(jax.tree.leaves(tree) for tree in (found, expected)), strict=True
  ):
    np.testing.assert_allclose(a, b, **tolerance)


def test_every_route_beats_the_mean_on_new_rows(alone):
  own, about = known()
  codes = {name: own[name].encode(x) for name, x in rows(SITES, seed=1).items()}
  for (source, target), params in zip(ROUTES, alone[1], strict=True):
    width, out = (own[name].config.width for name in (source, target))
    losses = [
      objective.code_losses(
        *translator.apply(some, about[source], about[target], codes[source]),
        codes[target],
        about[target],
        jnp.arange(out),
      )
      for some in (
        translator.init(jax.random.key(0), width, CONFIG["width"], out),
        params,
      )
    ]
    mean, found = losses
    assert mean["reconstruction"] == pytest.approx(1, abs=0.1)
    assert found["reconstruction"] < 0.7
    assert found["cosine"] < 0.6
    assert found["firing"] < 0.8 * mean["firing"]
    assert found["correlation"] < mean["correlation"]


def test_metrics_are_written_for_every_route(alone):
  written = loop.read_metrics(alone[0] / "metrics.jsonl")
  assert [row["step"] for row in written] == [50, 100, 150, 200]
  first, *_, last = (row["members"] for row in written)
  assert set(last) == {"loss", *objective.TERMS}
  for i in range(len(ROUTES)):
    assert last["loss"][i] < first["loss"][i]
    terms = sum(last[name][i] for name in objective.TERMS)
    assert last["loss"][i] == pytest.approx(terms, rel=1e-5)


def test_a_training_that_broke_off_ends_bit_for_bit_as_one_left_alone(
  store, alone, one_device, tmp_path, monkeypatch
):
  with monkeypatch.context() as patch:
    interrupt(patch, at=130)
    with pytest.raises(InterruptedError):
      run(store, tmp_path, one_device)
  assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["100"]
  assert_same(run(store, tmp_path, one_device), alone[1], rtol=0)
  found, expected = (
    [(row["step"], row["members"]) for row in loop.read_metrics(path)]
    for path in (tmp_path / "metrics.jsonl", alone[0] / "metrics.jsonl")
  )
  assert found == expected


def test_a_finished_training_is_restored(store, alone, one_device, monkeypatch):
  workdir, params = alone
  log = (workdir / "metrics.jsonl").read_text()
  interrupt(monkeypatch, at=0)
  assert_same(run(store, workdir, one_device), params, rtol=0)
  assert (workdir / "metrics.jsonl").read_text() == log


def test_a_mesh_gives_the_parameters_of_one_device(store, one_device, tmp_path):
  one, many = (
    run(store, tmp_path / str(mesh.size), mesh, routes=((A, C),), steps=6)
    for mesh in (one_device, models.make_mesh({"data": 8}))
  )
  assert_same(many, one, rtol=1e-4, atol=1e-5)


def test_a_route_that_diverges_stays_and_the_others_go_on(
  alone, one_device, tmp_path
):
  arrays = rows(SITES)
  arrays[C][::1_000] = 1e30
  store = write(tmp_path / "store", arrays)
  trained = run(store, tmp_path / "run", one_device, routes=((A, B), (A, C)))
  assert_same(trained[0], alone[1][0], rtol=1e-3, atol=1e-4)
  last = loop.read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["members"]
  assert np.isfinite(last["loss"][0])
  assert not np.isfinite(last["loss"][1])
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(trained[1]))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"steps": 0}, "steps of 1 or more, got 0"),
    ({"batch_size": 0}, "batch_size of 1 or more, got 0"),
    ({"batch_size": 4_096}, "at most the 2048 rows"),
    ({"learning_rate": 0.0}, "learning_rate above 0"),
    ({"width": 0}, "width of 1 or more"),
    ({"dropout": 1.0}, "dropout of 0 to below 1"),
    ({"sampled": 25}, "sampled of 2 to the 24 latents of b:blocks.1"),
    ({"weights": {"mse": 1.0}}, "weights of 0 or more for some of"),
    ({"weights": {"cosine": 0.0}}, "weights of 0 or more for some of"),
    ({"weight": {}}, "did you mean weights"),
    ({"routes": ()}, "got 0 routes"),
    ({"routes": ((A, site("b", 9)),)}, "none for b:blocks.9.resid_post"),
  ],
)
def test_what_does_not_fit_is_refused(
  changes, message, store, one_device, tmp_path
):
  with pytest.raises(ValueError, match=message):
    run(store, tmp_path, one_device, **changes)
  assert not (tmp_path / "config.json").exists()


def test_stores_and_dictionaries_that_do_not_fit_are_refused(
  store, one_device, tmp_path
):
  def attempt(store, dictionaries, about=None, mesh=one_device, **changes):
    train(
      CONFIG | changes,
      [(A, B)],
      [store],
      dictionaries,
      about or known()[1],
      tmp_path / "run",
      mesh=mesh,
      seed=0,
    )

  own = known()[0]
  short = write(tmp_path / "short", {A: rows([A])[A]})
  with pytest.raises(ValueError, match=f"expected {B} in the store"):
    attempt(short, own)
  with pytest.raises(ValueError, match="reads 10 dims, got one of 12"):
    attempt(store, own | {B: own[A]}, known()[1] | {B: known()[1][A]})
  with pytest.raises(ValueError, match="'data' divides"):
    attempt(store, own, mesh=models.make_mesh({"data": 8}), batch_size=100)


def test_a_workdir_of_other_dictionaries_is_refused(store, alone, one_device):
  own, about = known()
  own = own | {A: dictionary(rows([A])[A], 32, seed=1)}
  with pytest.raises(ValueError, match="made by another config:\n  given"):
    train(
      CONFIG,
      ROUTES,
      [store] * len(ROUTES),
      own,
      about,
      alone[0],
      mesh=one_device,
      seed=0,
    )
