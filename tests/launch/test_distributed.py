"""Several processes: when they are joined, and that together they are right."""

import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from gemma_jax import models
from launch import distributed

ROOT = pathlib.Path(distributed.__file__).parent.parent
SLURM = {
  "SLURM_JOB_ID": "71",
  "SLURM_STEP_NODELIST": "node[001-002]",
  "SLURM_NTASKS": "2",
  "SLURM_PROCID": "1",
  "SLURM_LOCALID": "0",
}
OPEN_MPI = {
  "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
  "OMPI_COMM_WORLD_SIZE": "2",
}
KUBERNETES = {
  "KUBERNETES_SERVICE_HOST": "10.0.0.1",
  "JOB_COMPLETION_INDEX": "1",
}

# All eight devices run one model; the job also checks that SIGTERM still ends
# a run, since JAX takes the signal for itself when it starts.
JOB = """
import os, signal, time
import jax, numpy as np
from jax.experimental import multihost_utils
from gemma_jax import models

def run(config, workdir):
  mesh = models.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  model = models.load_model("random:gemma3-tiny", mesh=mesh)
  tokens = np.load(config["tokens"])
  logits, _ = model.forward(tokens)
  assert not logits.is_fully_addressable
  found = {
    "logits": multihost_utils.process_allgather(logits, tiled=True),
    "longer": model.generate(tokens, max_new_tokens=6),
    "odd": model.generate(tokens[:3], max_new_tokens=6),
  }
  if jax.process_index() == 0:
    np.savez(config["found"], **found)
  try:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)
    stopped = 0
  except SystemExit:
    stopped = 1
  return {"stopped": stopped, "here": jax.local_device_count()}
"""
CONFIG = """
import ml_collections

def get_config():
  return ml_collections.ConfigDict(
    {"job": "whole_model", "tokens": %r, "found": %r}
  )
"""


@pytest.fixture
def joined(monkeypatch):
  """What `jax.distributed.initialize` is called with; it joins nothing."""
  calls = []
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda **given: calls.append(given)
  )
  for name in (*SLURM, *OPEN_MPI, *KUBERNETES):
    monkeypatch.delenv(name, raising=False)
  return calls


def put(monkeypatch, environment):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)


@pytest.fixture
def port():
  with socket.create_server(("localhost", 0)) as server:
    return server.getsockname()[1]


def command(config, port, process, *args):
  return [
    *(sys.executable, "-m", "launch.run", f"--config={config}"),
    f"--coordinator_address=localhost:{port}",
    *("--num_processes=2", f"--process_id={process}", *args),
  ]


