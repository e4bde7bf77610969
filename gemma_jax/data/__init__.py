"""Corpora, honest splits, and windows of tokens."""

from gemma_jax.data.corpus import (
  Document,
  builtin,
  load,
  read_jsonl,
  read_text,
  sample,
  split,
)
from gemma_jax.data.windows import Windows, fingerprint, make_windows

__all__ = [
  "Document",
  "Windows",
  "builtin",
  "fingerprint",
  "load",
  "make_windows",
  "read_jsonl",
  "read_text",
  "sample",
  "split",
]
