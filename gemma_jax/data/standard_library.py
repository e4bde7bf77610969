"""The text that every Python carries with it, taken apart into strata.

Sources are parsed, not imported: importing the whole library opens windows
and browsers.
"""

import ast
import dataclasses
import functools
import pathlib
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator, Sequence

from gemma_jax.data.document import Document

# A passage this long that stands in two groups is a copy, not a coincidence.
_PASSAGE_LINES = 8

# Not prose and not program: test data, another application, other people's
# packages, and tables that a script wrote. A model learns nothing about
# language from them, and a metric averaged over them says nothing.
_NOT_TEXT = {
  "_compat_pickle",
  "_opcode_metadata",
  "antigravity",
  "encodings",
  "html.entities",
  "idlelib",
  "keyword",
  "msilib",
  "pydoc_data",
  "stringprep",
  "test",
  "tests",
  "this",
}

_NO_LIBRARY = (
  "expected the standard library's sources in {}, found none; this Python was"
  " installed without them: install the full package, or use a corpus of kind"
  " 'text' or 'jsonl'"
)

_FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def documents() -> list[Document]:
  """The text that every Python installation carries: no download.

  Three strata: "reference" (the language reference, one document per topic of
  `help()`), "docstrings" (one document per standard-library module: its
  docstrings under their qualified names) and "code" (the module's source
  without its docstrings). Nothing is imported but the topics. A module's
  docstrings and its code share a group, the top-level package, and no passage
  of eight lines stands in two groups: the later copy is cut out.

  Returns:
    Documents in a fixed order; the same for the same Python version.
  """
  return list(_documents())


@functools.cache
def _documents() -> tuple[Document, ...]:
  """Read once in a process: it takes seconds, and a job asks several times."""
  # Chapters of the reference repeat their sections, which are topics too. The
  # short ones come first, so that the sections stay whole and the chapters are
  # thinned: more documents, and a finer split.
  found = [
    Document(text, "reference", topic, f"reference/{topic}")
    for topic, text in reference()
  ]
  library = list(modules())
  for index, stratum in ((1, "docstrings"), (2, "code")):
    for module in library:
      name = module[0]
      # _pydecimal and decimal, _py_abc and abc: one thing written twice.
      package = name.split(".")[0].removeprefix("_py").lstrip("_")
      group = f"library/{package}"
      found.append(Document(module[index], stratum, name, group))
  return tuple(_cut_repeats(found))


def _cut_repeats(documents: Sequence[Document]) -> list[Document]:
  """Cuts passages that already stood in a document of another group.

  Without this the split leaks: licences, vendored copies, and the chapters of
  the reference that repeat whole topics. Lines are compared without their
  indentation, blank lines are skipped.
  """
  numbers: dict[str, int] = {}
  owner: dict[tuple[int, ...], str] = {}
  kept = []
  for document in documents:
    lines = document.text.split("\n")
    solid = [i for i, line in enumerate(lines) if line.strip()]
    keys = [numbers.setdefault(lines[i].strip(), len(numbers)) for i in solid]
    repeated: set[int] = set()
    for start in range(len(keys) - _PASSAGE_LINES + 1):
      stop = start + _PASSAGE_LINES
      passage = tuple(keys[start:stop])
      if owner.setdefault(passage, document.group) != document.group:
        repeated.update(range(solid[start], solid[stop - 1] + 1))
    if repeated:
      rest = (line for i, line in enumerate(lines) if i not in repeated)
      text = "\n".join(rest).strip("\n")
      document = dataclasses.replace(document, text=text)
    if document.text.strip():
      kept.append(document)
  return kept


def reference() -> Iterator[tuple[str, str]]:
  """Yields (topic, text) of the language reference, short topics first."""
  # Here, because half a megabyte is read: most programs bring their own text.
  try:
    from pydoc_data.topics import topics
  except ModuleNotFoundError as error:
    raise FileNotFoundError(_NO_LIBRARY.format("pydoc_data")) from error
  for topic in sorted(topics, key=lambda t: (len(topics[t]), t)):
    yield topic, topics[topic].strip()


def modules() -> Iterator[tuple[str, str, str]]:
  """Yields (name, docstrings, code) of every module, sorted by name.

  `docstrings` lists each docstring under its qualified name; `code` is the
  source without them, and parses to the same program.

  Raises:
    FileNotFoundError: this Python ships without sources.
  """
  root = pathlib.Path(sysconfig.get_path("stdlib"))
  files = {}
  for path in root.rglob("*.py"):
    parts = path.relative_to(root).with_suffix("").parts
    # config-3.11-x86_64, site-packages, lib-dynload: no module names.
    if all(part.isidentifier() for part in parts):
      parts = parts[:-1] if parts[-1] == "__init__" else parts
      files[parts] = path
  if not files:
    raise FileNotFoundError(_NO_LIBRARY.format(root))
  for parts in sorted(files):
    name = ".".join(parts)
    # Distributions put files of their own into this directory.
    known = parts and parts[0] in sys.stdlib_module_names
    if known and not _NOT_TEXT & {name, *parts}:
      with tokenize.open(files[parts]) as file:
        docstrings, code = take_apart(name, file.read())
      yield name, docstrings, code


def take_apart(name: str, source: str) -> tuple[str, str]:
  """Parts a module's source into (docstrings, code without docstrings)."""
  with warnings.catch_warnings():
    # Old modules write "\d" in plain strings. Not ours to report.
    warnings.simplefilter("ignore")
    tree = ast.parse(source)
  # Not splitlines(): for ast, form feeds do not end a line.
  lines = source.split("\n")
  entries, seen = [], set()
  for qualified, node in _definitions(tree, name):
    if (text := ast.get_docstring(node)) is None:
      continue
    if text.strip() and text not in seen:
      seen.add(text)
      entries.append(f"{qualified}\n\n{text.strip()}\n")
    only = len(node.body) == 1 and not isinstance(node, ast.Module)
    _blank(lines, node.body[0], only)
  code = "\n".join(line for line in lines if line is not None)
  return "\n".join(entries), code.strip("\n") + "\n"


def _definitions(node: ast.AST, name: str) -> Iterator[tuple[str, ast.AST]]:
  # Statements only: `ast.walk` would visit every expression too, and takes
  # several times as long.
  if isinstance(node, ast.Module | ast.ClassDef | _FUNCTIONS):
    name = name if isinstance(node, ast.Module) else f"{name}.{node.name}"
    yield name, node
  for field in ("body", "handlers", "orelse", "finalbody", "cases"):
    for child in getattr(node, field, ()):
      yield from _definitions(child, name)


def _blank(lines: list[str | None], node: ast.stmt, only: bool) -> None:
  """Takes a docstring out of `lines`; a body of nothing else gets `pass`."""
  first, last = node.lineno - 1, node.end_lineno - 1
  # Offsets of ast count bytes.
  before = lines[first].encode()[: node.col_offset].decode()
  after = lines[last].encode()[node.end_col_offset :].decode()
  lines[first : last + 1] = [None] * (last + 1 - first)
  if before.strip() or after.lstrip()[:1] not in ("", "#"):
    lines[first] = f"{before}pass{after}"
  elif only:
    lines[first] = f"{before}pass"
  else:
    last += 1
    while last < len(lines) and lines[last] == "":
      lines[last] = None
      last += 1
