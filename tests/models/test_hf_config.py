"""From and to Hugging Face's config.json: spellings, defaults, damage."""

import dataclasses
import json

import pytest
import transformers

from gemma_jax.models.families import PRESETS, from_hf_config, to_hf_config


def hf(preset, **changes):
  """The preset's config.json, as a file would hold it; None removes a key."""
  contents = json.loads(json.dumps(to_hf_config(PRESETS[preset]))) | changes
  return {k: v for k, v in contents.items() if v is not None}


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
  cfg = dataclasses.replace(PRESETS[preset], eos_ids=(1, 106))
  assert from_hf_config(contents) == cfg


def test_a_complete_text_config_is_taken_as_it_is():
  contents = {"model_type": "gemma3", "text_config": hf("gemma3-tiny")}
  assert from_hf_config(contents) == PRESETS["gemma3-tiny"]


@pytest.mark.parametrize("preset", ["gemma3-1b", "gpt2-small", "pythia-1b"])
@pytest.mark.parametrize(
  ("value", "ids"), [(7, (7,)), ([7], (7,)), ([7, 6], (7, 6))]
)
def test_a_text_ends_at_any_of_several_tokens(preset, value, ids):
  cfg = from_hf_config(hf(preset, eos_token_id=value))
  assert (cfg.eos_ids, cfg.eos_id) == (ids, 7)
  assert to_hf_config(cfg)["eos_token_id"] == ([7, 6] if len(ids) > 1 else 7)
  assert from_hf_config(to_hf_config(cfg)) == cfg


def test_ids_that_a_file_should_not_have_stop_nobody():
  """Tiny GPT-2s keep the default 50256; old Llamas write -1 for none."""
  cfg = from_hf_config(hf("gpt2-tiny", bos_token_id=None))
  assert cfg.bos_id == 50_256 > cfg.vocab_size
  cfg = from_hf_config(hf("llama-tiny", pad_token_id=-1, eos_token_id=[7, 8]))
  assert cfg.pad_id == 7


@pytest.mark.parametrize("preset", ["gpt2-small", "pythia-1b", "smollm2-135m"])
def test_padding_that_is_not_stated_is_the_end_of_a_text(preset):
  cfg = from_hf_config(hf(preset, eos_token_id=[5, 6], pad_token_id=None))
  assert cfg.pad_id == 5


# What there is no sense in guessing: sizes, and the type itself.
NEEDED = {
  "gemma2": {
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "query_pre_attn_scalar",
    "sliding_window",
    "vocab_size",
  },
  "gpt2": {
    "model_type",
    "n_embd",
    "n_head",
    "n_layer",
    "n_positions",
    "vocab_size",
  },
  "gpt_neox": {
    "hidden_size",
    "intermediate_size",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
  },
}
NEEDED["gemma3_text"] = NEEDED["gemma2"]
NEEDED["llama"] = NEEDED["gpt_neox"]


@pytest.mark.parametrize(
  "config",
  [
    transformers.Gemma2Config,
    transformers.Gemma3TextConfig,
    transformers.GPT2Config,
    transformers.GPTNeoXConfig,
    transformers.LlamaConfig,
  ],
)
def test_what_a_config_leaves_out_has_hugging_faces_default(config):
  contents = config().to_dict()
  expected = from_hf_config(contents)
  needed = set()
  for key in contents:
    less = {k: v for k, v in contents.items() if k != key}
    try:
      assert from_hf_config(less) == expected, key
    except ValueError:
      needed.add(key)
  assert needed == NEEDED[config.model_type]
  assert from_hf_config({k: contents[k] for k in needed}) == expected


