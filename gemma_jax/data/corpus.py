"""Where the text comes from: documents, strata, and an honest split.

A corpus is a list of `Document`s. Three kinds exist: the text that every
Python carries with it (`builtin`, no download), plain files (`read_text`) and
JSON lines (`read_jsonl`); `load` picks one from a config. `split` holds
documents out by group, and `sample` orders them so that a token budget taken
from the front sees every stratum.
"""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from gemma_jax.data import standard_library

# A passage this long that stands in two groups is a copy, not a coincidence.
_PASSAGE_LINES = 8


@dataclasses.dataclass(frozen=True)
class Document:
  """One text, where it came from, and what it may not be separated from.

  Attributes:
    text: the text, never blank.
    source: the stratum, e.g. "code" or "Wikipedia (en)".
    name: what a person calls it, e.g. "json.decoder" or "file.jsonl:12".
    group: documents of one group land on the same side of `split`.
  """

  text: str
  source: str
  name: str
  group: str

  @functools.cached_property
  def id(self) -> str:
    """Hash of source, name and text: the same in every process (16 hex)."""
    return _digest(self.source, self.name, self.text)[:16]


def _digest(*parts: str) -> str:
  # The lengths keep ("ab", "c") and ("a", "bc") apart.
  hasher = hashlib.sha256()
  for part in parts:
    data = part.encode("utf-8")
    hasher.update(b"%d:" % len(data))
    hasher.update(data)
  return hasher.hexdigest()


# ---------------------------------------------------------------- builtin


def builtin() -> list[Document]:
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
  # Chapters of the reference repeat their sections, which are topics too. The
  # short ones come first, so that the sections stay whole and the chapters are
  # thinned: more documents, and a finer split.
  documents = [
    Document(text, "reference", topic, f"reference/{topic}")
    for topic, text in standard_library.reference()
  ]
  modules = list(standard_library.modules())
  for index, stratum in ((1, "docstrings"), (2, "code")):
    for module in modules:
      name = module[0]
      # _pydecimal and decimal, _py_abc and abc: one thing written twice.
      package = name.split(".")[0].removeprefix("_py").lstrip("_")
      group = f"library/{package}"
      documents.append(Document(module[index], stratum, name, group))
  return _cut_repeats(documents)


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


# ------------------------------------------------------------------ files


def read_text(
  path: str | pathlib.Path, *, source: str | None = None
) -> list[Document]:
  """Reads plain text: a file is one document, a directory one per file.

  Args:
    path: a UTF-8 file, or a directory: every *.txt and *.md below it, in the
      order of their relative paths, which become the documents' names.
    source: the stratum; by default the name of the file or directory.

  Returns:
    The documents that are not blank. Equal texts share a group, so copies
    cannot straddle a split.

  Raises:
    FileNotFoundError: nothing to read there.
    ValueError: a file is not UTF-8.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    found = (p for p in path.rglob("*") if p.suffix in (".txt", ".md"))
    files = {p.relative_to(path).as_posix(): p for p in found if p.is_file()}
    if not files:
      raise FileNotFoundError(
        f"expected *.txt or *.md files under {path}, found none"
      )
  elif path.is_file():
    files = {path.name: path}
  else:
    raise FileNotFoundError(
      f"expected a text file or a directory of *.txt and *.md at {path},"
      " found nothing"
    )
  source = source or _plain_name(path)
  documents = []
  for name in sorted(files):
    try:
      text = files[name].read_text("utf-8-sig")
    except UnicodeDecodeError as error:
      raise ValueError(_not_utf8(files[name], error)) from error
    documents.append(_loose(text, source, name))
  return [document for document in documents if document.text.strip()]


def read_jsonl(
  path: str | pathlib.Path,
  *,
  text_field: str = "text",
  source_field: str | None = None,
) -> list[Document]:
  """Reads JSON lines: one object per line, one document per object.

  Args:
    path: a UTF-8 file. Blank lines are skipped.
    text_field: where the text is; dots go into nested objects.
    source_field: where the stratum is, e.g. "meta.pile_set_name"; without it
      the file's name is the stratum.

  Returns:
    The documents that are not blank, named `file.jsonl:line`. Equal texts
    share a group, so copies cannot straddle a split.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a line that is not an object with these fields as strings.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    found = "a directory" if path.is_dir() else "nothing"
    raise FileNotFoundError(
      f"expected a file of JSON lines at {path}, found {found}"
    )
  documents = []
  source = _plain_name(path)
  with path.open(encoding="utf-8-sig") as file:
    try:
      for number, line in enumerate(file, start=1):
        if not line.strip():
          continue
        where = f"{path}:{number}"
        try:
          record = json.loads(line)
        except json.JSONDecodeError as error:
          raise ValueError(f"{where}: not JSON: {error}") from error
        text = _field(record, text_field, where)
        if source_field is not None:
          source = _field(record, source_field, where)
        if text.strip():
          documents.append(_loose(text, source, f"{path.name}:{number}"))
    except UnicodeDecodeError as error:
      raise ValueError(_not_utf8(path, error)) from error
  return documents


def _loose(text: str, source: str, name: str) -> Document:
  # JSON may hold half a surrogate pair, which neither hashes nor tokenises.
  text = text.encode("utf-8", "replace").decode("utf-8")
  # Copies are common in crawled text; white space is where they differ.
  return Document(text, source, name, _digest(" ".join(text.split())))


