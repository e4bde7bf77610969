"""Says what this machine is, and which of our models run on it.

python -m launch.doctor [--json]
"""

import glob
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import app, flags
from absl import logging as absl_logging

from gemma_jax import cache
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


def matmul_rate(
  dtype="float32",
  *,
  size: int | None = None,
  clock: Callable[[], float] = time.perf_counter,
) -> float:
  """Measured FLOP/s of a square matrix product on one device.

  The precision is JAX's default, which models are run with: float32 on a GPU
  may be TF32.

  Args:
    dtype: of both factors and the product.
    size: rows of each; default 2048 on a CPU, 8192 elsewhere.
    clock: gives seconds.

  Returns:
    2 size^3 over the best time of several.
  """
  size = size or (2048 if jax.default_backend() == "cpu" else 8192)
  keys = jax.random.split(jax.random.key(0))
  a, b = (jax.random.normal(key, (size, size), dtype) for key in keys)
  product = jax.jit(jnp.matmul)
  return 2 * size**3 / _best(lambda: product(a, b), clock)


def copy_bandwidth(
  *,
  size: int | None = None,
  clock: Callable[[], float] = time.perf_counter,
) -> float:
  """Measured bytes/s of one device's memory, reading and writing together.

  Args:
    size: bytes; default 256 MiB on a CPU, 1 GiB elsewhere.
    clock: gives seconds.

  Returns:
    Twice the size over the best time of adding one to an array in place.
  """
  size = size or (2**28 if jax.default_backend() == "cpu" else 2**30)
  # In place: fresh pages would be timed otherwise, not the copy.
  add = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = [jnp.zeros(size // 4, jnp.float32)]

  def step():
    x[0] = add(x[0])
    return x[0]

  return 2 * x[0].nbytes / _best(step, clock)


def _best(work, clock, *, seconds: float = 0.4) -> float:
  """Least seconds of a few runs, the one that compiles not counted."""
  jax.block_until_ready(work())
  times = []
  while len(times) < 3 or sum(times) < seconds:
    began = clock()
    jax.block_until_ready(work())
    times.append(clock() - began)
  return min(times)


def host_memory() -> tuple[int, int]:
  """(total, available) bytes of the host, or of the container's limit."""
  page = os.sysconf("SC_PAGE_SIZE")
  total = available = page * os.sysconf("SC_PHYS_PAGES")
  meminfo = pathlib.Path("/proc/meminfo")
  if meminfo.exists():
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
  limit = pathlib.Path("/sys/fs/cgroup/memory.max")
  if limit.exists() and limit.read_text().strip().isdigit():
    total = min(total, int(limit.read_text()))
  return total, min(total, available)


def _cores() -> int:
  """Those that this process may use; macOS does not tell, and has all."""
  known = hasattr(os, "sched_getaffinity")
  return len(os.sched_getaffinity(0)) if known else os.cpu_count()


def device_memory() -> tuple[int, int]:
  """(total, available) bytes that JAX may use on the smallest local device.

  Devices that do not tell, such as CPUs, share the host's.
  """
  found = []
  for device in jax.local_devices():
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
      limit = stats["bytes_limit"]
      found.append((limit, limit - stats.get("bytes_in_use", 0)))
  if found:
    return min(found, key=lambda pair: pair[1])
  total, available = host_memory()
  count = jax.local_device_count()
  return total // count, available // count


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
  host, device = host_memory(), device_memory()
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
    "matmul": {dtype: matmul_rate(dtype) for dtype in dtypes},
    "copy": copy_bandwidth(),
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
