"""The training loop: one page, read top to bottom."""

import contextlib
import dataclasses
import json
import logging
import math
import pathlib
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma_jax import cache, checkpoints, progress
from trainers.track import Trackers

log = logging.getLogger("gemma_jax")


class State(NamedTuple):
  """All of a training: what is saved, donated and resumed.

  The data stream's cursor is `step`: batch number `step` comes next.

  Attributes:
    step: int32, steps done.
    params: the parameters.
    opt_state: of optax.
    extra: what the method carries besides (statistics, thresholds).
    sums: running sums of the metrics since the last log step.
    first_bad: int32 [S], for each member that is trained the first step whose
      loss was not finite; -1 for none.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  extra: Any
  sums: dict[str, jax.Array]
  first_bad: jax.Array


@dataclasses.dataclass(frozen=True)
class Task:
  """What the loop trains.

  Attributes:
    members: names of what is trained side by side; one is called "".
    init: (*init_args) -> (params, opt_state, extra); jitted.
    init_args: gives the arrays that `init` takes; called only when starting.
    init_shapes: `jax.ShapeDtypeStruct` of each of them.
    step: (params, opt_state, extra, batch, number) -> (params, opt_state,
      extra, finite [S], metrics of [S]). One of several members that is not
      finite must stay as it was: the others go on.
    batches: (start, sharding) -> endless batches from number `start`, their
      rows on the devices as `sharding` says.
    batch_shapes: `jax.ShapeDtypeStruct` of each array of a batch.
    rule: (path of a leaf of the state, shape) -> PartitionSpec.
    by_row: how the rows of a batch are split.
    shown: metrics for the progress bar.
    watch: (metrics of a member) -> {kind of trouble: a sentence}.
    constant: what `step` finds in every batch besides, by name: arrays on the
      mesh, which no checkpoint holds.
  """

  members: tuple[str, ...]
  init: Callable
  init_args: Callable[[], tuple]
  init_shapes: tuple
  step: Callable
  batches: Callable[..., Iterator[Mapping[str, jax.Array]]]
  batch_shapes: Mapping[str, jax.ShapeDtypeStruct]
  rule: Callable[[str, tuple[int, ...]], P]
  by_row: P
  shown: tuple[str, ...]
  watch: Callable[[Mapping[str, float]], dict[str, str]] = lambda row: {}
  constant: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def train(
  task: Task,
  workdir: pathlib.Path,
  *,
  mesh: Mesh,
  steps: int,
  batch_size: int,
  log_every: int,
  checkpoint_every: int,
  keep: int,
  steps_per_dispatch: int = 1,
  track: tuple[str, ...] = (),
) -> State:
  """Trains to `steps`, from the newest checkpoint if there is one.

  Raises:
    FloatingPointError: no member's loss is finite; names the step.
    SystemExit: SIGTERM arrived; the state is saved and the code is 0.
  """

  # ---------------------------------------------------------------- state
  def fresh(*args) -> State:
    zero = jnp.zeros((), jnp.int32)
    params, opt_state, extra = task.init(*args)
    batch = {**task.batch_shapes, **jax.eval_shape(lambda: dict(task.constant))}
    *_, finite, metrics = jax.eval_shape(
      task.step, params, opt_state, extra, batch, zero
    )
    sums = {name: jnp.zeros(x.shape) for name, x in metrics.items()}
    first_bad = jnp.full(finite.shape, -1, jnp.int32)
    return State(zero, params, opt_state, extra, sums, first_bad)

  shapes = jax.eval_shape(fresh, *task.init_shapes)
  shardings = jax.tree_util.tree_map_with_path(
    lambda path, x: NamedSharding(
      mesh, task.rule(jax.tree_util.keystr(path), x.shape)
    ),
    shapes,
  )
  by_row = NamedSharding(mesh, task.by_row)

  # ----------------------------------------------------------- checkpoint
  store = checkpoints.Checkpoints(workdir / "checkpoints", keep=keep)
  state, start = store.restore(checkpoints.abstract(shapes, shardings))
  if start < steps:
    # Parameters and two moments, in the checkpoints to come.
    leaves = jax.tree.leaves(shapes.params)
    size = sum(x.size * x.dtype.itemsize for x in leaves)
    room = max(1, keep + 1 - store.count())
    cache.require_space(workdir, 3 * size * room, "The checkpoints")
  if state is None:
    state = jax.jit(fresh, out_shardings=shardings)(*task.init_args())
  else:
    log.info("resuming at step %d of %d", start, steps)

  # ----------------------------------------------------------------- step
  def update(state: State, batch):
    *new, finite, now = task.step(
      state.params, state.opt_state, state.extra, batch, state.step
    )
    since = state.step % log_every
    sums = {
      name: jnp.where(since == 0, 0, state.sums[name]) + x
      for name, x in now.items()
    }
    bad = (state.first_bad < 0) & ~finite
    first_bad = jnp.where(bad, state.step, state.first_bad)
    metrics = {name: x / (since + 1) for name, x in sums.items()}
    metrics["first_bad"] = first_bad
    return State(state.step + 1, *new, sums, first_bad), metrics

  def updates(state: State, constant, batches):
    def one(state, batch):
      return update(state, {**batch, **constant})

    if len(batches) == 1:
      return one(state, batches[0])
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    state, metrics = jax.lax.scan(one, state, stacked)
    return state, jax.tree.map(lambda x: x[-1], metrics)

  step_fn = jax.jit(
    updates,
    donate_argnums=0,
    in_shardings=(shardings, None, by_row),
    out_shardings=(shardings, None),
  )
  # Logs and checkpoints fall on the end of a dispatch.
  stride = math.gcd(steps_per_dispatch, log_every, checkpoint_every, steps)
  if stride < steps_per_dispatch:
    log.info(
      "%d steps per dispatch, not %d: that many divide the steps, log_every "
      "and checkpoint_every",
      stride,
      steps_per_dispatch,
    )

  # ----------------------------------------------------------------- loop
  record = _Record(workdir, start, steps, batch_size, task, track)
  batches, constant = task.batches(start, by_row), dict(task.constant)
  done = start
  with contextlib.ExitStack() as stack:
    stack.callback(store.close)
    stack.callback(batches.close)
    stack.callback(record.close)
    stopping = stack.enter_context(sigterm())
    stack.enter_context(jax.set_mesh(mesh))
    pending = None
    while done < steps:
      several = tuple(dict(next(batches)) for _ in range(stride))
      with jax.transfer_guard("disallow"):
        state, metrics = step_fn(state, constant, several)
      done += stride
      if pending is not None:  # the device is busy with the step just sent
        record.write(*pending)
        pending = None
      record.advance(stride)
      stop = bool(stopping)
      if done % log_every == 0 or done == steps:
        pending = done, metrics
      if done % checkpoint_every == 0 or done == steps or stop:
        record.check(metrics)  # never save what is not finite
        if pending is not None:  # a kill after the save must not lose a row
          record.write(*pending)
          pending = None
        store.save(done, state)
      if stop:
        break
  if done < steps or stopping:
    log.info("stopped at step %d: resume with the same command", done)
    raise SystemExit(0)
  return state


@contextlib.contextmanager
def sigterm():
  """A list that is no longer empty once SIGTERM has arrived."""
  arrived = []
  try:
    before = signal.signal(signal.SIGTERM, lambda *_: arrived.append(True))
  except ValueError:  # not in the main thread: nothing to catch
    yield arrived
    return
  try:
    yield arrived
  finally:
    signal.signal(signal.SIGTERM, before)


class _Record:
  """metrics.jsonl, the progress bar and the trackers."""

  def __init__(self, workdir, start, steps, batch_size, task, track):
    path = workdir / "metrics.jsonl"
    # What was logged after the checkpoint that we resume from comes again; a
    # line that was cut short goes.
    kept = [row for row in read_metrics(path) if row["step"] <= start]
    partial = path.with_name(f".{path.name}")
    partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
    partial.rename(path)
    self._file = path.open("a")
    self._trackers = Trackers(track, workdir)
    self._batch, self._steps, self._task = batch_size, steps, task
    self._warned = set()
    self._began, self._at = time.perf_counter(), start
    self._before = kept[-1].get("seconds", 0.0) if kept else 0.0
    self._start = time.perf_counter()
    self._bar = progress.bar(
      steps * batch_size,
      "train",
      unit="tokens",
      initial=start * batch_size,
    )

  def advance(self, steps: int) -> None:
    self._bar.update(steps * self._batch)

  def check(self, metrics) -> dict[str, Any]:
    """The metrics, means over the members that are finite, and of each."""
    found = {n: np.atleast_1d(x) for n, x in jax.device_get(metrics).items()}
    bad = found.pop("first_bad")
    if (bad >= 0).all():
      raise FloatingPointError(
        f"The loss is not finite at step {bad.min()}. The last checkpoint "
        "before it is kept. Check the activations for NaN, or lower the "
        "learning rate."
      )
    for name, step in zip(self._task.members, bad, strict=True):
      if step >= 0:
        self._warn(
          (name, "bad"),
          f"{name}: the loss is not finite at step {step}; it stays as it was "
          "there. Lower its learning rate.",
        )
    row = {name: float(x[bad < 0].mean()) for name, x in found.items()}
    if len(bad) > 1:
      row["members"] = {name: x.tolist() for name, x in found.items()}
    return row

  def _warn(self, about: tuple[str, str], message: str) -> None:
    """Once for each member and kind of trouble."""
    if about not in self._warned:
      self._warned.add(about)
      log.warning("%s", message)

  def _watch(self, step: int, row) -> None:
    for i, name in enumerate(self._task.members):
      own = row
      if "members" in row:
        own = {metric: x[i] for metric, x in row["members"].items()}
      for kind, message in self._task.watch(own).items():
        where = f"{name}, step {step}" if name else f"step {step}"
        self._warn((name, kind), f"{where}: {message}")

  def write(self, step: int, metrics) -> None:
    row = self.check(metrics)
    self._watch(step, row)
    now = time.perf_counter()
    rate = (step - self._at) * self._batch / max(now - self._began, 1e-9)
    self._began, self._at = now, step
    row = {
      "step": step,
      "tokens": step * self._batch,
      **row,
      "tokens_per_second": rate,
      "seconds": self._before + now - self._start,
      **memory(),
    }
    shown = {name: f"{row[name]:.4g}" for name in self._task.shown}
    self._bar.set_postfix(
      {"step": f"{step}/{self._steps}", **shown}, refresh=False
    )
    self._file.write(json.dumps(row) + "\n")
    self._file.flush()
    self._trackers.write(
      step, {name: x for name, x in row.items() if name != "members"}
    )

  def close(self) -> None:
    self._bar.close()
    self._file.close()
    self._trackers.close()


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of a metrics.jsonl, without a last line that a kill cut short."""
  if not path.exists():
    return []
  rows = []
  for line in path.read_text().splitlines():
    try:
      rows.append(json.loads(line))
    except ValueError:
      break
  return rows


def memory() -> dict[str, float]:
  """Peak memory in bytes of this process, and of the fullest local device."""
  # Linux counts ru_maxrss in KiB, macOS in bytes.
  unit = 1 if sys.platform == "darwin" else 1024
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  out = {"host_memory_peak": float(peak)}
  stats = [d.memory_stats() for d in jax.local_devices()]
  used = [s["peak_bytes_in_use"] for s in stats if s]
  if used:
    out["device_memory_peak"] = float(max(used))
  return out
