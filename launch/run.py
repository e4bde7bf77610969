"""Runs the job that a config names.

python -m launch.run --config=configs/quickstart.py --workdir=runs/first
"""

import importlib
import json
import logging
import os
import pathlib
import signal
import sys
import time

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from gemma_jax import cache

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "FILE or FILE:argument of a config.", lock_config=True
)
WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where the run goes; default runs/<name of the config>."
)
CACHE = flags.DEFINE_string(
  "cache", None, "Where weights and activations are shared between runs."
)
DRY_RUN = flags.DEFINE_bool(
  "dry_run", False, "Print what would be done and what it costs; start nothing."
)
TRACEBACK = flags.DEFINE_bool(
  "traceback", False, "Show where an error came from."
)


def _set_up_jax() -> None:
  """Everything that must happen before the first use of a device."""
  import jax

  compiled = cache.directory("compiled")
  jax.config.update("jax_compilation_cache_dir", str(compiled))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _stop(*_) -> None:
  logging.getLogger("gemma_jax").info("stopped: resume with the same command")
  sys.exit(0)


def _parse(argv):
  """Reads the flags; a config that lacks a field says which one was meant."""
  try:
    return flags.FLAGS(argv)
  except (AttributeError, KeyError, OSError, TypeError) as e:
    # Of ml_collections, whose message is the last part of a nested one.
    text = e.args[0] if e.args and isinstance(e.args[0], str) else str(e)
    sys.exit(f"error: {text.strip()}")


def main(argv) -> None:
  began = time.perf_counter()
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments {argv[1:]}.")
  absl_logging.set_verbosity(absl_logging.WARNING)
  logging.getLogger("gemma_jax").setLevel(logging.INFO)
  # PyTorch is not needed; transformers need not say that it is missing.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  if CACHE.value:
    os.environ[cache.VARIABLE] = CACHE.value
  signal.signal(signal.SIGTERM, _stop)
  _set_up_jax()
  config = CONFIG.value.to_dict()
  filename = config_flags.get_config_filename(flags.FLAGS["config"])
  name = pathlib.Path(filename.split(":")[0]).stem
  workdir = pathlib.Path(WORKDIR.value or f"runs/{name}")
  try:
    job = importlib.import_module(config["job"])
    if DRY_RUN.value:
      print(json.dumps({"config": config, **job.plan(config)}, indent=2))
      return
    results = job.run(config, workdir)
  except (ValueError, OSError, ImportError, FloatingPointError) as e:
    if TRACEBACK.value:
      raise
    sys.exit(f"error: {e}\n(--traceback shows where.)")
  for key, value in results.items():
    if isinstance(value, float):
      value = f"{value:.6g}"
    if isinstance(value, int | str):
      print(f"{key:28} {value}")
  minutes = (time.perf_counter() - began) / 60
  print(f"{workdir}/results.json  {workdir}/report.html  {minutes:.1f} minutes")


if __name__ == "__main__":
  app.run(main, flags_parser=_parse)
