"""Trainings by other systems, in the environment that has them, beside ours."""

import json
import os
import pathlib
import subprocess

SCRIPT = pathlib.Path(__file__).with_name("dictionary_peer.py")


class Server:
  """A peer in a process of its own, which waits while the others run.

  Args:
    command: of the process; its lines in JSON are its answers, the first says
      that it is ready.
  """

  def __init__(self, *command):
    self.command = [str(part) for part in command]
    self.process = subprocess.Popen(
      self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    self._answer()

  def ask(self, request) -> dict:
    """Sends JSON, waits for the answer."""
    self.process.stdin.write(json.dumps(request) + "\n")
    self.process.stdin.flush()
    return self._answer()

  def _answer(self) -> dict:
    for line in self.process.stdout:  # what they print themselves goes by
      if line.startswith("{"):
        return json.loads(line)
    raise SystemExit(f"{' '.join(self.command[:3])} ended; see above.")

  def close(self) -> None:
    """Ends the process."""
    self.process.stdin.close()
    self.process.wait()


def train(args, case, out, rows) -> None:
  """A whole training, with the schedules of SAEBench's baselines.

  Args:
    args: with `peers` (the interpreter), `steps` and `batch`.
    case: "system", "activation", "k", "d", "width", "learning_rate", "seed".
    out: where its weights go, NPZ.
    rows: of all steps, NPY.
  """
  case = case | {
    "batch": args.batch,
    "steps": args.steps,
    "warmup": args.steps // 10,
    "decay": args.steps // 5,
    "decay_start": args.steps - args.steps // 5,
    "threads": os.cpu_count(),
  }
  command = [args.peers, SCRIPT, json.dumps(case), out, rows]
  subprocess.run([str(part) for part in command], check=True)


def compared(name, unit, scores, *, smaller: bool) -> dict:
  """What `--json` prints first; a ratio above 1 is better than every peer.

  Args:
    name: of the work.
    unit: of the scores.
    scores: of "ours" and of every peer.
    smaller: is better.
  """
  others = {system: x for system, x in scores.items() if system != "ours"}
  best, ours = (min if smaller else max)(others.values()), scores["ours"]
  ratio = best / ours if smaller else ours / best
  return {
    "name": name,
    "ours": ours,
    "peers": others,
    "unit": unit,
    "ratio": ratio,
  }
