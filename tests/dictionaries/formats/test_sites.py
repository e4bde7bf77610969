"""Our sites and labels of what every format says."""

import json

import jax.numpy as jnp
import pytest

from gemma_jax import dictionaries
from gemma_jax.dictionaries.formats import hooks
from gemma_jax.models.sites import NAMES
from tests.dictionaries.formats.cases import CASES
from tests.dictionaries.formats.circuit_tracer_files import circuit_tracer
from tests.dictionaries.formats.files import (
  D,
  K,
  M,
  write_json,
)
from tests.dictionaries.formats.gemma_files import (
  GS2_HOOKS,
  gemma_scope,
  gemma_scope_2,
)
from tests.dictionaries.formats.sae_lens_files import (
  sae_lens,
  sae_lens_config,
)
from tests.dictionaries.formats.sparsify_files import sparsify


def convention(d):
  return d.provenance["convention"]


@pytest.mark.parametrize(
  ("kind", "read", "write", "gain"),
  [
    ("res", "resid_post", "resid_post", None),
    ("mlp", "mlp_out", "mlp_out", None),
    ("att", "attn_z", "attn_z", None),
    ("transcoders", "mlp_norm", "mlp_out", False),
  ],
)
def test_gemma_scope_reads_its_label_from_its_path(
  kind, read, write, gain, tmp_path
):
  made = CASES[f"gemma_scope-{kind}"](tmp_path)
  for path in (made.path, made.path / "params.npz"):
    d = dictionaries.load(path)
    assert d.config.read == f"blocks.12.{read}"
    assert d.config.write == f"blocks.12.{write}"
    assert (d.config.k, d.config.model) == (4, "google/gemma-2-2b")
    assert convention(d)["gain"] is gain
    assert not convention(d)["subtracts_b_dec"]
    assert d.provenance["label"] == {
      "model": "google/gemma-2-2b",
      "kind": kind,
      "layer": 12,
      "width": "16k",
      "l0": 4,
    }


def test_gemma_scope_in_the_hubs_cache_is_found_by_its_repository(tmp_path):
  folder = (
    "models--google--gemma-scope-9b-it-res/snapshots/ab12/layer_3/width_16k/"
    "canonical"
  )
  d = dictionaries.load(gemma_scope(tmp_path, folder, seed=0).path)
  assert d.config.read == "blocks.3.resid_post"
  assert (d.config.k, d.config.model) == (None, "google/gemma-2-9b-it")


def test_gemma_scopes_embedding_is_scaled_to_what_enters_the_model(tmp_path):
  d = dictionaries.load(CASES["gemma_scope-embedding"](tmp_path).path)
  assert d.config.read == d.config.write == "blocks.0.resid_pre"
  assert convention(d)["input_scale"] == pytest.approx(D**-0.5)
  assert "sqrt(D)" in convention(d)["note"]


def test_gemma_scope_without_its_folders_needs_a_site(tmp_path):
  path = gemma_scope(tmp_path, "mine", seed=0).path
  with pytest.raises(
    ValueError, match="does not say what this dictionary"
  ) as e:
    dictionaries.load(path)
  assert str(path) in str(e.value)
  assert "site='blocks.12.resid_post'" in str(e.value)
  d = dictionaries.load(path, site=("blocks.1.mlp_norm", "blocks.1.mlp_out"))
  assert (d.config.read, d.config.write) == (
    "blocks.1.mlp_norm",
    "blocks.1.mlp_out",
  )
  assert convention(d)["gain"] is False
  assert d.config.k is None


@pytest.mark.parametrize("site", ["blocks.x.resid_post", ("blocks.1.mlp_in",)])
def test_a_site_that_is_none_is_refused(site, tmp_path):
  path = gemma_scope(tmp_path, "mine", seed=0).path
  with pytest.raises(ValueError, match=r"names no site\. Expected 'blocks"):
    dictionaries.load(path, site=site)


@pytest.mark.parametrize(
  ("kind", "read", "write", "gain"),
  [
    ("resid_post", "resid_post", "resid_post", None),
    ("attn_out", "attn_z", "attn_z", None),
    ("mlp_out", "mlp_out", "mlp_out", None),
    ("transcoder", "mlp_in", "mlp_out", True),
  ],
)
def test_gemma_scope_2_takes_its_hook_strings_literally(
  kind, read, write, gain, tmp_path
):
  d = dictionaries.load(gemma_scope_2(tmp_path, kind).path)
  assert d.config.read == f"blocks.7.{read}"
  assert d.config.write == f"blocks.7.{write}"
  assert (d.config.k, d.config.model) == (4, "google/gemma-3-1b-pt")
  assert convention(d)["gain"] is gain
  hook = d.provenance["metadata"]["hf_hook_name"]
  assert hook == f"model.layers.7.{GS2_HOOKS[kind][0]}"


