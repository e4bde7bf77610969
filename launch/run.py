"""Runs the job that a config names.

python -m launch.run --config=configs/quickstart.py --workdir=runs/first
"""

import importlib
import json
import pathlib
import sys
import time

from absl import app, flags
from ml_collections import config_flags

from launch import distributed, process

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
COORDINATOR = flags.DEFINE_string(
  "coordinator_address", None, "HOST:PORT of process 0, for several processes."
)
PROCESSES = flags.DEFINE_integer("num_processes", None, "Of the whole run.")
PROCESS = flags.DEFINE_integer("process_id", None, "From 0; of this process.")
TIMEOUT = flags.DEFINE_integer(
  "initialization_timeout", 300, "Seconds to wait for the other processes."
)


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
  process.set_up(CACHE.value)
  config = CONFIG.value.to_dict()
  filename = config_flags.get_config_filename(flags.FLAGS["config"])
  name = pathlib.Path(filename.split(":")[0]).stem
  workdir = pathlib.Path(WORKDIR.value or f"runs/{name}")
  try:
    distributed.start(
      COORDINATOR.value, PROCESSES.value, PROCESS.value, timeout=TIMEOUT.value
    )
    job = importlib.import_module(config["job"])
    if DRY_RUN.value:
      results = {"config": config, **job.plan(config)}
    else:
      results = job.run(config, workdir)
  except (ValueError, OSError, ImportError, FloatingPointError) as e:
    if TRACEBACK.value:
      raise
    sys.exit(f"error: {e}\n(--traceback shows where.)")
  import jax  # late, so that wrong flags are told at once

  if jax.process_index():
    return  # process 0 speaks for all
  if DRY_RUN.value:
    print(json.dumps(results, indent=2))
    return
  for key, value in results.items():
    if isinstance(value, float):
      value = f"{value:.6g}"
    if isinstance(value, int | str):
      print(f"{key:28} {value}")
  minutes = (time.perf_counter() - began) / 60
  page = workdir / "report.html"
  shown = f"{page}  " if page.exists() else ""
  print(f"{workdir}/results.json  {shown}{minutes:.1f} minutes")


if __name__ == "__main__":
  app.run(main, flags_parser=_parse)
