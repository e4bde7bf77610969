"""The study from end to end on tiny models, and what it refuses."""

import json

import numpy as np
import pytest

from configs import convergence as config_file
from gemma_jax import models
from studies import convergence, jobs, prompts, readings

pytestmark = pytest.mark.usefixtures("quick_compiles")


def config(**changes):
  c = json.loads(config_file.get_config("smoke").to_json_best_effort())
  c["dictionaries"] = {"gemma": c["dictionaries"]["gemma"]}
  c["models"]["llama"]["dictionaries"] = []
  c["dictionaries"]["gemma"]["train"]["steps"] = 5
  c["dictionaries"]["gemma"]["eval"] |= {"latents": 1, "splice_tokens": 100}
  c["compare"]["draws"] = 39
  return jobs.changed(c, changes)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("study")
  return convergence.run(config(), workdir), workdir


def leading(results, b, level):
  (found,) = [
    row
    for row in results["rows"]
    if row["b"] == b
    and row["level"] == level
    and row["primary"]
    and row["capability"] == "all"
  ]
  return found


LEVELS = ("behaviour", "activations", "features")


@pytest.mark.parametrize("level", LEVELS)
def test_more_noise_is_less_convergence(done, level):
  results, _ = done
  near, far = (leading(results, b, level) for b in ("noise_5", "noise_50"))
  assert near["share"] > far["share"]
  assert near["share"] > 0.2
  assert near["null_p"] is None or near["null_p"] <= 0.025


def test_every_row_has_its_null_floor_and_verdict(done):
  results, _ = done
  for row in results["rows"]:
    assert row["low"] <= row["value"] <= row["high"]
    assert row["verdict"] in ("equivalent", "convergent", "not shown")
    assert row["prompts"] in (12, 6)
    assert np.isfinite(row["floor"])
    if row["capability"] == "all":
      assert 0 < row["null_p"] <= 1, row["measure"]
  assert {r["capability"] for r in results["rows"]} == {
    "all",
    "naming",
    "counting",
  }


def test_another_width_is_refused_for_cosine_and_accepted_for_cka(done):
  results, _ = done
  own = [r["measure"] for r in results["rows"] if r["b"] == "llama"]
  assert "cosine" not in own
  assert "jaccard" not in own
  assert {"linear_cka", "mutual_knn", "jsd"} <= set(own)
  reasons = {
    r["measure"]: r["reason"] for r in results["refused"] if r["b"] == "llama"
  }
  assert "linear_cka" in reasons["cosine"]
  assert "llama without a dictionary" in reasons["code_cka"]


def test_files_maps_and_page(done):
  results, workdir = done
  assert json.loads((workdir / "results.json").read_text()) == results
  for name in ("report.html", "plots/forest.png", "rows.csv", "table.md"):
    assert (workdir / name).stat().st_size > 100
  deep = {name: one["layers"] for name, one in results["models"].items()}
  for one in results["maps"]:
    assert np.shape(one["scores"]) == (deep[one["a"]], deep[one["b"]])
    assert len(one["null_best"]) == 39


def test_a_finished_model_is_not_read_again(done, monkeypatch):
  results, workdir = done
  (workdir / "models/noise_50/reading.npz").unlink()
  loaded = []
  real = readings.read

  def read(subject, *args, **kwargs):
    loaded.append(subject.name)
    return real(subject, *args, **kwargs)

  monkeypatch.setattr(readings, "read", read)
  monkeypatch.setattr(readings, "answers", None)
  again = convergence.run(config(), workdir)
  assert set(loaded) == {"noise_50"}
  assert again["rows"] == results["rows"]


def test_other_prompts_in_the_same_workdir_are_refused(done, monkeypatch):
  _, workdir = done
  real = prompts.load
  monkeypatch.setattr(prompts, "load", lambda *a: real(*a)[::-1])
  with pytest.raises(ValueError, match=r"begun with other prompts.*counting-6"):
    convergence.run(config(), workdir)


def test_the_plan_says_which_measures_are_defined():
  found = convergence.plan(config())
  assert found["prompts"] == {"naming": 6, "counting": 6}
  pairs = {pair["b"]: pair for pair in found["pairs"]}
  assert set(pairs) == {"noise_5", "noise_50", "llama"}
  assert "cosine" in pairs["noise_5"]["measures"]
  assert "cosine" in pairs["llama"]["refused"]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"prompts.per_capability": 2}, "4 prompts are too few.*below 8"),
    ({"compare.draws": 5}, "compare.draws=5.*at least 19"),
    ({"compare.measures": ["cka"]}, "cka"),
    ({"compare.margin": 0.6}, "margin 0.6"),
    ({"prompts.template": "User:"}, "{prompt}"),
    ({"pairs": "some"}, "'reference', 'all'"),
    ({"pairs": [["gemma", "pythia"]]}, "pythia"),
    ({"models.gemma.dictionaries": ["@pythia"]}, "@pythia"),
    ({"models.gemma.dictionaries": ["@gemma", "@gemma"]}, "2 dictionaries"),
    ({"models.gemma.nois": 0.1}, "did you mean gemma.noise"),
    ({"models.gemma.chat": True}, "no chat template"),
    ({"answers.max_new_tokens": 250}, "do not fit gemma's context of 256"),
    ({"compare.measures": ["cosine"]}, "No measure is defined"),
  ],
)
def test_bad_configs_are_refused_before_a_model_is_loaded(
  changes, message, tmp_path, monkeypatch
):
  monkeypatch.setattr(models, "load_model", None)
  with pytest.raises(ValueError, match=message):
    convergence.run(config(**changes), tmp_path)


def test_a_dictionary_that_is_not_there_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no dictionary at nowhere"):
    convergence.run(
      config(**{"models.gemma.dictionaries": ["nowhere"]}), tmp_path
    )
