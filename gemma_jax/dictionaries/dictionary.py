"""A trained dictionary on raw activations: use it, save it, load it."""

import dataclasses
import functools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.dictionaries import config as config_lib
from gemma_jax.dictionaries import core
from gemma_jax.dictionaries.config import DictionaryConfig
from gemma_jax.models import safetensors

CONFIG = "dictionary.json"
WEIGHTS = "dictionary.safetensors"
FORMAT = "gemma_jax"


@dataclasses.dataclass(frozen=True)
class Dictionary:
  """An SAE or transcoder, folded to raw activations.

  Attributes:
    config: sizes, selection, sites.
    params: `W_enc` [D, M], `b_enc` [M], `W_dec` [M, E], `b_dec` [E], and
      where there is one `W_skip` [D, E] and `threshold` [M].
  """

  config: DictionaryConfig
  params: dict[str, jax.Array]

  def encode(self, x) -> jax.Array:
    """Latent activations, [..., D] -> [..., M]."""
    return encode(self.config, self.params, jnp.asarray(x))

  def decode(self, z) -> jax.Array:
    """What the latents and the bias write, [..., M] -> [..., E].

    A skip connection reads the input, so it is not part of this.
    """
    return jnp.asarray(z) @ self.params["W_dec"] + self.params["b_dec"]

  def reconstruct(self, x) -> jax.Array:
    """The output site from the input site, [..., D] -> [..., E]."""
    return reconstruct(self.config, self.params, jnp.asarray(x))

  def save(self, path: str | os.PathLike, *, format: str = FORMAT) -> None:
    """Writes the dictionary into the directory `path`.

    Raises:
      ValueError: an unknown format.
    """
    if format != FORMAT:
      raise ValueError(f"Unknown format {format!r}; expected {FORMAT!r}.")
    directory = pathlib.Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.asarray(x) for name, x in self.params.items()}
    safetensors.write_file(directory / WEIGHTS, tensors)
    text = json.dumps(dataclasses.asdict(self.config), indent=2)
    (directory / CONFIG).write_text(text)


def load(path: str | os.PathLike, *, format: str | None = None) -> Dictionary:
  """Loads a dictionary from its directory, or from a workdir that holds one.

  Args:
    path: what `Dictionary.save` wrote, or a workdir of `trainers.dictionary`.
    format: "gemma_jax", or None to find out.

  Raises:
    FileNotFoundError: no dictionary there.
    ValueError: an unknown format, or tensors that do not fit the config.
  """
  if format not in (None, FORMAT):
    raise ValueError(f"Unknown format {format!r}; expected {FORMAT!r}.")
  directory = pathlib.Path(path)
  if (directory / "dictionary" / CONFIG).exists():
    directory = directory / "dictionary"
  if not (directory / CONFIG).exists():
    raise FileNotFoundError(
      f"{directory} holds no dictionary: it has no {CONFIG}. Pass a workdir "
      "whose training has finished, or a directory that save() wrote."
    )
  try:
    fields = json.loads((directory / CONFIG).read_text())
    cfg = config_lib.from_dict(fields)
  except (ValueError, TypeError) as e:
    raise ValueError(f"{directory / CONFIG}: {e}") from e
  if not (directory / WEIGHTS).exists():
    raise FileNotFoundError(
      f"{directory} has a {CONFIG} and no {WEIGHTS}. Copy it there too."
    )
  tensors = safetensors.open_file(directory / WEIGHTS)
  shapes = cfg.shapes()
  if cfg.activation == "batchtopk":
    shapes["threshold"] = (cfg.width,)
  found = {name: x.shape for name, x in tensors.items()}
  if found != shapes:
    raise ValueError(
      f"{directory / WEIGHTS} holds {found}; {CONFIG} says {shapes}."
    )
  return Dictionary(cfg, {name: jnp.asarray(x) for name, x in tensors.items()})


@functools.partial(jax.jit, static_argnums=0)
def encode(cfg: DictionaryConfig, params, x: jax.Array) -> jax.Array:
  """Latent activations of a folded dictionary, [..., D] -> [..., M]."""
  z = core.pre_activations(params, x.astype(jnp.float32))
  acts, _ = core.select(cfg, z, params.get("threshold"))
  return acts


@functools.partial(jax.jit, static_argnums=0)
def reconstruct(cfg: DictionaryConfig, params, x: jax.Array) -> jax.Array:
  """The output site of a folded dictionary, [..., D] -> [..., E]."""
  rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
  acts = encode(cfg, params, rows)
  out = core.decode_prefixes(cfg, params, rows, acts)[-1]
  return out.reshape(*x.shape[:-1], cfg.d_out).astype(x.dtype)
