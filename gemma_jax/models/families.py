"""Which file knows which model.

A family is a module with the tables `block(cfg)` and `top(cfg)`, `Block`,
`norm`, `PRESETS`, the hub's names (`HUB`, `MODEL_TYPES`), Hugging Face's
names of weights (`PREFIX`, `CANONICAL`, `HEAD`, `IGNORED`) and of modules
(`ROOT`, `SITES`), `from_hf` and `to_hf`.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from gemma_jax.models import gemma, gpt2, hf_config, llama, neox, tables
from gemma_jax.models.config import ModelConfig

_MODULES = (gemma, gpt2, neox, llama)
_FAMILIES = {
  "gemma2": gemma,
  "gemma3": gemma,
  "gpt2": gpt2,
  "neox": neox,
  "llama": llama,
}

# Every shape that is known by name: the released ones and, for tests, a tiny
# one of each family ("gemma3-tiny") in which every feature is visible.
PRESETS: dict[str, ModelConfig] = {
  name: cfg for module in _MODULES for name, cfg in module.PRESETS.items()
}
# Hub id -> preset, to know a shape without asking the hub.
HUB: dict[str, str] = {
  name: preset for module in _MODULES for name, preset in module.HUB.items()
}


def of(cfg: ModelConfig) -> ModuleType:
  """The module of a config's family.

  Raises:
    ValueError: no such family.
  """
  if cfg.family not in _FAMILIES:
    raise ValueError(
      f"There is no family {cfg.family!r}; expected one of "
      f"{', '.join(_FAMILIES)}."
    )
  return _FAMILIES[cfg.family]


def shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
  """The shape of every parameter; a block's have a leading layer axis."""
  family = of(cfg)
  blocks = tables.shapes(family.block(cfg), cfg)
  stacked = {name: (cfg.num_layers, *s) for name, s in blocks.items()}
  return tables.shapes(family.top(cfg), cfg) | stacked


def from_hf_config(hf: Mapping[str, Any]) -> ModelConfig:
  """A `ModelConfig` from the contents of a Hugging Face config.json.

  The spellings of old files and those of transformers >= 5 (such as
  `rope_parameters` and `layer_types`) are both accepted; the `text_config`
  of a multimodal checkpoint is used where there is one.

  Args:
    hf: the parsed JSON object.

  Raises:
    ValueError: an architecture, activation, RoPE type, attention or
      quantisation that is not supported (named), or a field that is missing
      (named).
  """
  if not isinstance(hf, Mapping):
    raise ValueError(f"Expected a JSON object; got {type(hf).__name__}.")
  text = hf_config.section(hf, "text_config")
  kind = (text or hf).get("model_type")
  known = {name: module for module in _MODULES for name in module.MODEL_TYPES}
  if kind not in known:
    raise ValueError(
      f"Unsupported model_type {kind!r} (architectures "
      f"{hf.get('architectures') or []}). Expected one of {sorted(known)}: "
      "Gemma 2, Gemma 3, GPT-2, Pythia, or a model of Llama's shape."
    )
  if text and known[kind] is not gemma:
    raise ValueError(
      f"text_config of model_type {kind!r} is not supported: only Gemma is "
      "read as a part of a larger model. Load a checkpoint of the text model "
      "alone."
    )
  for part in (hf, text):
    hf_config.refuse(part, quantization_config=())
  return known[kind].from_hf(hf)


def to_hf_config(cfg: ModelConfig) -> dict[str, Any]:
  """The config.json contents that `from_hf_config` turns back into `cfg`."""
  return of(cfg).to_hf(cfg)
