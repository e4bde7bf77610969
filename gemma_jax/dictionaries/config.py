"""What a dictionary is: sizes, selection, and how it was made."""

import dataclasses
import difflib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

ACTIVATIONS = ("topk", "batchtopk")


@dataclasses.dataclass(frozen=True)
class DictionaryConfig:
  """An SAE (read == write) or a transcoder. Hashable, so jit-static.

  Attributes:
    d_in: width of the vectors read.
    d_out: width of the vectors reconstructed.
    width: M, number of latents.
    activation: "topk" keeps the k largest latents of each token, "batchtopk"
      the k * B largest of a batch in training and those above a threshold
      afterwards.
    k: latents that are active, for each token or on average.
    prefix_widths: nested Matryoshka widths, ascending, the last one M; every
      prefix is a dictionary of its own.
    skip: add an affine map from input to output.
    aux_k: dead latents that each token recruits for what is left unexplained.
    aux_candidates: the longest dead, among which they are chosen.
    aux_coefficient: weight of their loss; 0 turns it off.
    dead_after: tokens without firing after which a latent counts as dead.
    threshold_decay: of the running inference threshold.
    read: site of the input.
    write: site of the output.
    model: name of the model.
  """

  d_in: int
  d_out: int
  width: int
  activation: str
  k: float
  prefix_widths: tuple[int, ...]
  skip: bool = False
  aux_k: int = 64
  aux_candidates: int = 256
  aux_coefficient: float = 1 / 32
  dead_after: int = 50_000
  threshold_decay: float = 0.99
  read: str = ""
  write: str = ""
  model: str = ""

  def __post_init__(self):
    if self.activation not in ACTIVATIONS:
      raise ValueError(
        f"activation {self.activation!r} is unknown; expected one of "
        f"{', '.join(ACTIVATIONS)}."
      )
    if not 0 < self.k <= self.width:
      raise ValueError(f"k={self.k} must be in (0, {self.width}], the width.")
    if self.activation == "topk" and self.k != int(self.k):
      raise ValueError(f"k={self.k} must be whole with activation 'topk'.")
    check_prefixes(self.prefix_widths, self.width)

  @property
  def is_transcoder(self) -> bool:
    """Whether input and output are different sites."""
    return self.read != self.write

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter, by name."""
    shapes = {
      "W_enc": (self.d_in, self.width),
      "b_enc": (self.width,),
      "W_dec": (self.width, self.d_out),
      "b_dec": (self.d_out,),
    }
    if self.skip:
      shapes["W_skip"] = (self.d_in, self.d_out)
    return shapes


def check_prefixes(widths: Sequence[int], width: int) -> None:
  """Raises ValueError unless `widths` ascend and end at `width`."""
  ascending = all(a < b for a, b in itertools.pairwise(widths))
  if not widths or widths[0] < 1 or not ascending or widths[-1] != width:
    raise ValueError(
      f"prefix_widths {list(widths)} must be positive, ascend strictly and "
      f"end at the width, {width}. (Sizes of groups, which add up to the "
      "width, go under group_sizes.)"
    )


def prefix_widths(
  width: int,
  *,
  prefix_widths: Sequence[int] | None = None,
  group_sizes: Sequence[int] | None = None,
) -> tuple[int, ...]:
  """Nested widths, from either way of giving them; none means plain (M,).

  Raises:
    ValueError: both are given, or they do not end at (add up to) the width.
  """
  if prefix_widths and group_sizes:
    raise ValueError(
      "Both prefix_widths and group_sizes are given; give one of them."
    )
  if group_sizes:
    if min(group_sizes) < 1 or sum(group_sizes) != width:
      raise ValueError(
        f"group_sizes {list(group_sizes)} must be positive and add up to the "
        f"width, {width}; they add up to {sum(group_sizes)}. (Nested widths, "
        "which end at the width, go under prefix_widths.)"
      )
    return tuple(itertools.accumulate(group_sizes))
  widths = tuple(prefix_widths or (width,))
  check_prefixes(widths, width)
  return widths


def from_dict(fields: Mapping[str, Any]) -> DictionaryConfig:
  """A `DictionaryConfig` from JSON.

  Raises:
    ValueError: unknown or missing fields, by name; values that do not fit.
  """
  known = {field.name for field in dataclasses.fields(DictionaryConfig)}
  for name in fields:
    if name not in known:
      near = difflib.get_close_matches(name, known, n=1)
      hint = f" Did you mean {near[0]!r}?" if near else ""
      raise ValueError(f"A dictionary has no field {name!r}.{hint}")
  missing = [
    field.name
    for field in dataclasses.fields(DictionaryConfig)
    if field.default is dataclasses.MISSING and field.name not in fields
  ]
  if missing:
    raise ValueError(f"A dictionary needs {', '.join(missing)}.")
  widths = tuple(fields["prefix_widths"])
  return DictionaryConfig(**{**fields, "prefix_widths": widths})
