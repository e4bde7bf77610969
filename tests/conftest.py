"""Eight virtual CPU devices, a cache of the session's own, tiny models."""

import os

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


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
  return directory
