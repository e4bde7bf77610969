"""What a job's config may hold, checked before any work."""

import difflib
import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

log = logging.getLogger("gemma_jax")

NAME = "config.json"


class Free:
  """Marks a mapping whose keys are somebody else's to check."""


def check(config: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
  """Compares a config with the fields that its job knows.

  Args:
    config: nested mapping.
    fields: the same nesting, with a type or a tuple of types for each leaf.

  Raises:
    ValueError: unknown fields with the nearest valid name, missing ones, and
      values of another type, all in one message.
  """
  wrong = list(_faults(config, fields, ""))
  if wrong:
    raise ValueError(
      "The config does not fit its job:\n  " + "\n  ".join(wrong)
    )


def _faults(config, fields, prefix):
  for name, value in config.items():
    path = f"{prefix}{name}"
    if name not in fields:
      near = difflib.get_close_matches(name, fields, n=1, cutoff=0.4)
      hint = f"did you mean {prefix}{near[0]}?" if near else "there is no such"
      yield f"{path} is unknown: {hint} (valid: {', '.join(fields)})"
      continue
    expected = fields[name]
    if expected is Free or isinstance(expected, Mapping):
      if not isinstance(value, Mapping):
        yield f"{path} must be a group of fields; got {value!r}"
      elif expected is not Free:
        yield from _faults(value, expected, f"{path}.")
      continue
    kinds = expected if isinstance(expected, tuple) else (expected,)
    number = isinstance(value, int) and not isinstance(value, bool)
    if not isinstance(value, kinds) and not (number and float in kinds):
      names = " or ".join(kind.__name__ for kind in kinds)
      yield f"{path} must be {names}; got {value!r}"
    elif isinstance(value, bool) and bool not in kinds:
      yield f"{path} must be a number; got {value!r}"
  for name in fields:
    if name not in config:
      yield f"{prefix}{name} is missing"


def compare(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
  """Checks that a workdir is new, or was made by this config.

  Raises:
    ValueError: the workdir was made by another config; shows what differs.
  """
  path = workdir / NAME
  if not path.exists():
    return
  try:
    theirs = json.loads(path.read_text())
  except ValueError as e:
    raise ValueError(
      f"{path} is no JSON ({e}). Restore it, or use another --workdir."
    ) from e
  different = [
    f"{key}: {old} there, {new} here"
    for key, (old, new) in _differences(theirs, _plain(config)).items()
  ]
  if different:
    raise ValueError(
      f"{workdir} was made by another config:\n  "
      + "\n  ".join(different)
      + "\nUse another --workdir, or the same config to resume."
    )


def finished(
  workdir: pathlib.Path, config: Mapping[str, Any]
) -> dict[str, Any] | None:
  """The results of a workdir of this config, or None where it has none yet.

  Raises:
    ValueError: as `compare`.
  """
  compare(workdir, config)
  path = workdir / "results.json"
  if not path.exists():
    return None
  log.info("%s is finished; nothing to do", workdir)
  return json.loads(path.read_text())


def claim(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
  """Makes a new workdir this config's; see `compare` for one that is not."""
  compare(workdir, config)
  workdir.mkdir(parents=True, exist_ok=True)
  write_json(workdir / NAME, config)


def write_json(path: pathlib.Path, contents: Any) -> None:
  """Writes a file whole or not at all."""
  partial = path.with_name(f".{path.name}")
  partial.write_text(json.dumps(contents, indent=2))
  partial.rename(path)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
  """As JSON gives it back: tuples are lists."""
  return json.loads(json.dumps(config))


def _differences(old, new, prefix=""):
  out = {}
  for key in sorted({*old, *new}):
    a, b = old.get(key), new.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
      out |= _differences(a, b, f"{prefix}{key}.")
    elif a != b or (key in old) != (key in new):
      out[f"{prefix}{key}"] = tuple(
        repr(side[key]) if key in side else "nothing" for side in (old, new)
      )
  return out
