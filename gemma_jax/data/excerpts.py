"""A piece of each document, cut by characters: the same for any tokenizer."""

import dataclasses
import itertools
import unicodedata

from gemma_jax.data.corpus import Corpus, shuffled
from gemma_jax.data.document import Document, key

SOURCE = "excerpts"


def excerpts(
  corpus: Corpus, *, documents: int, characters: int, seed: int = 0
) -> Corpus:
  """One piece of each of some documents, as equally many of every source.

  Models with other tokenizers can then read the same text whole, which budgets
  of tokens would end elsewhere for each. A piece starts at a line or, in a
  long one, where the document's id decides. Texts are in Unicode's normal form
  C, to which some tokenizers bring them. Equal pieces are taken once. All are
  one stratum, so that a budget of all tokens is read to its end; their names
  say the sources.

  Args:
    corpus: to take from; memory is that of the pieces.
    documents: at most so many.
    characters: of a piece, at most.
    seed: which documents.

  Raises:
    ValueError: numbers below 1.
  """
  if documents < 1 or characters < 1:
    raise ValueError(
      f"expected at least 1 document of 1 character, got documents={documents}"
      f" and characters={characters}"
    )
  found: dict[str, Document] = {}
  for indices in itertools.zip_longest(*shuffled(corpus, seed)):
    for index in indices:
      if index is None:
        continue
      document = corpus[int(index)]
      text = _piece(document, characters)
      if text.strip():
        name = f"{document.source}: {document.name}"
        piece = dataclasses.replace(
          document, text=text, source=SOURCE, name=name
        )
        found.setdefault(text, piece)
      if len(found) == documents:
        return Corpus.of(list(found.values()))
  return Corpus.of(list(found.values()))


def _piece(document: Document, characters: int) -> str:
  text = unicodedata.normalize("NFC", document.text)
  if len(text) <= characters:
    return text
  start = key(document) % (len(text) - characters + 1)
  line = text.rfind("\n", max(0, start - characters), start) + 1
  start = line if line or start < characters else start
  return text[start : start + characters]
