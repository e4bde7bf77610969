"""The main job stopped, killed, fed with NaN: nothing is lost."""

import os
import random
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from tests.trainers.runs import command, quick
from trainers import dictionary, dictionary_task, loop

LITTLE = ("--config.eval.splice_tokens=100", "--config.eval.latents=1")


def test_a_batch_with_nan_stops_names_the_step_and_keeps_the_checkpoint(
  tmp_path, monkeypatch
):
  real = dictionary_task.make

  def poisoned(*args, **kwargs):
    task = real(*args, **kwargs)

    def batches(start, sharding):
      for step, batch in enumerate(task.batches(start, sharding), start):
        if step == 47:
          batch["x"] = batch["x"] * np.nan
        yield batch

    return loop.dataclasses.replace(task, batches=batches)

  monkeypatch.setattr(dictionary_task, "make", poisoned)
  config = quick(**{"eval.splice_tokens": 100, "eval.latents": 1})
  with pytest.raises(FloatingPointError, match="not finite at step 47"):
    dictionary.run(config, tmp_path / "run")
  monkeypatch.undo()
  kept = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
  assert "40" in kept
  assert "60" not in kept
  results = dictionary.run(config, tmp_path / "run")
  assert np.isfinite(results["fvu"])


def test_a_sweep_with_a_member_that_diverges_ends_with_the_others(tmp_path):
  changes = {
    "dictionary.activation": "gated",
    "dictionary.skip": False,
    "sweep.learning_rate": [4e-3, 1e3],
    "train.steps": 20,
  }
  results = dictionary.run(quick(**changes), tmp_path / "run")
  (name,) = results["diverged"]
  assert name == "learning_rate=1000.0"
  assert results["diverged"][name] < 20
  (member,) = results["members"]
  assert np.isfinite([member["fvu"], member["delta_ce"]]).all()
  assert not (tmp_path / "run/members" / name).exists()
  rows = (tmp_path / "run/sweep.csv").read_text().splitlines()
  assert len(rows) == 2
  assert (tmp_path / "run/report.html").exists()


def run_to_end(workdir, cache, steps):
  subprocess.run(
    command(workdir, cache, f"--config.train.steps={steps}", *LITTLE),
    check=True,
  )
  return (workdir / "dictionary/dictionary.safetensors").read_bytes()


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_bit_for_bit_as_one_left_alone(
  tmp_path,
):
  steps, kills = 120, int(os.environ.get("GEMMA_JAX_KILLS", "1"))
  first = tmp_path / "cache"
  began = time.monotonic()
  alone = run_to_end(tmp_path / "alone", first, steps)
  long = time.monotonic() - began
  rng = random.Random(0)
  for i in range(kills):
    workdir, cache = tmp_path / f"killed{i}", tmp_path / f"cache{i}"
    # Those to be killed need not compile, so they take about half as long.
    shutil.copytree(first / "compiled", cache / "compiled")
    args = command(workdir, cache, f"--config.train.steps={steps}", *LITTLE)
    process = subprocess.Popen(args, stderr=subprocess.DEVNULL)
    time.sleep(rng.uniform(0.15, 0.55) * long)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert run_to_end(workdir, cache, steps) == alone
    rows = loop.read_metrics(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(10, steps + 1, 10))


def test_sigterm_saves_exits_zero_and_the_same_command_resumes(tmp_path):
  workdir = tmp_path / "run"
  args = command(workdir, tmp_path / "cache", "--config.train.steps=100000")
  process = subprocess.Popen(args, stderr=subprocess.PIPE, text=True)
  log = workdir / "metrics.jsonl"
  for _ in range(600):
    if log.exists() and log.stat().st_size:
      break
    time.sleep(0.1)
  process.send_signal(signal.SIGTERM)
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == 0, stderr
  assert "resume with the same command" in stderr
  steps = [p.name for p in (workdir / "checkpoints").iterdir()]
  assert any(f"stopped at step {step}:" in stderr for step in steps)
