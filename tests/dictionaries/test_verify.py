"""verify: at its own site a dictionary passes; elsewhere its site is named."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import models
from gemma_jax.dictionaries import Dictionary, DictionaryConfig, WrongSiteError
from gemma_jax.dictionaries import verify as verify_lib
from gemma_jax.metrics import fvu
from gemma_jax.models.sites import NAMES, parse

pytestmark = pytest.mark.usefixtures("quick_compiles")

K = 10
LAYER = 2
EVERYTHING = tuple(f"blocks.{l}.{n}" for l in (1, 2, 3) for n in NAMES)


@pytest.fixture(scope="module")
def model(one_device):
  """A tiny Gemma 2, with gains before the MLP as uneven as real ones."""
  model = models.load_model("random:gemma2-tiny", mesh=one_device)
  blocks = dict(model.params["blocks"])
  gain = np.random.default_rng(0).lognormal(1, 1, blocks["pre_mlp_norm"].shape)
  blocks["pre_mlp_norm"] = jnp.asarray(gain, jnp.float32)
  return dataclasses.replace(model, params=model.params | {"blocks": blocks})


@pytest.fixture(scope="module")
def tokens(model):
  """Random ids, BOS first; the second row ends in padding."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(4, model.config.vocab_size, (20, 64))
  tokens[:, 0] = model.config.bos_id
  return tokens


@pytest.fixture(scope="module")
def rows(model, tokens):
  """{site: activations [n, D]} at every position but the first."""
  _, found = model.forward(tokens, capture=EVERYTHING, stop_at=LAYER + 2)
  return {
    name: np.asarray(x, np.float64)[:, 1:].reshape(-1, x.shape[-1])
    for name, x in found.items()
  }


def trained(rows, read, write=None, *, k=K):
  """Both ways along the principal axes, the k largest kept, ridge outwards."""
  write = write or read
  x = np.concatenate([rows[name] for name in read.split("+")], 1)
  y = np.concatenate([rows[name] for name in write.split("+")], 1)
  mean = x.mean(0)
  _, scales, axes = np.linalg.svd(x - mean, full_matrices=False)
  W = axes.T / scales * np.sqrt(len(x))
  W = np.concatenate([W, -W], axis=1)
  z = x @ W - mean @ W
  # Between two activations, that rounding may not move one across.
  threshold = np.sort(z, axis=None)[-k * len(x) - 1 :][:2].mean()
  acts = np.where(z >= threshold, z, 0)
  seen = np.concatenate([acts, np.ones((len(x), 1))], axis=1)
  penalty = 0.01 * len(x) * np.eye(seen.shape[1])
  out = np.linalg.solve(seen.T @ seen + penalty, seen.T @ y)
  cfg = DictionaryConfig(
    d_in=x.shape[1],
    d_out=y.shape[1],
    width=W.shape[1],
    activation="jumprelu",
    k=k,
    prefix_widths=(W.shape[1],),
    read=read,
    write=write,
    parts=tuple(rows[n].shape[1] for n in write.split("+"))
    if "+" in write
    else (),
  )
  params = {
    "W_enc": W,
    "b_enc": -mean @ W,
    "W_dec": out[:-1],
    "b_dec": out[-1],
    "threshold": np.full(W.shape[1], threshold),
  }
  return Dictionary(
    cfg, {name: jnp.asarray(x, jnp.float32) for name, x in params.items()}
  )


def at(dictionary, read, write=None, **changes):
  cfg = dataclasses.replace(
    dictionary.config, read=read, write=write or read, **changes
  )
  return Dictionary(cfg, dictionary.params)


def site(name, layer=LAYER):
  return f"blocks.{layer}.{name}"


@pytest.fixture(scope="module")
def sae(rows):
  return trained(rows, site("resid_post"))


@pytest.fixture(scope="module")
def transcoder(rows):
  return trained(rows, site("mlp_norm"), site("mlp_out"))


def test_at_its_site_it_passes_with_numbers_of_those_tokens(
  model, tokens, rows, sae
):
  got = sae.verify(model, tokens=tokens)
  x = rows[site("resid_post")]
  assert got.tokens == len(x)
  assert got.fits
  assert got.label == K
  assert got.read == got.write == site("resid_post")
  assert got.l0 == pytest.approx(
    float((np.asarray(sae.encode(x.astype(np.float32))) > 0).sum() / len(x))
  )
  rec = np.asarray(sae.reconstruct(x.astype(np.float32)))
  assert got.fvu == pytest.approx(fvu(x, rec), rel=1e-4)
  assert got.fvu < 0.5


