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
