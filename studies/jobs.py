"""Studies are jobs made of jobs: each in a directory of its own, resumable."""

import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

from trainers import dictionary

log = logging.getLogger("gemma_jax")


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
  """A config as JSON gives it back: no ConfigDict, tuples are lists."""
  return json.loads(json.dumps(dict(config), default=dict))


def changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict:
  """A deep copy of a config with `{"train.steps": 20}` and the like set."""
  out = json.loads(json.dumps(dict(config)))
  for path, value in changes.items():
    *groups, name = path.split(".")
    inner = out
    for group in groups:
      inner = inner[group]
    inner[name] = value
  return out


def train(config: Mapping[str, Any], workdir: pathlib.Path) -> list[dict]:
  """Runs `trainers.dictionary` and gives its results, one for each member.

  Every one gets a `path`, where `gemma_jax.dictionaries.load` finds it.
  """
  log.info("%s", workdir)
  results = dictionary.run(config, workdir)
  members = results.get("members") or [results]
  common = {k: v for k, v in results.items() if k != "members"}
  return [
    common
    | member
    | {"path": str(dictionary.place(workdir, member["name"]) / "dictionary")}
    for member in members
  ]
