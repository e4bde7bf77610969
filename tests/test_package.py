"""What the package imports: nothing heavy, and only from the left."""

import ast
import pathlib
import subprocess
import sys

import pytest

import gemma_jax

ROOT = pathlib.Path(gemma_jax.__file__).parent.parent

# The floors of the house: text -> tokens -> sites -> store -> methods ->
# metrics -> report. A package imports from lower floors and from itself.
FLOORS = {
  "gemma_jax.cache": 0,
  "gemma_jax.checkpoints": 0,
  "gemma_jax.machine": 0,
  "gemma_jax.progress": 0,
  "gemma_jax.tables": 0,
  "gemma_jax.models": 1,
  "gemma_jax.data": 1,
  "gemma_jax.metrics": 1,
  "gemma_jax.statistics": 1,
  "gemma_jax.activations": 2,
  "gemma_jax.dictionaries": 3,
  "gemma_jax.probing": 3,
  "gemma_jax.clustering": 3,
  "gemma_jax.alignment": 3,
  "gemma_jax.concepts": 3,
  "gemma_jax.report": 4,
  "trainers": 5,
  "studies": 6,
  "launch": 7,
}
# Faithfulness splices into a forward pass.
SAME_FLOOR = {("gemma_jax.metrics", "gemma_jax.models")}


def files():
  for top in ("gemma_jax", "trainers", "studies", "launch", "configs"):
    yield from sorted((ROOT / top).rglob("*.py"))


def module(path):
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path, *, top_level=False):
  """Full names of what a file imports, `from a import b` as a.b."""
  tree = ast.parse(path.read_text(), str(path))
  for node in tree.body if top_level else ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package(name):
  """The package on a floor that a module lies in, or None."""
  parts = name.split(".")
  key = ".".join(parts[:2]) if parts[0] == "gemma_jax" else parts[0]
  return key if key in FLOORS else None


def test_every_module_has_a_floor():
  homeless = [
    module(path)
    for path in files()
    if package(module(path)) is None
    and module(path) not in ("gemma_jax", "configs")
    and not module(path).startswith("configs.")
  ]
  assert homeless == []


def test_imports_only_point_to_lower_floors():
  wrong = []
  for path in files():
    here = package(module(path))
    if here is None:
      continue
    for name in imports(path):
      there = package(name)
      if there in (None, here) or (here, there) in SAME_FLOOR:
        continue
      if FLOORS[there] >= FLOORS[here]:
        wrong.append(f"{module(path)} (floor {FLOORS[here]}) imports {name}")
  assert wrong == []


def test_the_rule_above_sees_the_imports_that_there_are():
  """That it would notice: the trainers do import from far below."""
  seen = {package(name) for name in imports(ROOT / "trainers/dictionary.py")}
  assert {"gemma_jax.models", "gemma_jax.report"} <= seen
  seen = {package(name) for name in imports(ROOT / "gemma_jax/__init__.py")}
  assert seen == {"gemma_jax.models"}


def test_configs_import_nothing_but_ml_collections_and_one_another():
  paths = sorted((ROOT / "configs").glob("*.py"))
  found = {name.split(".")[0] for path in paths for name in imports(path)}
  assert found - set(sys.stdlib_module_names) == {"configs", "ml_collections"}


@pytest.mark.parametrize("name", ["models", "data", "metrics"])
def test_the_first_floor_needs_little_to_be_imported(name):
  allowed = {"gemma_jax", "jax", "flax", "numpy", "scipy", "ml_dtypes"}
  allowed |= {"absl", "tokenizers", "tqdm"}
  found = {
    used.split(".")[0]
    for path in (ROOT / "gemma_jax" / name).glob("*.py")
    for used in imports(path, top_level=True)
  }
  assert found - set(sys.stdlib_module_names) <= allowed


def test_importing_everything_imports_neither_torch_nor_other_frameworks():
  program = """
import sys
import gemma_jax, gemma_jax.models, gemma_jax.data, gemma_jax.metrics
import gemma_jax.activations, gemma_jax.dictionaries, gemma_jax.report
import trainers.dictionary
heavy = ("flax.nnx", "torch", "transformers", "tensorflow", "huggingface_hub")
print([name for name in heavy if name in sys.modules])
print("jax" in sys.modules)
"""
  done = subprocess.run(
    [sys.executable, "-c", program],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines() == ["[]", "True"]


def test_the_package_itself_imports_no_jax_until_a_model_is_loaded():
  program = "import sys, gemma_jax; print('jax' in sys.modules)"
  done = subprocess.run(
    [sys.executable, "-c", program],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout == "False\n"


def test_no_file_is_named_for_having_no_subject():
  bad = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
  assert [path for path in files() if path.name in bad] == []
