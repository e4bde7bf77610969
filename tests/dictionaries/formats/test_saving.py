"""Into other libraries' formats and back; what they cannot hold is refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from gemma_jax import dictionaries
from gemma_jax.dictionaries import Dictionary, DictionaryConfig
from tests.dictionaries.formats.files import (
  D,
  E,
  K,
  M,
  inputs,
  weights,
  wide,
)
from tests.dictionaries.formats.sae_lens_files import sae_lens_formula

pytestmark = pytest.mark.usefixtures("quick_compiles")

PROVENANCE = {
  "format": "somewhere",
  "metadata": {"context_size": 77, "prepend_bos": False, "neuronpedia_id": "n"},
}


def make(activation, *, kind="sae", layer_norm=False, prefixes=(), site=None):
  """A random dictionary: an "sae", a "transcoder", or one with a "skip"."""
  read, write = "blocks.3.resid_post", "blocks.3.resid_post"
  if kind != "sae":
    read, write = "blocks.3.mlp_in", "blocks.3.mlp_out"
  cfg = DictionaryConfig(
    d_in=D,
    d_out=E if kind == "transcoder" else D,
    width=M,
    activation=activation,
    k=K,
    prefix_widths=prefixes or (M,),
    skip=kind == "skip",
    layer_norm=layer_norm,
    read=site or read,
    write=site or write,
    model="google/gemma-2-2b",
  )
  params = weights(7, **cfg.shapes())
  params = {name: jnp.asarray(x) for name, x in params.items()}
  return Dictionary(cfg, params, PROVENANCE)


SAVED = [
  ("relu", "sae", "standard"),
  ("gated", "sae", "gated"),
  ("topk", "sae", "topk"),
  ("jumprelu", "sae", "jumprelu"),
  ("batchtopk", "sae", "jumprelu"),
  ("relu", "transcoder", "transcoder"),
  ("relu", "skip", "skip_transcoder"),
  ("jumprelu", "transcoder", "jumprelu_transcoder"),
  ("batchtopk", "skip", "jumprelu_skip_transcoder"),
]


@pytest.mark.parametrize(("activation", "kind", "architecture"), SAVED)
def test_sae_lens_files_compute_the_same_by_its_formula(
  activation, kind, architecture, tmp_path
):
  d = make(activation, kind=kind)
  d.save(tmp_path, format="sae_lens")
  cfg = json.loads((tmp_path / "cfg.json").read_text())
  assert cfg["architecture"] == architecture
  w = safetensors.numpy.load_file(tmp_path / "sae_weights.safetensors")
  x = inputs()
  acts, y = sae_lens_formula(cfg, wide(w))(x)
  np.testing.assert_allclose(d.encode(x), acts, atol=2e-5)
  np.testing.assert_allclose(d.reconstruct(x), y, atol=5e-5)
  again = dictionaries.load(tmp_path)
  for name, tensor in d.params.items():
    np.testing.assert_array_equal(again.params[name], tensor)
  assert (again.config.read, again.config.write) == (
    d.config.read,
    d.config.write,
  )


def test_sae_lens_keeps_layer_norm(tmp_path):
  d = make("topk", layer_norm=True)
  d.save(tmp_path, format="sae_lens")
  again = dictionaries.load(tmp_path)
  assert again.config == d.config
  cfg = json.loads((tmp_path / "cfg.json").read_text())
  w = safetensors.numpy.load_file(tmp_path / "sae_weights.safetensors")
  x = inputs()
  _, y = sae_lens_formula(cfg, wide(w))(x)
  np.testing.assert_allclose(d.reconstruct(x), y, atol=5e-5)


@pytest.mark.parametrize(
  ("kind", "site", "hooks", "reshape"),
  [
    ("sae", None, ("blocks.3.hook_resid_post", None), "none"),
    ("sae", "blocks.3.attn_z", ("blocks.3.attn.hook_z", None), "hook_z"),
    (
      "skip",
      None,
      ("blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out"),
      "none",
    ),
  ],
)
def test_sae_lens_gets_what_it_needs_to_know(
  kind, site, hooks, reshape, tmp_path
):
  make("jumprelu", kind=kind, site=site).save(tmp_path, format="sae_lens")
  cfg = json.loads((tmp_path / "cfg.json").read_text())
  metadata = cfg["metadata"]
  assert (metadata["hook_name"], metadata.get("hook_name_out")) == hooks
  assert cfg["reshape_activations"] == reshape
  assert cfg["normalize_activations"] == "none"
  assert cfg["apply_b_dec_to_input"] is False
  assert cfg["dtype"] == "float32"
  assert metadata["model_name"] == "google/gemma-2-2b"
  assert metadata["context_size"] == 77
  assert metadata["prepend_bos"] is False
  assert metadata["sae_lens_version"].startswith("6.")


def test_a_hook_of_another_site_is_not_passed_on(tmp_path):
  d = make("jumprelu", kind="skip")
  norm = "model.layers.3.pre_feedforward_layernorm.output"
  for read, kept in (("mlp_in", norm), ("mlp_norm", None)):
    metadata = {"hf_hook_name": norm}
    config = {**vars(d.config), "read": f"blocks.3.{read}"}
    moved = Dictionary(
      DictionaryConfig(**config), d.params, {"metadata": metadata}
    )
    moved.save(tmp_path / read, format="sae_lens")
    cfg = json.loads((tmp_path / read / "cfg.json").read_text())
    assert cfg["metadata"].get("hf_hook_name") == kept


@pytest.mark.parametrize("activation", ["jumprelu", "batchtopk", "relu"])
@pytest.mark.parametrize("kind", ["sae", "transcoder"])
def test_gemma_scope_files_compute_the_same(activation, kind, tmp_path):
  d = make(activation, kind=kind)
  path = tmp_path / "layer_3" / "width_16k" / "average_l0_3"
  d.save(path, format="gemma_scope")
  with np.load(path / "params.npz", allow_pickle=False) as w:
    w = wide(w)
  assert set(w) == {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}
  x = inputs()
  z = x @ w["W_enc"] + w["b_enc"]
  acts = np.maximum(z, 0) * (z > w["threshold"])
  np.testing.assert_allclose(d.encode(x), acts, atol=2e-5)
  np.testing.assert_allclose(
    d.reconstruct(x), acts @ w["W_dec"] + w["b_dec"], atol=5e-5
  )
  site = (d.config.read, d.config.write)
  again = dictionaries.load(path, site=site)
  np.testing.assert_array_equal(again.reconstruct(x), d.reconstruct(x))
  assert again.config.activation == "jumprelu"
  assert again.config.k == 3


def test_gemma_scopes_own_files_come_back_as_they_were(tmp_path):
  d = make("jumprelu")
  path = tmp_path / "gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_3"
  d.save(path, format="gemma_scope")
  first = (path / "params.npz").read_bytes()
  dictionaries.load(path).save(path, format="gemma_scope")
  assert (path / "params.npz").read_bytes() == first
  assert [p.name for p in path.iterdir()] == ["params.npz"]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"activation": "topk"}, "activation 'topk'"),
    ({"activation": "gated"}, "activation 'gated'"),
    ({"activation": "jumprelu", "kind": "skip"}, "a skip"),
    ({"activation": "relu", "layer_norm": True}, "layer_norm"),
    ({"activation": "relu", "site": "blocks.0.resid_pre"}, "the embedding"),
  ],
)
def test_gemma_scope_refuses_what_it_cannot_hold(options, message, tmp_path):
  with pytest.raises(ValueError, match=f"cannot hold {message}.*'gemma_jax'"):
    make(**options).save(tmp_path, format="gemma_scope")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["transcoder", "skip"])
@pytest.mark.parametrize("activation", ["topk", "gated"])
def test_sae_lens_refuses_what_it_has_no_architecture_for(
  activation, kind, tmp_path
):
  with pytest.raises(ValueError, match=f"no transcoder with .*{activation}"):
    make(activation, kind=kind).save(tmp_path, format="sae_lens")
  assert not list(tmp_path.iterdir())


def test_a_crosscoder_is_saved_as_ours_only(tmp_path):
  d = make("jumprelu")
  config = {
    **vars(d.config),
    "parts": (2, D - 2),
    "read": "blocks.1.resid_post+blocks.2.resid_post",
    "write": "blocks.1.resid_post+blocks.2.resid_post",
  }
  d = Dictionary(DictionaryConfig(**config), d.params)
  d.save(tmp_path)
  assert dictionaries.load(tmp_path).config == d.config
  for format, message in (
    ("sae_lens", "no crosscoder"),
    ("gemma_scope", "a crosscoder's parts"),
  ):
    with pytest.raises(ValueError, match=message):
      d.save(tmp_path / format, format=format)


@pytest.mark.parametrize(
  "format", ["sparsify", "gemma_scope_2", "dictionary_learning", "npz"]
)
def test_a_format_that_is_not_written_is_refused(format, tmp_path):
  with pytest.raises(
    ValueError, match="expected one of gemma_jax, gemma_scope"
  ):
    make("relu").save(tmp_path / "d", format=format)
  assert not (tmp_path / "d").exists()
