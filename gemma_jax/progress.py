"""One progress bar for everything that a user waits for."""

import logging
import sys

import tqdm

log = logging.getLogger("gemma_jax")

SECONDS_BETWEEN_LINES = 10.0


class _Lines:
  """A file for tqdm that turns redrawn bars into log lines."""

  def write(self, text: str) -> None:
    if text := text.strip():
      log.info("%s", text)

  def flush(self) -> None:
    """Logging flushes by itself."""


def bar(total: int, description: str, *, unit: str, initial: int = 0):
  """A tqdm bar with rate and time left: redrawn on a terminal, else logged.

  Args:
    total: how many units there are.
    description: what is being done.
    unit: what is counted, e.g. "tokens".
    initial: how many were done before.
  """
  terminal = sys.stderr.isatty()
  return tqdm.tqdm(
    total=total,
    initial=initial,
    desc=description,
    unit=f" {unit}",
    unit_scale=True,
    dynamic_ncols=terminal,
    ncols=None if terminal else 160,
    ascii=None if terminal else True,
    file=sys.stderr if terminal else _Lines(),
    mininterval=0.1 if terminal else SECONDS_BETWEEN_LINES,
    bar_format=None
    if terminal
    else (
      "{desc}: {percentage:.0f}%  {n_fmt}/{total_fmt}{unit}  {rate_fmt}  "
      "{remaining} left{postfix}"
    ),
  )
