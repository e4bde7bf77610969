"""Grids over a config: reads them, names and resolves their combinations."""

import ast
import difflib
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

PREFIX = "config."
# What the parsers of absl and ml_collections raise.
ERRORS = (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError)
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_LONGEST = 120  # characters; file systems take 255 bytes


def parse(given: Sequence[str]) -> dict[str, list[str]]:
  """Reads what `--grid` was given.

  Args:
    given: "config.KEY=VALUE,VALUE,..." each. Commas inside brackets and quotes
      belong to a value; quotes around a whole value are taken off.

  Returns:
    The values of each key (without "config."), as text.

  Raises:
    ValueError: no such form, a key or a value given twice, a value missing.
  """
  grid = {}
  for text in given:
    key, equals, values = text.partition("=")
    path = key.removeprefix(PREFIX)
    if not equals or path in ("", key):
      raise ValueError(
        f"--grid={text}: expected config.KEY=VALUE,VALUE,..., such as "
        "--grid=config.seed=0,1."
      )
    if path in grid:
      raise ValueError(
        f"--grid={key}=... is given twice. Give all its values in one: "
        f"--grid={key}={','.join(grid[path])},{values}"
      )
    try:
      grid[path] = [_unquoted(value.strip()) for value in _split(values)]
    except ValueError as e:
      raise ValueError(f"--grid={text}: {e}") from e
    twice = {v for v in grid[path] if grid[path].count(v) > 1}
    if twice:
      raise ValueError(f"--grid={text}: {', '.join(twice)} is given twice.")
  if not grid:
    raise ValueError(
      "No --grid is given. Expected at least one, such as "
      "--grid=config.seed=0,1; a single run is `python -m launch.run`."
    )
  return grid


def _split(text: str) -> list[str]:
  """At the commas that stand outside brackets and quotes."""
  parts, closing, quote = [""], [], None
  for letter in text:
    if quote:
      quote = None if letter == quote else quote
    elif letter in "'\"":
      quote = letter
    elif letter in _CLOSING:
      closing.append(_CLOSING[letter])
    elif closing and letter == closing[-1]:
      closing.pop()
    elif letter in _CLOSING.values():
      raise ValueError(f"{letter} closes nothing.")
    elif letter == "," and not closing:
      parts.append("")
      continue
    parts[-1] += letter
  if closing or quote:
    raise ValueError(f"{quote or closing[-1]} is missing at the end.")
  if not all(part.strip() for part in parts):
    raise ValueError("a value is missing; write '' for empty text.")
  return parts


def _unquoted(value: str) -> str:
  if value[0] not in "'\"":
    return value
  try:
    return ast.literal_eval(value)
  except (SyntaxError, ValueError):  # quotes that do not span the value
    return value


def combinations(grid: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
  """Every choice of one value for each key; the last key varies fastest."""
  return [
    dict(zip(grid, values, strict=True))
    for values in itertools.product(*grid.values())
  ]


def labels(keys: Sequence[str]) -> dict[str, str]:
  """The last component of each key, or all of it where two would be alike."""
  last = [key.rpartition(".")[2] for key in keys]
  return {
    key: short if last.count(short) == 1 else key.removeprefix(PREFIX)
    for key, short in zip(keys, last, strict=True)
  }


def names(
  combos: Sequence[Mapping[str, str]],
  known: Mapping[str, Mapping[str, str]] | None = None,
) -> list[str]:
  """A directory's name for each combination, such as "k=32,seed=0".

  Args:
    combos: all with the same keys.
    known: combinations that have a name; they keep it.
  """
  known = dict(known or {})
  out, short = [], labels(list(combos[0]))
  for combo in combos:
    found = [name for name, other in known.items() if other == combo]
    if not found:
      name = ",".join(f"{short[key]}={_safe(combo[key])}" for key in combo)
      # Some file systems do not tell a from A.
      taken = {other.casefold() for other in known}
      if len(name) > _LONGEST or name.casefold() in taken:
        tail = hashlib.sha256(str(sorted(combo.items())).encode()).hexdigest()
        name = f"{name[:_LONGEST]}-{tail[:8]}"
      known[name] = combo
      found = [name]
    out += found
  return out


def _safe(value: str) -> str:
  """What a file system and a shell take as it is."""
  bare = re.sub(r"[\s()\[\]{}'\"]", "", value)
  return re.sub(r"[^\w.+-]+", "-", bare, flags=re.ASCII)


def arguments(overrides: Mapping[str, str]) -> list[str]:
  """The flags of `launch.run` for these overrides."""
  return [f"--{PREFIX}{key}={value}" for key, value in overrides.items()]


def resolve(filename: str, overrides: Mapping[str, str]) -> dict[str, Any]:
  """The config that `launch.run` makes of these overrides, by its parser.

  Raises:
    ValueError: no such file or key, or a value of another type.
  """
  argv = ["", f"--config={filename}", *arguments(overrides)]
  own = flags.FlagValues()
  flag = config_flags.DEFINE_config_file(
    "config", None, flag_values=own, sys_argv=argv
  )
  try:
    own(argv)
    return flag.value.to_dict()
  except ERRORS as e:
    raise ValueError(explain(e)) from e


def check_keys(config: Mapping[str, Any], keys: Sequence[str]) -> None:
  """Tells, better than the parser, of keys that the config does not have.

  Raises:
    ValueError: unknown keys, with the nearest.
  """
  for key in keys:
    group, done = config, PREFIX
    for name in key.split("."):
      if not isinstance(group, Mapping) or name not in group:
        here = group if isinstance(group, Mapping) else {}
        near = difflib.get_close_matches(name, here, n=1, cutoff=0.4)
        hint = f" Did you mean {done}{near[0]}?" if near else ""
        raise ValueError(f"There is no {PREFIX}{key}.{hint}")
      group, done = group[name], f"{done}{name}."


def value(config: Mapping[str, Any], key: str) -> Any:
  """That of a field, such as "dictionary.k"."""
  for name in key.split("."):
    config = config[name]
  return config


def given_overrides(flag_values: flags.FlagValues) -> dict[str, str]:
  """The `--config.KEY=VALUE` of a command line, as text that parses again."""
  out = {}
  values = config_flags.get_override_values(flag_values["config"])
  for key, value in values.items():
    literal = flag_values[PREFIX + key].parser.flag_type() == "config_literal"
    if hasattr(value, "to_dict"):
      value = value.to_dict()
    plain = isinstance(value, str) and not literal
    out[key] = value if plain else repr(value)
  return out


def explain(error: Exception) -> str:
  """The line of a parser's error that tells a person what is wrong."""
  # ml_collections nests its messages, and quotes whole tracebacks.
  text = error.args[0] if error.args else error
  text = str(text if isinstance(text, str) else error).strip()
  if "Error whilst parsing config file" in text:
    return text.splitlines()[-1].partition(": ")[2] or text
  field, unsupported, _ = text.partition(" is not supported for overriding.")
  if unsupported:  # and seven lines more
    return f"{field} cannot be changed here: change it in the config file."
  return text
