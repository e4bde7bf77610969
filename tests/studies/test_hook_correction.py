"""The study that tells what a transcoder should read."""

import numpy as np
import pytest

from configs import hook_correction as config_file
from studies import hook_correction, jobs


def config(**changes):
  base = config_file.get_config("smoke").to_dict()
  quick = {"seeds": [0], "run.train.steps": 20, "run.eval.splice_tokens": 500}
  return jobs.changed(base, quick | changes)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("hooks")
  return hook_correction.run(config(), workdir), workdir


def test_every_site_is_trained_on_one_harvest_and_compared(done):
  results, workdir = done
  rows = {row["read"]: row for row in results["rows"]}
  assert list(rows) == ["mlp_in", "mlp_norm", "resid_mid"]
  for row in rows.values():
    assert row["fvu"] < row["fvu_linear"] * 1.2
    assert row["fvu_sd"] == 0  # of one seed
  table = (workdir / "table.md").read_text()
  assert table.count("\n") == 5
  assert f"| resid_mid | {rows['resid_mid']['fvu']:.4g} |" in table


def test_what_is_linear_in_the_mlps_input_is_aligned_with_it(done):
  rows = {row["read"]: row for row in done[0]["rows"]}
  # A gain is linear, a norm is not.
  assert rows["mlp_in"]["alignment_r2"] == pytest.approx(1, abs=1e-3)
  assert rows["mlp_norm"]["alignment_r2"] == pytest.approx(1, abs=1e-3)
  assert rows["resid_mid"]["alignment_r2"] < 0.999
  for row in rows.values():
    assert row["alignment_cosine"] > 0.5
    assert abs(row["alignment_cosine_null"]) < 0.1


def test_a_run_is_not_made_twice(done, monkeypatch):
  results, workdir = done
  monkeypatch.setattr("trainers.loop.train", None)  # would fail
  again = hook_correction.run(config(), workdir)
  for a, b in zip(again["rows"], results["rows"], strict=True):
    np.testing.assert_allclose(a["fvu"], b["fvu"])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"reads": ["mlp_norm"]}, "must have mlp_in"),
    ({"reads": ["mlp_in", "mlp_inn"]}, "Did you mean 'mlp_in'"),
    ({"run.train.steps": 0}, "must be at least 1"),
    ({"run.trian": 0}, r"trian is unknown"),
  ],
)
def test_a_bad_study_is_refused_before_any_training(changes, message):
  with pytest.raises(ValueError, match=message):
    hook_correction.plan(config(**changes))
