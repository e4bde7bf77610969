"""From the coordinates of training to raw activations: nothing changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.dictionaries import core, dictionary
from gemma_jax.dictionaries.config import ACTIVATIONS, SELECTING
from gemma_jax.dictionaries.presets import PRESETS, preset
from tests.dictionaries import cases
from tests.dictionaries.cases import B, E, M, f64

pytestmark = pytest.mark.usefixtures("quick_compiles")

THRESHOLD = 0.4
ALL = [(name, a) for name, recipes in PRESETS.items() for a in recipes]


def trained(cfg, recipe, p, norm, raw):
  """What training sees of raw rows, in float64, and which rows are clear.

  Returns:
    Activations [B, M], reconstructions [B, E] in raw coordinates, and rows
    [B] in which rounding decides nothing.
  """
  mean, std = 0.0, 1.0
  if cfg.layer_norm:
    mean = raw.mean(1, keepdims=True)
    std = raw.std(1, keepdims=True, ddof=1)
    raw = (raw - mean) / (std + 1e-5)
  x = (raw - norm.x_mean) @ norm.x_map
  b_in = p["b_dec"] if recipe.subtract_b_dec and not cfg.is_transcoder else 0
  pi = (x - b_in) @ p["W_enc"]
  z = pi + p["b_enc"]
  norms = np.linalg.norm(p["W_dec"], axis=1)
  ranked = z * norms if recipe.rank_by_norm else z
  cut = 0.0
  if cfg.activation == "topk":
    order = np.sort(ranked, axis=1)
    cut = order[:, -4:-2].mean(1, keepdims=True)
  elif cfg.activation == "batchtopk":
    cut = THRESHOLD
  elif cfg.activation == "jumprelu":
    cut = np.exp(p["threshold"]) if recipe.log_threshold else p["threshold"]
  magnitude = z
  if cfg.activation == "gated":
    magnitude = np.exp(p["r_mag"]) * pi + p["b_mag"]
  active = (ranked > cut) & (z > 0) & (magnitude > 0)
  acts = np.where(active, magnitude, 0)
  rec = cases.recs(cfg, p, x, acts)[-1]
  rec = (rec * norm.y_scale + norm.y_mean) * std + mean
  near = [np.abs(ranked - cut), np.abs(z), np.abs(magnitude)]
  return acts, rec, (np.min(near, axis=0) > 2e-4).all(1)


def check(cfg, recipe, norm, seed=0, *, unit=None):
  """Folded, the dictionary is active where it was, and says the same."""
  params, batch = cases.make_params(cfg, seed), cases.make_batch(cfg, seed)
  if recipe.log_threshold:
    params["threshold"] = jnp.log(params["threshold"])
  if recipe.decoder != "free":
    params = core.constrain(recipe, params)
  acts, rec, clear = trained(
    cfg, recipe, f64(params), f64(norm), f64(batch["x"])
  )
  assert clear.sum() > B / 2
  active = acts[clear] > 0
  assert 0 < active.sum() < active.size
  threshold = THRESHOLD if cfg.activation == "batchtopk" else None
  folded = core.fold(cfg, recipe, params, norm, threshold)
  assert {name: x.shape for name, x in folded.items()} == cfg.shapes()
  assert all(x.dtype == np.float32 for x in folded.values())
  d = dictionary.Dictionary(cfg, jax.tree.map(jnp.asarray, folded))
  got = np.asarray(d.encode(batch["x"]))[clear]
  np.testing.assert_array_equal(got > 0, active)
  size = np.abs(rec[clear]).max()
  np.testing.assert_allclose(
    np.asarray(d.reconstruct(batch["x"]))[clear], rec[clear], atol=1e-5 * size
  )
  rows = np.linalg.norm(folded["W_dec"], axis=1)
  if unit is None:
    unit = cfg.activation != "topk"
  if unit:
    np.testing.assert_allclose(rows, 1, rtol=1e-5)
    # Activations are in raw units: norms of what the latents write.
    raw = np.linalg.norm(f64(params["W_dec"]) * f64(norm.y_scale), axis=1)
    size = np.abs(acts[clear] * raw).max()
    np.testing.assert_allclose(got, acts[clear] * raw, atol=1e-4 * size)
  return rows


@pytest.mark.parametrize(("name", "activation"), ALL)
def test_folding_changes_neither_what_is_active_nor_what_comes_out(
  name, activation
):
  recipe = preset(name, activation)
  transcoder = "transcoder" in name
  make = cases.make_config if transcoder else cases.make_sae
  cfg = make(activation, skip=transcoder, layer_norm=recipe.layer_norm)
  for seed in range(3):
    check(cfg, recipe, cases.make_norm(cfg, seed), seed)


@pytest.mark.parametrize(
  ("activation", "by_norm"),
  [(a, False) for a in ACTIVATIONS] + [(a, True) for a in SELECTING],
)
def test_it_does_not_with_a_scale_for_every_dim_and_a_skip(activation, by_norm):
  cfg = cases.make_config(activation, skip=True)
  recipe = cases.make_recipe(rank_by_norm=by_norm)
  for seed in range(3):
    norm = cases.make_norm(cfg, seed, scales=E)
    rows = check(cfg, recipe, norm, seed)
    if activation == "topk":  # on whose ranking it depends
      assert np.ptp(rows) > 0.1


@pytest.mark.parametrize("case", ["by_norm", "unit"])
def test_topk_gets_unit_rows_where_that_keeps_its_ranking(case):
  cfg = cases.make_config("topk")
  recipe = cases.make_recipe(
    rank_by_norm=case == "by_norm",
    decoder="unit_after_step" if case == "unit" else "free",
  )
  check(cfg, recipe, cases.make_norm(cfg), unit=True)


def test_folding_a_latent_that_writes_nothing_stays_finite():
  norm = cases.make_norm(cases.make_config())
  for activation in ACTIVATIONS:
    for by_norm in (False, True):
      cfg = cases.make_config(activation)
      params, batch = cases.make_params(cfg), cases.make_batch(cfg)
      params["W_dec"] = params["W_dec"].at[3].set(0)
      recipe = cases.make_recipe(rank_by_norm=by_norm)
      folded = core.fold(cfg, recipe, params, norm, THRESHOLD)
      assert all(np.isfinite(x).all() for x in folded.values())
      d = dictionary.Dictionary(cfg, jax.tree.map(jnp.asarray, folded))
      assert np.isfinite(d.reconstruct(batch["x"])).all()


@pytest.mark.parametrize("by_norm", [False, True])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_a_calibrated_threshold_gives_k_latents_on_average(layer_norm, by_norm):
  cfg = cases.make_sae(k=4.5, layer_norm=layer_norm)
  recipe = cases.make_recipe(rank_by_norm=by_norm, subtract_b_dec=True)
  params, batch = cases.make_params(cfg), cases.make_batch(cfg)
  norm = cases.make_norm(cfg)
  threshold = core.calibrate(cfg, recipe, params, norm, batch["x"], 4.5)
  folded = core.fold(cfg, recipe, params, norm, threshold)
  d = dictionary.Dictionary(cfg, jax.tree.map(jnp.asarray, folded))
  assert int((np.asarray(d.encode(batch["x"])) > 0).sum()) == 4.5 * B


def test_calibration_cannot_make_more_fire_than_are_positive():
  cfg = cases.make_config(k=20)
  params, batch = cases.make_params(cfg), cases.make_batch(cfg)
  norm = cases.identity(cfg)
  z = f64(batch["x"]) @ f64(params["W_enc"]) + f64(params["b_enc"])
  assert (z > 0).sum() < 20 * B < M * B
  recipe = cases.make_recipe()
  threshold = core.calibrate(cfg, recipe, params, norm, batch["x"], 20)
  assert 0 <= float(threshold) < z[z > 0].min()