def test_padding_bos_and_first_positions_do_not_count(model, tokens, sae):
  mask = np.ones(tokens.shape, bool)
  mask[1, 40:] = False  # padding behind
  mask[2, :7] = False  # padding before: position 7 is a row's first
  inner = tokens.copy()
  inner[3, 20] = model.config.bos_id
  got = sae.verify(model, tokens=inner, mask=mask)
  assert got.tokens == 17 * 63 + 39 + 56 + 62
  inner[1, 40:] = 5
  inner[2, :7] = 7
  again = sae.verify(model, tokens=inner, mask=mask)
  assert (again.l0, again.fvu) == (got.l0, got.fvu)


@pytest.mark.parametrize("wrong", [site("attn_out"), site("mlp_norm")])
def test_an_sae_at_a_wrong_site_is_refused_and_the_right_one_named(
  wrong, model, tokens, sae
):
  with pytest.raises(WrongSiteError) as error:
    at(sae, wrong).verify(model, tokens=tokens)
  found = error.value.found
  assert not found.fits
  best = error.value.candidates[0]
  assert (best.read, best.write) == (site("resid_post"),) * 2
  own = sae.verify(model, tokens=tokens)
  assert (best.l0, best.fvu) == pytest.approx((own.l0, own.fvu), rel=1e-3)
  message = str(error.value)
  assert message.startswith(f"{wrong}: L0 {found.l0:.3g}, FVU {found.fvu:.3g}")
  assert f"(label {K}) over {found.tokens} tokens" in message
  assert f"Load it with site={site('resid_post')!r}." in message


def test_a_gain_too_many_is_told_by_its_norm(model, tokens, transcoder):
  assert transcoder.verify(model, tokens=tokens).fits
  with pytest.raises(WrongSiteError) as error:
    at(transcoder, site("mlp_in"), site("mlp_out")).verify(model, tokens=tokens)
  best = error.value.candidates[0]
  assert (best.read, best.write) == (site("mlp_norm"), site("mlp_out"))
  assert f"site=({site('mlp_norm')!r}, {site('mlp_out')!r})" in str(error.value)


def test_a_transcoder_taken_for_an_sae_is_told(model, tokens, transcoder):
  with pytest.raises(WrongSiteError) as error:
    at(transcoder, site("mlp_out")).verify(model, tokens=tokens)
  best = error.value.candidates[0]
  assert (best.read, best.write) == (site("mlp_norm"), site("mlp_out"))


def test_the_layer_beside_is_tried(model, tokens, rows):
  deeper = trained(rows, site("attn_z", 3))
  with pytest.raises(WrongSiteError) as error:
    at(deeper, site("attn_z", 2)).verify(model, tokens=tokens)
  assert error.value.candidates[0].read == site("attn_z", 3)
  # Of the same width there is the layer before, too, and nothing else.
  tried = {c.read for c in error.value.candidates}
  assert tried == {site("attn_z", 1), site("attn_z", 3)}


@pytest.mark.parametrize("k", [K / 2.2, K * 2.2])
def test_a_label_that_is_twice_off_is_refused(k, model, tokens, sae):
  with pytest.raises(WrongSiteError, match="Or its label is wrong"):
    at(sae, site("resid_post"), k=k).verify(model, tokens=tokens)
  near = K / 1.8 if k < K else K * 1.8
  assert at(sae, site("resid_post"), k=near).verify(model, tokens=tokens).fits


def test_without_a_label_the_reconstruction_decides(model, tokens, sae):
  blind = at(sae, site("resid_post"), k=None)
  assert blind.verify(model, tokens=tokens).label is None
  worse = {**sae.params, "b_dec": sae.params["b_dec"] + 1e4}
  with pytest.raises(
    WrongSiteError, match=r"no label.* fits no neigh"
  ) as error:
    Dictionary(blind.config, worse).verify(model, tokens=tokens)
  assert error.value.found.fvu > 1


def test_a_reconstruction_that_is_not_finite_does_not_fit(model, tokens, sae):
  params = {**sae.params, "W_dec": sae.params["W_dec"] * 1e38}
  with pytest.raises(WrongSiteError, match="FVU nan"):
    Dictionary(sae.config, params).verify(model, tokens=tokens)


def test_a_crosscoder_is_measured_on_its_layers_joined(model, tokens, rows):
  sites = "+".join(site("resid_post", l) for l in (1, 2))
  d = trained(rows, sites, k=20)
  assert d.verify(model, tokens=tokens).fits
  wrong = "+".join(site("attn_out", l) for l in (1, 2))
  with pytest.raises(WrongSiteError) as error:
    at(d, wrong).verify(model, tokens=tokens)
  assert error.value.candidates[0].read == sites


