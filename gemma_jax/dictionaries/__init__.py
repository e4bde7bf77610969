"""Sparse dictionaries: SAEs and transcoders, plain or Matryoshka."""

from gemma_jax.dictionaries.config import DictionaryConfig, prefix_widths
from gemma_jax.dictionaries.dictionary import Dictionary, load

__all__ = ["Dictionary", "DictionaryConfig", "load", "prefix_widths"]
