"""Says what this machine is, and which of our models run on it.

python -m launch.doctor [--json]
"""

import glob
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess

import jax
from absl import app, flags
from absl import logging as absl_logging

from gemma_jax import cache, machine
from launch import fit

PACKAGES = [
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "tensorstore",
  "transformers",
  "safetensors",
  "numpy",
  "torch",
]


def _cores() -> int:
  """Those that this process may use; macOS does not tell, and has all."""
  known = hasattr(os, "sched_getaffinity")
  return len(os.sched_getaffinity(0)) if known else os.cpu_count()


def gpu() -> dict:
  """The NVIDIA driver's version (or None), and what is missing, in words."""
  smi = shutil.which("nvidia-smi")
  driver = None
  if smi:
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    driver = (done.stdout.split() or [None])[0] if not done.returncode else None
  if jax.default_backend() != "cpu":
    note = "none missing"
  elif not smi and not glob.glob("/dev/nvidia[0-9]*"):
    note = "no GPU here"
  elif _version("jax-cuda13-plugin") is None:
    note = "JAX sees only the CPU: pip install -e '.[gpu]'"
  else:
    note = (
      "JAX has CUDA and sees only the CPU: see JAX_PLATFORMS and nvidia-smi"
    )
  return {"driver": driver, "note": note}


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def examine() -> dict:
  """Everything that this program says, as one JSON object."""
  first = jax.devices()[0]
  host, device = machine.host_memory(), machine.device_memory()
  there = cache.directory().absolute()
  while not there.exists():
    there = there.parent
  dtypes = ["float32"] + ["bfloat16"] * (first.platform != "cpu")
  return {
    "devices": {
      "platform": first.platform,
      "kind": first.device_kind,
      "count": jax.device_count(),
      "memory": {"total": device[0], "available": device[1]},
    },
    "host": {
      "cores": _cores(),
      "memory": {"total": host[0], "available": host[1]},
      "processes": jax.process_count(),
      "cache": str(cache.directory()),
      "cache_free": shutil.disk_usage(there).free,
    },
    "gpu": gpu(),
    "versions": {"python": platform.python_version()}
    | {name: _version(name) or "not installed" for name in PACKAGES},
    "matmul": {dtype: machine.matmul_rate(dtype) for dtype in dtypes},
    "copy": machine.copy_bandwidth(),
    "models": fit.which_models(device[1], jax.device_count()),
    "estimate": fit.ESTIMATE,
  }


def text(facts: dict) -> str:
  """What `examine` found, for people."""
  d, h, g = facts["devices"], facts["host"], facts["gpu"]

  def memory(of):
    return f"{_gib(of['available'])} of {_gib(of['total'])} free"

  rates = [f"{name} {_rate(r)}" for name, r in facts["matmul"].items()]
  lines = [
    f"devices   {d['count']} x {d['platform']} ({d['kind']}), each "
    f"{memory(d['memory'])}",
    f"host      {h['cores']} cores, {memory(h['memory'])}, "
    f"{h['processes']} process{'es' * (h['processes'] > 1)}",
    f"cache     {h['cache']}, {_gib(h['cache_free'])} free",
    f"gpu       {g['note']}" + f", driver {g['driver']}" * bool(g["driver"]),
    f"matmul    {', '.join(rates)} on one device",
    f"copy      {facts['copy'] / 1e9:.1f} GB/s, read and written",
    "versions  " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items()),
    "",
    f"{'model':12} {'parameters':>10}  {'float32':46} bfloat16",
  ]
  for row in facts["models"]:
    cells = [
      f"{_gib(row['bytes'][dtype]):>9}, {_verdict(row[dtype])}"
      for dtype in ("float32", "bfloat16")
    ]
    millions = f"{row['parameters'] / 1e6:,.0f} M"
    lines.append(f"{row['model']:12} {millions:>10}  {cells[0]:46} {cells[1]}")
  return "\n".join([*lines, "", facts["estimate"]])


def _verdict(answer) -> str:
  axes = {axis: n for axis, n in answer["mesh"].items() if n > 1}
  mesh = ", ".join(f"{a}={n}" for a, n in (axes or {"data": 1}).items())
  if answer["fits"]:
    return f"fits ({mesh})"
  each = f" each ({mesh})" if axes else ""
  return f"no: needs {_gib(answer['needs'])}{each}"


def _gib(size: float) -> str:
  return f"{size / 2**30:.1f} GiB"


def _rate(flops: float) -> str:
  tera = flops >= 1e12
  return f"{flops / (1e12 if tera else 1e9):.1f} {'T' if tera else 'G'}FLOP/s"


def main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments {argv[1:]}.")
  absl_logging.set_verbosity(absl_logging.WARNING)
  facts = examine()
  print(json.dumps(facts, indent=2) if JSON.value else text(facts))


if __name__ == "__main__":
  # Not above: benchmarks that import this file have a --json of their own.
  JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")
  app.run(main)
