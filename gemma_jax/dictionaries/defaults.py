"""What a dictionary should be, from the widths of its sites alone."""

import dataclasses
from collections.abc import Sequence

EXPANSION = 16  # M / D
# Of Matryoshka groups: 1x, 2x, 4x and 9x the width of what is written.
GROUP_FRACTIONS = (1 / 16, 2 / 16, 4 / 16, 9 / 16)


@dataclasses.dataclass(frozen=True)
class Defaults:
  """Sizes that fit a site.

  Attributes:
    d_in: width of what is read.
    d_out: width of what is written.
    parts: widths of a crosscoder's sites; empty for one.
    width: M, 16 times the width of what is written.
    k: active latents; grows with the width, 32 for GPT-2, 96 for Gemma 2 2B.
    batch_size: tokens.
  """

  d_in: int
  d_out: int
  parts: tuple[int, ...]
  width: int
  k: int
  batch_size: int


def of(read: Sequence[int], write: Sequence[int]) -> Defaults:
  """Defaults for reading and writing sites of these widths."""
  parts = tuple(write)
  wide = max(parts)
  return Defaults(
    d_in=sum(read),
    d_out=sum(parts),
    parts=parts if len(parts) > 1 else (),
    width=EXPANSION * wide,
    k=max(32, wide // 192 * 8),
    batch_size=4096 if wide > 1024 else 2048,
  )
