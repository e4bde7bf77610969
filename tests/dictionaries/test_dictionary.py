"""A dictionary in use and on disk: what was saved comes back, or why not."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import dictionaries, models
from gemma_jax.dictionaries import Dictionary, DictionaryConfig, prefix_widths
from gemma_jax.dictionaries.config import ACTIVATIONS
from gemma_jax.dictionaries.dictionary import reconstruct_prefixes

pytestmark = pytest.mark.usefixtures("quick_compiles")

D, E, M = 5, 4, 12


def make_dictionary(activation="batchtopk", skip=True, **changes):
  fields = {
    "d_in": D,
    "d_out": E,
    "width": M,
    "activation": activation,
    "k": 2,
    "prefix_widths": (3, M),
    "skip": skip,
    "read": "blocks.1.mlp_in",
    "write": "blocks.1.mlp_out",
    "model": "tiny",
  }
  cfg = DictionaryConfig(**(fields | changes))
  rng = np.random.default_rng(0)
  params = {
    name: jnp.asarray(rng.normal(size=shape), jnp.float32)
    for name, shape in cfg.shapes().items()
  }
  return Dictionary(cfg, params, {"format": "made", "metadata": {"seed": 0}})


def make_sae(activation, **changes):
  site = "blocks.1.resid_post"
  return make_dictionary(activation, d_out=D, read=site, write=site, **changes)


def inputs(*shape):
  return np.random.default_rng(1).normal(size=(*shape, D)).astype(np.float32)


@pytest.fixture
def saved(tmp_path):
  make_dictionary().save(tmp_path)
  return tmp_path


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_saved_dictionary_comes_back_whole(activation, skip, tmp_path):
  d = make_dictionary(activation, skip)
  d.save(tmp_path / "d")
  again = dictionaries.load(tmp_path / "d")
  assert again.config == d.config
  assert again.provenance == d.provenance
  assert set(again.params) == set(d.params) == set(d.config.shapes())
  for name, x in d.params.items():
    np.testing.assert_array_equal(again.params[name], x)


def test_a_workdir_is_searched_for_its_dictionary(tmp_path):
  d = make_dictionary()
  d.save(tmp_path / "dictionary")
  (tmp_path / "checkpoints").mkdir()
  assert dictionaries.load(tmp_path).config == d.config


def test_either_file_of_ours_may_be_named(saved):
  for name in ("dictionary.json", "dictionary.safetensors"):
    assert dictionaries.load(saved / name).config == make_dictionary().config


def test_a_site_replaces_the_saved_one(saved):
  d = dictionaries.load(saved, site=("blocks.2.mlp_norm", "blocks.2.mlp_raw"))
  assert (d.config.read, d.config.write) == (
    "blocks.2.mlp_norm",
    "blocks.2.mlp_raw",
  )


def activations(d, x):
  """Latents of a folded dictionary, from the definitions, in float64."""
  p = {name: np.asarray(a, np.float64) for name, a in d.params.items()}
  pi = x @ p["W_enc"]
  z = pi + p["b_enc"]
  if d.config.activation == "topk":
    cut = np.sort(z, axis=1)[:, -2:-1]
    return np.where((z >= cut) & (z > 0), z, 0)
  if d.config.activation == "gated":
    return np.where(
      z > 0, np.maximum(np.exp(p["r_mag"]) * pi + p["b_mag"], 0), 0
    )
  return np.where(z > p.get("threshold", 0), np.maximum(z, 0), 0)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_outputs_are_those_of_the_formula(activation, skip):
  d = make_dictionary(activation, skip)
  p = {name: np.asarray(a, np.float64) for name, a in d.params.items()}
  x = inputs(50)
  acts = activations(d, x)
  assert 0.02 < (acts > 0).mean() < 0.9
  expected = acts @ p["W_dec"] + p["b_dec"]
  np.testing.assert_allclose(d.encode(x), acts, atol=1e-5)
  np.testing.assert_allclose(d.decode(acts), expected, atol=1e-4)
  expected += x @ p["W_skip"] if skip else 0
  np.testing.assert_allclose(d.reconstruct(x), expected, atol=1e-4)


@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_layer_norm_is_turned_back_on_the_way_out(activation):
  d = make_sae(activation, skip=False, layer_norm=True)
  p = {name: np.asarray(a, np.float64) for name, a in d.params.items()}
  x = 3 * inputs(50) + 2
  mean, std = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True)
  acts = activations(d, (x - mean) / (std + 1e-5))
  expected = (acts @ p["W_dec"] + p["b_dec"]) * std + mean
  np.testing.assert_allclose(d.encode(x), acts, atol=1e-5)
  np.testing.assert_allclose(d.reconstruct(x), expected, atol=1e-4)
  # As it is in the original: no scale or shift of a token changes a latent.
  np.testing.assert_allclose(d.encode(7 * x - 1), acts, atol=1e-4)


def test_layer_norm_holds_for_every_prefix():
  d = make_sae("relu", skip=False, layer_norm=True)
  x = 3 * inputs(20) + 2
  acts, recs = reconstruct_prefixes(d.config, d.params, x)
  np.testing.assert_allclose(acts, d.encode(x), atol=1e-6)
  np.testing.assert_allclose(recs[-1], d.reconstruct(x), atol=1e-5)
  first = acts.at[:, 3:].set(0)
  mean, std = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True)
  np.testing.assert_allclose(recs[0], d.decode(first) * std + mean, atol=1e-4)


def test_a_crosscoder_reads_and_writes_its_parts_joined():
  sites = "blocks.0.resid_post+blocks.1.resid_post"
  d = make_dictionary("relu", skip=False, parts=(1, 3), read=sites, write=sites)
  assert d.reconstruct(inputs(3)).shape == (3, E)


def test_leading_axes_and_dtype_of_the_input_are_kept():
  d = make_dictionary("topk")
  x = inputs(2, 3)
  rec = d.reconstruct(x)
  assert d.encode(x).shape == (2, 3, M)
  assert rec.shape == (2, 3, E)
  np.testing.assert_allclose(
    rec.reshape(6, E), d.reconstruct(x.reshape(6, D)), atol=1e-5
  )
  half = d.reconstruct(jnp.asarray(x, jnp.bfloat16))
  assert half.dtype == jnp.bfloat16
  full = d.reconstruct(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))
  np.testing.assert_array_equal(half, full.astype(jnp.bfloat16))


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_a_token_is_encoded_alone_as_in_company(activation):
  d = make_dictionary(activation)
  x = inputs(9)
  alone = np.concatenate([d.encode(row[None]) for row in x])
  np.testing.assert_allclose(d.encode(x), alone, atol=1e-5)
  np.testing.assert_allclose(d.encode(x[0]), alone[0], atol=1e-5)


def test_a_directory_without_a_dictionary_says_what_to_pass(tmp_path):
  with pytest.raises(FileNotFoundError, match="workdir whose training has fin"):
    dictionaries.load(tmp_path)
  with pytest.raises(FileNotFoundError, match="nothing does not exist"):
    dictionaries.load(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["dictionary.safetensors", "dictionary.json"])
def test_a_missing_file_is_named(name, saved):
  (saved / name).unlink()
  with pytest.raises(FileNotFoundError, match=f"no {name}") as error:
    dictionaries.load(saved)
  assert str(saved) in str(error.value)


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_truncated_weights_file_says_so(kept, saved):
  path = saved / "dictionary.safetensors"
  path.write_bytes(path.read_bytes()[:kept])
  with pytest.raises(ValueError, match="not a complete safetensors file"):
    dictionaries.load(saved)


def rewrite(saved, **changes):
  path = saved / "dictionary.json"
  fields = json.loads(path.read_text()) | changes
  path.write_text(
    json.dumps({k: v for k, v in fields.items() if v is not None})
  )


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"prefix_width": [12]}, "'prefix_width'. Did you mean 'prefix_widths'"),
    ({"colour": 3}, "no field 'colour'"),
    ({"k": None, "width": None}, "needs width, k"),
    ({"activation": "elu"}, "expected one of relu, gated, topk"),
    ({"d_in": D + 1}, r"(?s)'W_enc': \(5, 12\).*says.*'W_enc': \(6, 12\)"),
    ({"skip": False}, r"(?s)holds .*W_skip"),
    ({"activation": "topk"}, r"(?s)holds .*threshold"),
    ({"prefix_widths": [3, 9]}, "end at the width, 12"),
    ({"provenance": 3}, "provenance must be dict; got 3"),
  ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(changes, message, saved):
  rewrite(saved, **changes)
  with pytest.raises(ValueError, match=message) as error:
    dictionaries.load(saved)
  assert str(saved) in str(error.value)


@pytest.mark.parametrize("contents", ["", "{", "[]", "3", "[" * 100_000])
def test_a_damaged_config_names_its_file(contents, saved):
  (saved / "dictionary.json").write_text(contents)
  with pytest.raises(ValueError, match=r"dictionary\.json"):
    dictionaries.load(saved)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
  d = make_dictionary()
  broken = {**d.params, "b_enc": d.params["b_enc"].at[3].set(value)}
  Dictionary(d.config, broken).save(tmp_path)
  with pytest.raises(ValueError, match="b_enc holds 1 values that are not fin"):
    dictionaries.load(tmp_path)


def test_a_latent_may_be_switched_off_by_its_threshold(tmp_path):
  d = make_dictionary("jumprelu")
  off = {**d.params, "threshold": d.params["threshold"].at[3].set(np.inf)}
  Dictionary(d.config, off).save(tmp_path)
  assert not np.asarray(dictionaries.load(tmp_path).encode(inputs(9)))[
    :, 3
  ].any()


def test_an_unknown_format_is_refused(tmp_path):
  with pytest.raises(ValueError, match="Format 'npz' is unknown; expected one"):
    make_dictionary().save(tmp_path, format="npz")
  with pytest.raises(ValueError, match="Unknown format 'npz'; expected one of"):
    dictionaries.load(tmp_path, format="npz")


def test_nested_widths_come_from_any_way_of_giving_them():
  assert prefix_widths(12) == (12,)
  assert prefix_widths(12, prefix_widths=[3, 6, 12]) == (3, 6, 12)
  assert prefix_widths(12, group_sizes=[3, 3, 6]) == (3, 6, 12)
  assert prefix_widths(12, group_fractions=[0.3, 0.7]) == (3, 12)
  assert prefix_widths(12, prefix_widths=[], group_sizes=()) == (12,)


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (
      {"prefix_widths": [6, 12], "group_sizes": [6, 6]},
      "Give one of prefix_widths and group_sizes, not both",
    ),
    ({"group_sizes": [3, 6, 12]}, "add up to 21.*under prefix_widths"),
    ({"group_sizes": [0, 12]}, "must be positive"),
    ({"group_fractions": [0.5, 0.6]}, "add up to 1"),
    ({"prefix_widths": [3, 3, 6]}, "under group_sizes"),
    ({"prefix_widths": [3, 6]}, "end at the width, 12.*under group_sizes"),
  ],
)
def test_sizes_taken_for_widths_and_the_reverse_are_told_apart(given, message):
  with pytest.raises(ValueError, match=f"(?s){message}"):
    prefix_widths(12, **given)


def test_a_dictionary_can_be_sharded_over_its_latents():
  d = make_dictionary()
  mesh = models.make_mesh({"fsdp": 4}, jax.devices()[:4])
  spec = jax.sharding.PartitionSpec
  where = {"W_enc": spec(None, "fsdp"), "W_dec": spec("fsdp")}
  params = {
    name: jax.device_put(
      x, jax.sharding.NamedSharding(mesh, where.get(name, spec()))
    )
    for name, x in d.params.items()
  }
  x = inputs(6)
  got = Dictionary(d.config, params).reconstruct(x)
  np.testing.assert_allclose(got, d.reconstruct(x), atol=1e-5)
