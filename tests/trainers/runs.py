"""Smoke runs of the main job."""

import sys

from configs import gemma2b_transcoder
from studies import jobs

SMOKE = "configs/gemma2b_transcoder.py:smoke"


def smoke(**changes):
  """The smoke config with `{"train.steps": 20}` and the like applied."""
  return jobs.changed(gemma2b_transcoder.get_config("smoke").to_dict(), changes)


def quick(**changes):
  """The same with hardly any evaluation."""
  return smoke(**{"eval.splice_tokens": 100, "eval.latents": 1} | changes)


def command(workdir, cache, *more):
  return [
    sys.executable,
    "-m",
    "launch.run",
    f"--config={SMOKE}",
    f"--workdir={workdir}",
    f"--cache={cache}",
    *more,
  ]
