"""Checks configs with their jobs, apart from the process that starts them.

A process of its own, on the CPU: checking makes a mesh, and the first use of
JAX takes the GPUs, which belong to the runs.
"""

import importlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def faults(
  configs: Sequence[Mapping[str, Any]], env: Mapping[str, str]
) -> list[str | None]:
  """What is wrong with each config, or None.

  Args:
    configs: resolved.
    env: the environment of a run, with as many CPU devices as it will have.

  Raises:
    OSError: the checking process died.
  """
  done = subprocess.run(
    [sys.executable, "-m", "launch.check"],
    input=json.dumps(list(configs)).encode(),
    env={**env, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
  )
  if done.returncode:
    last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
    raise OSError(f"The configs could not be checked: {''.join(last)}")
  return json.loads(done.stdout)


def require_sound(
  configs: Mapping[str, Mapping[str, Any]], env: Mapping[str, str]
) -> None:
  """Checks the configs of several runs.

  Args:
    configs: of each run's name.
    env: see `faults`.

  Raises:
    ValueError: two runs are the same, or a job refuses some; all in one, what
      is wrong with several once.
  """
  names = list(configs)
  wrong = [
    f"{names[i]} and {names[j]} are the same run."
    for i, j in itertools.combinations(range(len(names)), 2)
    if configs[names[i]] == configs[names[j]]
  ]
  if not wrong:
    same = {}
    found = faults(list(configs.values()), env)
    for name, fault in zip(names, found, strict=True):
      if fault:
        same.setdefault(fault, []).append(name)
    for fault, those in same.items():
      more = f" and {len(those) - 1} more" if len(those) > 1 else ""
      wrong.append(f"{those[0]}{more}: {fault}")
  if wrong:
    raise ValueError("\n".join(["Nothing was started.", *wrong]))


def _fault(config: Mapping[str, Any]) -> str | None:
  if not isinstance(config.get("job"), str):
    return "config.job is missing: expected the path of a module."
  try:
    job = importlib.import_module(config["job"])
    if not hasattr(job, "run"):
      return f"config.job={config['job']!r} has no run(config, workdir)."
    if hasattr(job, "prepare"):  # the cheap checks
      job.prepare(config)
  except Exception as e:  # whatever it is, the run would meet it too
    known = isinstance(e, ValueError | OSError | ImportError)
    return str(e) if known else f"{type(e).__name__}: {e}"
  return None


def main() -> None:
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # what a job prints is no answer
  with answers:
    json.dump([_fault(c) for c in json.load(sys.stdin)], answers)


if __name__ == "__main__":
  main()
