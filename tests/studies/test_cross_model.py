"""The study across models, whole, on two tiny models that are the same one."""

import json
from pydoc_data.topics import topics

import numpy as np
import pytest

from configs import cross_model, cross_model_270m
from gemma_jax.report import cross_model as report
from studies import cross_model as study
from studies import cross_splice, jobs
from trainers import loop

MAPS = {
  *("mean", "position", "token", "procrustes", "scaled_procrustes", "ridge"),
  *("reduced_rank", "cca", "decoded_ridge", "code_ridge", "hypernetwork"),
  *("hypernetwork_unseen", "translator", "shuffled_across", "shuffled_within"),
  *("shuffled_token", "redrawn", "other_seed", "own"),
}


def twins(texts=None):
  """The smoke config, of a model and itself under another name, one pair.

  On the texts of a directory, which are found sooner than the builtin ones.
  """
  c = cross_model_270m.get_config("smoke")
  c.pairs = c.pairs[:1]
  c.models.llama = c.models.gemma
  c.network_pairs = (
    ("gemma:blocks.0.resid_post", "llama:blocks.0.resid_post"),
    ("gemma:blocks.2.resid_post", "llama:blocks.2.resid_post"),
  )
  config = jobs.plain(c)
  if texts is not None:
    config["text"]["corpus"] |= {"kind": "text", "path": str(texts)}
  return config


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
  folder = tmp_path_factory.mktemp("texts")
  for name, text in sorted(topics.items()):
    (folder / f"{name}.txt").write_text(text)
  return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, texts):
  folder = tmp_path_factory.mktemp("cross")
  patch = pytest.MonkeyPatch()
  patch.setenv("GEMMA_JAX_CACHE", str(folder / "cache"))
  results = study.run(twins(texts), folder / "run")
  yield folder / "run", results
  patch.undo()


def by_map(results, route, table="rows"):
  return {r["map"]: r for r in results[table] if r["route"] == route}


def test_every_route_has_the_whole_ladder_with_floors_and_ceilings(made):
  _, results = made
  routes = dict.fromkeys(r["route"] for r in results["rows"])
  assert list(routes) == ["gemma:1 > llama:1", "llama:1 > gemma:1"]
  for route in routes:
    rows = by_map(results, route)
    assert set(rows) == MAPS
    assert rows["own"]["r2_pooled"] == 1
    assert abs(rows["mean"]["r2_pooled"]) < 1e-5
    assert rows["mean"]["delta_token"] < 0 < rows["own"]["delta_ridge"]
    assert all(np.isfinite(row["fvu_decoded"]) for row in rows.values())
    spliced = set(by_map(results, route, "splice"))
    assert spliced == {*cross_splice.SPLICED, "dealt"}
  assert json.loads(json.dumps(results)) == results


def test_a_model_is_predicted_from_itself(made):
  _, results = made
  for route in ("gemma:1 > llama:1", "llama:1 > gemma:1"):
    rows = by_map(results, route)
    spliced = by_map(results, route, "splice")
    for name in ("procrustes", "ridge"):
      assert rows[name]["fvu"] < 1e-3
      assert rows[name]["r2_pooled"] > 0.98
    assert abs(spliced["ridge"]["kl"] - spliced["own"]["kl"]) < 0.05
    assert rows["code_ridge"]["r2_pooled"] > 0.9
    for name in ("shuffled_across", "shuffled_within", "redrawn"):
      assert rows[name]["r2_pooled"] < 0.6, name
    assert rows["hypernetwork_unseen"]["unseen"]
  matches = results["matches"][0]
  # The same dictionary twice: every latent that fires often is its own match.
  assert matches["significant"] == matches["matched"] == matches["eligible"]
  assert matches["r_median"] > 0.999 > matches["null_median"]
  assert results["features"]
  for one in results["features"]:
    assert one["latent_a"] == one["latent_b"]
    assert one["contexts_a"] == one["contexts_b"] != []


def test_what_was_never_seen_stands_beside_cheaper_guesses(made):
  _, results = made
  for route in ("gemma:1 > llama:1", "llama:1 > gemma:1"):
    fvu = {r["map"]: r["fvu"] for r in results["unseen"] if r["route"] == route}
    assert set(fvu) == {
      *("hypernetwork", "nearest", "mean_of_neighbours"),
      *("pooled_ridge", "fitted_ridge"),
    }
    assert fvu["fitted_ridge"] < 1e-3


