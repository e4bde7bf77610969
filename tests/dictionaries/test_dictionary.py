"""A dictionary on disk: what was saved comes back, or a reason why not."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import dictionaries, models
from gemma_jax.dictionaries import Dictionary, DictionaryConfig, prefix_widths

D, E, M = 5, 4, 12


def make_dictionary(activation="batchtopk", skip=True):
  cfg = DictionaryConfig(
    d_in=D,
    d_out=E,
    width=M,
    activation=activation,
    k=2,
    prefix_widths=(3, M),
    skip=skip,
    read="blocks.1.mlp_in",
    write="blocks.1.mlp_out",
    model="tiny",
  )
  rng = np.random.default_rng(0)
  shapes = cfg.shapes()
  if activation == "batchtopk":
    shapes["threshold"] = (M,)
  params = {
    name: jnp.asarray(rng.normal(size=shape), jnp.float32)
    for name, shape in shapes.items()
  }
  return Dictionary(cfg, params)


def inputs(*shape):
  return np.random.default_rng(1).normal(size=(*shape, D)).astype(np.float32)


@pytest.fixture
def saved(tmp_path):
  make_dictionary().save(tmp_path)
  return tmp_path


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_a_saved_dictionary_gives_the_same_outputs(activation, skip, tmp_path):
  d = make_dictionary(activation, skip)
  d.save(tmp_path / "d")
  again = dictionaries.load(tmp_path / "d")
  assert again.config == d.config
  assert set(again.params) == set(d.params)
  x = inputs(30)
  np.testing.assert_array_equal(again.encode(x), d.encode(x))
  np.testing.assert_array_equal(again.reconstruct(x), d.reconstruct(x))


def test_a_workdir_is_searched_for_its_dictionary(tmp_path):
  d = make_dictionary()
  d.save(tmp_path / "dictionary")
  assert dictionaries.load(tmp_path).config == d.config


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_outputs_are_those_of_the_formula(activation, skip):
  d = make_dictionary(activation, skip)
  p = {name: np.asarray(a, np.float64) for name, a in d.params.items()}
  x = inputs(50)
  z = x @ p["W_enc"] + p["b_enc"]
  cut = np.sort(z, axis=1)[:, -2:-1] if activation == "topk" else p["threshold"]
  acts = np.where((z >= cut) & (z > 0), z, 0)
  expected = acts @ p["W_dec"] + p["b_dec"]
  np.testing.assert_allclose(d.encode(x), acts, atol=1e-5)
  np.testing.assert_allclose(d.decode(acts), expected, atol=1e-4)
  expected += x @ p["W_skip"] if skip else 0
  np.testing.assert_allclose(d.reconstruct(x), expected, atol=1e-4)


def test_leading_axes_and_dtype_of_the_input_are_kept():
  d = make_dictionary()
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


def test_a_missing_weights_file_is_named(saved):
  (saved / "dictionary.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match=r"no dictionary\.safetensors"):
    dictionaries.load(saved)


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
    ({"activation": "relu"}, "expected one of topk, batchtopk"),
    ({"d_in": D + 1}, r"(?s)'W_enc': \(5, 12\).*says.*'W_enc': \(6, 12\)"),
    ({"skip": False}, r"(?s)holds .*W_skip"),
    ({"activation": "topk"}, r"(?s)holds .*threshold"),
    ({"prefix_widths": [3, 9]}, "end at the width, 12"),
  ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(changes, message, saved):
  rewrite(saved, **changes)
  with pytest.raises(ValueError, match=message) as error:
    dictionaries.load(saved)
  assert str(saved) in str(error.value)


@pytest.mark.parametrize("contents", ["", "{", "[]", "3"])
def test_a_damaged_config_names_its_file(contents, saved):
  (saved / "dictionary.json").write_text(contents)
  with pytest.raises(ValueError, match=r"dictionary\.json"):
    dictionaries.load(saved)


def test_an_unknown_format_is_refused(tmp_path):
  with pytest.raises(ValueError, match="Unknown format 'npz'"):
    make_dictionary().save(tmp_path, format="npz")
  with pytest.raises(ValueError, match="Unknown format 'npz'"):
    dictionaries.load(tmp_path, format="npz")


def test_nested_widths_come_from_either_way_of_giving_them():
  assert prefix_widths(12) == (12,)
  assert prefix_widths(12, prefix_widths=[3, 6, 12]) == (3, 6, 12)
  assert prefix_widths(12, group_sizes=[3, 3, 6]) == (3, 6, 12)
  assert prefix_widths(12, prefix_widths=[], group_sizes=()) == (12,)


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"prefix_widths": [6, 12], "group_sizes": [6, 6]}, "Both .* are given"),
    ({"group_sizes": [3, 6, 12]}, "add up to 21.*under prefix_widths"),
    ({"group_sizes": [0, 12]}, "must be positive"),
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
