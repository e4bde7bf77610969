"""A document, and the numbers that stand for it in an index."""

import dataclasses
import functools
import hashlib

import numpy as np


@dataclasses.dataclass(frozen=True)
class Document:
  """One text, where it came from, and what it may not be separated from.

  Attributes:
    text: the text, never blank.
    source: the stratum, e.g. "code" or "Wikipedia (en)".
    name: what a person calls it, e.g. "json.decoder" or "file.jsonl:12".
    group: documents of one group land on the same side of `split`.
  """

  text: str
  source: str
  name: str
  group: str

  @functools.cached_property
  def id(self) -> str:
    """Hash of source, name and text: the same in every process (16 hex)."""
    return _digest(self.source, self.name, self.text)[:16]


def loose(text: str, source: str, name: str) -> Document:
  """A document of a file: equal texts share a group, white space aside."""
  # JSON may hold half a surrogate pair, which neither hashes nor tokenises.
  text = text.encode("utf-8", "replace").decode("utf-8")
  # Copies are common in crawled text; white space is where they differ.
  return Document(text, source, name, _digest(" ".join(text.split())))


def key(document: Document) -> int:
  """The id as a number below 2^64."""
  return int(document.id, 16)


def group_key(document: Document) -> int:
  """The group as a number below 2^64."""
  return int(_digest(document.group)[:16], 16)


def draw(values: np.ndarray, purpose: str, seed: int) -> np.ndarray:
  """A seeded hash of numbers that are hashes already.

  The finaliser of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable
  pseudorandom number generators", with the constants of Stafford's variant
  13) after a shift by the seed. It is a bijection: no two values collide.

  Args:
    values: uint64, e.g. documents' keys.
    purpose: draws for different purposes are independent.
    seed: so are draws of different seeds.

  Returns:
    uint64 of the same shape, uniform for uniform values.
  """
  shift = int(_digest(purpose, str(seed))[:16], 16)
  mixed = values ^ np.uint64(shift)
  mixed ^= mixed >> np.uint64(30)
  mixed *= np.uint64(0xBF58476D1CE4E5B9)
  mixed ^= mixed >> np.uint64(27)
  mixed *= np.uint64(0x94D049BB133111EB)
  mixed ^= mixed >> np.uint64(31)
  return mixed


def _digest(*parts: str) -> str:
  # The lengths keep ("ab", "c") and ("a", "bc") apart.
  hasher = hashlib.sha256()
  for part in parts:
    data = part.encode("utf-8")
    hasher.update(b"%d:" % len(data))
    hasher.update(data)
  return hasher.hexdigest()
