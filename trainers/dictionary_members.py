"""The dictionaries that a run trains side by side."""

import dataclasses
import itertools
import math

from gemma_jax import dictionaries
from gemma_jax.dictionaries import defaults
from gemma_jax.dictionaries.config import SELECTING, DictionaryConfig

# Type, least value and what it must be below, for every axis of a sweep.
RANGES = {
  "learning_rate": (int | float, 0.0, math.inf),
  "k": (int | float, 0.0, math.inf),
  "sparsity": (int | float, 0.0, math.inf),
  "width": (int, 1, 2**31),
  "seed": (int, 0, 2**32),
}


@dataclasses.dataclass(frozen=True)
class Member:
  """One dictionary of a sweep; without a sweep there is one.

  Attributes:
    name: what it differs in, as in "k=32,seed=1".
    config: what it is.
    learning_rate: peak.
    sparsity: coefficient.
    seed: of its initial latents.
  """

  name: str
  config: DictionaryConfig
  learning_rate: float
  sparsity: float
  seed: int


def of(config, recipe, known, read, write) -> tuple[Member, ...]:
  """All combinations of a checked config's `sweep`; see `dictionary_plan`."""
  own = dict(config["dictionary"])
  _require("seed", config["seed"], *RANGES["seed"])
  sweep = {name: tuple(v) for name, v in config["sweep"].items() if v}
  for name, values in sweep.items():
    for value in values:
      _require(f"sweep.{name}", value, *RANGES[name])
    if len(set(values)) < len(values):
      raise ValueError(f"sweep.{name}={list(values)} has a value twice.")
  groups = {
    name: own.pop(name)
    for name in ("prefix_widths", "group_sizes", "group_fractions")
  }
  if own.pop("matryoshka") and not any(groups.values()):
    groups["group_fractions"] = defaults.GROUP_FRACTIONS
  elif any(groups.values()) and not config["dictionary"]["matryoshka"]:
    raise ValueError(
      "dictionary.matryoshka is False and its groups are given; make it True, "
      "or leave them out."
    )
  aims = own["activation"] in SELECTING or recipe.sparsity.startswith("target")
  for name, used in (
    ("k", aims),
    ("sparsity", recipe.sparsity != "none"),
  ):
    if name in sweep and not used:
      raise ValueError(
        f"sweep.{name} changes nothing here: activation "
        f"{own['activation']!r} with recipe.sparsity {recipe.sparsity!r} does "
        "not use it."
      )
  if own["skip"] and read == write:
    raise ValueError(
      "dictionary.skip would learn the identity: activations.read and .write "
      f"are both {', '.join(read)}. Skips are for transcoders."
    )
  members = []
  for values in itertools.product(*sweep.values()):
    at = dict(zip(sweep, values, strict=True))
    width = at.get(
      "width", known.width if own["width"] is None else own["width"]
    )
    k = at.get("k", known.k if own["k"] is None else own["k"]) if aims else None
    dictionary = DictionaryConfig(
      d_in=known.d_in,
      d_out=known.d_out,
      width=width,
      activation=own["activation"],
      k=None if k is None else float(k),
      prefix_widths=dictionaries.prefix_widths(width, **groups),
      skip=own["skip"],
      layer_norm=recipe.layer_norm,
      read="+".join(read),
      write="+".join(write),
      parts=known.parts,
      model=config["model"]["name"],
    )
    members.append(
      Member(
        ",".join(f"{name}={value}" for name, value in at.items()),
        dictionary,
        float(at.get("learning_rate", recipe.rate(width))),
        float(at.get("sparsity", recipe.sparsity_coefficient)),
        at.get("seed", config["seed"]),
      )
    )
  if recipe.sparsity != "none" and not all(m.sparsity for m in members):
    raise ValueError(
      f"recipe.sparsity {recipe.sparsity!r} has the coefficient 0, so nothing "
      "would be sparse. Give recipe.sparsity_coefficient; its scale is that of "
      f"loss {recipe.loss!r}."
    )
  return tuple(members)


def _require(name, value, kind, least, most) -> None:
  """Raises ValueError unless a value is of its type and range."""
  if isinstance(value, bool) or not isinstance(value, kind):
    raise ValueError(
      f"{name}={value!r} must be "
      f"{'a whole number' if kind is int else 'a number'}."
    )
  if not least <= value < most:
    raise ValueError(
      f"{name}={value!r} must be at least {least}, below {most}."
    )


def grouped(members: tuple[Member, ...]) -> list[tuple[Member, ...]]:
  """Members of one width together: they are one program."""
  widths = dict.fromkeys(member.config.width for member in members)
  return [
    tuple(m for m in members if m.config.width == width) for width in widths
  ]