def test_text_is_tokenised_and_some_is_at_hand(model, sae):
  loose = at(sae, site("resid_post"), k=None)
  some = loose.verify(model, max_tokens=150, context=64)
  assert some.tokens == 150
  short = loose.verify(model, "The cat sat on the mat, and purred.")
  assert short.tokens == len("The cat sat on the mat, and purred.")


def test_without_bos_the_first_position_is_dropped_all_the_same(model, sae):
  text = "The cat sat on the mat, and purred."
  cfg = at(sae, site("resid_post"), k=None).config
  bare = Dictionary(cfg, sae.params, {"metadata": {"prepend_bos": False}})
  assert bare.verify(model, text).tokens == len(text) - 1


def never(*args, **kwargs):
  raise AssertionError("a forward pass")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"read": "", "write": ""}, "not known what the dictionary reads"),
    (
      {"read": site("attn_z")},
      "reads vectors of width 48, and blocks.2.attn_z",
    ),
    ({"write": site("mlp_hidden")}, "gemma2 model is 96 wide"),
    ({"read": site("nothing")}, "there is no 'nothing' in a gemma2 block"),
    ({"read": site("resid_post", 99)}, "layer 99 does not exist"),
    ({"read": "blocks.*.resid_post"}, "names all layers; expected one"),
  ],
)
def test_a_site_that_cannot_be_is_refused_before_any_forward_pass(
  changes, message, model, tokens, sae, monkeypatch
):
  monkeypatch.setattr(models.Model, "forward", never)
  cfg = dataclasses.replace(sae.config, **changes)
  with pytest.raises(ValueError, match=message):
    Dictionary(cfg, sae.params).verify(model, tokens=tokens)


def test_a_model_without_a_tokenizer_needs_tokens(model, sae, monkeypatch):
  monkeypatch.setattr(models.Model, "tokenizer", None)
  fresh = dataclasses.replace(model)  # which has none cached
  with pytest.raises(ValueError, match="no tokenizer, so text cannot be used"):
    sae.verify(fresh)


@pytest.mark.parametrize("preset", ["gemma2-tiny", "neox-tiny", "gpt2-tiny"])
@pytest.mark.parametrize("write", ["resid_post", "mlp_out"])
def test_only_sites_that_the_model_has_are_tried(preset, write, sae):
  config = models.PRESETS[preset]
  model = types.SimpleNamespace(config=config, num_loaded=config.num_layers)
  for layer in (0, config.num_layers - 1):
    cfg = at(sae, site("resid_post", layer), site(write, layer)).config
    own = verify_lib._places(cfg, config)
    tried = list(verify_lib._neighbours(*own, cfg, model))
    assert own in tried
    assert len(tried) > 10
    for place in (place for places in tried for place in places):
      assert all(parse(str(s), config) == s for s in place)


@pytest.mark.parametrize(
  ("ids", "mask", "message"),
  [
    (np.arange(5), None, r"tokens must be integers \[B, T\]"),
    (np.ones((2, 3)), None, "tokens must be integers"),
    (np.ones((2, 3), int), np.ones((3, 2)), r"as tokens are, \(2, 3\)"),
  ],
)
def test_tokens_of_another_shape_are_refused(ids, mask, message, model, sae):
  with pytest.raises(ValueError, match=message):
    sae.verify(model, tokens=ids, mask=mask)


def test_nothing_but_bos_is_no_measurement(model, sae):
  tokens = np.full((2, 3), model.config.bos_id)
  with pytest.raises(ValueError, match="No tokens to measure"):
    sae.verify(model, tokens=tokens)


def test_layers_that_are_not_loaded_are_not_tried(one_device, tokens, rows):
  part = models.load_model("random:gemma2-tiny", mesh=one_device, layers=3)
  d = trained(rows, site("resid_post"))
  with pytest.raises(WrongSiteError) as error:
    at(d, site("attn_out")).verify(part, tokens=tokens)
  layers = {int(c.read.split(".")[1]) for c in error.value.candidates}
  assert layers == {1, 2}


def test_every_batch_of_rows_counts_once(model, tokens, sae, monkeypatch):
  whole = sae.verify(model, tokens=tokens)
  monkeypatch.setattr(verify_lib, "ROWS", 100)
  parts = sae.verify(model, tokens=tokens)
  assert (parts.l0, parts.tokens) == (whole.l0, whole.tokens)
  assert parts.fvu == pytest.approx(whole.fvu, rel=1e-5)
