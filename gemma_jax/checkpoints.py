"""Orbax behind one page: save, restore, and what to do when it is damaged."""

import logging
import os
import pathlib

import jax
import orbax.checkpoint as ocp

log = logging.getLogger("gemma_jax")


class Checkpoints:
  """Checkpoints of one training, by step; saving is asynchronous and atomic.

  Args:
    directory: made if need be; the same for all hosts.
    keep: how many of the newest stay.
  """

  def __init__(self, directory: str | os.PathLike, *, keep: int):
    self.directory = pathlib.Path(directory).absolute()
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=True, cleanup_tmp_directories=True
      ),
    )

  def count(self) -> int:
    """How many complete checkpoints there are."""
    return len(self._manager.all_steps())

  def save(self, step: int, state) -> None:
    """Starts saving; returns once the arrays may be overwritten.

    A checkpoint of the same step is one that could not be read: it goes.
    """
    if step in self._manager.all_steps():
      self._manager.delete(step)
    self._manager.save(step, args=ocp.args.StandardSave(state), force=True)

  def restore(self, abstract):
    """The newest checkpoint that can be read, and its step.

    A damaged one is passed over with a warning, so that a disk that filled up
    or a copy that broke off costs the steps since the one before it.

    Args:
      abstract: tree of `jax.ShapeDtypeStruct` with shardings.

    Returns:
      (state, step), or (None, 0) where there is no checkpoint.

    Raises:
      ValueError: there are checkpoints and none can be read.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    for step in steps:
      try:
        args = ocp.args.StandardRestore(abstract)
        return self._manager.restore(step, args=args), step
      except Exception as e:  # Orbax raises many kinds for damaged files
        log.warning(
          "checkpoint %s/%d cannot be read (%s: %s)",
          self.directory,
          step,
          type(e).__name__,
          str(e).splitlines()[0] if str(e) else "",
        )
    if steps:
      raise ValueError(
        f"None of the checkpoints {steps} in {self.directory} can be read. "
        "Restore them from a copy, or use a new workdir."
      )
    return None, 0

  def close(self) -> None:
    """Waits for what is being saved."""
    self._manager.wait_until_finished()
    self._manager.close()


def abstract(tree, shardings):
  """`jax.ShapeDtypeStruct` for every leaf, with its sharding."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    shardings,
  )