def test_a_null_soft_cap_is_none_and_no_default():
  null = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
  cfg = from_hf_config(to_hf_config(PRESETS["gemma2-2b"]) | null)
  assert (cfg.attn_softcap, cfg.final_softcap) == (None, None)


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
    ({"layer_types": ["full_attention"] * 3}, "list of 8, an entry per layer"),
    ({"layer_types": []}, r"layer_types=\[\] must be a list of 8"),
    ({"layer_types": ["chunked_attention"] * 8}, "chunked_attention"),
    ({"num_key_value_heads": 3}, "num_heads=4.*num_kv_heads=3"),
    (
      {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}},
      "'yarn' is not supported.*'linear'",
    ),
    ({"rope_scaling": {"type": "dynamic"}}, "'dynamic' is not supported"),
    ({"rope_scaling": {"type": "linear"}}, "lacks 'factor'.*: type. Add"),
    ({"rope_scaling": [8.0]}, r"rope_scaling=\[8.0\] must be an object"),
    ({"rope_parameters": "linear"}, "rope_parameters='linear' must be an obj"),
    ({"rope_parameters": {"full_attention": 3}}, "full_attention=3 must be"),
    ({"text_config": "gemma"}, "text_config='gemma' must be an object"),
    ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not"),
    (
      {"rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}},
      "partial_rotary_factor=0.5 is not",
    ),
    ({"sliding_window_pattern": 0, "layer_types": None}, "pattern=0 must be"),
    ({"eos_token_id": [1, "2"]}, r"eos_token_id=\[1, '2'\] must be a token"),
    ({"bos_token_id": [2]}, r"bos_token_id=\[2\] must be a token id"),
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


@pytest.mark.parametrize("preset", ["gpt2-tiny", "neox-tiny", "llama-tiny"])
def test_only_gemma_is_read_as_a_part_of_a_larger_model(preset):
  for top in ({"model_type": "llava"}, hf(preset)):
    with pytest.raises(ValueError, match=r"text_config of model_type.*alone"):
      from_hf_config(top | {"text_config": hf(preset)})


def test_quantisation_of_a_part_is_refused():
  text = hf("gemma3-tiny", quantization_config={"quant_method": "gptq"})
  with pytest.raises(
    ValueError, match=r"'quant_method': 'gptq'.*expected none"
  ):
    from_hf_config({"model_type": "gemma3", "text_config": text})


def test_an_untied_head_is_refused_wherever_the_config_says_so():
  contents = {
    "model_type": "gemma3",
    "tie_word_embeddings": False,
    "text_config": hf("gemma3-tiny", tie_word_embeddings=None),
  }
  with pytest.raises(ValueError, match="tie_word_embeddings=False"):
    from_hf_config(contents)


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
    ("smollm2-135m", {"rope_theta": [1]}, r"rope_theta=\[1\] must be a pos"),
    ("smollm2-135m", {"rope_theta": 0}, "rope_theta=0 must be a positive"),
    ("smollm2-135m", {"bos_token_id": "<s>"}, "bos_token_id='<s>'.*integer"),
    ("smollm2-135m", {"num_key_value_heads": 0}, "num_key_value_heads=0"),
    ("smollm2-135m", {"head_dim": 0}, "head_dim=0"),
    ("smollm2-135m", {"head_dim": "64"}, "head_dim='64'"),
    ("smollm2-135m", {"head_dim": None, "hidden_size": 577}, "577.* of the 9"),
    ("smollm2-135m", {"tie_word_embeddings": "false"}, "must be true or false"),
    ("smollm2-135m", {"partial_rotary_factor": 0.25}, "partial_rotary_factor="),
    (
      "smollm2-135m",
      {"rope_parameters": {"partial_rotary_factor": 0.25}},
      "partial_rotary_factor=0.25 is not",
    ),
    ("smollm2-135m", {"rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
    ("pythia-70m", {"rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
    ("pythia-70m", {"use_parallel_residual": 1}, "must be true or false"),
    ("pythia-70m", {"tie_word_embeddings": "false"}, "must be true or false"),
    ("pythia-70m", {"hidden_size": 513}, "513 must be a multiple of the 8"),
    ("pythia-70m", {"rotary_pct": 2}, "rotary_dim=128 must be.*head_dim=64"),
    ("gpt2-small", {"n_embd": 770}, "770 must be a multiple of the 12"),
    ("gpt2-small", {"n_inner": 0}, "n_inner=0"),
    ("gpt2-small", {"quantization_config": {}}, "quantization_config={} is"),
    ("gemma2-2b", {"attn_logit_softcapping": -50}, "attn_softcap=-50"),
  ],
)
def test_what_a_family_does_not_have_is_refused_by_name(
  preset, changes, message
):
  with pytest.raises(ValueError, match=message):
    from_hf_config(hf(preset, **changes))