def test_it_leaves_a_page_and_goes_on_from_what_is_there(
  made, texts, monkeypatch
):
  workdir, results = made
  for name in ("report.html", "table.md", "config.json", "results.json"):
    assert (workdir / name).stat().st_size > 0
  assert results["verdicts"]
  assert report.summary(results)
  assert study.run(twins(texts), workdir) == results
  # Pairs that are done are not done again.
  (workdir / "results.json").rename(workdir / "before.json")
  monkeypatch.setattr(study, "_pair", lambda *_: pytest.fail("done again"))
  again = study.run(twins(texts), workdir)
  assert again["rows"] == results["rows"]


@pytest.mark.slow
def test_layers_of_one_model_are_a_pair_too(tmp_path, monkeypatch):
  monkeypatch.setenv("GEMMA_JAX_CACHE", str(tmp_path / "cache"))
  config = jobs.plain(cross_model_270m.get_config("smoke"))
  config["hypernetwork"]["weights"]["kl"] = 0.1
  config["hypernetwork"]["kl_windows"] = 8
  results = study.run(config, tmp_path / "run")
  written = loop.read_metrics(tmp_path / "run/hypernetwork/metrics.jsonl")
  assert 0 < written[-1]["kl"] < written[0]["kl"]
  assert [one["kind"] for one in results["pairs"]] == ["across", "within"]
  for route in ("gemma:1 > gemma:2", "gemma:2 > gemma:1"):
    rows = by_map(results, route)
    assert set(rows) == MAPS - {"hypernetwork_unseen"}
    assert rows["ridge"]["r2_pooled"] > rows["token"]["r2_pooled"]
    assert rows["redrawn"]["r2_pooled"] < rows["ridge"]["r2_pooled"] - 0.3


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"pairs": []}, "pairs is empty"),
    ({"pairs": [["gemma:blocks.1.resid_post"]]}, "expected two sites"),
    ({"pairs": [["gema:blocks.1.resid_post"] * 2]}, "models has no 'gema'"),
    ({"pairs": [["gemma:blocks.99.resid_post"] * 2]}, "layer"),
    ({"pairs": [["gemma:blocks.1.resid_post"] * 2]}, "twice in one pair"),
    ({"unseen": [["gemma:blocks.0.resid_post"] * 2]}, "unseen"),
    ({"maps.rank": 0}, "maps.rank=0"),
    ({"text.corpus": {"kind": "builtin"}}, "no excerpts"),
    ({"hypernetwork.rnk": 3}, "did you mean hypernetwork.rank"),
    ({"hypernetwork.learning_rate": 0.0}, "a learning_rate above 0"),
    ({"hypernetwork.batch_size": 9}, "batch_size that the mesh's axis 'data'"),
    ({"translator.dropout": 1.0}, "a dropout of 0 to below 1"),
    ({"causal.dose": [1.0]}, "did you mean causal.doses"),
    ({"text.contxt": 3}, "did you mean text.context"),
    ({"given": {"gemma:blocks.0.resid_post": "x"}}, "expected sites of pairs"),
  ],
)
def test_bad_configs_are_refused_at_once(change, message):
  config = jobs.changed(twins(), change)
  with pytest.raises(ValueError, match=message):
    study.prepare(config)


def test_too_little_text_and_foreign_dictionaries_are_refused_early(
  made, texts, tmp_path
):
  workdir, _ = made
  little = jobs.changed(
    twins(texts),
    {"text.corpus.excerpts.documents": 5, "text.heldout_fraction": 0.5},
  )
  little["text"]["corpus"]["excerpts"]["characters"] = 40
  little["skip"] = 30
  with pytest.raises(ValueError, match=r"one more than their widths together"):
    study.run(little, tmp_path / "little")
  given = twins(texts)
  found = next((workdir / "dictionaries").glob("gemma_1/members/*0/dictionary"))
  given["pairs"] = [["gemma:blocks.2.resid_post", "llama:blocks.2.resid_post"]]
  given["network_pairs"], given["unseen"] = [], []
  given["causal"] = {}
  given["given"] = {"gemma:blocks.2.resid_post": str(found)}
  with pytest.raises(ValueError, match=r"expected an SAE of blocks\.2"):
    study.run(given, tmp_path / "given")


def test_the_configs_ask_for_what_the_study_knows():
  original = jobs.plain(cross_model.get_config())
  study.fields.check(original, study.FIELDS)
  assert original["run"]["dictionary"]["width"] == 4096
  assert {
    site.split(".")[1] for pair in original["pairs"] for site in pair
  } == {*"567"}
  plan = study.plan(jobs.plain(cross_model_270m.get_config("smoke")))
  assert plan["routes"] == 4
