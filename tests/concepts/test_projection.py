"""Projection against the model's own logits, SciPy, and the whole matrix."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gemma_jax import concepts, models
from gemma_jax.concepts import projection

FAMILIES = ("gemma2", "gemma3", "gpt2", "neox", "llama")
LAYER = -1


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, one_device):
  return models.load_model(f"random:{request.param}-tiny", mesh=one_device)


def materialised(model, layer, tokens=None):
  """Logits [F, V] of value vectors, in float64, by the table's formulas."""
  cfg, params = model.config, jax.device_get(model.params)
  gain = cfg.norm_offset + params["final_norm"].astype(np.float64)
  v = params["blocks"]["down"][layer].astype(np.float64)
  if "post_mlp_norm" in params["blocks"]:
    v = v * (1 + params["blocks"]["post_mlp_norm"][layer].astype(np.float64))
  if cfg.family in ("gpt2", "neox"):
    v = v - v.mean(1, keepdims=True)
  table = params["embed" if cfg.tied else "unembed"].astype(np.float64)
  logits = (gain * v) @ table.T
  return logits if tokens is None else logits[:, tokens]


def test_streamed_equals_materialised(model):
  tokens = np.random.default_rng(0).permutation(model.config.vocab_size)[:777]
  for chosen in (None, tokens):
    got = concepts.project(model, 3, top_k=20, tokens=chosen)
    logits = materialised(model, 3, chosen)
    ids = np.arange(logits.shape[1]) if chosen is None else chosen
    order = np.argsort(-logits, axis=1, kind="stable")
    scale = logits.std()
    for sign, found, values in (
      (1, got.top_tokens, got.top_logits),
      (-1, got.bottom_tokens, got.bottom_logits),
    ):
      expected = order[:, ::sign][:, :20]
      np.testing.assert_allclose(
        values,
        np.take_along_axis(logits, expected, axis=1),
        atol=2e-5 * scale,
        rtol=1e-4,
      )
      assert np.mean(found == ids[expected]) > 0.99  # but for ties
    np.testing.assert_allclose(got.mean, logits.mean(1), atol=1e-5 * scale)
    np.testing.assert_allclose(got.std, logits.std(1), rtol=1e-4)
    np.testing.assert_allclose(got.skew, stats.skew(logits, 1), atol=1e-3)
    np.testing.assert_allclose(
      got.kurtosis, stats.kurtosis(logits, 1), atol=2e-3
    )


def test_the_projection_is_the_slope_of_the_models_logits(model):
  """Numerically: coefficients are moved, logits are looked at.

  The norms' scales move with the stream too. Not so to first order, where the
  stream and the MLP's output are at right angles to what the neuron writes:
  there the slope is the projection, up to its length.
  """
  with jax.enable_x64(True):
    cfg = model.config
    params = jax.tree.map(
      lambda a: jnp.asarray(np.asarray(a, np.float64)), model.params
    )
    layer, neuron = cfg.num_layers - 1, 5
    own = jax.tree.map(lambda a: np.asarray(a[layer]), params["blocks"])
    rng = np.random.default_rng(0)
    vector, flat = own["down"][neuron], cfg.family in ("gpt2", "neox")
    raw = across(rng.normal(size=cfg.width), vector)
    bias = own.get("down_bias", 0)
    start = np.linalg.lstsq(own["down"].T, raw - bias, rcond=None)[0]
    written, out = vector, raw
    if "post_mlp_norm" in own:
      gain = 1 + own["post_mlp_norm"]
      out = gain * raw / np.sqrt(np.mean(raw**2) + cfg.norm_eps)
      written = gain * vector
    if flat:
      written = written - written.mean()
    stream = across(rng.normal(size=cfg.width), written)
    if flat:
      stream = stream - stream.mean()
    # What the residual stream must be for the MLP's output to make it that.
    site = "attn_out" if cfg.parallel_residual else "resid_mid"

    def logits(amount):
      hidden = start.copy()
      hidden[neuron] += amount

      def residual(x):
        return jnp.broadcast_to(stream - out, x.shape)

      edits = {
        f"blocks.{layer}.mlp_hidden": lambda x: jnp.broadcast_to(
          hidden, x.shape
        ),
        f"blocks.{layer}.{site}": residual,
      }
      if cfg.parallel_residual:
        edits[f"blocks.{layer}.resid_pre"] = jnp.zeros_like
      found, _ = models.forward(cfg, params, np.array([[7, 8]]), edits=edits)
      found = np.asarray(found)[0, -1]
      if cfg.final_softcap:  # keeps the order, not the slope
        found = cfg.final_softcap * np.arctanh(found / cfg.final_softcap)
      return found

    step = 1e-4
    slope = (logits(step) - logits(-step)) / (2 * step)
  expected = concepts.project(model, layer, top_k=cfg.vocab_size)
  got = np.empty(cfg.vocab_size)
  got[expected.top_tokens[neuron]] = expected.top_logits[neuron]
  cosine = got @ slope / np.linalg.norm(got) / np.linalg.norm(slope)
  assert 1 - cosine < 1e-8
  got, slope = (a / np.linalg.norm(a) for a in (got, slope))
  assert np.abs(got - slope).max() < 1e-4 * np.abs(slope).max()


