"""batch.json: what a batch was asked for, and how its runs ended so far."""

import json
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from launch import grid
from launch.schedule import Outcome


class Record:
  """That of one directory; nothing is written before `start`.

  Args:
    workdir: of the batch.
    command: that the user gave.
    config: FILE or FILE:argument.
    overrides: that hold for all runs.

  Attributes:
    runs: of each name its overrides, status, seconds and error.

  Raises:
    ValueError: the directory is that of another config or other overrides.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    *,
    command: Sequence[str],
    config: str,
    overrides: Mapping[str, str],
  ):
    self._path = workdir / "batch.json"
    self._asked = {
      "command": shlex.join(command),
      "config": config,
      "overrides": dict(overrides),
    }
    self.runs: dict[str, dict[str, Any]] = {}
    if not self._path.exists():
      return
    try:
      there = json.loads(self._path.read_text())
    except ValueError as e:
      raise ValueError(
        f"{self._path} is no JSON ({e}). Restore it, or use another --workdir."
      ) from e
    before, now = _common(there), _common(self._asked)
    if before != now:
      raise ValueError(
        f"{workdir} belongs to another batch:\n  there {before}\n  here  {now}"
        "\nUse another --workdir, or the same config and overrides."
      )
    self.runs = there["runs"]

  def names(self, combos: Sequence[Mapping[str, str]]) -> list[str]:
    """A name for each combination; those that are known keep theirs.

    Raises:
      ValueError: runs that are known are not among them.
    """
    known = {name: run["overrides"] for name, run in self.runs.items()}
    lost = [name for name, combo in known.items() if combo not in combos]
    if lost:
      raise ValueError(
        f"{self._path.parent} has runs that are not in this grid: "
        f"{'; '.join(lost)}. A grid there may add runs and not leave out any. "
        "Give their values too, or use another --workdir."
      )
    return grid.names(combos, known)

  def start(
    self, combos: Mapping[str, Mapping[str, str]], states: Mapping[str, str]
  ) -> None:
    """Writes what is to be done.

    Args:
      combos: the overrides of each name.
      states: see `schedule.state`.
    """
    for name, combo in combos.items():
      new = {"status": "not started", "seconds": None, "error": None}
      run = self.runs.setdefault(name, {"overrides": dict(combo)} | new)
      if states[name] == "finished":  # or its process outlived the batch
        run.update(status="finished", error=None)
    self._path.parent.mkdir(parents=True, exist_ok=True)
    self._write()

  def end(self, name: str, outcome: Outcome) -> None:
    """Writes how a run ended; its seconds add up over the attempts."""
    run = self.runs[name]
    run["seconds"] = (run["seconds"] or 0.0) + outcome.seconds
    run.update(status=outcome.status, error=outcome.error)
    self._write()

  def _write(self) -> None:
    values = {}
    for run in self.runs.values():
      for key, value in run["overrides"].items():
        values.setdefault(key, {})[value] = None
    whole = {
      **self._asked,
      "grid": {key: list(seen) for key, seen in values.items()},
      "runs": self.runs,
    }
    partial = self._path.with_name(f".{self._path.name}")
    partial.write_text(json.dumps(whole, indent=2))
    partial.rename(self._path)


def _common(asked) -> str:
  config = f"--config={asked['config']}"
  return shlex.join([config, *grid.arguments(asked["overrides"])])