def test_two_processes_of_four_devices_give_what_one_device_gives(
  tmp_path, port, one_device
):
  tokens = np.random.default_rng(0).integers(4, 1000, (8, 24))
  np.save(tmp_path / "tokens.npy", tokens)
  (tmp_path / "whole_model.py").write_text(JOB)
  files = str(tmp_path / "tokens.npy"), str(tmp_path / "found.npz")
  (tmp_path / "config.py").write_text(CONFIG % files)
  environment = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    "PYTHONPATH": str(tmp_path),
  }
  processes = [
    subprocess.Popen(
      command(tmp_path / "config.py", port, i, f"--workdir={tmp_path}/run"),
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  try:
    said = [process.communicate(timeout=300) for process in processes]
  finally:
    for process in processes:
      process.kill()
  for i, (process, (_, err)) in enumerate(zip(processes, said, strict=True)):
    assert process.returncode == 0, err
    assert f"process {i} of 2: 4 of 8 devices" in err
  # Process 0 speaks for all; Gloo, which joins CPUs, prints in between.
  (first, _), (second, _) = said
  assert re.search(r"^stopped +1$", first, re.MULTILINE)
  assert re.search(r"^here +4$", first, re.MULTILINE)
  assert "results.json" in first
  assert not re.search("stopped|here|results.json", second)
  model = models.load_model("random:gemma3-tiny", mesh=one_device)
  expected, _ = model.forward(tokens)
  found = np.load(tmp_path / "found.npz")
  np.testing.assert_allclose(found["logits"], expected, atol=1e-5, rtol=0)
  longer = model.generate(tokens, max_new_tokens=6)
  np.testing.assert_array_equal(found["longer"], longer)
  np.testing.assert_array_equal(found["odd"], longer[:3])


@pytest.mark.parametrize(
  "process", [0, pytest.param(1, marks=pytest.mark.slow)]
)
def test_a_process_that_waits_in_vain_says_so(process, port):
  done = subprocess.run(
    command(
      "configs/quickstart.py", port, process, "--initialization_timeout=2"
    ),
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1
  errors = [l for l in done.stderr.splitlines() if l.startswith("error:")]
  assert len(errors) == 1, done.stderr
  assert f"localhost:{port}" in errors[0]
  assert "Process 0 must run there" in errors[0]
  assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_an_error_and_no_crash(joined):
  with socket.create_server(("", 0)) as server:
    address = f"localhost:{server.getsockname()[1]}"
    with pytest.raises(OSError, match=f"{address}.*another port"):
      distributed.start(address, 2, 0)
  assert joined == []


def test_one_process_starts_nothing(joined, monkeypatch, port):
  assert not distributed.start()
  assert not distributed.start(f"localhost:{port}", 1, 0)
  put(monkeypatch, SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
  assert not distributed.start()
  put(monkeypatch, {"OMPI_COMM_WORLD_SIZE": "1"})
  assert not distributed.start()
  assert joined == []


def test_a_batch_script_without_srun_is_one_process(joined, monkeypatch):
  put(monkeypatch, SLURM)
  monkeypatch.delenv("SLURM_STEP_NODELIST")
  assert not distributed.start()
  assert joined == []


@pytest.mark.parametrize(
  "environment", [SLURM, OPEN_MPI], ids=["slurm", "open_mpi"]
)
def test_what_a_launcher_started_is_left_to_jax(
  environment, joined, monkeypatch
):
  put(monkeypatch, environment)
  assert distributed.start(timeout=10)
  (call,) = joined
  assert call.keys() == {"initialization_timeout"}
  assert call["initialization_timeout"] > 10
  # JAX recognises the same environment.
  from jax._src.clusters import ClusterEnv

  assert any(
    cluster.is_env_present()
    for cluster in ClusterEnv._cluster_types
    if cluster.name in ("slurm", "ompi")
  )


def test_a_kubernetes_job_is_joined_where_jax_can_ask_it(
  joined, monkeypatch, caplog
):
  put(monkeypatch, KUBERNETES)
  has = {"kubernetes": None}
  monkeypatch.setattr(distributed.importlib.util, "find_spec", has.get)
  assert not distributed.start()
  assert "jax[k8s]" in caplog.text
  has["kubernetes"] = object()
  assert distributed.start()
  assert len(joined) == 1
  monkeypatch.delenv("JOB_COMPLETION_INDEX")
  assert not distributed.start()


def test_flags_win_over_a_launcher(joined, monkeypatch, port):
  put(monkeypatch, SLURM)
  address = f"localhost:{port}"
  assert distributed.start(address, 4, 3)
  (call,) = joined
  del call["initialization_timeout"]
  assert call == {
    "coordinator_address": address,
    "num_processes": 4,
    "process_id": 3,
    "cluster_detection_method": "deactivate",
  }


@pytest.mark.parametrize(
  ("given", "said"),
  [
    ((None, 2, 0), "--coordinator_address must be given too"),
    ((None, 2, None), "--coordinator_address and --process_id must be given"),
    (("node:1", 2, None), "--process_id must be given too"),
    (("node:1", None, 0), "--num_processes must be given too"),
    (("node:1", 2, 2), "expected 0 to num_processes - 1"),
    (("node:1", 2, -1), "expected 0 to num_processes - 1"),
    (("node:1", 0, 0), "expected 0 to num_processes - 1"),
    (("node", 2, 1), "expected HOST:PORT"),
    (("node:http", 2, 1), "expected HOST:PORT"),
    (("node:99999", 2, 1), "expected HOST:PORT"),
  ],
)
def test_half_given_or_wrong_flags_are_refused(given, said, joined):
  with pytest.raises(ValueError, match=said):
    distributed.start(*given)
  assert joined == []


def test_open_mpi_5_is_told_to_pass_the_flags(joined, monkeypatch):
  put(monkeypatch, {"OMPI_COMM_WORLD_SIZE": "8"})
  with pytest.raises(ValueError, match="--num_processes=8 and --process_id"):
    distributed.start()
  assert joined == []


def test_what_jax_cannot_do_is_said_with_the_way_out(joined, monkeypatch):
  def refuse(**_):
    raise RuntimeError("no headless service")

  monkeypatch.setattr(jax.distributed, "initialize", refuse)
  put(monkeypatch, SLURM)
  with pytest.raises(OSError, match=r"no headless service.*--process_id"):
    distributed.start()
