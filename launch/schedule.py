"""Runs as processes: their devices, their logs, how they ended."""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import glob
import logging
import os
import pathlib
import queue
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainers import fields

log = logging.getLogger("gemma_jax")

POLL_SECONDS = 0.1
# What a harvest says whose store is being written (activations/claim.py).
_BUSY = re.compile(r"Another process is writing (.+?)(?: \(its claim|\. Wait)")
_COUNT = "--xla_force_host_platform_device_count"


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a run ended.

  Attributes:
    status: "finished", "failed", "interrupted" (the same command resumes it)
      or "not started".
    seconds: that its process took.
    error: the last error in its log, if it failed.
  """

  status: str
  seconds: float = 0.0
  error: str | None = None


def state(workdir: pathlib.Path, config: Mapping[str, Any]) -> str:
  """ "finished", "to resume" or "new".

  Results of another config are none of this run's: it is started, and its job
  says what is wrong.
  """
  if not (workdir / "results.json").exists():
    return "to resume" if workdir.exists() else "new"
  try:
    fields.compare(workdir, config)
  except ValueError:
    return "to resume"
  return "finished"


# -------------------------------------------------------------------- devices
def gpus(env: Mapping[str, str]) -> list[str]:
  """The GPUs that runs may use, as CUDA_VISIBLE_DEVICES names them.

  Asks the driver and not JAX, which would take them.
  """
  platforms = env.get("JAX_PLATFORMS", "")
  if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
    return []
  visible = env.get("CUDA_VISIBLE_DEVICES")
  if visible is not None:
    names = [name.strip() for name in visible.split(",")]
    return [name for name in names if name not in ("", "-1")]
  if smi := shutil.which("nvidia-smi"):
    done = subprocess.run([smi, "-L"], capture_output=True, text=True)
    lines = [x for x in done.stdout.splitlines() if x.startswith("GPU ")]
    if not done.returncode:
      return [str(i) for i in range(len(lines))]
  return [str(i) for i in range(len(glob.glob("/dev/nvidia[0-9]*")))]


def environments(
  jobs: int, devices: int, env: Mapping[str, str]
) -> list[dict[str, str]]:
  """The environment of each run of those that go at once.

  Args:
    jobs: at once.
    devices: of each: GPUs of its own, or virtual devices of the CPU.
    env: of this process.

  Raises:
    ValueError: fewer GPUs than that.
  """
  if jobs < 1 or devices < 1:
    raise ValueError(
      f"--jobs={jobs} and --devices_per_job={devices} must be at least 1."
    )
  found = gpus(env)
  if not found:
    return [on_cpu(devices, env)] * jobs
  if jobs * devices > len(found):
    raise ValueError(
      f"--jobs={jobs} with --devices_per_job={devices} needs {jobs * devices} "
      f"GPUs, and there are {len(found)}. Lower one of them."
    )
  return [
    {**env, "CUDA_VISIBLE_DEVICES": ",".join(found[i : i + devices])}
    for i in range(0, jobs * devices, devices)
  ]


def on_cpu(devices: int, env: Mapping[str, str]) -> dict[str, str]:
  """With so many virtual devices; one leaves XLA_FLAGS as it is."""
  if devices == 1:
    return dict(env)
  kept = env.get("XLA_FLAGS", "").split()
  kept = [flag for flag in kept if not flag.startswith(_COUNT)]
  return {**env, "XLA_FLAGS": " ".join([*kept, f"{_COUNT}={devices}"])}


# ------------------------------------------------------------------------ run
class Run:
  """One `launch.run` in a process of its own.

  Args:
    name: of the run.
    command: to execute.
    workdir: whose log.txt takes what it prints, behind what is there.
  """

  def __init__(self, name: str, command: Sequence[str], workdir: pathlib.Path):
    self.name, self.command, self.workdir = name, list(command), workdir
    self.stopped = False
    self._process: subprocess.Popen | None = None

  def __call__(self, env: Mapping[str, str] | None = None) -> Outcome:
    """Runs it to its end, or until `stop`; waits for stores that are busy."""
    if self.stopped:
      return Outcome("not started")
    began = time.monotonic()
    self.workdir.mkdir(parents=True, exist_ok=True)
    with (self.workdir / "log.txt").open("a+b") as file:
      try:
        # The child inherits the lock: a batch that was killed may have left
        # one behind, and two must not write to one workdir.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        error = f"Another process is running {self.workdir}. Wait for it."
        return Outcome("failed", error=error)
      outcome = self._attempt(file, env)
      while busy := _BUSY.search(outcome.error or ""):
        # Runs of a grid share their activations: the first one harvests.
        log.info("%s waits: another run is writing %s", self.name, busy[1])
        while not self.stopped and _is_written(pathlib.Path(busy[1])):
          time.sleep(POLL_SECONDS)
        if self.stopped:
          outcome = Outcome("interrupted")
        else:
          outcome = self._attempt(file, env)
    seconds = time.monotonic() - began
    return dataclasses.replace(outcome, seconds=seconds)

  def stop(self, number: int = signal.SIGTERM) -> None:
    """Lets it save and end, or never start; SIGKILL ends it at once."""
    self.stopped = True
    if self._process is not None:
      self._process.send_signal(number)

  def _attempt(self, file, env) -> Outcome:
    start = file.seek(0, os.SEEK_END)
    self._process = self.start(
      stdin=subprocess.DEVNULL,
      stdout=file,
      stderr=subprocess.STDOUT,
      env=env,
      # A Ctrl-C is for us, who pass on what lets it save.
      process_group=0,
    )
    if self.stopped:
      self.stop()
    # Not wait(): a handler of a signal may ask for the process meanwhile.
    while (code := self._process.poll()) is None:
      time.sleep(POLL_SECONDS)
    if code == 0:
      done = (self.workdir / "results.json").exists()
      return Outcome("finished" if done else "interrupted")
    if code == -signal.SIGTERM or (self.stopped and code == -signal.SIGKILL):
      return Outcome("interrupted")
    file.seek(start)
    error = last_error(file.read().decode(errors="replace"))
    if code < 0:
      error = f"killed by {signal.Signals(-code).name}; the log ends: {error}"
    return Outcome("failed", error=error)

  def start(self, **options) -> subprocess.Popen:
    """The process; `options` are those of Popen."""
    return subprocess.Popen(self.command, **options)


def last_error(text: str) -> str:
  """The last `error:` of a log in one line, else the log's last line."""
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  for i in reversed(range(len(lines))):
    if lines[i].startswith("error:"):
      own = [x for x in lines[i : i + 9] if not x.startswith("(--traceback")]
      return " ".join(own).removeprefix("error:").strip()
  return lines[-1] if lines else "nothing in the log"