def test_gemma_scope_2_without_its_config_needs_a_site(tmp_path):
  path = gemma_scope_2(tmp_path, "transcoder", affine=True).path
  (path / "config.json").unlink()
  with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
    dictionaries.load(path)
  hooks = [f"model.layers.9.{name}" for name in GS2_HOOKS["transcoder"]]
  d = dictionaries.load(path, site=hooks)
  assert (d.config.read, d.config.write) == (
    "blocks.9.mlp_in",
    "blocks.9.mlp_out",
  )
  assert d.config.skip
  assert d.config.k is None


def test_a_crosscoder_joins_its_layers_as_parts(tmp_path):
  d = dictionaries.load(CASES["gemma_scope_2-crosscoder_affine"](tmp_path).path)
  sites = "+".join(f"blocks.{l}.resid_post" for l in (7, 13, 17))
  assert d.config.read == d.config.write == sites
  assert d.config.parts == (D, D, D)
  assert d.config.skip
  assert d.config.k == 4
  # The first four latents read the first layer and nothing else.
  assert jnp.all(d.params["W_enc"][D:, :4] == 0)
  assert jnp.all(d.params["W_enc"][:D, :4] != 0)


@pytest.mark.parametrize(
  ("hook", "read"),
  [
    ("blocks.5.hook_resid_pre", "blocks.5.resid_pre"),
    ("blocks.5.attn.hook_z", "blocks.5.attn_z"),
    ("blocks.5.mlp.hook_in", "blocks.5.mlp_in"),
    ("blocks.5.mlp.hook_out", "blocks.5.mlp_raw"),
    ("hook_embed", "blocks.0.resid_pre"),
    ("blocks.5.hook_pattern", ""),
    # The residual in TransformerLens, the MLP's input in SAELens.
    ("blocks.5.hook_mlp_in", ""),
  ],
)
def test_sae_lens_hooks_become_our_sites(hook, read, tmp_path):
  metadata = sae_lens_config("standard")["metadata"] | {"hook_name": hook}
  d = dictionaries.load(sae_lens(tmp_path, "standard", metadata=metadata).path)
  assert d.config.read == d.config.write == read
  assert d.config.model == "gemma-2-2b"
  assert d.provenance["metadata"]["hook_name"] == hook
  assert d.provenance["metadata"]["context_size"] == 256
  assert convention(d)["subtracts_b_dec"]


def test_an_ambiguous_hook_is_told_by_its_name_in_hugging_face(tmp_path):
  metadata = sae_lens_config("transcoder")["metadata"] | {
    "hook_name": "blocks.5.hook_mlp_in",
    "hf_hook_name": "model.layers.5.pre_feedforward_layernorm.output",
  }
  made = sae_lens(tmp_path, "transcoder", metadata=metadata)
  d = dictionaries.load(made.path)
  assert (d.config.read, d.config.write) == (
    "blocks.5.mlp_in",
    "blocks.5.mlp_out",
  )
  assert convention(d)["gain"] is True


def test_a_single_head_is_no_site(tmp_path):
  metadata = sae_lens_config("standard")["metadata"] | {"hook_head_index": 3}
  d = dictionaries.load(sae_lens(tmp_path, "standard", metadata=metadata).path)
  assert d.config.read == ""
  assert dictionaries.load(
    tmp_path / "sae_lens_standard", site="blocks.1.attn_z"
  ).config.read == ("blocks.1.attn_z")


@pytest.mark.parametrize(
  ("hook", "model", "site"),
  [
    ("model.layers.3.output", "google/gemma-3-1b", "blocks.3.resid_post"),
    ("model.layers.3.mlp.output", "google/gemma-3-1b", "blocks.3.mlp_raw"),
    ("model.layers.3.mlp.output", "Llama-3", "blocks.3.mlp_out"),
    (
      "model.layers.3.post_attention_layernorm.output",
      "google/gemma-3-1b",
      "blocks.3.attn_out",
    ),
    (
      "model.layers.3.post_attention_layernorm.output",
      "Llama-3",
      "blocks.3.mlp_in",
    ),
    ("transformer.h.0.mlp.output", "gpt2", "blocks.0.mlp_out"),
    ("gpt_neox.layers.11.output", "pythia", "blocks.11.resid_post"),
    ("hook_embed", "gpt2", ""),
    ("blocks.1.resid_pre+blocks.2.hook_resid_pre", "", None),
    ("blocks.1.resid_pre+blocks.2.nothing", "", ""),
    ("blocks.*.resid_pre", "", ""),
  ],
)
def test_hooks_of_every_spelling_are_our_sites(hook, model, site):
  if site is None:
    site = "blocks.1.resid_pre+blocks.2.resid_pre"
  assert hooks.to_ours(hook, model) == site


