"""What tests of damaged files share."""

import zipfile

import pytest

from gemma_jax import dictionaries


def refused(path, message, error=ValueError, **options):
  """Loading fails with a message that names the place."""
  with pytest.raises(error, match=f"(?s){message}") as caught:
    dictionaries.load(path, **options)
  assert str(path) in str(caught.value)


def archive(path, members, compression=zipfile.ZIP_STORED):
  with zipfile.ZipFile(path, "w", compression) as z:
    for name, contents in members.items():
      z.writestr(name, contents)
