"""Every preset against the shapes of Hugging Face's class, without weights."""

import pytest
import torch
import transformers

from gemma_jax.models import families, tables

pytestmark = pytest.mark.torch


@pytest.fixture(autouse=True)
def no_initial_values(monkeypatch):
  """On the meta device there is nothing to fill; looking takes a while."""
  monkeypatch.setattr(
    transformers.PreTrainedModel,
    "init_weights",
    lambda self: self.tie_weights(),
  )


@pytest.mark.parametrize("preset", families.PRESETS)
def test_every_preset_has_the_tensors_of_hugging_faces_class(preset):
  cfg = families.PRESETS[preset]
  hf = families.to_hf_config(cfg)
  cls = getattr(transformers, hf["architectures"][0])
  with torch.device("meta"):
    model = cls(cls.config_class.from_dict(hf))
  # Tied tensors are named once. In files, Pythia's head has its old name.
  head = "embed_out.weight" if cfg.family == "neox" else "lm_head.weight"
  expected = {
    head if name == "lm_head.weight" else name: tuple(p.shape)
    for name, p in model.named_parameters()
  }
  family = families.of(cfg)
  rows = [(row, "") for row in family.top(cfg).values()] + [
    (row, l)
    for row in family.block(cfg).values()
    for l in range(cfg.num_layers)
  ]
  got = {row.theirs.format(l): tables.shape_there(row, cfg) for row, l in rows}
  assert got == expected
  assert cfg.num_parameters() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
  ("preset", "parameters"),
  [
    # The models' cards and papers; Gemma's are in test_config.py.
    ("gpt2-distil", 81_912_576),
    ("gpt2-small", 124_439_808),
    ("gpt2-medium", 354_823_168),
    ("gpt2-large", 774_030_080),
    ("gpt2-xl", 1_557_611_200),
    ("pythia-70m", 70_426_624),
    ("pythia-160m", 162_322_944),
    ("pythia-410m", 405_334_016),
    ("pythia-1b", 1_011_781_632),
    ("pythia-1.4b", 1_414_647_808),
    ("pythia-2.8b", 2_775_208_960),
    ("pythia-6.9b", 6_857_302_016),
    ("pythia-12b", 11_846_072_320),
    ("smollm2-135m", 134_515_008),
    ("smollm2-360m", 361_821_120),
    ("smollm2-1.7b", 1_711_376_384),
  ],
)
def test_presets_have_as_many_parameters_as_is_published(preset, parameters):
  assert families.PRESETS[preset].num_parameters() == parameters


@pytest.mark.parametrize(
  ("preset", "config"),
  [
    ("gpt2-small", transformers.GPT2Config()),
    ("gemma2-2b", transformers.Gemma2Config()),
    (
      "pythia-70m",
      transformers.GPTNeoXConfig(
        num_hidden_layers=6,
        hidden_size=512,
        intermediate_size=2048,
        num_attention_heads=8,
        vocab_size=50_304,
        eos_token_id=0,
      ),
    ),
  ],
  ids=["gpt2", "gemma2", "neox"],
)
def test_what_transformers_takes_as_default_is_in_the_preset(preset, config):
  got = families.from_hf_config(config.to_dict())
  assert got == families.PRESETS[preset]
