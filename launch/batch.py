r"""Runs a config with every combination of some values of its fields.

python -m launch.batch --config=configs/quickstart.py \
  --grid=config.dictionary.k=16,32 --grid=config.seed=0,1 --workdir=runs/grid

Each combination is a launch.run of its own, in a directory below --workdir
whose name tells its values. Runs that are finished are left alone and runs
that were interrupted are resumed: the same command goes on. At the end come
summary.csv, summary.json and, where the results have L0 and FVU, summary.png.
"""

import dataclasses
import json
import logging
import os
import pathlib
import shlex
import sys
from collections.abc import Iterator
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from gemma_jax import cache, progress
from launch import check, grid, schedule, slurm, summary
from launch.record import Record

log = logging.getLogger("gemma_jax")

CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "FILE or FILE:argument of a config. --config.KEY=VALUE holds for all runs.",
)
GRID = flags.DEFINE_multi_string(
  "grid",
  [],
  "config.KEY=VALUE,VALUE,...: the values of one field. Repeat it for other "
  "fields; every combination is run. Commas inside brackets and quotes belong "
  "to a value.",
)
WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Where the runs and the summary go; default runs/<name of the config>_grid.",
)
JOBS = flags.DEFINE_integer(
  "jobs", None, "Runs at once; default 1, under --slurm what SLURM gives."
)
DEVICES = flags.DEFINE_integer(
  "devices_per_job",
  1,
  "GPUs that each run has for itself; without GPUs, virtual CPU devices.",
)
CACHE = flags.DEFINE_string(
  "cache", None, "Where weights and activations are shared between runs."
)
LIST_ONLY = flags.DEFINE_bool(
  "list_only", False, "Print the state and the command of each run; start none."
)
TRACEBACK = flags.DEFINE_bool(
  "traceback", False, "Show where an error came from, also in the runs."
)
SLURM = flags.DEFINE_bool(
  "slurm", False, "Submit the runs to SLURM, as one job array."
)
SLURM_PARTITION = flags.DEFINE_string(
  "slurm_partition", None, "Partition of the jobs; default SLURM's."
)
SLURM_MINUTES = flags.DEFINE_integer(
  "slurm_time_minutes",
  240,
  "Time limit of a job. Just before it the run saves and is queued again.",
)
SLURM_GPUS = flags.DEFINE_integer(
  "slurm_gpus_per_job",
  None,
  "GPUs of a job; default --devices_per_job. 0 runs on CPUs.",
)
SLURM_OPTION = flags.DEFINE_multi_string(
  "slurm_option",
  [],
  "KEY=VALUE: another option of sbatch, such as cpus-per-task=8. Repeatable.",
)
SLURM_WAIT = flags.DEFINE_bool(
  "slurm_wait", True, "Wait for the jobs, and summarise them."
)
SLURM_CLUSTER = flags.DEFINE_enum(
  "slurm_cluster",
  "slurm",
  ["slurm", "local"],
  "local: the jobs are processes of this machine, to try --slurm without one.",
)


@dataclasses.dataclass
class Plan:
  """A batch whose runs are checked.

  Attributes:
    arguments: those of launch.run that all runs share.
    workdir: of the batch.
    combos: the grid's values of each run, as text, under its name.
    configs: resolved, under the same names.
    record: batch.json.
  """

  arguments: list[str]
  workdir: pathlib.Path
  combos: dict[str, dict[str, str]]
  configs: dict[str, dict[str, Any]]
  record: Record

  def command(self, name: str) -> list[str]:
    """To run one."""
    return [
      *(sys.executable, "-m", "launch.run", *self.arguments),
      *grid.arguments(self.combos[name]),
      f"--workdir={self.workdir / name}",
    ]

  def states(self) -> dict[str, str]:
    """See `schedule.state`."""
    return {
      name: schedule.state(self.workdir / name, config)
      for name, config in self.configs.items()
    }

  def row(self, name: str) -> dict[str, Any]:
    """See `summary.row`."""
    run = {k: self.record.runs[name][k] for k in ("status", "seconds", "error")}
    path = self.workdir / name / "results.json"
    done = run["status"] == "finished" and path.exists()
    results = json.loads(path.read_text()) if done else None
    config = self.configs[name]
    values = {key: grid.value(config, key) for key in self.combos[name]}
    return summary.row(name, values, results, **run)


