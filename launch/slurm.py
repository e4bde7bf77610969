"""Runs as one job array of SLURM, through submitit."""

import os
import pathlib
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch import schedule
from launch.schedule import Outcome, Run

POLL_SECONDS = 1.0


class Task(Run):
  """A run that saves when SLURM takes its node, and is queued again.

  Args:
    cpu_devices: virtual devices, for jobs without GPUs.
    See `Run` for the others.
  """

  def __init__(
    self,
    name: str,
    command: Sequence[str],
    workdir: pathlib.Path,
    *,
    cpu_devices: int = 1,
  ):
    super().__init__(name, command, workdir)
    self.cpu_devices = cpu_devices

  def __call__(self, env: Mapping[str, str] | None = None) -> Outcome:
    # Sent before the time is up, and at preemption. Handled by submitit,
    # which would not wait until the run has saved.
    queue_again = signal.signal(signal.SIGUSR2, lambda *_: self.stop())
    env = schedule.on_cpu(self.cpu_devices, env or os.environ)
    outcome = super().__call__(env)
    signal.signal(signal.SIGUSR2, queue_again)
    if self.stopped and outcome.status != "finished" and callable(queue_again):
      queue_again(signal.SIGUSR2, None)
    return outcome

  def start(self, **options):
    # SLURM signals every process of a job, and this one would kill the run. An
    # ignored signal stays so in the child.
    ours = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
      return super().start(**options)
    finally:
      signal.signal(signal.SIGUSR2, ours)

  def checkpoint(self):
    """What submitit queues again."""
    import submitit

    again = Task(
      self.name, self.command, self.workdir, cpu_devices=self.cpu_devices
    )
    return submitit.helpers.DelayedSubmission(again)


def executor(
  folder: pathlib.Path,
  *,
  cluster: str,
  minutes: int,
  gpus: int,
  at_once: int | None = None,
  partition: str | None = None,
  options: Sequence[str] = (),
) -> Any:
  """A submitit executor.

  Args:
    folder: for submitit's own files; on a disk that all nodes share.
    cluster: "slurm", or "local" for processes of this machine.
    minutes: for each run, before it is queued again.
    gpus: for each run.
    at_once: runs of the array; None leaves it to SLURM.
    partition: of SLURM.
    options: others of sbatch, KEY=VALUE each.

  Raises:
    ImportError: submitit is not installed.
    OSError: there is no SLURM here.
    ValueError: an option that is not KEY=VALUE.
  """
  wrong = [text for text in options if "=" not in text]
  if wrong:
    raise ValueError(
      f"--slurm_option={wrong[0]}: expected KEY=VALUE, an option of sbatch, "
      "such as --slurm_option=cpus-per-task=8."
    )
  try:
    import submitit
  except ImportError as e:
    raise ImportError(
      "--slurm needs submitit: pip install 'gemma_jax[slurm]'."
    ) from e
  try:
    made = submitit.AutoExecutor(folder=folder, cluster=cluster)
  except (RuntimeError, ValueError) as e:
    raise OSError(f"--slurm: {e}") from e
  made.update_parameters(
    name="gemma_jax",
    nodes=1,
    tasks_per_node=1,
    timeout_min=minutes,
    gpus_per_node=gpus or None,
    slurm_partition=partition,
    slurm_array_parallelism=at_once,
    slurm_additional_parameters=dict(t.split("=", 1) for t in options) or None,
  )
  return made


def submit(runs: Sequence[Task], executor: Any) -> list[Any]:
  """Submits them as one job array; returns submitit's jobs."""
  with executor.batch():
    return [executor.submit(run) for run in runs]


def wait(
  runs: Sequence[Task], jobs: Sequence[Any]
) -> Iterator[tuple[Task, Outcome]]:
  """Yields each run when its job has ended; SIGTERM and SIGINT end it."""
  stopped = []
  pending = dict(zip(runs, jobs, strict=True))
  with schedule.on_stop(lambda *_: stopped.append(True)):
    while pending and not stopped:
      for run, job in list(pending.items()):
        if job.done():
          del pending[run]
          yield run, _outcome(job)
      time.sleep(POLL_SECONDS if pending else 0)


def _outcome(job) -> Outcome:
  import submitit

  try:
    return job.result()
  except submitit.core.utils.FailedJobError as e:
    return Outcome("failed", error=str(e).strip().splitlines()[-1])
  except submitit.core.utils.UncompletedJobError as e:
    # Cancelled, or out of time too often: the same command resumes it.
    return Outcome("interrupted", error=str(e).strip().splitlines()[0])
