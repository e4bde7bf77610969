"""Batches from the command line, with real processes.

Most run a job that is written here and starts at once; the last test runs
`trainers.dictionary`.
"""

import csv
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from launch import check

BATCH = [sys.executable, "-m", "launch.batch"]
JOB = """
import json, os, pathlib, signal, time
from trainers import fields

def prepare(config):
  print("nobody shall take this for an answer")
  if config["x"] > 90:
    raise ValueError(f"x={config['x']} is more than 90")

def run(config, workdir):
  workdir = pathlib.Path(workdir)
  fields.claim(workdir, config)
  with (workdir / "starts").open("a") as file:
    file.write(".")
  if config["x"] in config["waits"] and not (workdir / "saved").exists():
    arrived = []
    signal.signal(signal.SIGTERM, lambda *_: arrived.append(True))
    (workdir / "waiting").touch()
    while not arrived:
      time.sleep(0.02)
    (workdir / "saved").touch()
    raise SystemExit(0)
  if config["x"] == config["fails"]:
    raise ValueError("x is wrong:\\n  by far")
  numbers = {"fvu": 1 / config["x"], "l0": 8.0 + config["group"]["x"]}
  results = numbers | {"seeds": {"train": 0}, "name": config["name"]}
  results["flags"] = os.environ.get("XLA_FLAGS", "")
  (workdir / "results.json").write_text(json.dumps(results))
  return results
"""
CONFIG = """
from ml_collections import ConfigDict

def get_config(arg=""):
  return ConfigDict({
    "job": "toy", "x": 1, "group": {"x": 0, "sizes": (1, 2)}, "name": "a",
    "fails": 0, "waits": (), "nothing": None,
  })
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
  """A config file whose job is JOB."""
  (tmp_path / "toy.py").write_text(JOB)
  (tmp_path / "config.py").write_text(CONFIG)
  monkeypatch.setenv("PYTHONPATH", str(tmp_path))
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.delenv("XLA_FLAGS", raising=False)
  return tmp_path / "config.py"


@pytest.fixture
def batch(toy, tmp_path):
  """Runs `launch.batch` on it, in tmp_path/grid."""

  def call(*args):
    return subprocess.run(
      [*BATCH, f"--config={toy}", f"--workdir={tmp_path}/grid", *args],
      capture_output=True,
      text=True,
      timeout=120,
    )

  return call


def starts(workdir: pathlib.Path) -> dict[str, int]:
  """How often each run below it was started."""
  return {
    path.parent.name: len(path.read_text()) for path in workdir.glob("*/starts")
  }


def summary(workdir: pathlib.Path) -> dict[str, dict]:
  return {
    r["run"]: r for r in json.loads((workdir / "summary.json").read_text())
  }


def wait_for(condition):
  deadline = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.02)


# ---------------------------------------------------------------- all is well
def test_every_combination_runs_and_is_summarised(batch, tmp_path):
  grid = ("--grid=config.x=2,4", "--grid=config.group.x=0,1")
  done = batch(*grid, "--config.name=b", "--jobs=2", "--devices_per_job=3")
  assert done.returncode == 0, done.stderr
  # Two keys end alike, so both are written out.
  names = [f"x={x},group.x={y}" for x in (2, 4) for y in (0, 1)]
  assert starts(tmp_path / "grid") == dict.fromkeys(names, 1)
  rows = summary(tmp_path / "grid")
  assert list(rows) == names
  assert rows["x=4,group.x=1"] == {
    "run": "x=4,group.x=1",
    "config.x": 4,
    "config.group.x": 1,
    "status": "finished",
    "seconds": pytest.approx(1, abs=30),
    "error": None,
    "fvu": 0.25,
    "l0": 9.0,
    "name": "b",
    "flags": "--xla_force_host_platform_device_count=3",
  }
  with (tmp_path / "grid/summary.csv").open() as file:
    table = list(csv.DictReader(file))
  assert [row["fvu"] for row in table] == ["0.5", "0.5", "0.25", "0.25"]
  assert (tmp_path / "grid/summary.png").read_bytes()[:4] == b"\x89PNG"
  assert "x=4,group.x=1: finished  fvu 0.25  l0 9" in done.stdout
  last = [line.split()[:4] for line in done.stdout.splitlines()[-7:-2]]
  assert last[0] == ["x", "group.x", "fvu", "l0"]
  assert last[4] == ["4", "1", "0.25", "9"]


def test_what_is_finished_is_kept_and_runs_may_be_added(batch, tmp_path):
  assert batch("--grid=config.x=2").returncode == 0
  written = (tmp_path / "grid/x=2/results.json").stat().st_mtime_ns
  done = batch("--grid=config.x=3,2", "--list_only")
  states = {line.split()[0]: line for line in done.stdout.splitlines()}
  assert set(states) == {"finished", "new"}
  assert states["new"].endswith(f"--config.x=3 --workdir={tmp_path}/grid/x=3")
  assert not (tmp_path / "grid/x=3").exists()
  done = batch("--grid=config.x=3,2")
  assert done.returncode == 0, done.stderr
  assert starts(tmp_path / "grid") == {"x=2": 1, "x=3": 1}
  assert (tmp_path / "grid/x=2/results.json").stat().st_mtime_ns == written
  assert list(summary(tmp_path / "grid")) == ["x=3", "x=2"]
  assert json.loads((tmp_path / "grid/batch.json").read_text())["grid"] == {
    "x": ["2", "3"]
  }


def test_the_listed_commands_run_as_they_are(batch, tmp_path):
  where = f"--cache={tmp_path}/a cache"
  done = batch("--grid=config.name='a b',\"c'd\"", "--list_only", where)
  assert done.returncode == 0, done.stderr
  assert not (tmp_path / "grid").exists()
  for line in done.stdout.splitlines():
    assert where in shlex.split(line)
    subprocess.run(line.removeprefix("new"), shell=True, check=True)
  found = (tmp_path / "grid").glob("*/results.json")
  names = {json.loads(path.read_text())["name"] for path in found}
  assert names == {"a b", "c'd"}


# ----------------------------------------------------------------- it is not
def test_a_run_that_fails_is_told_at_the_end_and_the_rest_goes_on(
  batch, tmp_path
):
  args = ("--grid=config.x=3,2", "--config.fails=3")
  done = batch(*args)
  assert done.returncode == 1
  assert "failed: x=3: x is wrong: by far (" in done.stdout
  rows = summary(tmp_path / "grid")
  assert rows["x=3"]["status"] == "failed"
  assert rows["x=3"]["error"] == "x is wrong: by far"
  assert rows["x=2"]["fvu"] == 0.5
  log = (tmp_path / "grid/x=3/log.txt").read_text()
  job = (tmp_path / "toy.py").read_text()
  (tmp_path / "toy.py").write_text(job.replace("raise ValueError", "print"))
  done = batch(*args)
  assert done.returncode == 0
  assert starts(tmp_path / "grid") == {"x=3": 2, "x=2": 1}
  assert (tmp_path / "grid/x=3/log.txt").read_text().startswith(log)
  rows = summary(tmp_path / "grid")
  assert rows["x=3"]["status"] == "finished"
  assert rows["x=3"]["error"] is None


@pytest.mark.parametrize(
  "number",
  [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
)
def test_a_stopped_batch_saves_its_runs_and_goes_on(number, toy, tmp_path):
  where = tmp_path / "grid"
  command = [
    *(*BATCH, f"--config={toy}", f"--workdir={where}", "--jobs=2"),
    *("--grid=config.x=1,2,3,4", "--config.waits=(1,2)"),
  ]
  process = subprocess.Popen(
    command, stdout=subprocess.PIPE, text=True, start_new_session=True
  )
  wait_for(lambda: len(list(where.glob("*/waiting"))) == 2)
  if number == signal.SIGINT:  # as a terminal sends it: to all that it shows
    os.killpg(process.pid, number)
  else:
    process.send_signal(number)
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 0
  assert "4 of 4 runs are left" in out
  assert "resume with the same command" in out
  assert len(list(where.glob("*/saved"))) == 2
  assert starts(where) == {"x=1": 1, "x=2": 1}
  assert not (where / "x=3").exists()
  before = list(summary(where).values())
  statuses = [row["status"] for row in before]
  assert statuses == ["interrupted"] * 2 + ["not started"] * 2
  done = subprocess.run(command, capture_output=True, text=True, timeout=60)
  assert done.returncode == 0, done.stderr
  assert starts(where) == {"x=1": 2, "x=2": 2, "x=3": 1, "x=4": 1}
  rows = list(summary(where).values())
  assert {row["status"] for row in rows} == {"finished"}
  # Of all attempts together.
  assert all(rows[i]["seconds"] > before[i]["seconds"] for i in (0, 1))


@pytest.mark.parametrize(
  ("args", "message"),
  [
    ([], "No --grid"),
    (["--grid=config.y=1"], "There is no config.y"),
    (["--grid=config.group.sise=1"], "Did you mean config.group.sizes?"),
    (["--grid=config.nothing=1"], "config.nothing cannot be changed here"),
    (["--grid=config.x=1,2.5"], "2.5"),
    (["--grid=config.x=1,1"], "1 is given twice"),
    (["--grid=config.x=1", "--grid=config.x=2"], "--grid=config.x=1,2"),
    (["--grid=config.x=1", "--config.x=2"], "choose one"),
    (["--grid=config.group.sizes=(1,2),[1,2]"], "are the same run"),
    (["--grid=config.x=91,1,92"], "x=91: x=91 is more than 90"),
    (["--grid=config.job=toy,toi"], "No module named 'toi'"),
    (["--grid=config.job=json"], "no run(config, workdir)"),
    (["--grid=config.x=1", "--jobs=0"], "at least 1"),
    (["--grid=config.x=1", "--config.z=1"], "'z'"),
  ],
)
def test_what_is_wrong_is_told_before_anything_starts(
  args, message, batch, tmp_path
):
  done = batch(*args)
  assert done.returncode == 1
  assert done.stderr.startswith("error: ")
  assert message in done.stderr
  assert "Traceback" not in done.stderr
  assert not (tmp_path / "grid").exists()


def test_configs_are_checked_without_the_gpus(tmp_path):
  (tmp_path / "tells.py").write_text(
    "import os\ndef run(*_): pass\n"
    "def prepare(config): raise ValueError(os.environ[config['name']])"
  )
  env = {**os.environ, "JAX_PLATFORMS": "cuda", "PYTHONPATH": str(tmp_path)}
  names = ("JAX_PLATFORMS", "PYTHONPATH", "NO_SUCH")
  asked = [{"job": "tells", "name": name} for name in names]
  assert check.faults([*asked, {}], env) == [
    "cpu",
    str(tmp_path),
    "KeyError: 'NO_SUCH'",
    "config.job is missing: expected the path of a module.",
  ]


def test_another_config_or_other_overrides_are_refused(batch, toy, tmp_path):
  assert batch("--grid=config.x=1,2").returncode == 0
  before = (tmp_path / "grid/batch.json").read_text()
  for args, words in [
    (["--grid=config.x=1,2", "--config.name=b"], "--config.name=b"),
    (["--grid=config.x=1,2", f"--config={toy}:b"], f"here  --config={toy}:b"),
    (["--grid=config.x=1"], "x=2"),
    (["--grid=config.name=b"], "x=1; x=2"),
  ]:
    done = batch(*args)
    assert done.returncode == 1
    assert words in done.stderr
  assert (tmp_path / "grid/batch.json").read_text() == before
  assert starts(tmp_path / "grid") == {"x=1": 1, "x=2": 1}


def test_results_of_a_config_that_has_changed_are_not_taken(batch, toy):
  assert batch("--grid=config.x=1").returncode == 0
  toy.write_text(toy.read_text().replace('"name": "a"', '"name": "c"'))
  done = batch("--grid=config.x=1")
  assert done.returncode == 1
  assert "made by another config: name: 'a' there, 'c' here" in done.stdout


# ---------------------------------------------------------------------- slurm
def test_a_job_array_is_submitted_and_summarised(batch, tmp_path):
  args = ["--grid=config.x=1,2", "--slurm", "--slurm_cluster=local"]
  done = batch(*args, "--slurm_gpus_per_job=0", "--config.fails=2")
  assert done.returncode == 1, done.stderr
  assert done.stdout.count(": job ") == 2
  rows = summary(tmp_path / "grid")
  assert rows["x=1"]["fvu"] == 1.0
  assert rows["x=2"]["error"] == "x is wrong: by far"


def test_without_slurm_one_is_told_so(batch, tmp_path):
  done = batch("--grid=config.x=1", "--slurm")
  assert done.returncode == 1
  assert 'Could not detect "srun"' in done.stderr
  assert not (tmp_path / "grid/x=1").exists()


# ----------------------------------------------------------------- dictionary
@pytest.mark.slow
def test_dictionaries_train_at_once_on_one_harvest(tmp_path):
  small = {
    "data.train_tokens": 4_000,
    "data.heldout_tokens": 1_000,
    "train.steps": 20,
    "train.batch_size": 64,
    "eval.splice_tokens": 200,
    "eval.latents": 1,
  }
  done = subprocess.run(
    [
      *(*BATCH, "--config=configs/gemma2b_transcoder.py:smoke", "--jobs=2"),
      *(f"--config.{key}={value}" for key, value in small.items()),
      *("--grid=config.dictionary.k=8,16", f"--workdir={tmp_path}/grid"),
    ],
    env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  logs = [path.read_text() for path in tmp_path.glob("grid/*/log.txt")]
  made = re.findall(r"tokens/s to (\S+)", "".join(logs))
  assert len(made) == len(set(made)) == 2  # training and held-out
  rows = summary(tmp_path / "grid")
  assert rows["k=16"]["config.dictionary.k"] == 16.0
  assert rows["k=8"]["l0_train"] == pytest.approx(8, abs=1)
  assert rows["k=16"]["l0_train"] == pytest.approx(16, abs=1)
  assert (tmp_path / "grid/summary.png").exists()
