"""Grids: read, named, resolved; and the summary of what they gave."""

import itertools
import json

import pytest
from absl import flags
from ml_collections import config_flags

from launch import grid, summary

# ml_collections loads config files in a way that Python 3.12 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*load_module")

CONFIG = """
from ml_collections import ConfigDict, config_dict

def get_config(arg=""):
  if arg:
    raise ValueError(f"Unknown argument {arg!r}; expected nothing.")
  c = ConfigDict({"name": "a", "sizes": (1,), "skip": True, "seed": 0})
  c.group = ConfigDict({"k": 1.0, "steps": 3, "free": {}, "nothing": None})
  c.number = config_dict.placeholder(int)
  c.one = config_dict.placeholder(object)
  c.other = config_dict.placeholder(object)
  return c
"""


@pytest.fixture
def config(tmp_path):
  """The path of CONFIG."""
  path = tmp_path / "config.py"
  path.write_text(CONFIG)
  return str(path)


# -------------------------------------------------------------------- parsing
@pytest.mark.parametrize(
  ("text", "values"),
  [
    ("32,64", ["32", "64"]),
    ("(1,2),(3, 4)", ["(1,2)", "(3, 4)"]),
    ("[(1,2),3],()", ["[(1,2),3]", "()"]),
    ("{'a': 1, 'b': (2,)},{}", ["{'a': 1, 'b': (2,)}", "{}"]),
    ("'a,b',\"c'd\",e", ["a,b", "c'd", "e"]),
    ("('a)','b'),('c',)", ["('a)','b')", "('c',)"]),
    ("'',a", ["", "a"]),
    ("a=b, c", ["a=b", "c"]),
    ("'a'+'b'", ["'a'+'b'"]),
    ("blocks.9.mlp_in", ["blocks.9.mlp_in"]),
  ],
)
def test_commas_in_brackets_and_quotes_belong_to_a_value(text, values):
  assert grid.parse([f"config.x.y={text}"]) == {"x.y": values}


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ([], "No --grid"),
    (["config.x"], "expected config.KEY=VALUE"),
    (["x=1"], "expected config.KEY=VALUE"),
    (["config.=1"], "expected config.KEY=VALUE"),
    (["config.x="], "a value is missing"),
    (["config.x=1,,2"], "a value is missing"),
    (["config.x=1,"], "a value is missing"),
    (["config.x=(1,2"], r"\) is missing at the end"),
    (["config.x=1,2)"], r"\) closes nothing"),
    (["config.x=(1]"], r"\] closes nothing"),
    (["config.x='a,b"], "' is missing at the end"),
    (["config.x=1,2,1"], "1 is given twice"),
    (["config.x=1", "config.y=2", "config.x=3"], "--grid=config.x=1,3"),
  ],
)
def test_a_grid_that_cannot_be_read_is_an_error(given, message):
  with pytest.raises(ValueError, match=message):
    grid.parse(given)


def test_combinations_are_the_product_in_order():
  values = {"b": ["1", "2"], "a": ["x", "y", "z"]}
  combos = grid.combinations(values)
  assert [tuple(combo.values()) for combo in combos] == list(
    itertools.product("12", "xyz")
  )
  assert list(combos[0]) == ["b", "a"]


# --------------------------------------------------------------------- naming
def test_names_tell_the_overrides():
  combo = {"dictionary.k": "32", "seed": "0", "data.seed": "-1"}
  assert grid.names([combo]) == ["k=32,seed=0,data.seed=-1"]


def test_names_are_safe_and_differ():
  values = ["(1, 2)", "1,2", "[1,2]", "a/b", "a:b", "A/b", "../..", "", "é"]
  values += ["x" * 300, "x" * 299 + "y", "$(rm)", "a b", "`c`;d"]
  names = grid.names([{"m.x": value} for value in values])
  assert len({name.casefold() for name in names}) == len(values)
  for name in names:
    assert len(name) < 140
    assert set(name) <= set(
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.,=+-"
    )
  assert names[0] == "x=1-2"


def test_a_combination_keeps_its_name():
  combos = grid.combinations({"k": ["1", "2"], "s": ["a/b"]})
  known = dict(zip(grid.names(combos), combos, strict=True))
  # In another order, and with one that would have taken a name of the others.
  more = grid.combinations({"s": ["a:b", "a/b"], "k": ["2", "1"]})
  names = grid.names(more, known)
  assert names[2:] == ["k=2,s=a-b", "k=1,s=a-b"]
  assert len(set(names)) == 4


# ------------------------------------------------------------------ resolving
def test_overrides_have_the_types_of_the_config(config):
  overrides = {"group.k": "8", "sizes": "(1, 2)", "seed": "3", "number": "5"}
  resolved = grid.resolve(config, overrides)
  assert isinstance(resolved["group"]["k"], float)
  assert [grid.value(resolved, key) for key in overrides] == [8, (1, 2), 3, 5]
  assert grid.resolve(config, {})["number"] is None
  assert resolved["name"] == "a"


