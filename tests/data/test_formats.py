import json
import sys

import ml_collections
import pyarrow as pa
import pyarrow.parquet
import pytest

from gemma_jax import data
from gemma_jax.data import formats


def _jsonl(path, *records):
  texts = (r if isinstance(r, str) else json.dumps(r) for r in records)
  path.write_text("\n".join(texts), "utf-8")
  return path


def _load(kind, path, **fields):
  return data.load({"kind": kind, "path": path, **fields})


RECORDS = [
  {"text": "one", "meta": {"set": "web"}},
  {"text": "  ", "meta": {"set": "web"}},
  {"text": "zwei \u00e4\u6f22", "meta": {"set": "code"}},
]


# ---------------------------------------------------------------- parquet


def test_parquet_gives_the_documents_of_its_row_groups(tmp_path):
  table = pa.Table.from_pylist([r | {"n": 1} for r in RECORDS * 3])
  path = tmp_path / "p.parquet"
  pa.parquet.write_table(table, path, row_group_size=2)
  corpus = _load("parquet", path, source_field="meta.set")
  assert [d.text for d in corpus] == ["one", "zwei ä漢"] * 3
  assert [d.source for d in corpus] == ["web", "code"] * 3
  assert corpus[3].name == "p.parquet:6"
  assert _load("parquet", tmp_path, source="x").sources == ("x",)


def test_a_parquet_file_without_the_column_lists_those_it_has(tmp_path):
  path = tmp_path / "p.parquet"
  pa.parquet.write_table(pa.Table.from_pylist([{"body": "x", "n": 3}]), path)
  with pytest.raises(ValueError, match=r"no column 'text'; .*\['body', 'n'\]"):
    _load("parquet", path)
  with pytest.raises(ValueError, match=r"p.parquet:1: .* in 'n', got int"):
    _load("parquet", path, text_field="n")
  path.write_bytes(b"not parquet")
  with pytest.raises(ValueError, match=r"p.parquet: not readable as Parquet"):
    _load("parquet", path)


# --------------------------------------------------------------------- hf


def _hub(path, **fields):
  return data.load({"kind": "hf", "name": "json", "data_files": path, **fields})


def test_a_stream_of_datasets_is_read_as_far_as_asked(tmp_path):
  path = str(_jsonl(tmp_path / "a.jsonl", *RECORDS))
  corpus = _hub(path, source_field="meta.set")
  assert [(d.text, d.source, d.name) for d in corpus] == [
    ("one", "web", "json:1"),
    ("zwei ä漢", "code", "json:3"),
  ]
  assert len(_hub([path], documents=2)) == 1
  assert _hub({"train": path}, source="mine").sources == ("mine",)
  pattern = str(tmp_path / "*.jsonl")
  assert len(_hub(pattern)) == 2
  _jsonl(tmp_path / "a.jsonl", {"text": "changed"})
  for changed in (path, pattern):
    assert [d.text for d in _hub(changed)] == ["changed"]


def test_a_data_set_that_cannot_be_read_says_why(tmp_path):
  path = str(_jsonl(tmp_path / "a.jsonl", *RECORDS))
  with pytest.raises(ValueError, match=r"'json' .*nosplit.*Bad split"):
    _hub(path, split="nosplit")
  with pytest.raises(ValueError, match=r"FileNotFoundError.*none.jsonl"):
    _hub(str(tmp_path / "none.jsonl"))
  with pytest.raises(ValueError, match=r"json:1: no field 'body'"):
    _hub(path, text_field="body")
  with pytest.raises(ValueError, match="documents >= 1 or None, got 0"):
    _hub(path, documents=0)


def test_a_hub_that_cannot_be_reached_says_so(monkeypatch):
  # The real call gives up after half a minute.
  import datasets

  def load_dataset(name, *_, **options):
    assert "trust_remote_code" not in options
    assert options["streaming"] is True
    raise errors[name](f"no {name}")

  errors = {
    "a/b": ConnectionError,
    "c/d": datasets.exceptions.DatasetNotFoundError,
  }
  monkeypatch.setattr(datasets, "load_dataset", load_dataset)
  with pytest.raises(ConnectionError, match=r"'a/b'.* cannot be reached: Conn"):
    data.load({"kind": "hf", "name": "a/b"})
  with pytest.raises(ValueError, match=r"'c/d'.* cannot be read: DatasetNotF"):
    data.load({"kind": "hf", "name": "c/d"})


# --------------------------------------------------------------- packages


@pytest.mark.parametrize(
  ("kind", "fields", "package"),
  [
    ("parquet", {"path": "a.parquet"}, "pyarrow"),
    ("jsonl", {"path": "a.jsonl.zst"}, "zstandard"),
    ("hf", {"name": "a/b"}, "datasets"),
  ],
)
def test_a_missing_package_says_how_to_install_it(
  tmp_path, monkeypatch, kind, fields, package
):
  monkeypatch.chdir(tmp_path)
  for name in ("a.parquet", "a.jsonl.zst"):
    (tmp_path / name).write_bytes(b"x")
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(ImportError, match=rf"{package}.*'gemma_jax\[data\]'"):
    data.load({"kind": kind, **fields})


# ------------------------------------------------------------------- load


def test_load_takes_a_config_with_empty_fields(tmp_path):
  path = _jsonl(
    tmp_path / "a.jsonl", {"body": "x", "set": "a"}, {"body": "y", "set": "b"}
  )
  config = ml_collections.ConfigDict(
    {
      "kind": "jsonl",
      "path": str(path),
      "text_field": "body",
      "source_field": "set",
      "source": ml_collections.config_dict.placeholder(str),
      "sources": ("b",),
    }
  )
  assert [d.text for d in data.load(config)] == ["y"]
  del config.source_field
  config.sources = None
  assert [d.text for d in data.load(config)] == ["x", "y"]


def test_load_builtin_restricts_the_strata(monkeypatch, builtin):
  kinds = {"builtin": (lambda workers: builtin, (), ())}
  monkeypatch.setattr(formats, "_KINDS", kinds)
  documents = data.load({"kind": "builtin", "sources": "reference"})
  assert {d.source for d in documents} == {"reference"}


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({}, r"unknown corpus kind None; .*\['builtin', 'text', 'jsonl', 'parq"),
    ({"kind": "pile"}, "unknown corpus kind 'pile'"),
    (
      {"kind": "text", "path": ".", "text_field": "x"},
      r"'text' has no fields \['text_field'\]; it takes \['path', 'source', 's",
    ),
    ({"kind": "jsonl"}, r"'jsonl' needs the fields \['path'\]"),
    ({"kind": "hf"}, r"'hf' needs the fields \['name'\]"),
  ],
)
def test_load_names_what_is_valid(config, message):
  with pytest.raises(ValueError, match=message):
    data.load(config)


def test_load_lists_the_strata_that_are_there(tmp_path):
  path = _jsonl(tmp_path / "pile.jsonl", {"text": "x"})
  with pytest.raises(ValueError, match=r"no sources \['web'\]; .*\['pile'\]"):
    _load("jsonl", path, sources=["web"])


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}'])
def test_load_refuses_a_corpus_without_text(tmp_path, content):
  path = _jsonl(tmp_path / "a.jsonl", content)
  with pytest.raises(ValueError, match="holds no text"):
    _load("jsonl", path)
