"""Sparse dictionaries: SAEs, transcoders and crosscoders."""

from gemma_jax.dictionaries.config import DictionaryConfig, prefix_widths
from gemma_jax.dictionaries.dictionary import Dictionary, load
from gemma_jax.dictionaries.verify import Verified, WrongSiteError

__all__ = [
  "Dictionary",
  "DictionaryConfig",
  "Verified",
  "WrongSiteError",
  "load",
  "prefix_widths",
]