def _is_written(part: pathlib.Path) -> bool:
  """Whether a process holds the lock of a store's part."""
  try:
    with (part / ".lock").open() as file:
      fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except BlockingIOError:
    return True
  except OSError:  # a store elsewhere, which has no such lock
    time.sleep(10)
  return False


# ------------------------------------------------------------------- schedule
def go(
  runs: Sequence[Run], environments: Sequence[Mapping[str, str]]
) -> Iterator[tuple[Run, Outcome]]:
  """Runs as many at once as there are environments; yields them as they end.

  SIGTERM and SIGINT let them save and end; a second SIGINT kills them.
  """
  free = queue.SimpleQueue()
  for env in environments:
    free.put(env)

  def one(run):
    env = free.get()
    try:
      return run(env)
    finally:
      free.put(env)

  def stop(number, _):
    again = number == signal.SIGINT and all(run.stopped for run in runs)
    for run in runs:
      run.stop(signal.SIGKILL if again else signal.SIGTERM)

  pool = concurrent.futures.ThreadPoolExecutor(len(environments))
  with on_stop(stop), pool:
    try:
      futures = {pool.submit(one, run): run for run in runs}
      for future in concurrent.futures.as_completed(futures):
        yield futures[future], future.result()
    finally:  # nobody takes the rest: a full disk, a closed terminal
      for run in runs:
        run.stop()


@contextlib.contextmanager
def on_stop(handler):
  """Calls it as a handler of SIGTERM and SIGINT meanwhile."""
  both = (signal.SIGTERM, signal.SIGINT)
  before = {number: signal.signal(number, handler) for number in both}
  try:
    yield
  finally:
    for number, old in before.items():
      signal.signal(number, old)