def across(x, vector):
  return x - vector * (x @ vector) / (vector @ vector)


def test_without_the_gains_other_tokens_come_out(one_device):
  """The mistake that reimplementations make, and that ours would show."""
  model = models.load_model("random:gemma3-tiny", mesh=one_device)
  right = concepts.project(model, 2, top_k=20)
  table = concepts.readout(model)
  naive = projection.project_directions(
    model, table, np.asarray(model.params["blocks"]["down"][2]), top_k=20
  )
  same = [
    len({*a} & {*b}) / 20
    for a, b in zip(
      right.top_tokens.tolist(), naive.top_tokens.tolist(), strict=True
    )
  ]
  assert np.mean(same) < 0.9


def test_eight_devices_and_one_give_the_same(one_device):
  wide = models.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  found = [
    concepts.project(
      models.load_model("random:gemma3-tiny", mesh=mesh), 1, top_k=10
    )
    for mesh in (one_device, wide)
  ]
  for field in dataclasses.fields(projection.Projection):
    one, eight = (getattr(p, field.name) for p in found)
    np.testing.assert_allclose(one, eight, rtol=1e-3, atol=1e-3)


def test_a_vector_of_nothing_has_no_shape(one_device):
  model = models.load_model("random:llama-tiny", mesh=one_device)
  table = concepts.readout(model)
  rows = np.zeros((2, model.config.width), np.float32)
  rows[1, 0] = 1
  got = concepts.project_directions(model, table, rows, top_k=5)
  assert got.std[0] == got.skew[0] == got.kurtosis[0] == 0
  assert got.std[1] > 0
  assert np.isfinite(got.top_logits).all()


def test_what_cannot_be_projected_is_refused(one_device):
  model = models.load_model("random:gemma3-tiny", mesh=one_device)
  with pytest.raises(ValueError, match=r"layer=8 must be one of 0\.\.7"):
    concepts.project(model, 8)
  with pytest.raises(ValueError, match="top_k=0 must be between 1 and"):
    concepts.project(model, 0, top_k=0)
  with pytest.raises(ValueError, match="tokens run from 0 to 5000"):
    concepts.readout(model, [0, 5000])
  with pytest.raises(ValueError, match="at least two ids"):
    concepts.readout(model, [3])
  table = concepts.readout(model)
  with pytest.raises(ValueError, match=r"must be \[F, D\] with D = 48"):
    concepts.project_directions(model, table, np.zeros((2, 7)))
  rows = np.zeros((3, 48), np.float32)
  rows[1] = np.nan
  with pytest.raises(ValueError, match=r"Directions \[1\] are not finite"):
    concepts.project_directions(model, table, rows)
  part = models.load_model("random:neox-tiny", mesh=one_device, layers=2)
  with pytest.raises(ValueError, match="The head is not loaded"):
    concepts.project(part, 0)
  with pytest.raises(ValueError, match=r"0\.\.1: 2 of"):
    concepts.value_vectors(part, 2)
