"""Processes that read a corpus side by side."""

import concurrent.futures
import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import Any

from gemma_jax import progress

# Below this a process takes longer to start than it saves.
_SMALL_BYTES = 1 << 26


class Workers:
  """Runs tasks in `count` processes; in this one where that is one.

  They are started afresh ("spawn"): a fork of a process that runs JAX may
  hang. A script that is not protected by `if __name__ == "__main__"` is
  therefore run again by each of them, as always with `multiprocessing`.

  Args:
    count: of processes; None for as many as there are cores, and one for
      little work.
  """

  def __init__(self, count: int | None = None):
    if count is not None and count < 1:
      raise ValueError(f"expected workers >= 1 or None, got {count}")
    self.count = count
    self._pool: concurrent.futures.ProcessPoolExecutor | None = None
    self._size = 0

  def __enter__(self) -> "Workers":
    return self

  def __exit__(self, *_) -> None:
    self._close()

  def _close(self) -> None:
    if self._pool is not None:
      self._pool.shutdown(cancel_futures=True)
      self._pool, self._size = None, 0

  def _pool_of(self, size: int) -> concurrent.futures.ProcessPoolExecutor:
    # All of its processes start at once, so no more than there are tasks.
    if size > self._size:
      self._close()
      self._pool = concurrent.futures.ProcessPoolExecutor(
        size, mp_context=multiprocessing.get_context("spawn")
      )
      self._size = size
    return self._pool

  def map(
    self,
    tasks: Sequence[Callable[..., Any]],
    sizes: Sequence[int],
    description: str,
    *,
    live: bool = False,
  ) -> list[Any]:
    """Results of the tasks, in their order.

    Args:
      tasks: functions that pickle.
      sizes: bytes of each.
      description: of the bar.
      live: the tasks take a `report` that they may call with bytes done.

    Raises:
      RuntimeError: a process ended without a word.
    """
    count = self.count
    if count is None:
      small = sum(sizes) < _SMALL_BYTES
      count = 1 if small else os.cpu_count() or 1
    if not tasks:
      return []
    with progress.bar(sum(sizes), description, unit="bytes") as bar:
      if min(count, len(tasks)) == 1:
        results = []
        for task, size in zip(tasks, sizes, strict=True):
          results.append(task(report=bar.update) if live else task())
          bar.update(0 if live else size)
        return results
      pool = self._pool_of(min(count, len(tasks)))
      futures = [pool.submit(task) for task in tasks]
      results = []
      try:
        # In order, so that of several bad files always the same is named.
        for future, size in zip(futures, sizes, strict=True):
          results.append(future.result())
          bar.update(size)
      except concurrent.futures.process.BrokenProcessPool as error:
        raise RuntimeError(
          "a worker process ended at once. Either the machine is out of"
          " memory, or the script that loads the corpus does so outside of"
          ' `if __name__ == "__main__":`; workers=1 needs no processes'
        ) from error
      return results
