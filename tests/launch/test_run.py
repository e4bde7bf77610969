"""The command line, as a user meets it."""

import json
import os
import subprocess
import sys

import pytest

RUN = [sys.executable, "-m", "launch.run"]
SMOKE = "--config=configs/gemma2b_transcoder.py:smoke"


def run(*args, devices=1, **environment):
  flags = f"--xla_force_host_platform_device_count={devices}"
  return subprocess.run(
    [*RUN, *args],
    env={**os.environ, "XLA_FLAGS": flags, **environment},
    capture_output=True,
    text=True,
  )


@pytest.mark.parametrize(
  "devices", [1, pytest.param(8, marks=pytest.mark.slow)]
)
def test_the_smoke_config_runs_to_its_report(devices, tmp_path):
  done = run(SMOKE, f"--workdir={tmp_path}/run", devices=devices)
  assert done.returncode == 0, done.stderr
  assert "fvu_linear" in done.stdout
  assert (tmp_path / "run/report.html").stat().st_size > 50_000


def test_an_unknown_key_names_the_nearest(tmp_path):
  done = run(SMOKE, f"--workdir={tmp_path}/run", "--config.train.stepz=3")
  assert done.returncode != 0
  assert "steps" in done.stderr.splitlines()[-1]
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("config", ["quickstart.py", "gemma2b_transcoder.py"])
def test_dry_run_prints_cost_and_starts_nothing(config, tmp_path):
  done = run(
    f"--config=configs/{config}",
    f"--workdir={tmp_path}/run",
    f"--cache={tmp_path}/cache",
    "--dry_run",
  )
  assert done.returncode == 0, done.stderr
  plan = json.loads(done.stdout)
  width = plan["dictionaries"][0]["width"]
  d = {"quickstart.py": 640, "gemma2b_transcoder.py": 2304}[config]
  assert plan["parameters"]["W_enc"].startswith(f"float32[1, {d}, {width}]")
  assert set(plan["memory_per_device"]) >= {"model", "training state"}
  assert float(plan["flops"]["train"]) > 1e12
  assert not (tmp_path / "run").exists()
  assert not (tmp_path / "cache" / "models").exists()


def test_a_missing_config_file_is_one_clear_line():
  done = run("--config=configs/nowhere.py")
  assert done.returncode != 0
  assert "nowhere.py" in done.stderr
