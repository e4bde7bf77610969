"""Random checkpoints: tiny models on the same code path as real ones."""

import json
import os
import pathlib
import shutil
import uuid

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax import cache
from gemma_jax.models import families, layers, tables, weights
from gemma_jax.models.config import ModelConfig

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")


def init(cfg: ModelConfig, key: jax.Array, dtype=jnp.float32):
  """Random parameters of `models.forward`, in which no feature is hidden."""

  def make(table, key):
    keys = jax.random.split(key, len(table))
    return {
      name: layers.initializer(name, row, cfg)(k, tables.shape(row, cfg), dtype)
      for k, (name, row) in zip(keys, table.items(), strict=True)
    }

  family = families.of(cfg)
  top_key, block_key = jax.random.split(key)
  block_keys = jax.random.split(block_key, cfg.num_layers)
  blocks = jax.vmap(lambda key: make(family.block(cfg), key))(block_keys)
  return {**make(family.top(cfg), top_key), "blocks": blocks}


# It runs once: how soon it is compiled matters more than how fast it runs.
init_quickly = jax.jit(
  init,
  static_argnames=("cfg", "dtype"),
  compiler_options={"xla_backend_optimization_level": 0},
)


def checkpoint(preset: str, *, seed: int = 0) -> pathlib.Path:
  """A Hugging Face directory with random weights, made once in the cache.

  Its tokenizer has a token for every byte, so any text can be used; the
  embedding has more rows than the tokenizer has tokens.

  Args:
    preset: a key of `families.PRESETS`.
    seed: of the weights.

  Raises:
    ValueError: no such preset.
  """
  presets = families.PRESETS
  if preset not in presets:
    raise ValueError(
      f"There is no preset {preset!r}; expected one of {', '.join(presets)}."
    )
  directory = cache.directory("models", f"random-{preset}-{seed}")
  if directory.exists():
    return directory
  partial = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
  partial.mkdir(parents=True)
  cfg = presets[preset]
  hf = families.to_hf_config(cfg)
  (partial / "config.json").write_text(json.dumps(hf, indent=2))
  params = init_quickly(cfg, jax.random.key(seed))
  weights.save(partial, jax.tree.map(np.asarray, params), cfg)
  _byte_tokenizer(partial)
  try:
    os.rename(partial, directory)
  except OSError:  # another process was first
    shutil.rmtree(partial)
  return directory


def _byte_tokenizer(directory: pathlib.Path) -> None:
  from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {token: i for i, token in enumerate((*SPECIAL, *letters))}
  tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(
    [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
  )
  tokenizer.save(str(directory / "tokenizer.json"))
  names = dict(zip(("pad", "eos", "bos", "unk"), SPECIAL, strict=True))
  settings = {f"{name}_token": token for name, token in names.items()}
  settings["tokenizer_class"] = "PreTrainedTokenizerFast"
  path = directory / "tokenizer_config.json"
  path.write_text(json.dumps(settings, indent=2))
