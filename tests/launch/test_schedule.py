"""How runs are started, stopped and judged; small programs stand for them."""

import json
import os
import re
import signal
import sys
import threading
import time

import pytest
import submitit

from gemma_jax.activations import claim
from gemma_jax.activations.storage import Location
from launch import schedule, slurm
from launch.schedule import Run

DONE = "import pathlib; pathlib.Path('results.json').write_text('{}')"
SEVERAL_LINES = r"raise SystemExit('error: a\n  b\n(--traceback shows where.)')"
KILLED = "print('a', flush=True); os.kill(os.getpid(), 9)"


@pytest.fixture
def make(tmp_path):
  """A run of some Python in its workdir."""

  def run(code, name="run", kind=Run, **options):
    workdir = tmp_path / name
    code = f"import os; os.chdir({str(workdir)!r})\n{code}"
    return kind(name, [sys.executable, "-c", code], workdir, **options)

  return run


def wait_for(condition):
  deadline = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)


# -------------------------------------------------------------------- devices
def test_runs_have_disjoint_gpus():
  env = {"CUDA_VISIBLE_DEVICES": "4,5,6,7,GPU-1", "OTHER": "kept"}
  found = schedule.environments(2, 2, env)
  assert [e["CUDA_VISIBLE_DEVICES"] for e in found] == ["4,5", "6,7"]
  assert [e["OTHER"] for e in found] == ["kept", "kept"]


@pytest.mark.parametrize(("jobs", "devices"), [(3, 2), (1, 6), (6, 1)])
def test_too_few_gpus_are_an_error_with_both_numbers(jobs, devices):
  env = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4"}
  with pytest.raises(ValueError, match=r"needs 6 GPUs, and there are 5\."):
    schedule.environments(jobs, devices, env)


@pytest.mark.parametrize(
  "env",
  [
    {"CUDA_VISIBLE_DEVICES": ""},
    {"CUDA_VISIBLE_DEVICES": "-1"},
    {"CUDA_VISIBLE_DEVICES": "0,1", "JAX_PLATFORMS": "cpu"},
  ],
)
def test_without_gpus_runs_have_virtual_devices(env):
  count = "--xla_force_host_platform_device_count"
  assert schedule.environments(3, 1, env) == [env] * 3
  env["XLA_FLAGS"] = f"--xla_a=1 {count}=8 --xla_b=2"
  for found in schedule.environments(3, 4, env):
    assert found["XLA_FLAGS"] == f"--xla_a=1 --xla_b=2 {count}=4"
  assert schedule.environments(1, 1, env) == [env]


def test_gpus_are_asked_of_the_driver(tmp_path, monkeypatch):
  smi = tmp_path / "nvidia-smi"
  smi.write_text(
    "#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-a)'\n"
    "echo '  MIG 1g.18gb Device 0: (UUID: MIG-b)'\n"
    "echo 'GPU 1: NVIDIA H200 (UUID: GPU-c)'\n"
  )
  smi.chmod(0o755)
  monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
  assert schedule.gpus({"JAX_PLATFORMS": "cuda,cpu"}) == ["0", "1"]


def test_as_many_runs_go_at_once_as_there_are_environments(make):
  code = (
    "import json, os, time; began = time.time(); time.sleep(0.6)\n"
    "row = [os.environ['CUDA_VISIBLE_DEVICES'], began, time.time()]\n"
    "open('results.json', 'w').write(json.dumps(row))"
  )
  runs = [make(code, f"run{i}") for i in range(4)]
  env = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1", "JAX_PLATFORMS": ""}
  ended = dict(schedule.go(runs, schedule.environments(2, 1, env)))
  assert {outcome.status for outcome in ended.values()} == {"finished"}
  rows = [json.loads((r.workdir / "results.json").read_text()) for r in runs]
  assert {row[0] for row in rows} == {"0", "1"}
  edges = sorted([(a, 1) for _, a, _ in rows] + [(b, -1) for _, _, b in rows])
  running = [sum(step for _, step in edges[: i + 1]) for i in range(8)]
  assert max(running) == 2
  for i, (gpu, a, b) in enumerate(rows):
    others = [row for row in rows[:i] + rows[i + 1 :] if row[0] == gpu]
    assert all(b <= start or end <= a for _, start, end in others)


