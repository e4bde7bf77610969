"""What a dictionary is: sizes, selection, and how it was made."""

import dataclasses
import difflib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

ACTIVATIONS = ("relu", "gated", "topk", "batchtopk", "jumprelu")
SELECTING = ("topk", "batchtopk")  # those that keep a number of latents


@dataclasses.dataclass(frozen=True)
class DictionaryConfig:
  """An SAE (read == write), transcoder or crosscoder. Hashable: jit-static.

  Attributes:
    d_in: width of the vectors read.
    d_out: width of the vectors reconstructed.
    width: M, number of latents.
    activation: "relu"; "gated" (a gate and a magnitude for each latent);
      "topk" keeps the k largest of each token, "batchtopk" the k * B largest
      of a batch in training and those above a threshold afterwards;
      "jumprelu" those above thresholds that are trained.
    k: latents that are active, for each token or on average: exact for
      "topk", the aim of "batchtopk" and of target-L0 losses, else what is
      known of it. None where nothing is.
    prefix_widths: nested Matryoshka widths, ascending, the last one M; every
      prefix is a dictionary of its own.
    skip: add an affine map from input to output.
    layer_norm: every token is centred and divided by its deviation first, and
      what comes out turned back. SAEs only.
    read: site of the input; of a crosscoder, sites joined by "+".
    write: site of the output, likewise.
    parts: widths of a crosscoder's sites, in order; empty for one site.
    model: name of the model.
  """

  d_in: int
  d_out: int
  width: int
  activation: str
  k: float | None
  prefix_widths: tuple[int, ...]
  skip: bool = False
  layer_norm: bool = False
  read: str = ""
  write: str = ""
  parts: tuple[int, ...] = ()
  model: str = ""

  def __post_init__(self):
    if self.activation not in ACTIVATIONS:
      raise ValueError(
        f"activation {self.activation!r} is unknown; expected one of "
        f"{', '.join(ACTIVATIONS)}."
      )
    if self.k is None and self.activation in SELECTING:
      raise ValueError(f"activation {self.activation!r} needs k.")
    if self.k is not None and not 0 < self.k <= self.width:
      raise ValueError(f"k={self.k} must be in (0, {self.width}], the width.")
    if self.activation == "topk" and self.k != int(self.k):
      raise ValueError(f"k={self.k} must be whole with activation 'topk'.")
    if self.layer_norm and (self.is_transcoder or self.d_in != self.d_out):
      raise ValueError("layer_norm needs one site, read and written.")
    if self.parts and sum(self.parts) != self.d_out:
      raise ValueError(
        f"parts {list(self.parts)} must add up to d_out, {self.d_out}."
      )
    check_prefixes(self.prefix_widths, self.width)

  @property
  def is_transcoder(self) -> bool:
    """Whether input and output are different sites."""
    return self.read != self.write

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a folded dictionary, by name.

    `b_enc` [M] is the gate's bias of "gated", whose magnitude is
    ReLU(exp(r_mag) * (x @ W_enc) + b_mag). `threshold` [M] belongs to
    "batchtopk" and "jumprelu".
    """
    shapes = {
      "W_enc": (self.d_in, self.width),
      "b_enc": (self.width,),
      "W_dec": (self.width, self.d_out),
      "b_dec": (self.d_out,),
    }
    if self.skip:
      shapes["W_skip"] = (self.d_in, self.d_out)
    if self.activation == "gated":
      shapes |= {"r_mag": (self.width,), "b_mag": (self.width,)}
    if self.activation in ("batchtopk", "jumprelu"):
      shapes["threshold"] = (self.width,)
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
  group_fractions: Sequence[float] | None = None,
) -> tuple[int, ...]:
  """Nested widths, from any way of giving them; none means plain (M,).

  Args:
    width: M.
    prefix_widths: where each prefix ends; the last one is M.
    group_sizes: latents that each prefix adds; they add up to M.
    group_fractions: the same as shares of M, which add up to 1; each group is
      rounded down, and the last takes what is left.

  Raises:
    ValueError: several are given, or they do not end at (add up to) M or 1.
  """
  given = {
    "prefix_widths": prefix_widths,
    "group_sizes": group_sizes,
    "group_fractions": group_fractions,
  }
  several = [name for name, value in given.items() if value]
  if len(several) > 1:
    raise ValueError(f"Give one of {' and '.join(several)}, not both.")
  if group_fractions:
    if min(group_fractions) <= 0 or abs(sum(group_fractions) - 1) > 1e-9:
      raise ValueError(
        f"group_fractions {list(group_fractions)} must be positive and add up "
        f"to 1; they add up to {sum(group_fractions)}."
      )
    group_sizes = [int(share * width) for share in group_fractions[:-1]]
    group_sizes.append(width - sum(group_sizes))
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
  tuples = {
    name: tuple(fields[name])
    for name in ("prefix_widths", "parts")
    if name in fields
  }
  return DictionaryConfig(**{**fields, **tuples})
