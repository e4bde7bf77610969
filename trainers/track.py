"""TensorBoard and Weights & Biases, where a config asks for them."""

import hashlib
import pathlib
from collections.abc import Mapping, Sequence

KINDS = ("tensorboard", "wandb")


class Trackers:
  """Writes scalars to every tracker that was asked for.

  Args:
    kinds: some of `KINDS`.
    workdir: TensorBoard's files go to its `tensorboard/`; W&B's, which
      `WANDB_MODE=offline` keeps on disk, to the workdir itself. W&B goes on
      with the same run when the training resumes.

  Raises:
    ImportError: a tracker that is not installed; says what to install.
  """

  def __init__(self, kinds: Sequence[str], workdir: pathlib.Path):
    check(kinds)
    self._tensorboard = self._wandb = None
    if "tensorboard" in kinds:
      import tensorboardX

      self._tensorboard = tensorboardX.SummaryWriter(
        str(workdir / "tensorboard")
      )
    if "wandb" in kinds:
      import wandb

      self._wandb = wandb.init(
        project="gemma_jax",
        dir=str(workdir),
        id=f"{workdir.name}-{_digest(workdir)}",
        resume="allow",
      )

  def write(self, step: int, row: Mapping[str, float]) -> None:
    """Adds the scalars of one log step."""
    if self._tensorboard is not None:
      for name, value in row.items():
        self._tensorboard.add_scalar(name, value, step)
      self._tensorboard.flush()
    if self._wandb is not None:
      self._wandb.log(dict(row), step=step)

  def close(self) -> None:
    """Finishes what the trackers write."""
    if self._tensorboard is not None:
      self._tensorboard.close()
    if self._wandb is not None:
      self._wandb.finish()


def _digest(workdir: pathlib.Path) -> str:
  """Tells runs apart whose workdirs have one name."""
  return hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:8]


def check(kinds: Sequence[str]) -> None:
  """Raises before any work if a tracker is unknown or not installed."""
  unknown = sorted(set(kinds) - set(KINDS))
  if unknown:
    raise ValueError(
      f"Unknown trackers {unknown}; config.track takes some of {KINDS}."
    )
  modules = {"tensorboard": "tensorboardX", "wandb": "wandb"}
  for kind in kinds:
    try:
      __import__(modules[kind])
    except ImportError as e:
      raise ImportError(
        f"config.track asks for {kind}, which is not installed: "
        "pip install -e '.[track]'"
      ) from e