# ------------------------------------------------------------------- outcomes
@pytest.mark.parametrize(
  ("code", "status", "error"),
  [
    (DONE, "finished", None),
    ("print('saved')", "interrupted", None),
    (SEVERAL_LINES, "failed", "a b"),
    ("print('error: old'); raise SystemExit('error: new')", "failed", "new"),
    ("1 / 0", "failed", "ZeroDivisionError: division by zero"),
    ("raise SystemExit(3)", "failed", "nothing in the log"),
    (f"{DONE}; raise SystemExit(3)", "failed", "nothing in the log"),
    (KILLED, "failed", "killed by SIGKILL; the log ends: a"),
    ("os.kill(os.getpid(), 15)", "interrupted", None),
  ],
)
def test_how_a_run_ended(code, status, error, make):
  outcome = make(code)()
  assert (outcome.status, outcome.error) == (status, error)
  assert outcome.seconds > 0


def test_an_old_error_in_the_log_is_not_this_attempts(make):
  assert make("raise SystemExit('error: old')")().error == "old"
  assert make("raise SystemExit(3)")().error == "nothing in the log"
  assert make("print('x')")().status == "interrupted"


def test_two_processes_never_run_in_one_workdir(make):
  first = make("open('on', 'w'); import time; time.sleep(60)")
  thread = threading.Thread(target=first)
  thread.start()
  wait_for((first.workdir / "on").exists)
  outcome = make(DONE)()
  first.stop()
  thread.join()
  assert outcome.status == "failed"
  assert "Another process is running" in outcome.error
  assert make(DONE)().status == "finished"


@pytest.mark.parametrize("stops", [False, True])
def test_a_run_waits_for_a_store_that_another_writes(stops, make, tmp_path):
  part = Location(tmp_path / "store/parts/00000")
  held = claim.lock(part)
  # As `launch.run` says it, in the words of the claim.
  with pytest.raises(BlockingIOError) as words:
    claim.lock(part)
  code = (
    "import fcntl, pathlib; open('tries', 'a').write('.')\n"
    f"file = open({str(part.path / '.lock')!r}, 'w')\n"
    "try: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
    f"except BlockingIOError: raise SystemExit({str(words.value)!r})\n{DONE}"
  )
  run, ended = make(code), []
  thread = threading.Thread(target=lambda: ended.append(run()))
  thread.start()
  wait_for((run.workdir / "tries").exists)
  time.sleep(1)
  assert thread.is_alive()
  run.stop() if stops else held()
  thread.join(30)
  held()
  assert ended[0].status == ("interrupted" if stops else "finished")
  assert (run.workdir / "tries").read_text() == ("." if stops else "..")


def test_the_claims_words_are_recognised():
  for more in ("", " (its claim ends by itself in at most 3 s)"):
    words = str(claim._busy(Location("/a b/parts/0"), more))
    assert schedule._BUSY.search(words)[1] == "/a b/parts/0"


# ------------------------------------------------------------------- stopping
def test_a_second_interrupt_kills_what_does_not_end(make):
  code = (
    "import signal, time; signal.signal(15, signal.SIG_IGN)\n"
    "open('on', 'w'); time.sleep(60)"
  )
  runs = [make(code, "stubborn"), make(DONE, "next")]

  def interrupt():
    wait_for((runs[0].workdir / "on").exists)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGINT)

  before = signal.getsignal(signal.SIGINT)
  thread = threading.Thread(target=interrupt)
  thread.start()
  began = time.monotonic()
  ended = dict(schedule.go(runs, schedule.environments(1, 1, dict(os.environ))))
  thread.join()
  assert 0.5 < time.monotonic() - began < 30
  assert ended[runs[0]].status == "interrupted"
  assert ended[runs[1]].status == "not started"
  assert not (runs[1].workdir / "results.json").exists()
  assert signal.getsignal(signal.SIGINT) is before


