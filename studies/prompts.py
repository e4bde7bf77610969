"""Prompts by capability, of our own writing and of the user's files."""

import dataclasses
import json
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

OWN = pathlib.Path(__file__).with_name("capabilities")
CAPABILITIES = tuple(sorted(path.stem for path in OWN.glob("*.jsonl")))
KEYS = ("id", "capability", "prompt", "response")
OPTIONAL = ("response",)


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A prompt, the unit of every statistic.

  Attributes:
    id: its name, once in a study.
    capability: what it asks of a model.
    prompt: text.
    response: a text that all models read after the prompt; "" where what the
      study's reference answers takes its place.
  """

  id: str
  capability: str
  prompt: str
  response: str = ""


def load(
  capabilities: Sequence[str],
  files: Sequence[str],
  per_capability: int,
) -> list[Prompt]:
  """Prompts sorted by capability.

  Args:
    capabilities: of our own, of `CAPABILITIES`.
    files: JSONL of the user's, an object with `KEYS` on each line.
    per_capability: the first so many of each; 0 takes all.

  Raises:
    FileNotFoundError: no such file.
    ValueError: an unknown capability, a line that is no prompt (its number),
      an id that comes twice, or no prompts.
  """
  unknown = [name for name in capabilities if name not in CAPABILITIES]
  if unknown:
    raise ValueError(
      f"expected capabilities of {', '.join(CAPABILITIES)}, got "
      f"{', '.join(unknown)}; prompts of others come in a JSONL file"
    )
  if per_capability < 0:
    raise ValueError(
      f"expected a number of prompts for each capability, or 0 for all, got "
      f"{per_capability}"
    )
  found = []
  for name in capabilities:
    found += _read(OWN / f"{name}.jsonl", {"capability": name})
  for name in files:
    found += _read(pathlib.Path(name).expanduser(), {})
  again = [name for name, n in Counter(p.id for p in found).items() if n > 1]
  if again or not found:
    raise ValueError(
      f"expected prompts with an id of its own each, got {len(found)} prompts "
      f"and twice {', '.join(again[:10]) or 'none'}"
    )
  groups = {}
  for prompt in found:
    groups.setdefault(prompt.capability, []).append(prompt)
  most = per_capability or None
  return [prompt for group in groups.values() for prompt in group[:most]]


def _read(path: pathlib.Path, known: Mapping[str, str]) -> list[Prompt]:
  if not path.is_file():
    raise FileNotFoundError(
      f"{path} is no file; expected JSONL, an object with "
      f"{', '.join(KEYS)} on each line."
    )
  out = []
  for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
    if line.strip():
      out.append(_prompt(line, known, f"{path}, line {number}"))
  return out


def _prompt(line: str, known: Mapping[str, str], where: str) -> Prompt:
  try:
    given: Any = json.loads(line)
  except (ValueError, RecursionError) as e:
    raise ValueError(f"{where} is no JSON ({e})") from e
  if not isinstance(given, dict):
    raise ValueError(f"{where}: expected an object, got {line[:80]!r}")
  given = {**known, **given}
  wrong = [
    name
    for name in KEYS
    if not isinstance(given.get(name, "" if name in OPTIONAL else None), str)
    or (name not in OPTIONAL and not given[name].strip())
  ]
  if wrong or (wrong := sorted(set(given) - set(KEYS))):
    raise ValueError(
      f"{where}: expected {', '.join(KEYS)} as text ({', '.join(OPTIONAL)} may "
      f"be left out), got {sorted(given)}; look at {', '.join(wrong)}"
    )
  return Prompt(**given)


def others(prompts: Sequence[Prompt], seed: int = 0) -> np.ndarray:
  """For each prompt another one of its capability, int [N].

  What a measure gives for these is what two texts of one kind have in common.

  Raises:
    ValueError: a capability with a single prompt.
  """
  rng = np.random.default_rng(seed)
  names = np.array([prompt.capability for prompt in prompts])
  out = np.empty(len(prompts), int)
  for name in dict.fromkeys(names):
    own = rng.permutation(np.flatnonzero(names == name))
    if len(own) < 2:
      raise ValueError(
        f"expected at least 2 prompts of {name}, got {len(own)}; add some or "
        "leave that capability out"
      )
    out[own] = np.roll(own, 1)
  return out