@pytest.mark.parametrize("name", NAMES)
def test_every_site_of_ours_has_a_name_in_transformer_lens(name):
  site = f"blocks.3.{name}"
  hook = hooks.to_transformer_lens(site)
  assert hook.startswith("blocks.3.")
  assert "hook_" in hook
  assert hooks.to_ours(hook) == site


@pytest.mark.parametrize(
  ("hookpoint", "options", "model", "sites"),
  [
    ("layers.3", {}, "pythia", ("resid_post",) * 2),
    ("layers.3.mlp", {}, "gemma-2-2b", ("mlp_raw",) * 2),
    ("layers.3.mlp", {"transcode": True}, "pythia", ("mlp_in", "mlp_raw")),
    # Before there was a flag, transcoders subtracted b_dec too.
    ("h.3.mlp", {"skip": True}, "gpt2", ("mlp_in", "mlp_raw")),
    ("layers.3.attention", {}, "pythia", ("attn_out",) * 2),
    ("layers.3.self_attn", {}, "google/gemma-2-2b", None),
    ("embed_tokens", {}, "llama", None),
  ],
)
def test_sparsifys_hookpoints_become_our_sites(
  hookpoint, options, model, sites, tmp_path
):
  made = sparsify(tmp_path, hookpoint, **options)
  write_json(tmp_path / "run" / "config.json", {"model": model, "ctx_len": 9})
  d = dictionaries.load(made.path)
  expected = tuple(f"blocks.3.{s}" for s in sites) if sites else ("", "")
  assert (d.config.read, d.config.write) == expected
  assert (d.config.k, d.config.model) == (K, model)
  assert convention(d)["subtracts_b_dec"] is not options.get("transcode", False)
  assert d.provenance["metadata"]["context_size"] == 9


def test_sparsifys_width_may_be_a_multiple_of_its_input(tmp_path):
  made = sparsify(tmp_path, "layers.0", num_latents=0, expansion_factor=2)
  with pytest.raises(ValueError, match=f"M = {M}; but M = {2 * D} in cfg.json"):
    dictionaries.load(made.path)


def test_circuit_tracers_layer_and_hooks_make_our_sites(tmp_path):
  made = circuit_tracer(tmp_path)
  for path in (made.path, made.path / "layer_4.safetensors"):
    d = dictionaries.load(path)
    assert d.config.read == "blocks.4.mlp_in"
    assert d.config.write == "blocks.4.mlp_out"
    assert d.config.model == "meta-llama/Llama-3.2-1B"
    assert convention(d)["gain"] is True


@pytest.mark.torch
@pytest.mark.parametrize(
  ("name", "k", "activation"),
  [
    ("AutoEncoder", None, "relu"),
    ("BatchTopKSAE", K, "batchtopk"),
    ("BatchTopKSAE_without_a_threshold", K, "topk"),
    ("JumpReluAutoEncoder", 4, "jumprelu"),
    ("MatryoshkaBatchTopKSAE", K, "batchtopk"),
  ],
)
def test_dictionary_learnings_config_gives_site_and_label(
  name, k, activation, tmp_path
):
  made = CASES[f"dictionary_learning-{name}"](tmp_path)
  d = dictionaries.load(made.path)
  assert (d.config.k, d.config.activation) == (k, activation)
  assert d.config.read == "blocks.8.resid_post"
  assert d.config.model == "EleutherAI/pythia-160m"
  assert d.provenance["metadata"]["context_size"] == 64
  prefixes = (4, 8, M) if name.startswith("Matryoshka") else (M,)
  assert d.config.prefix_widths == prefixes
  fell_back = "never estimated" in convention(d)["note"]
  assert fell_back == name.endswith("without_a_threshold")


@pytest.mark.torch
def test_a_checkpoint_of_dictionary_learning_finds_its_config(tmp_path):
  made = CASES["dictionary_learning-AutoEncoder"](tmp_path)
  step = made.path / "checkpoints" / "ae_1000.pt"
  step.parent.mkdir()
  (made.path / "ae.pt").rename(step)
  assert dictionaries.load(step).config.read == "blocks.8.resid_post"


@pytest.mark.torch
def test_a_submodule_of_unknown_name_has_no_site(tmp_path):
  made = CASES["dictionary_learning-AutoEncoder"](tmp_path)
  fields = json.loads((made.path / "config.json").read_text())
  fields["trainer"]["submodule_name"] = "resid_post"
  write_json(made.path / "config.json", fields)
  assert dictionaries.load(made.path).config.read == ""
  d = dictionaries.load(made.path, site="blocks.8.hook_resid_post")
  assert d.config.read == "blocks.8.resid_post"
