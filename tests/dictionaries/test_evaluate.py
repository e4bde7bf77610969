"""Held-out numbers against NumPy on a store that fits in the hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import machine, models
from gemma_jax.activations import ActivationStore, Writer
from gemma_jax.activations.store import LABELS
from gemma_jax.dictionaries import Dictionary, DictionaryConfig, linear
from gemma_jax.dictionaries.evaluate import (
  DEFINITIONS,
  evaluate,
  fitting_rows,
)

READ, WRITE = "blocks.1.mlp_in", "blocks.1.mlp_out"
D, E, M, N, TOP = 6, 5, 16, 300, 8


def make_store(path, x, y):
  rows = {READ: x, WRITE: y}
  rows |= dict.fromkeys(LABELS, np.arange(len(x), dtype=np.int32))
  rows["source"] = np.zeros(len(x), np.int32)
  sites = {READ: D, WRITE: E}
  with Writer(path, sites=sites, dtype="float32", metadata={}) as writer:
    writer.append(rows)
  return ActivationStore.open(path)


def make_dictionary():
  """Latent 0 never fires, latent 1 on every token, latent 2 rarely."""
  cfg = DictionaryConfig(
    d_in=D,
    d_out=E,
    width=M,
    activation="batchtopk",
    k=4,
    prefix_widths=(4, 8, M),
    skip=True,
    read=READ,
    write=WRITE,
  )
  rng = np.random.default_rng(0)
  params = {
    name: rng.normal(size=shape) * 0.4 for name, shape in cfg.shapes().items()
  }
  params["threshold"] = np.full(M, 0.5)
  params["b_enc"][:2] = -100, 100
  params["b_enc"][2] = -2
  params["W_dec"][1] *= 1e-3
  return Dictionary(
    cfg, {name: jnp.asarray(a, jnp.float32) for name, a in params.items()}
  )


def fvu(y, rec):
  y = y.astype(np.float64)
  return np.sum((y - rec) ** 2) / np.sum((y - y.mean(0)) ** 2)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
  """Everything about one evaluation, and what NumPy makes of it."""
  rng = np.random.default_rng(3)
  d = make_dictionary()
  p = {name: np.asarray(a, np.float64) for name, a in d.params.items()}
  x = rng.normal(size=(N, D)).astype(np.float32)
  z = x @ p["W_enc"] + p["b_enc"]
  acts = np.where(z >= 0.5, z, 0)
  affine = x @ p["W_skip"] + p["b_dec"]
  recs = {
    w: acts[:, :w] @ p["W_dec"][:w] + affine for w in d.config.prefix_widths
  }
  y = (recs[M] + 0.3 * rng.normal(size=(N, E))).astype(np.float32)
  store = make_store(tmp_path_factory.mktemp("eval") / "s", x, y)
  ridge = linear.Ridge(
    rng.normal(size=(D, E)).astype(np.float32),
    rng.normal(size=E).astype(np.float32),
    0.0,
  )
  train_mean = y.mean(0) + 0.1
  got = evaluate(d, store, ridge, train_mean, batch_size=64, top=TOP)
  return {
    "got": got,
    "args": (d, store, ridge, train_mean),
    "x": x,
    "y": y,
    "p": p,
    "acts": acts,
    "recs": recs,
  }


def test_fvu_of_all_prefixes_is_over_all_tokens_about_their_mean(case):
  numbers, _, _ = case["got"]
  expected = {str(w): fvu(case["y"], rec) for w, rec in case["recs"].items()}
  assert list(numbers["fvu_prefixes"]) == ["4", "8", "16"]
  for width, value in expected.items():
    assert numbers["fvu_prefixes"][width] == pytest.approx(value, rel=1e-4)
  values = list(expected.values())
  assert numbers["fvu"] == pytest.approx(values[-1], rel=1e-4)
  assert numbers["fvu_min"] == pytest.approx(min(values), rel=1e-4)
  assert numbers["fvu_max"] == pytest.approx(max(values), rel=1e-4)
  assert numbers["fvu_mean_prefixes"] == pytest.approx(
    np.mean(values), rel=1e-4
  )


def test_baselines_are_the_ridge_the_means_and_a_shuffle(case):
  numbers, _, _ = case["got"]
  _, _, ridge, train_mean = case["args"]
  x, y = case["x"], case["y"]
  linear_rec = x.astype(np.float64) @ ridge.linear + ridge.bias
  assert numbers["fvu_linear"] == pytest.approx(fvu(y, linear_rec), rel=1e-5)
  assert abs(numbers["fvu_mean"] - 1) < 1e-6
  assert numbers["fvu_train_mean"] == pytest.approx(
    fvu(y, train_mean), rel=1e-5
  )
  assert numbers["fvu_train_mean"] > 1
  # Independent of the target: the variances of both, over one of them.
  rec = case["recs"][M]
  expected = 1 + rec.var(0).sum() / y.var(0).sum()
  assert numbers["fvu_shuffled"] == pytest.approx(expected, rel=0.1)


def test_l0_and_dead_latents_are_counts(case):
  numbers, latents, _ = case["got"]
  fired = case["acts"] > 0
  assert numbers["l0"] == pytest.approx(fired.sum() / N)
  assert numbers["dead_fraction"] == (fired.sum(0) == 0).mean()
  assert numbers["dead_fraction"] > 0
  assert latents.tokens == N
  np.testing.assert_allclose(latents.density, fired.mean(0))
  assert latents.density[1] == 1


def test_latent_statistics_are_over_the_tokens_they_fire_on(case):
  _, latents, _ = case["got"]
  acts = case["acts"]
  fired = acts > 0
  mean = [
    a[f].mean() if f.any() else 0 for a, f in zip(acts.T, fired.T, strict=True)
  ]
  np.testing.assert_allclose(latents.mean_activation, mean, rtol=1e-4)
  np.testing.assert_allclose(latents.max_activation, acts.max(0), rtol=1e-4)
  squares = (acts**2).sum(0) * (case["p"]["W_dec"] ** 2).sum(1)
  np.testing.assert_allclose(latents.energy, squares, rtol=1e-4)


def test_top_rows_are_the_largest_activations_in_order(case):
  _, latents, _ = case["got"]
  rare = 0
  for m, acts in enumerate(case["acts"].T):
    order = np.argsort(-acts)[:TOP]
    order = np.where(acts[order] > 0, order, -1)
    rare += (order < 0).any()
    np.testing.assert_array_equal(latents.top_rows[m], order)
    np.testing.assert_allclose(
      latents.top_activations[m], np.sort(acts)[::-1][:TOP], rtol=1e-4
    )
  assert rare


def test_norms_have_one_value_for_each_token(case):
  _, _, norms = case["got"]
  rec = case["recs"][M]
  for name, a in (
    ("input", case["x"]),
    ("target", case["y"]),
    ("reconstruction", rec),
    ("error", case["y"] - rec),
  ):
    np.testing.assert_allclose(
      norms[name], np.linalg.norm(a, axis=1), rtol=1e-3
    )


def test_every_number_has_its_definition(case):
  assert set(case["got"][0]) == set(DEFINITIONS)


@pytest.mark.parametrize("batch_size", [1, 7, N, 10_000])
def test_the_size_of_the_batches_changes_no_number(case, batch_size):
  numbers, latents, _ = evaluate(*case["args"], batch_size=batch_size, top=TOP)
  # Dealt within batches, and those that are about batches by definition.
  depend = {"fvu_shuffled", "fvu_batch", "ev_legacy", "relative_bias"}
  depend.add("batch_size")
  for name, value in case["got"][0].items():
    if name in ("l0_percentiles", "density_histogram"):
      assert numbers[name] == value
    elif name not in depend:
      assert numbers[name] == pytest.approx(value, rel=1e-5), name
  np.testing.assert_array_equal(latents.top_rows, case["got"][1].top_rows)


def test_more_contexts_than_tokens_are_filled_with_minus_one(case):
  _, latents, _ = evaluate(*case["args"], batch_size=128, top=N + 50)
  assert latents.top_rows.shape == (M, N + 50)
  assert (latents.top_rows[1] >= 0).sum() == N
  assert (latents.top_rows[0] == -1).all()


@pytest.mark.parametrize("batch_size", [64, None])
def test_all_devices_give_the_numbers_of_one(case, batch_size):
  mesh = models.make_mesh({"data": 8})
  numbers, latents, _ = evaluate(
    *case["args"], batch_size=batch_size, top=TOP, mesh=mesh
  )
  one, alone, _ = case["got"]
  for name in ("fvu", "l0", "dead_fraction", "nmse0", "decoder_coherence"):
    assert numbers[name] == pytest.approx(one[name], rel=1e-5)
  assert numbers["fvu_prefixes"] == pytest.approx(one["fvu_prefixes"], rel=1e-5)
  np.testing.assert_array_equal(latents.top_rows, alone.top_rows)


def test_the_batch_that_fits_shrinks_with_the_memory(case, monkeypatch):
  found = []
  for free in (1e9, 3e5):
    monkeypatch.setattr(machine, "device_memory", lambda free=free: (1, free))
    found.append(fitting_rows(case["args"][0]))
  assert found[0] == 2048
  assert 0 < found[1] < 2048
  monkeypatch.setattr(machine, "device_memory", lambda: (1, 100))
  with pytest.raises(MemoryError, match="M = 16 needs"):
    fitting_rows(case["args"][0])


def test_the_interval_is_over_documents_and_holds_the_number(case):
  low, high = case["got"][0]["fvu_interval"]
  assert low < case["got"][0]["fvu"] < high
