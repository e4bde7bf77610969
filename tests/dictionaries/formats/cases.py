"""All cases: every module that adds to them is imported."""

import pytest

from tests.dictionaries.formats import (  # noqa: F401
  circuit_tracer_files,
  dictionary_learning_files,
  gemma_files,
  sae_lens_files,
  sparsify_files,
)
from tests.dictionaries.formats.files import CASES


def marked(name):
  """A case as a parameter; torch writes those of dictionary_learning."""
  torch = name.startswith("dictionary_learning")
  return pytest.param(name, marks=pytest.mark.torch if torch else ())


EVERY = [marked(name) for name in CASES]
