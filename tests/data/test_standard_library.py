import ast
import collections
import hashlib
import itertools
import pathlib
import subprocess
import sys
import sysconfig
import tokenize
import warnings

import pytest

from gemma_jax.data import standard_library
from gemma_jax.data.document import Document


def _passages(document):
  lines = [line.strip() for line in document.text.split("\n") if line.strip()]
  return zip(*(lines[i:] for i in range(8)), strict=False)


def _paragraphs(document):
  for paragraph in document.text.split("\n\n"):
    words = " ".join(paragraph.split())
    if len(words) >= 500:
      yield words


# -------------------------------------------------------------- documents


def test_builtin_holds_three_strata_of_real_size(builtin):
  characters = collections.Counter()
  for document in builtin:
    characters[document.source] += len(document.text)
  assert list(characters) == ["reference", "docstrings", "code"]
  assert characters["reference"] > 300_000
  assert characters["docstrings"] > 1_000_000
  assert characters["code"] > 4_000_000


def test_builtin_documents_have_unique_ids_and_text(builtin):
  assert len({d.id for d in builtin}) == len(builtin)
  assert all(d.text.strip() for d in builtin)


def test_no_passage_stands_in_two_strata_or_groups(builtin):
  sources, groups = {}, {}
  for document in builtin:
    for passage in _passages(document):
      assert sources.setdefault(passage, document.source) == document.source
      assert groups.setdefault(passage, document.group) == document.group


def test_no_long_paragraph_stands_in_two_groups(builtin):
  groups = {}
  for document in builtin:
    for paragraph in _paragraphs(document):
      assert groups.setdefault(paragraph, document.group) == document.group


def test_builtin_is_the_same_in_another_process(builtin):
  program = (
    "from gemma_jax import data; import hashlib;"
    "ids = ''.join(d.id for d in data.builtin());"
    "print(hashlib.sha256(ids.encode()).hexdigest())"
  )
  ids = "".join(d.id for d in builtin)
  other = subprocess.run(
    [sys.executable, "-c", program],
    env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)},
    capture_output=True,
    check=True,
    text=True,
  ).stdout.strip()
  assert other == hashlib.sha256(ids.encode()).hexdigest()


def test_copies_are_cut_from_the_later_group_only():
  copy = "\n".join(f"shared line {i}" for i in range(9))
  first = Document(f"one\n{copy}", "code", "a", "a")
  same = Document(f"two\n{copy}", "code", "a.b", "a")
  other = Document(f"three\n\n  {copy}\nfour", "code", "b", "b")
  kept = standard_library._cut_repeats([first, same, other])
  assert [d.text for d in kept] == [first.text, same.text, "three\n\nfour"]


# ------------------------------------------------------------ taking apart


def _without_docstrings(source):
  """The same cut as ours, made on the tree instead of on the text."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    tree = ast.parse(source)
  holders = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
  for node in ast.walk(tree):
    if isinstance(node, holders) and ast.get_docstring(node) is not None:
      only = len(node.body) == 1 and not isinstance(node, ast.Module)
      node.body[:1] = [ast.Pass()] if only else []
  return ast.dump(tree)


def _plain(source):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    return ast.dump(ast.parse(source))


@pytest.mark.parametrize(
  "package", ["json", "dataclasses.py", "asyncio", "typing.py", "email"]
)
def test_code_without_docstrings_is_the_same_program(package):
  path = pathlib.Path(sysconfig.get_path("stdlib")) / package
  for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
    with tokenize.open(file) as opened:
      source = opened.read()
    _, code = standard_library.take_apart(file.stem, source)
    assert _plain(code) == _without_docstrings(source), file


@pytest.mark.parametrize(
  ("source", "code"),
  [
    ('"""Doc."""\n\nx = 1\n', "x = 1\n"),
    ('def f():\n  """Doc."""\n', "def f():\n  pass\n"),
    ('def f(): "Doc."\n', "def f(): pass\n"),
    ('def f(): "Doc."; return 1\n', "def f(): pass; return 1\n"),
    ('def f():\n  "é"; return 1\n', "def f():\n  pass; return 1\n"),
    ('def f():\n  "Doc."  # noqa\n\n  return 1\n', "def f():\n  return 1\n"),
    (
      'if x:\n  class A:\n    """D."""\n    y = 1\n',
      "if x:\n  class A:\n    y = 1\n",
    ),
    (
      '"""D."""\nx = 1\n\f\ndef f():\n  """E."""\n  y\n',
      "x = 1\n\f\ndef f():\n  y\n",
    ),
  ],
)
def test_docstrings_leave_the_code_wherever_they_stand(source, code):
  assert standard_library.take_apart("m", source)[1] == code


def test_docstrings_stand_under_their_qualified_names():
  source = (
    '"""Module."""\nclass A:\n  """Class."""\n  async def f(self):\n'
    '    """Method.\n\n    More.\n    """\n'
    'if 1:\n  def g():\n    """Branch."""\n'
  )
  docstrings, _ = standard_library.take_apart("pack.mod", source)
  assert docstrings == (
    "pack.mod\n\nModule.\n\npack.mod.A\n\nClass.\n\npack.mod.A.f\n\n"
    "Method.\n\nMore.\n\npack.mod.g\n\nBranch.\n"
  )


def test_a_docstring_that_is_repeated_in_a_module_is_listed_once():
  source = 'def f():\n  """Same."""\ndef g():\n  """Same."""\n'
  docstrings, code = standard_library.take_apart("m", source)
  assert docstrings == "m.f\n\nSame.\n"
  assert "Same" not in code


def test_old_escapes_in_the_sources_do_not_warn():
  standard_library.take_apart("m", '"""Doc."""\nx = "\\d"\n')


def test_modules_are_sorted_and_leave_out_tests_and_tables(builtin):
  names = [d.name for d in builtin if d.source == "code"]
  assert names == sorted(names, key=lambda n: n.split("."))
  parts = set(itertools.chain.from_iterable(n.split(".") for n in names))
  assert not parts & {"test", "tests", "idlelib", "pydoc_data", "encodings"}
  assert {"json", "json.decoder", "asyncio.tasks", "unittest.case"} <= {*names}


def test_reading_the_library_imports_none_of_it():
  # Importing any of these shows: a browser, a window, a poem.
  program = (
    "import sys; from gemma_jax.data import standard_library as s;"
    "assert len(list(s.modules())) > 300;"
    "loaded = {'antigravity', 'tkinter', 'turtle', 'this'} & {*sys.modules};"
    "assert not loaded, loaded"
  )
  subprocess.run([sys.executable, "-c", program], check=True)


def test_a_python_without_its_sources_says_so(monkeypatch, tmp_path):
  monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
  with pytest.raises(FileNotFoundError, match=r"installed without them.*jsonl"):
    list(standard_library.modules())


def test_a_python_without_its_reference_says_so(monkeypatch):
  monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
  with pytest.raises(FileNotFoundError, match=r"pydoc_data.*jsonl"):
    list(standard_library.reference())
