"""Joins the processes of one run, on one host or on several."""

import importlib.util
import logging
import os
import signal
import socket
import threading

log = logging.getLogger("gemma_jax")

# What `jax.distributed.initialize` reads to recognise a task of SLURM. A batch
# script that calls python without srun has no step, and is one process.
SLURM = (
  "SLURM_JOB_ID",
  "SLURM_STEP_NODELIST",
  "SLURM_PROCID",
  "SLURM_LOCALID",
)


def start(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  timeout: int = 300,
) -> bool:
  """Joins the other processes, if there are any; before any use of a device.

  All three of the first arguments, or none: then SLURM, Open MPI and
  Kubernetes are recognised by their environment, and JAX asks them.

  Args:
    coordinator: HOST:PORT of process 0, a free port there.
    num_processes: of the whole run.
    process_id: 0 to num_processes - 1.
    timeout: seconds to wait for the others.

  Returns:
    Whether there are several processes. One alone starts nothing.

  Raises:
    ValueError: arguments that are half given or out of range, or a launcher
      that does not say where process 0 is.
    OSError: the others did not come in time, or the port is taken.
  """
  given = {
    "coordinator_address": coordinator,
    "num_processes": num_processes,
    "process_id": process_id,
  }
  if all(value is None for value in given.values()):
    arguments, where = {}, _launcher()
    if where is None:
      return False
  else:
    _check(given)
    if num_processes == 1:
      return False
    # The flags say all: JAX must not pick devices by what a launcher says.
    arguments = given | {"cluster_detection_method": "deactivate"}
    where = coordinator
    if process_id == 0:
      _require_free(coordinator)
  log.info("joining the other processes (%s), %d s at most", where, timeout)
  _initialize(arguments, where, timeout)

  import jax

  log.info(
    "process %d of %d: %d of %d devices",
    jax.process_index(),
    jax.process_count(),
    jax.local_device_count(),
    jax.device_count(),
  )
  return True


def _check(given) -> None:
  missing = [f"--{name}" for name, value in given.items() if value is None]
  if missing:
    raise ValueError(
      f"{' and '.join(missing)} must be given too: a run of several processes "
      "needs --coordinator_address=HOST:PORT (of process 0), --num_processes "
      "and --process_id, each process its own; or none of them, under srun."
    )
  coordinator, num_processes, process_id = given.values()
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit() or not 0 < int(port) < 65536:
    raise ValueError(
      f"--coordinator_address={coordinator}: expected HOST:PORT, the host of "
      "process 0 and a free port there, such as node001:12345."
    )
  if not 0 <= process_id < num_processes:
    raise ValueError(
      f"--process_id={process_id} with --num_processes={num_processes}: "
      "expected 0 to num_processes - 1, another one for each process."
    )


def _launcher() -> str | None:
  """What started this process as one of several, or None."""
  env = os.environ
  tasks = env.get("OMPI_COMM_WORLD_SIZE", "1")
  if int(tasks) > 1:
    if "OMPI_MCA_orte_hnp_uri" in env:
      return f"Open MPI, {tasks} tasks"
    raise ValueError(
      f"Open MPI started {tasks} processes and does not say where process 0 "
      "is (from version 5 on). Pass --coordinator_address=HOST:PORT, "
      f"--num_processes={tasks} and --process_id=$OMPI_COMM_WORLD_RANK."
    )
  tasks = env.get("SLURM_NTASKS", "1")
  if int(tasks) > 1 and all(name in env for name in SLURM):
    return f"SLURM, {tasks} tasks"
  if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= env.keys():
    if importlib.util.find_spec("kubernetes"):
      return "Kubernetes, an indexed job"
    log.warning(
      "An indexed Kubernetes job, each pod of which runs for itself. To join "
      "them: pip install 'jax[k8s]', or pass --coordinator_address."
    )
  return None


def _require_free(coordinator: str) -> None:
  """Raises where the port is taken; JAX would crash."""
  port = int(coordinator.rpartition(":")[2])
  try:
    socket.create_server(("", port)).close()
  except OSError as e:
    raise OSError(
      f"Process 0 cannot listen on port {port} of --coordinator_address="
      f"{coordinator} ({e.strerror}). Choose another port, for all processes."
    ) from e


def _initialize(arguments, where: str, timeout: int) -> None:
  """`jax.distributed.initialize`, and an error if it takes too long.

  JAX aborts the process when its own time is up, and lets no signal through
  while it waits. So it waits in a thread, and longer than we do.
  """
  import jax

  failed = []

  def join():
    try:
      jax.distributed.initialize(
        **arguments, initialization_timeout=2 * timeout + 60
      )
    except Exception as e:
      failed.append(e)

  # JAX replaces it by one that only takes a note.
  handler = signal.getsignal(signal.SIGTERM)
  thread = threading.Thread(target=join, daemon=True)
  thread.start()
  thread.join(timeout)
  if thread.is_alive():
    raise TimeoutError(
      f"The processes of this run did not find one another in {timeout} s "
      f"({where}). Process 0 must run there, and be reached from here; all "
      "processes must be started, each with its own number. Is a firewall "
      "between them? --initialization_timeout changes the time."
    )
  signal.signal(signal.SIGTERM, handler)
  if failed:
    raise OSError(
      f"The processes of this run could not be joined ({where}): {failed[0]} "
      "Pass --coordinator_address, --num_processes and --process_id instead."
    ) from failed[0]