def _field(record: Any, field: str, where: str) -> str:
  value = record
  for part in field.split("."):
    if not isinstance(value, dict):
      raise ValueError(
        f"{where}: expected an object with the field {part!r} of {field!r},"
        f" got {type(value).__name__}"
      )
    if part not in value:
      raise ValueError(
        f"{where}: no field {part!r} of {field!r}; there are"
        f" {sorted(value)}: set text_field or source_field to one of them"
      )
    value = value[part]
  if not isinstance(value, str):
    raise ValueError(
      f"{where}: expected a string in {field!r}, got {type(value).__name__}"
    )
  return value


def _plain_name(path: pathlib.Path) -> str:
  path = path.resolve()
  return path.name if path.is_dir() else path.stem


def _not_utf8(path: pathlib.Path, error: UnicodeDecodeError) -> str:
  return f"{path}: expected UTF-8, got other bytes ({error}): convert it first"


# ------------------------------------------------------- load, split, order

_KINDS = {
  "builtin": (builtin, (), ()),
  "text": (read_text, ("path",), ("source",)),
  "jsonl": (read_jsonl, ("path",), ("text_field", "source_field")),
}


def load(config: Mapping[str, Any]) -> list[Document]:
  """Loads the corpus that a config describes.

  Args:
    config: `kind` is "builtin", "text" (`path`, `source`) or "jsonl" (`path`,
      `text_field`, `source_field`); every kind takes `sources`, the strata to
      keep. A field that is None counts as absent, so that a config can list
      fields for the command line to fill.

  Returns:
    At least one document.

  Raises:
    ValueError: an unknown kind, field or stratum, a field that is missing, or
      a corpus without text.
  """
  fields = {k: v for k, v in dict(config).items() if v is not None}
  kind = fields.pop("kind", None)
  sources = fields.pop("sources", None)
  if kind not in _KINDS:
    raise ValueError(
      f"unknown corpus kind {kind!r}; expected one of {list(_KINDS)}"
    )
  read, required, optional = _KINDS[kind]
  valid = [*required, *optional]
  if unknown := sorted(set(fields) - set(valid)):
    raise ValueError(
      f"a corpus of kind {kind!r} has no fields {unknown}; it takes"
      f" {[*valid, 'sources']}"
    )
  if missing := [name for name in required if name not in fields]:
    raise ValueError(f"a corpus of kind {kind!r} needs the fields {missing}")
  documents = read(**fields)
  if sources is not None:
    wanted = {sources} if isinstance(sources, str) else set(sources)
    there = {document.source for document in documents}
    if unknown := sorted(wanted - there):
      raise ValueError(
        f"this corpus has no sources {unknown}; it has {sorted(there)}"
      )
    documents = [d for d in documents if d.source in wanted]
  if not documents:
    raise ValueError(f"the corpus {dict(config)} holds no text")
  return documents


def split(
  documents: Sequence[Document], *, heldout_fraction: float, seed: int
) -> tuple[list[Document], list[Document]]:
  """Parts a corpus into training and held-out documents, by group.

  A group's side depends on the seed and its name alone: adding, removing or
  reordering documents moves no other document, and a larger fraction holds
  out a superset.

  Args:
    documents: in any order.
    heldout_fraction: the chance of a group to be held out, in [0, 1).
    seed: another seed gives an independent split.

  Returns:
    (train, heldout), both in the order of `documents`.

  Raises:
    ValueError: the fraction is out of range, or one side would be empty.
  """
  if not 0 <= heldout_fraction < 1:
    raise ValueError(
      f"expected heldout_fraction in [0, 1), got {heldout_fraction}"
    )
  sides: tuple[list[Document], list[Document]] = ([], [])
  for document in documents:
    draw = int(_digest(str(seed), document.group)[:13], 16) / 16**13
    sides[draw < heldout_fraction].append(document)
  if documents and heldout_fraction and not all(sides):
    groups = len({document.group for document in documents})
    raise ValueError(
      f"all {groups} groups of documents fell on one side of the split"
      f" (heldout_fraction {heldout_fraction}, seed {seed}): bring more"
      " documents, or take another fraction or seed"
    )
  return sides


def sample(
  documents: Sequence[Document],
  *,
  seed: int,
  weights: Mapping[str, float] | None = None,
) -> list[Document]:
  """Orders documents so that every prefix follows the mixture.

  Each source is shuffled by a seeded hash; then the source that is furthest
  behind its share of the characters goes next. A source that runs out leaves
  the others to go on. A prefix is off by less than the longest document.

  Args:
    documents: in any order, which does not matter.
    seed: of the shuffle.
    weights: share of the characters for every source, e.g. {"code": 2.0,
      "reference": 1.0}; 0 leaves a source out. Equal by default.

  Returns:
    The documents, whole, each once.

  Raises:
    ValueError: weights that are not finite, not positive, or for other sources.
  """
  queues: dict[str, list[Document]] = {}
  for document in documents:
    queues.setdefault(document.source, []).append(document)
  weights = dict.fromkeys(queues, 1.0) if weights is None else dict(weights)
  if set(weights) != set(queues):
    raise ValueError(
      f"expected one weight for each of the sources {sorted(queues)}, got"
      f" {sorted(weights)}; 0 leaves a source out"
    )
  values = list(weights.values())
  if not all(0 <= v < math.inf for v in values) or (values and not any(values)):
    raise ValueError(
      f"expected finite weights >= 0, at least one positive, got {weights}"
    )
  for queue in queues.values():
    # Reversed by pop(), which is as good a shuffle.
    queue.sort(key=lambda d: (_digest(str(seed), d.id), d.name))
  taken = dict.fromkeys(sorted(s for s in queues if weights[s]), 0)
  order = []
  while taken:
    source = min(taken, key=lambda s: taken[s] / weights[s])
    document = queues[source].pop()
    order.append(document)
    taken[source] += len(document.text)
    if not queues[source]:
      del taken[source]
  return order
