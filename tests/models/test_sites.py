"""Names of sites, in three spellings."""

import pytest

from gemma_jax.models import families, sites
from gemma_jax.models.families import PRESETS
from gemma_jax.models.sites import Site

GEMMA2, GEMMA3 = PRESETS["gemma2-tiny"], PRESETS["gemma3-tiny"]  # 5, 8 layers

# Ours, TransformerLens (HookedTransformer's hook names), and modules of
# Hugging Face's Gemma2DecoderLayer and Gemma3DecoderLayer.
TABLE = (
  ("resid_pre", "hook_resid_pre", "input"),
  ("attn_z", "attn.hook_z", "self_attn.o_proj.input"),
  ("attn_out", "hook_attn_out", "post_attention_layernorm.output"),
  ("resid_mid", "hook_resid_mid", "pre_feedforward_layernorm.input"),
  ("mlp_norm", "ln2.hook_normalized", None),
  ("mlp_in", None, "pre_feedforward_layernorm.output"),
  ("mlp_hidden", "mlp.hook_post", "mlp.down_proj.input"),
  ("mlp_raw", None, "mlp.output"),
  ("mlp_out", "hook_mlp_out", "post_feedforward_layernorm.output"),
  ("resid_post", "hook_resid_post", "output"),
)


@pytest.mark.parametrize(("ours", "lens", "hugging_face"), TABLE)
@pytest.mark.parametrize(("layer", "index"), [("7", 7), ("*", None)])
def test_all_spellings_of_a_site_are_the_same_site(
  ours, lens, hugging_face, layer, index
):
  expected = Site(index, ours)
  assert sites.parse(f"blocks.{layer}.{ours}", GEMMA3) == expected
  if lens:
    assert sites.parse(f"blocks.{layer}.{lens}", GEMMA3) == expected
  if hugging_face:
    assert (
      sites.parse(f"model.layers.{layer}.{hugging_face}", GEMMA3) == expected
    )


def test_the_table_above_holds_every_site_and_alias_in_order():
  assert tuple(ours for ours, _, _ in TABLE) == sites.NAMES
  assert {lens: s for s, lens, _ in TABLE if lens} == sites.TRANSFORMER_LENS
  assert {theirs: s for s, _, theirs in TABLE if theirs} == families.of(
    GEMMA2
  ).SITES


@pytest.mark.parametrize("name", ["blocks.3.mlp_in", "blocks.*.resid_post"])
def test_a_site_prints_as_the_name_that_it_is_read_from(name):
  assert str(sites.parse(name, GEMMA2)) == name


@pytest.mark.parametrize(
  ("wrong", "near"),
  [
    ("blocks.0.resid_pst", "resid_post"),
    ("blocks.0.mlp_input", "mlp_in"),
    ("blocks.0.hook_mlp_ot", "hook_mlp_out"),
    ("blocks.0.attn.hook_q", "attn.hook_z"),
    ("model.layers.0.mlp.down_proj.inptu", "mlp.down_proj.input"),
  ],
)
def test_an_unknown_name_suggests_the_nearest_and_lists_the_valid(wrong, near):
  with pytest.raises(ValueError, match=f"Did you mean '{near}'") as e:
    sites.parse(wrong, GEMMA2)
  known = families.of(GEMMA2).SITES if wrong[0] == "m" else sites.NAMES
  assert all(name in str(e.value) for name in known)
  assert wrong in str(e.value)


def test_a_name_near_to_nothing_gets_no_suggestion():
  with pytest.raises(
    ValueError, match=r"no 'xyz' in a gemma2 block\. Valid: resid"
  ):
    sites.parse("blocks.0.xyz", GEMMA2)


def test_names_of_one_spelling_are_not_mixed_with_roots_of_another():
  with pytest.raises(ValueError, match="no 'mlp_in' in a gemma2 block"):
    sites.parse("model.layers.0.mlp_in", GEMMA2)
  with pytest.raises(ValueError, match=r"no 'mlp\.output\' in a gemma2 block"):
    sites.parse("blocks.0.mlp.output", GEMMA2)


@pytest.mark.parametrize("layer", [5, 26])
def test_a_layer_out_of_range_lists_the_range(layer):
  with pytest.raises(
    ValueError, match=rf"layer {layer} does not exist.*5 layers, 0\.\.4"
  ):
    sites.parse(f"blocks.{layer}.mlp_in", GEMMA2)


@pytest.mark.parametrize(
  "wrong",
  [
    "mlp_in",
    "blocks.mlp_in",
    "blocks.-1.mlp_in",
    "blocks.1:3.mlp_in",
    "layers.0.mlp_in",
    " blocks.0.mlp_in",
    "blocks.0.",
    "",
  ],
)
def test_what_is_no_site_at_all_says_what_one_looks_like(wrong):
  with pytest.raises(
    ValueError, match=r"is not a site.*blocks\.\{layer\}"
  ) as e:
    sites.parse(wrong, GEMMA2)
  assert repr(wrong) in str(e.value)
  assert "0..4" in str(e.value)


@pytest.mark.parametrize(
  ("names", "blocks"),
  [
    (("blocks.0.resid_post",), 1),
    (("blocks.3.mlp_in", "model.layers.1.output"), 4),
    (("blocks.0.mlp_in", "blocks.*.mlp_in"), 5),
  ],
)
def test_the_blocks_to_run_are_those_up_to_the_last_site(names, blocks):
  assert sites.last_layer(names, GEMMA2) == blocks