def plan(devices: int) -> Plan:
  """What the flags ask for, checked before anything starts.

  Args:
    devices: of each run.

  Raises:
    ValueError: flags that do not fit the config or the workdir, or configs
      that their job refuses.
  """
  values = grid.parse(GRID.value)
  if CONFIG.value is None:
    raise ValueError("--config is missing: expected FILE or FILE:argument.")
  filename = config_flags.get_config_filename(flags.FLAGS["config"])
  common = grid.given_overrides(flags.FLAGS)
  for key in values.keys() & common.keys():
    raise ValueError(
      f"config.{key} is given by --grid and by --config.{key}: choose one."
    )
  grid.check_keys(CONFIG.value.to_dict(), list(values))
  stem = pathlib.Path(filename.split(":")[0]).stem
  workdir = pathlib.Path(WORKDIR.value or f"runs/{stem}_grid")
  record = Record(
    workdir,
    command=["python", "-m", "launch.batch", *sys.argv[1:]],
    config=filename,
    overrides=common,
  )
  combos = grid.combinations(values)
  combos = dict(zip(record.names(combos), combos, strict=True))
  configs = {
    name: grid.resolve(filename, common | combo)
    for name, combo in combos.items()
  }
  check.require_sound(configs, schedule.on_cpu(devices, os.environ))
  arguments = [f"--config={filename}", *grid.arguments(common)]
  arguments += [f"--cache={CACHE.value}"] if CACHE.value else []
  arguments += ["--traceback"] if TRACEBACK.value else []
  return Plan(arguments, workdir, combos, configs, record)


def by_slurm(
  asked: Plan, names: list[str], gpus: int
) -> Iterator[tuple[schedule.Run, schedule.Outcome]]:
  """Submits runs; yields each when its job has ended."""
  tasks = [
    slurm.Task(
      name,
      asked.command(name),
      asked.workdir / name,
      cpu_devices=1 if gpus else DEVICES.value,
    )
    for name in names
  ]
  executor = slurm.executor(
    asked.workdir / "slurm",
    cluster=SLURM_CLUSTER.value,
    minutes=SLURM_MINUTES.value,
    gpus=gpus,
    at_once=JOBS.value,
    partition=SLURM_PARTITION.value,
    options=SLURM_OPTION.value,
  )
  jobs = slurm.submit(tasks, executor)
  for task, job in zip(tasks, jobs, strict=True):
    print(f"{task.name}: job {job.job_id}", flush=True)
  return slurm.wait(tasks, jobs)


def batch() -> int:
  """All of it; returns the exit code."""
  gpus = SLURM_GPUS.value
  gpus = DEVICES.value if gpus is None else gpus
  if SLURM.value:
    asked = plan(gpus or DEVICES.value)
  else:
    jobs = 1 if JOBS.value is None else JOBS.value
    # First: it is told at once, while the check takes seconds.
    envs = schedule.environments(jobs, DEVICES.value, os.environ)
    asked = plan(DEVICES.value)
  states = asked.states()
  if LIST_ONLY.value:
    for name, state in states.items():
      print(f"{state:9}  {shlex.join(asked.command(name))}")
    return 0
  todo = [name for name, state in states.items() if state != "finished"]
  asked.record.start(asked.combos, states)
  if not todo:
    return summarise(asked)
  if SLURM.value:
    ended = by_slurm(asked, todo, gpus)
    if not SLURM_WAIT.value:
      print("The same command without --noslurm_wait summarises them.")
      return 0
  else:
    runs = [
      schedule.Run(name, asked.command(name), asked.workdir / name)
      for name in todo
    ]
    ended = schedule.go(runs, envs)
  done = len(states) - len(todo)
  with progress.bar(len(states), "runs", unit="runs", initial=done) as bar:
    bar.unit_scale = False
    for run, outcome in ended:
      if outcome.status == "not started":
        continue
      asked.record.end(run.name, outcome)
      bar.write(summary.headline(asked.row(run.name)))
      sys.stdout.flush()
      bar.update()
  return summarise(asked)


def summarise(asked: Plan) -> int:
  """Writes and prints what came out; returns the exit code."""
  rows = [asked.row(name) for name in asked.combos]
  paths = summary.write(rows, asked.workdir)
  print(f"\n{summary.table(rows)}\n")
  failed = [row for row in rows if row["status"] == "failed"]
  for row in failed:
    where = asked.workdir / row["run"] / "log.txt"
    print(f"failed: {row['run']}: {row['error']} ({where})")
  left = [r for r in rows if r["status"] in ("interrupted", "not started")]
  if left:
    print(f"{len(left)} of {len(rows)} runs are left.", end=" ")
    if SLURM.value:
      print("Jobs of SLURM go on (scancel ends them).", end=" ")
    print("To go on, resume with the same command.")
  print("  ".join(map(str, paths)))
  return 1 if failed else 0


def _parse(argv):
  """Reads the flags; a config that lacks a field says which one was meant."""
  try:
    return flags.FLAGS(argv)
  except grid.ERRORS as e:
    sys.exit(f"error: {grid.explain(e)}")


def main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments {argv[1:]}.")
  absl_logging.set_verbosity(absl_logging.WARNING)
  log.setLevel(logging.INFO)
  if CACHE.value:
    os.environ[cache.VARIABLE] = CACHE.value
  try:
    code = batch()
  except (ValueError, OSError, ImportError) as e:
    if TRACEBACK.value:
      raise
    sys.exit(f"error: {e}\n(--traceback shows where.)")
  sys.exit(code)


if __name__ == "__main__":
  app.run(main, flags_parser=_parse)
