"""Dictionaries as other libraries store them: read all, write some.

A format is a module with `NAME`; `FILES`, patterns of which one shows it in a
directory; `CONVENTION`, what its files take for granted; and `read(path, site)`
-> `Loaded`, folded to raw activations. Those that are written have
`write(directory, config, params, provenance)`.
"""

import pathlib
from collections.abc import Sequence
from types import ModuleType

from gemma_jax.dictionaries.formats import (
  circuit_tracer,
  dictionary_learning,
  gemma_scope,
  gemma_scope_2,
  native,
  sae_lens,
  sparsify,
)
from gemma_jax.dictionaries.formats.convention import Convention, Loaded

__all__ = ["FORMATS", "Convention", "Loaded", "read", "writer"]

FORMATS: dict[str, ModuleType] = {
  module.NAME: module
  for module in (
    native,
    gemma_scope,
    gemma_scope_2,
    sae_lens,
    dictionary_learning,
    sparsify,
    circuit_tracer,
  )
}


def read(
  path: pathlib.Path,
  format: str | None = None,
  site: str | Sequence[str] | None = None,
) -> Loaded:
  """What lies at a path; see `dictionaries.load`."""
  if format is not None and format not in FORMATS:
    raise ValueError(
      f"Unknown format {format!r}; expected one of {', '.join(FORMATS)}."
    )
  if not path.exists():
    raise FileNotFoundError(
      f"{path} does not exist. Pass a workdir, or a directory or file of a "
      "dictionary; download it first."
    )
  candidates = list(FORMATS.values()) if format is None else [FORMATS[format]]
  module, path = _find(path, candidates)
  return module.read(path, site)


def writer(format: str) -> ModuleType:
  """The module that writes a format.

  Raises:
    ValueError: there is no such format, or it is only read.
  """
  written = [name for name, m in FORMATS.items() if hasattr(m, "write")]
  if format not in written:
    known = "is only read" if format in FORMATS else "is unknown"
    raise ValueError(
      f"Format {format!r} {known}; expected one of {', '.join(written)}."
    )
  return FORMATS[format]


def _find(path, modules) -> tuple[ModuleType, pathlib.Path]:
  """The one format that a path shows, and where below it."""
  if path.is_file():
    found = [m for m in modules if any(path.match(p) for p in m.FILES)]
    if len(modules) == 1:
      return modules[0], path
    if len(found) == 1:
      return found[0], path
    raise ValueError(
      f"{path} has no name of a dictionary's file, such as "
      f"{', '.join(sorted(p for m in modules for p in m.FILES))}. Pass format= "
      "to say what it is."
    )
  places = [(m, path) for m in modules if _shows(m, path)]
  if not places:
    below = (*path.iterdir(), *path.glob("members/*/dictionary"))  # of a sweep
    children = sorted(p for p in below if p.is_dir())
    places = [
      (m, child) for child in children for m in modules if _shows(m, child)
    ]
  if len(places) == 1:
    return places[0]
  if not places:
    raise FileNotFoundError(
      f"{path} holds no dictionary: none of "
      f"{', '.join(p for m in modules for p in m.FILES)}. Pass a workdir "
      "whose training has finished, or a directory that save() or another "
      "library wrote."
    )
  names = [f"{where} ({m.NAME})" for m, where in places]
  raise ValueError(
    f"{path} holds {len(places)} dictionaries: {', '.join(names[:8])}"
    f"{' and more' * (len(names) > 8)}. Pass the path of one of them; in one "
    "directory, format= tells them apart."
  )


def _shows(module, directory) -> bool:
  return any(any(directory.glob(pattern)) for pattern in module.FILES)
