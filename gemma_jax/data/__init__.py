"""Corpora, honest splits, and windows of tokens."""

from gemma_jax.data.corpus import Corpus, sample, split
from gemma_jax.data.document import Document
from gemma_jax.data.formats import builtin, load
from gemma_jax.data.stream import WindowStream
from gemma_jax.data.windows import Windows, fingerprint, make_windows

__all__ = [
  "Corpus",
  "Document",
  "WindowStream",
  "Windows",
  "builtin",
  "fingerprint",
  "load",
  "make_windows",
  "sample",
  "split",
]
