"""Word lists of our own, and how many of their words a list of tokens has."""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from gemma_jax.concepts import lexemes as lexemes_lib

FEWEST = 5  # words of a category that are in the vocabulary

_BUNDLED = pathlib.Path(__file__).with_name("lexicons")


@dataclasses.dataclass(frozen=True)
class Lexicon:
  """Categories of words as families of a vocabulary.

  Attributes:
    names: of the A categories.
    member: bool [A, families], among those that have a content token.
    split: of each category, the words that no content token stands for, so
      that the tokenizer splits them, sorted.
  """

  names: tuple[str, ...]
  member: np.ndarray
  split: dict[str, list[str]]


class Purity(NamedTuple):
  """How far n lists of tokens are of A categories.

  Attributes:
    p: float64 [n, A], chance of as many hits or more.
    hits: int64 [n, A], families of the row in the category.
  """

  p: np.ndarray
  hits: np.ndarray


def load(
  paths: Sequence[str | pathlib.Path] = (),
) -> dict[str, frozenset[str]]:
  """The bundled categories and one's own, by name.

  Args:
    paths: of word lists as `lexemes.word_list` reads them; a file's name
      without its ending is the category's.

  Raises:
    FileNotFoundError, ValueError: as `lexemes.word_list`, or a name twice.
  """
  paths = [*sorted(_BUNDLED.glob("*.txt")), *map(pathlib.Path, paths)]
  found: dict[str, frozenset[str]] = {}
  for path in paths:
    if path.stem in found:
      raise ValueError(
        f"{path}: there is a category {path.stem!r} already, of "
        f"{sorted(found)}; rename the file"
      )
    found[path.stem] = lexemes_lib.word_list(path)
  return found


def fit(
  words: Mapping[str, frozenset[str]], lexemes: lexemes_lib.Lexemes
) -> Lexicon:
  """Finds the words of categories in a vocabulary.

  Args:
    words: of each category, compared as families are: case, diacritics and
      plurals make no difference.
    lexemes: of the vocabulary.

  Raises:
    ValueError: no categories, or one with fewer than `FEWEST` families in
      the vocabulary.
  """
  if not words:
    raise ValueError("expected categories of words, got none")
  content = _content(lexemes)
  member = np.zeros((len(words), len(content)), bool)
  split = {}
  lists = [sorted(category) for category in words.values()]
  ends = np.cumsum([len(ordered) for ordered in lists])
  every = lexemes_lib.find(itertools.chain(*lists), lexemes)
  places = np.split(every, ends[:-1])
  for row, name in enumerate(words):
    ordered, found = lists[row], places[row]
    there = (found >= 0) & content[found]
    member[row, found[there]] = True
    split[name] = [w for w, t in zip(ordered, there, strict=True) if not t]
    if member[row].sum() < FEWEST:
      raise ValueError(
        f"{name}: expected at least {FEWEST} words in the vocabulary, got "
        f"{member[row].sum()} of {len(ordered)}; the tokenizer splits "
        f"{split[name]}. Add commoner words"
      )
  return Lexicon(tuple(words), member, split)


def purity(
  families: np.ndarray, lexicon: Lexicon, lexemes: lexemes_lib.Lexemes
) -> Purity:
  """Compares lists of tokens with the categories of a lexicon.

  The null draws as many families as the row has, without replacement and each
  as likely as any other, from all that have a content token: the hits are
  hypergeometric. Families of the row without a content token, and those that
  it has already, are no draws.

  It takes no account of how common words are. Lexicons hold common words, and
  these have more tokens (cases, spaces), so that tokens drawn at random hit
  more often than families do.

  Args:
    families: int [n, m], -1 for none.
    lexicon: fitted to the same vocabulary.
    lexemes: of the vocabulary.

  Returns:
    p, 1 where there are no hits, and hits.

  Raises:
    ValueError: other shapes, or a lexicon of another vocabulary.
  """
  families = np.asarray(families)
  size = len(lexemes.names)
  if families.ndim != 2 or lexicon.member.shape[1] != size:
    raise ValueError(
      "expected families [n, m] and a lexicon fitted to the same vocabulary "
      f"of {size} families, got {families.shape} and a lexicon of "
      f"{lexicon.member.shape[1]}"
    )
  content = _content(lexemes)
  drawn = lexemes_lib.firsts(families) & content[families]
  draws = drawn.sum(axis=1)
  members = lexicon.member.sum(axis=1)
  hits = np.stack(
    [(member[families] & drawn).sum(axis=1) for member in lexicon.member],
    axis=1,
  )
  rows, columns = np.nonzero(hits)
  cases = hits[rows, columns], members[columns], draws[rows]
  # SciPy loops in Python, and few of the cases differ.
  cases, place = np.unique(np.stack(cases), axis=1, return_inverse=True)
  p = np.ones(hits.shape)
  p[rows, columns] = stats.hypergeom.sf(
    cases[0] - 1, content.sum(), cases[1], cases[2]
  )[place.ravel()]
  return Purity(p, hits)


def best(purity: Purity) -> tuple[np.ndarray, np.ndarray]:
  """The category of each list that chance explains least.

  Args:
    purity: of n lists and A categories.

  Returns:
    int32 [n] categories, and float64 [n] their p times A, at most 1
    (Bonferroni); the category is -1 where that is 1.
  """
  p = np.minimum(purity.p.min(axis=1) * purity.p.shape[1], 1)
  category = np.where(p < 1, purity.p.argmin(axis=1), -1)
  return category.astype(np.int32), p


def _content(lexemes: lexemes_lib.Lexemes) -> np.ndarray:
  """bool [families], whether a token of the family is a content word."""
  out = np.zeros(len(lexemes.names), bool)
  content = lexemes.kind == lexemes_lib.KINDS.index("content")
  out[lexemes.family[content & lexemes.usable]] = True
  return out
