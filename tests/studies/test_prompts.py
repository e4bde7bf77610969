"""Prompts of our own and of files."""

import json
from collections import Counter

import numpy as np
import pytest

from studies import prompts

GOOD = {"id": "a", "capability": "own", "prompt": "Why?", "response": "So."}


def write(path, *lines):
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return str(path)


def test_each_capability_has_at_least_forty_of_our_own():
  found = prompts.load(prompts.CAPABILITIES, (), 0)
  assert set(prompts.CAPABILITIES) == {
    "truthfulness",
    "safety_boundaries",
    "instruction_following",
    "uncertainty",
    "context_awareness",
  }
  assert min(Counter(p.capability for p in found).values()) >= 40
  assert len({p.prompt for p in found}) == len(found)
  for prompt in found:
    assert 8 <= len(prompt.prompt.split()) <= 70
    assert 15 <= len(prompt.response.split()) <= 50
    assert "\n" not in prompt.prompt + prompt.response


def test_a_few_of_each_and_a_file_of_the_users(tmp_path):
  other = GOOD | {"id": "b", "prompt": "How?"}
  del other["response"]
  path = write(tmp_path / "own.jsonl", GOOD, other)
  found = prompts.load(("uncertainty",), (path,), 3)
  assert [p.id for p in found] == [
    "uncertainty-01",
    "uncertainty-02",
    "uncertainty-03",
    "a",
    "b",
  ]
  assert [p.response for p in found[3:]] == ["So.", ""]


@pytest.mark.parametrize(
  ("line", "message"),
  [
    (GOOD | {"prompt": " "}, "line 2.*prompt"),
    (GOOD | {"answer": "So."}, "line 2.*answer"),
    (GOOD | {"response": 4}, "line 2.*response"),
    ({k: v for k, v in GOOD.items() if k != "capability"}, "capability"),
    (["a"], "line 2: expected an object"),
    (GOOD, "twice a"),
  ],
)
def test_lines_that_are_no_prompts_are_named(tmp_path, line, message):
  path = write(tmp_path / "own.jsonl", GOOD, line)
  with pytest.raises(ValueError, match=message):
    prompts.load((), (path,), 0)


def test_bad_files_and_numbers_are_refused(tmp_path):
  broken = tmp_path / "broken.jsonl"
  broken.write_text('{"id": ')
  with pytest.raises(ValueError, match=r"line 1 is no JSON"):
    prompts.load((), (str(broken),), 0)
  with pytest.raises(FileNotFoundError, match=r"absent.jsonl"):
    prompts.load((), (str(tmp_path / "absent.jsonl"),), 0)
  with pytest.raises(ValueError, match=r"kindness"):
    prompts.load(("kindness",), (), 0)
  with pytest.raises(ValueError, match=r"got -1"):
    prompts.load(("uncertainty",), (), -1)
  with pytest.raises(ValueError, match=r"got 0 prompts"):
    prompts.load((), (), 0)


def test_others_are_of_the_same_capability_and_never_the_prompt_itself():
  found = prompts.load(prompts.CAPABILITIES, (), 5)
  other = prompts.others(found, seed=1)
  assert sorted(other) == list(range(len(found)))
  assert (other != np.arange(len(found))).all()
  for i, j in enumerate(other):
    assert found[i].capability == found[j].capability
  with pytest.raises(ValueError, match=r"at least 2 prompts of uncertainty"):
    prompts.others(found[:5] + [p for p in found if p.id == "uncertainty-01"])
