"""The kinds of corpora that a config can ask for."""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

from gemma_jax import progress
from gemma_jax.data import files, lines, spool, standard_library
from gemma_jax.data.corpus import Corpus
from gemma_jax.data.excerpts import excerpts
from gemma_jax.data.workers import Workers

_JSONL_SUFFIXES = (
  *(".jsonl", ".jsonl.gz", ".jsonl.zst"),
  # Not plain .json, which may be anything.
  *(".json.gz", ".json.zst"),
)


@functools.cache
def builtin() -> Corpus:
  """The text that every Python installation carries: no download.

  Three strata, "reference", "docstrings" and "code", about seven megabytes;
  see `standard_library.documents`.

  Returns:
    Documents in a fixed order; the same for the same Python version, and
    read once in a process.
  """
  return Corpus.of(standard_library.documents())


def _text(workers: Workers, path: Any, source: str | None = None) -> Corpus:
  found, name = files.find(path, (".txt", ".md"), "a text file")
  paths = tuple(str(path) for path in found.values())
  shelf = lines.TextShelf(paths, tuple(found), source or name)
  return shelf.index(workers)


def _jsonl(workers: Workers, path: Any, **fields: Any) -> Corpus:
  found, name = files.find(path, _JSONL_SUFFIXES, "a file of JSON lines")
  shown = [str(path) for path in found.values()]
  packed = [str(p) for p in found.values() if files.is_compressed(p)]
  plain = dict(zip(shown, shown, strict=True))
  plain |= _spooled(workers, packed, spool.decompress)
  fields = _fields(name, **fields)
  paths = [plain[path] for path in shown]
  return lines.line_files(paths, list(found), shown, **fields).index(workers)


def _parquet(workers: Workers, path: Any, **fields: Any) -> Corpus:
  found, name = files.find(path, (".parquet",), "a Parquet file")
  shown = [str(path) for path in found.values()]
  fields = _fields(name, **fields)
  task = functools.partial(
    spool.parquet,
    text_field=fields["text_field"],
    source_field=fields["source_field"],
  )
  paths = list(_spooled(workers, shown, task).values())
  fields = _of_spool(fields)
  return lines.line_files(paths, list(found), shown, **fields).index(workers)


def _hub(
  workers: Workers,
  name: str,
  subset: str | None = None,
  split: str = "train",
  data_files: Any = None,
  documents: int | None = None,
  **fields: Any,
) -> Corpus:
  if documents is not None and documents < 1:
    raise ValueError(f"expected documents >= 1 or None, got {documents}")
  fields = _fields(name, **fields)
  with progress.bar(documents, f"stream {name}", unit="documents") as bar:
    path = spool.hub(
      name,
      subset=subset,
      split=split,
      data_files=_plain(data_files),
      text_field=fields["text_field"],
      source_field=fields["source_field"],
      documents=documents,
      report=bar.update,
    )
  fields = _of_spool(fields)
  return lines.line_files([path], [name], [name], **fields).index(workers)


def _spooled(workers: Workers, paths: list[str], task: Callable) -> dict:
  tasks = [functools.partial(task, path) for path in paths]
  sizes = [os.path.getsize(path) for path in paths]
  made = workers.map(tasks, sizes, "unpack", live=True)
  return dict(zip(paths, made, strict=True))


def _fields(
  name: str,
  text_field: str = "text",
  source_field: str | None = None,
  source: str | None = None,
) -> dict[str, Any]:
  if source is not None and source_field is not None:
    raise ValueError(
      f"expected source ({source!r}) or source_field ({source_field!r}), got"
      " both: the first names one stratum for all, the second reads it"
    )
  return {
    "text_field": text_field,
    "source_field": source_field,
    "source": source or name,
  }


def _of_spool(fields: dict[str, Any]) -> dict[str, Any]:
  found = "source" if fields["source_field"] is not None else None
  return fields | {"text_field": "text", "source_field": found}


