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
from gemma_jax.models import config as config_lib
from gemma_jax.models import gemma, weights
from gemma_jax.models.config import ModelConfig

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")


def init(cfg: ModelConfig, key: jax.Array, dtype=jnp.float32):
  """Random parameters of `models.forward`, norm gains N(0, 0.3) around one."""
  embed_key, norm_key, block_key = jax.random.split(key, 3)
  block = gemma.Block(cfg, dtype)
  one = jax.tree.map(lambda a: a[0], gemma.layers(cfg))
  ctx = gemma.context(cfg, jnp.ones((1, 1), bool), dtype)
  x = jnp.zeros((1, 1, cfg.width), dtype)

  def make(key):
    return block.init(key, x, one, ctx, lambda name, value: value)["params"]

  d, v = cfg.width, cfg.vocab_size
  return {
    "embed": jax.random.normal(embed_key, (v, d), dtype) * d**-0.5,
    "blocks": jax.vmap(make)(jax.random.split(block_key, cfg.num_layers)),
    "final_norm": 0.3 * jax.random.normal(norm_key, (d,), dtype),
  }


def checkpoint(preset: str, *, seed: int = 0) -> pathlib.Path:
  """A Hugging Face directory with random weights, made once in the cache.

  Its tokenizer has a token for every byte, so any text can be used; the
  embedding has more rows than the tokenizer has tokens.

  Args:
    preset: a key of `config.PRESETS`.
    seed: of the weights.

  Raises:
    ValueError: no such preset.
  """
  presets = config_lib.PRESETS
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
  hf = config_lib.to_hf_config(cfg)
  (partial / "config.json").write_text(json.dumps(hf, indent=2))
  # Without jit, flax would also run the blocks to learn their parameters.
  params = jax.jit(init, static_argnums=0)(cfg, jax.random.key(seed))
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