@pytest.mark.parametrize(
  ("argument", "overrides", "message"),
  [
    ("", {"seed": "1.5"}, "--config.seed=1.5"),
    ("", {"skip": "maybe"}, "Non-boolean"),
    ("", {"group.k": "many"}, "could not convert"),
    ("", {"number": "x"}, "invalid literal"),
    ("", {"group.nothing": "1"}, "config.group.nothing cannot be changed here"),
    ("", {"group.l": "1"}, "l"),
    (":smoke", {}, "^Unknown argument 'smoke'; expected nothing."),
    ("/nowhere", {}, "Not a directory"),
  ],
)
def test_what_does_not_resolve_is_one_error(
  argument, overrides, message, config
):
  with pytest.raises(ValueError, match=message):
    grid.resolve(config + argument, overrides)


@pytest.mark.parametrize(
  ("key", "message"),
  [
    ("group.kk", r"no config.group.kk. Did you mean config.group.k\?"),
    ("grop.steps", r"Did you mean config.group\?"),
    ("seed.x", r"no config.seed.x\.$"),
  ],
)
def test_unknown_keys_are_told_with_the_nearest(key, message, config):
  resolved = grid.resolve(config, {})
  grid.check_keys(resolved, ["group.k", "number"])
  with pytest.raises(ValueError, match=message):
    grid.check_keys(resolved, [key])


def test_given_overrides_parse_to_the_same_config(config):
  argv = [
    *("", f"--config={config}", "--config.name=it's '5'"),
    *("--config.sizes=(2,'x')", "--noconfig.skip", "--config.group.k", "2"),
    *("--config.one='5'", "--config.other=5", "--config.number=7"),
    "--config.group.free={'a': (1, 2)}",
  ]
  own = flags.FlagValues()
  flag = config_flags.DEFINE_config_file(
    "config", None, flag_values=own, sys_argv=argv
  )
  own(argv)
  given = grid.given_overrides(own)
  assert given["name"] == "it's '5'"
  assert grid.resolve(config, given) == flag.value.to_dict()
  assert (flag.value.one, flag.value.other) == ("5", 5)


# -------------------------------------------------------------------- summary
def rows(metrics=("fvu", "l0", "delta_ce")):
  out = []
  for k, seed in itertools.product((8.0, 16.0), (0, 1)):
    numbers = {name: k + seed + i for i, name in enumerate(metrics)}
    overrides = {"dictionary.k": k, "seed": seed, "width": 64}
    results = numbers | {"seeds": {"train": 0}, "sites": ["a"], "model": "m"}
    out.append(
      summary.row(
        f"k={k:g},seed={seed}",
        overrides,
        results,
        status="finished",
        seconds=2.0,
        error=None,
      )
    )
  return out


def test_a_row_has_the_scalars_of_the_results():
  assert rows()[3] == {
    "run": "k=16,seed=1",
    "config.dictionary.k": 16.0,
    "config.seed": 1,
    "config.width": 64,
    "status": "finished",
    "seconds": 2.0,
    "error": None,
    "fvu": 17.0,
    "l0": 18.0,
    "delta_ce": 19.0,
    "model": "m",
  }


def test_seconds_of_the_results_go_before_those_of_the_process():
  status = {"status": "finished", "seconds": 2.0, "error": None}
  row = summary.row("r", {"x": 1}, {"seconds": 7.5, "status": "odd"}, **status)
  assert (row["seconds"], row["status"]) == (7.5, "finished")


def test_the_table_shows_what_varies_and_the_main_metrics():
  lines = summary.table(rows()).splitlines()
  header = ["k", "seed", "fvu", "l0", "delta_ce", "status", "seconds"]
  assert lines[0].split() == header
  assert lines[1].split() == ["8", "0", "8", "9", "10", "finished", "2"]
  assert len({len(line) for line in lines}) == 1
  failed = summary.row(
    "k=9", {"x": 1}, None, status="failed", seconds=None, error="e"
  )
  assert summary.table([failed]).split() == [
    *("run", "status", "seconds"),
    *("k=9", "failed", "-"),
  ]


def test_points_are_named_by_what_varies_and_grouped_by_the_first():
  assert summary.points(rows())[1:3] == [
    {"name": "k=8, seed=1", "group": "k=8", "l0": 10, "fvu": 9, "delta_ce": 11},
    {"name": "k=16, seed=0", "group": "k=16", "l0": 17, "fvu": 16}
    | {"delta_ce": 18},
  ]


def test_a_picture_is_drawn_of_what_the_results_have(tmp_path):
  three = ["summary.csv", "summary.json", "summary.png"]
  for metrics, names in [
    (("fvu", "l0", "delta_ce"), three),
    (("fvu", "l0"), three),
    (("fvu",), three[:2]),
  ]:
    workdir = tmp_path / "-".join(metrics)
    workdir.mkdir()
    paths = summary.write(rows(metrics), workdir)
    assert [path.name for path in paths] == names
    assert {path.name for path in workdir.iterdir()} == set(names)
    assert json.loads(paths[1].read_text()) == rows(metrics)