def _plain(value: Any) -> Any:
  """Without the containers of ml_collections, which `datasets` refuses."""
  if hasattr(value, "items"):
    return {key: _plain(entry) for key, entry in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(entry) for entry in value]
  return os.fspath(value) if isinstance(value, os.PathLike) else value


_FIELDS = ("text_field", "source_field", "source")
_KINDS = {
  "builtin": (lambda workers: builtin(), (), ()),
  "text": (_text, ("path",), ("source",)),
  "jsonl": (_jsonl, ("path",), _FIELDS),
  "parquet": (_parquet, ("path",), _FIELDS),
  "hf": (
    _hub,
    ("name",),
    ("subset", "split", "data_files", "documents", *_FIELDS),
  ),
}


def load(config: Mapping[str, Any], *, workers: int | None = None) -> Corpus:
  """Indexes the corpus that a config describes; texts stay on the disk.

  Kinds, and the fields of each:

    builtin  what every Python carries; none.
    text     `path`: a file, one document each, or a directory for the *.txt
             and *.md below it, a glob pattern, a list; `source`.
    jsonl    `path`: likewise, JSON lines, plain, .gz or .zst; `text_field`
             ("text") and `source_field` say where the text and the stratum
             are, dots go into nested objects, e.g. "meta.pile_set_name";
             `source` names one stratum for all.
    parquet  the same fields.
    hf       `name` of a data set on the Hugging Face hub, `subset`, `split`
             ("train"), `data_files`, `documents`: at most so many, and the
             fields of jsonl.

  Every kind takes `sources`, the strata to keep, and `excerpts`: `documents`,
  `characters` and `seed` of `excerpts.excerpts`, a piece of each. A field that
  is None counts as absent, so that a config can list fields for the command
  line to fill.
  Without `source` or `source_field` the stratum is the name of the file, the
  directory or the data set. Blank documents are left out. Documents of equal
  text, white space aside, share a group, so copies cannot straddle a split.

  What is not plain text or JSON lines is written as such to the cache first
  (`cache.directory("corpora")`), and found there again until it changes. A
  data set of the hub is kept as it was: delete the cache to fetch it anew.

  Args:
    config: see above.
    workers: processes that read; None for as many as there are cores where
      there is much to read. The corpus does not depend on it.

  Returns:
    At least one document.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: an unknown kind, field or stratum, a field that is missing,
      text that is not UTF-8, a record without the fields as strings, or a
      corpus without text.
    ImportError: a package of the extra `data` is missing.
    ConnectionError: the hub cannot be reached.
    OSError: the disk is full.
  """
  fields = {k: v for k, v in dict(config).items() if v is not None}
  kind = fields.pop("kind", None)
  sources = fields.pop("sources", None)
  cut = fields.pop("excerpts", None)
  if kind not in _KINDS:
    raise ValueError(
      f"unknown corpus kind {kind!r}; expected one of {list(_KINDS)}"
    )
  read, required, optional = _KINDS[kind]
  valid = [*required, *optional]
  if unknown := sorted(set(fields) - set(valid)):
    raise ValueError(
      f"a corpus of kind {kind!r} has no fields {unknown}; it takes"
      f" {[*valid, 'sources', 'excerpts']}"
    )
  if missing := [name for name in required if name not in fields]:
    raise ValueError(f"a corpus of kind {kind!r} needs the fields {missing}")
  with Workers(workers) as pool:
    corpus = read(pool, **fields)
  if not len(corpus):
    raise ValueError(f"the corpus {dict(config)} holds no text")
  corpus = corpus if sources is None else corpus.keep(sources)
  if cut is None:
    return corpus
  if set(cut) - {"seed"} != {"documents", "characters"}:
    raise ValueError(
      "expected excerpts with documents and characters, and a seed if wanted;"
      f" got {sorted(cut)}"
    )
  return excerpts(corpus, **cut)
