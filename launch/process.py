"""Sets up the process that a job runs in, before the first use of a device."""

import logging
import os
import signal
import sys

from absl import logging as absl_logging

from gemma_jax import cache

log = logging.getLogger("gemma_jax")


def set_up(cache_directory: str | None) -> None:
  """Logging, SIGTERM, the cache, and the cache of compiled programs.

  Args:
    cache_directory: what `cache.directory` is to be; None leaves it.
  """
  absl_logging.set_verbosity(absl_logging.WARNING)
  log.setLevel(logging.INFO)
  # PyTorch is not needed; transformers need not say that it is missing.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  if cache_directory:
    os.environ[cache.VARIABLE] = cache_directory
  signal.signal(signal.SIGTERM, _stop)

  import jax

  compiled = cache.directory("compiled")
  jax.config.update("jax_compilation_cache_dir", str(compiled))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _stop(*_) -> None:
  log.info("stopped: resume with the same command")
  sys.exit(0)
