"""A trained dictionary on raw activations: use it, save it, load it."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.dictionaries import core, formats
from gemma_jax.dictionaries.config import DictionaryConfig

if TYPE_CHECKING:
  from gemma_jax.dictionaries.verify import Verified
  from gemma_jax.models import Model

FORMAT = "gemma_jax"


@dataclasses.dataclass(frozen=True)
class Dictionary:
  """An SAE, transcoder or crosscoder, folded to raw activations.

  Attributes:
    config: sizes, selection, sites.
    params: `config.shapes()`, float32: `W_enc` [D, M], `b_enc` [M], `W_dec`
      [M, E], `b_dec` [E], and what the activation and a skip need besides.
    provenance: where it comes from, JSON, saved with it. Of a loaded one:
      "format"; "path"; "dtype" of the file; "convention", the fields of
      `formats.Convention`, which say what was folded; "label", what the path
      says; "metadata", what its config says, in SAELens' names where it has
      them: "model_name", "hook_name", "context_size", "prepend_bos".
  """

  config: DictionaryConfig
  params: dict[str, jax.Array]
  provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def encode(self, x) -> jax.Array:
    """Latent activations, [..., D] -> [..., M]."""
    return encode(self.config, self.params, jnp.asarray(x))

  def decode(self, z) -> jax.Array:
    """What the latents and the bias write, [..., M] -> [..., E].

    A skip reads the input, so it is not part of this; nor is the way back of
    `config.layer_norm`.
    """
    return jnp.asarray(z) @ self.params["W_dec"] + self.params["b_dec"]

  def reconstruct(self, x) -> jax.Array:
    """The output site from the input site, [..., D] -> [..., E]."""
    return reconstruct(self.config, self.params, jnp.asarray(x))

  def save(self, path: str | os.PathLike, *, format: str = FORMAT) -> None:
    """Writes the dictionary into the directory `path`.

    Args:
      path: made if need be.
      format: "gemma_jax", which holds everything; "sae_lens", for SAELens 6;
        "gemma_scope", a params.npz whose label is its path.

    Raises:
      ValueError: an unknown format, or one that cannot hold this dictionary.
    """
    module = formats.writer(format)
    directory = pathlib.Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    params = {name: np.asarray(x) for name, x in self.params.items()}
    module.write(directory, self.config, params, self.provenance)

  def verify(
    self,
    model: "Model",
    text: str | None = None,
    *,
    tokens=None,
    mask=None,
    max_tokens: int = 512,
    context: int = 128,
  ) -> "Verified":
    """Measures L0 and FVU at its sites; see `verify.verify`.

    Args:
      model: to read the sites from.
      text: to measure on; None takes some of Python's language reference.
      tokens: int [B, T] instead of text.
      mask: bool [B, T], False at padding of `tokens`.
      max_tokens: of text, to measure.
      context: positions per window of text, with BOS.

    Raises:
      WrongSiteError: it does not do there what its label says; names the
        neighbouring sites where it does.
      ValueError: the model has no such site, or one of another width.
    """
    from gemma_jax.dictionaries import verify

    return verify.verify(
      self,
      model,
      text,
      tokens=tokens,
      mask=mask,
      max_tokens=max_tokens,
      context=context,
    )


def load(
  path: str | os.PathLike,
  *,
  format: str | None = None,
  site: str | Sequence[str] | None = None,
) -> Dictionary:
  """Loads a dictionary of any format that is known, folded to ours.

  Args:
    path: a directory that holds a dictionary, such as a workdir, or a file of
      one.
    format: one of `formats.FORMATS`; None finds out by what lies there.
    site: what it reads and writes, instead of what its files say; a pair for a
      transcoder. Any spelling that `models` accepts.

  Raises:
    FileNotFoundError: no dictionary there, or a part of it is missing.
    ModuleNotFoundError: a PyTorch file, and torch is not installed.
    ValueError: an unknown format or architecture; several dictionaries; files
      that are damaged, do not fit each other, or hold what is not finite.
  """
  cfg, params, provenance = formats.read(pathlib.Path(path), format, site)
  params = {name: jnp.asarray(x) for name, x in params.items()}
  return Dictionary(cfg, params, provenance)


@functools.partial(jax.jit, static_argnums=0)
def encode(cfg: DictionaryConfig, params, x: jax.Array) -> jax.Array:
  """Latent activations of a folded dictionary, [..., D] -> [..., M]."""
  rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
  if cfg.layer_norm:
    rows = core.centre_tokens(rows)[0]
  acts = core.select(cfg, params, core.pre_activations(params, rows))
  return acts.reshape(*x.shape[:-1], cfg.width)


@functools.partial(jax.jit, static_argnums=0)
def reconstruct_prefixes(
  cfg: DictionaryConfig, params, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """What every prefix of a folded dictionary makes of x.

  Args:
    cfg: the dictionary, with P prefixes.
    params: folded.
    x: raw input [B, D].

  Returns:
    Latent activations [B, M], and reconstructions [P, B, E], float32.
  """
  rows = x.astype(jnp.float32)
  mean, std = 0.0, 1.0
  if cfg.layer_norm:
    rows, mean, std = core.centre_tokens(rows)
  acts = core.select(cfg, params, core.pre_activations(params, rows))
  out = core.decode_prefixes(cfg, params, rows, acts)
  return acts, jnp.stack(out) * std + mean


@functools.partial(jax.jit, static_argnums=0)
def reconstruct(cfg: DictionaryConfig, params, x: jax.Array) -> jax.Array:
  """The output site of a folded dictionary, [..., D] -> [..., E]."""
  rows = x.reshape(-1, x.shape[-1])
  out = reconstruct_prefixes(cfg, params, rows)[1][-1]
  return out.reshape(*x.shape[:-1], cfg.d_out).astype(x.dtype)