def test_runs_do_not_outlive_whoever_wants_their_outcomes(make):
  runs = [make(DONE, "quick"), make("import time; time.sleep(60)", "long")]
  began = time.monotonic()
  ended = schedule.go(runs, [dict(os.environ)] * 2)
  assert next(ended)[0] is runs[0]
  ended.close()
  assert time.monotonic() - began < 30
  assert runs[1].stopped


def test_states(tmp_path):
  workdir = tmp_path / "run"
  assert schedule.state(workdir, {"a": 1}) == "new"
  workdir.mkdir()
  assert schedule.state(workdir, {"a": 1}) == "to resume"
  (workdir / "results.json").write_text("{}")
  (workdir / "config.json").write_text('{"a": 1}')
  assert schedule.state(workdir, {"a": 1}) == "finished"
  assert schedule.state(workdir, {"a": 2}) == "to resume"


# ---------------------------------------------------------------------- slurm
def test_a_job_that_slurm_takes_saves_and_is_queued_again(make, tmp_path):
  code = (
    "import os, pathlib, signal, sys, time\n"
    "open('starts', 'a').write('.')\n"
    "saved = pathlib.Path('saved')\n"
    f"if saved.exists():\n  {DONE}; sys.exit()\n"
    "def save(*_):\n  saved.touch(); sys.exit()\n"
    "signal.signal(signal.SIGTERM, save)\n"
    # SLURM's signal reaches every process of the job.
    "os.kill(os.getpid(), signal.SIGUSR2)\n"
    "time.sleep(60)"
  )
  executor = submitit.LocalExecutor(tmp_path / "slurm")
  executor.update_parameters(timeout_min=0.1, signal_delay_s=4)
  tasks = [make(code, kind=slurm.Task, cpu_devices=3)]
  jobs = slurm.submit(tasks, executor)
  ((task, outcome),) = slurm.wait(tasks, jobs)
  assert task is tasks[0]
  assert outcome.status == "finished"
  assert (task.workdir / "starts").read_text() == ".."


def test_what_slurm_is_asked_for(monkeypatch, tmp_path):
  (tmp_path / "srun").touch(0o755)
  sbatch = tmp_path / "sbatch"
  sbatch.write_text(
    f"#!/bin/sh\ncat $1 >> {tmp_path}/asked\necho Submitted batch job 71\n"
  )
  sbatch.chmod(0o755)
  monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
  executor = slurm.executor(
    tmp_path / "slurm",
    cluster="slurm",
    minutes=90,
    gpus=4,
    at_once=2,
    partition="big",
    options=["cpus-per-task=8", "account=me"],
  )
  task = slurm.Task("run", ["true"], tmp_path)
  jobs = slurm.submit([task] * 3, executor)
  assert [job.job_id for job in jobs] == ["71_0", "71_1", "71_2"]
  text = (tmp_path / "asked").read_text().replace("'", "")
  assert set(re.findall("#SBATCH --(.*)", text)) >= {
    "array=0-2%2",
    "time=90",
    "nodes=1",
    "gpus-per-node=4",
    "ntasks-per-node=1",
    "partition=big",
    "cpus-per-task=8",
    "account=me",
    "signal=USR2@90",
  }


def test_a_missing_submitit_says_how_to_install_it(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "submitit", None)
  with pytest.raises(ImportError, match=r"pip install 'gemma_jax\[slurm\]'"):
    slurm.executor(tmp_path, cluster="slurm", minutes=1, gpus=0)


def test_an_option_of_slurm_has_a_value(tmp_path):
  with pytest.raises(ValueError, match="--slurm_option=exclusive: expected"):
    slurm.executor(
      tmp_path, cluster="slurm", minutes=1, gpus=0, options=["exclusive"]
    )
