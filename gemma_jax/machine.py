"""What this machine has and can do, measured or asked."""

import contextlib
import os
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp


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


def reset_peak_memory() -> None:
  """Lets the peak of this process begin anew, where Linux allows it."""
  with contextlib.suppress(OSError):
    pathlib.Path("/proc/self/clear_refs").write_text("5")


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
