"""A config is checked as a whole, and every fault has its name."""

import json

import pytest

from trainers import fields

FIELDS = {
  "seed": int,
  "name": (str, type(None)),
  "train": {
    "steps": int,
    "learning_rate": float,
    "skip": bool,
    "inner": {"widths": (list, tuple)},
  },
  "corpus": fields.Free,
}


def make_config(**changes):
  config = {
    "seed": 0,
    "name": None,
    "train": {
      "steps": 10,
      "learning_rate": 0.1,
      "skip": True,
      "inner": {"widths": [1, 2]},
    },
    "corpus": {"anything": {"goes": 1}},
  }
  for path, value in changes.items():
    *groups, name = path.split("__")
    inner = config
    for group in groups:
      inner = inner[group]
    if value is ...:
      del inner[name]
    else:
      inner[name] = value
  return config


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"name": "text"},
    {"train__learning_rate": 1},  # a whole number is a float
    {"train__inner__widths": (3,)},
    {"corpus": {}},
  ],
)
def test_a_config_that_fits_passes(changes):
  fields.check(make_config(**changes), FIELDS)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"sead": 1}, "sead is unknown: did you mean seed?"),
    ({"train__stepz": 3}, "train.stepz is unknown: did you mean train.steps?"),
    (
      {"train__inner__width": 3},
      "train.inner.width is unknown: did you mean train.inner.widths?",
    ),
    ({"train__xyzzy": 3}, "train.xyzzy is unknown: there is no such"),
    ({"train__xyzzy": 3}, "(valid: steps, learning_rate, skip, inner)"),
    ({"seed": ...}, "seed is missing"),
    ({"train__inner__widths": ...}, "train.inner.widths is missing"),
    ({"train": ...}, "train is missing"),
    ({"seed": "3"}, "seed must be int; got '3'"),
    ({"seed": 3.0}, "seed must be int; got 3.0"),
    ({"seed": None}, "seed must be int; got None"),
    ({"name": 3}, "name must be str or NoneType; got 3"),
    ({"train__learning_rate": "1e-3"}, "must be float; got '1e-3'"),
    ({"train__inner__widths": 3}, "must be list or tuple; got 3"),
    ({"train__skip": 1}, "train.skip must be bool; got 1"),
    ({"train": 3}, "train must be a group of fields; got 3"),
    ({"corpus": "text"}, "corpus must be a group of fields; got 'text'"),
    ({"seed": {"a": 1}}, "seed must be int; got {'a': 1}"),
  ],
)
def test_a_fault_names_its_field_and_what_to_write(changes, message):
  with pytest.raises(ValueError) as error:
    fields.check(make_config(**changes), FIELDS)
  assert message in str(error.value)


@pytest.mark.parametrize("name", ["seed", "train__learning_rate"])
@pytest.mark.parametrize("value", [True, False])
def test_a_bool_is_no_number(name, value):
  path = name.replace("__", r"\.")
  with pytest.raises(ValueError, match=rf"{path} must be .*{value}"):
    fields.check(make_config(**{name: value}), FIELDS)


def test_all_faults_are_told_at_once():
  config = make_config(
    seed="x", train__stepz=1, train__steps=..., train__skip=0
  )
  with pytest.raises(ValueError) as error:
    fields.check(config, FIELDS)
  lines = str(error.value).splitlines()
  assert len(lines) == 1 + 4
  for part in ("seed must", "stepz is unknown", "steps is miss", "skip must"):
    assert sum(part in line for line in lines) == 1


def test_a_workdir_is_claimed_by_its_first_config(tmp_path):
  workdir = tmp_path / "a" / "b"
  fields.claim(workdir, make_config())
  assert json.loads((workdir / "config.json").read_text()) == make_config()
  fields.claim(workdir, make_config())


def test_a_tuple_and_the_list_that_json_makes_of_it_are_the_same(tmp_path):
  fields.claim(tmp_path, make_config(train__inner__widths=(1, 2)))
  fields.claim(tmp_path, make_config(train__inner__widths=[1, 2]))


def test_another_config_is_refused_with_every_field_that_differs(tmp_path):
  fields.claim(tmp_path, make_config())
  other = make_config(seed=1, train__inner__widths=[1, 3], name=..., new=2)
  with pytest.raises(ValueError, match="made by another config") as error:
    fields.claim(tmp_path, other)
  assert str(error.value).splitlines()[1:-1] == [
    "  name: None there, nothing here",
    "  new: nothing there, 2 here",
    "  seed: 0 there, 1 here",
    "  train.inner.widths: [1, 2] there, [1, 3] here",
  ]
  assert json.loads((tmp_path / "config.json").read_text()) == make_config()


def test_a_field_that_says_nothing_differs_from_no_field(tmp_path):
  fields.claim(tmp_path, make_config(name="nothing"))
  with pytest.raises(ValueError, match="name"):
    fields.claim(tmp_path, make_config(name=...))


def test_a_damaged_config_says_to_use_another_workdir(tmp_path):
  (tmp_path / "config.json").write_text('{"seed": ')
  with pytest.raises(ValueError, match=r"config\.json is no JSON.*workdir"):
    fields.claim(tmp_path, make_config())
