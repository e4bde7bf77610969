import json

import numpy as np
import pytest
import scipy.sparse

from configs import clusters_vs_sae as config_file
from gemma_jax import dictionaries
from gemma_jax.clustering.quantise import of_centroids
from gemma_jax.metrics import rates
from studies import clusters_vs_sae, codes, jobs


def config(**changes):
  """The smoke run with one SAE and few codes."""
  c = config_file.get_config("smoke")
  own = json.loads(c.to_json_best_effort())
  own["clusterings"] = {
    "kmeans": own["clusterings"]["kmeans"] | {"counts": [16]},
    "residual": own["clusterings"]["residual"] | {"stages": 2},
  }
  return jobs.changed(
    own,
    {
      "run.sweep.k": [],
      "run.train.steps": 20,
      "run.eval.latents": 1,
      "run.eval.splice_tokens": 100,
      "components": [48],
      "eval.splice_tokens": 300,
      "eval.explained": 2,
    }
    | changes,
  )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("study")
  return clusters_vs_sae.run(config(), workdir), workdir


def row(results, name):
  (found,) = [row for row in results["rows"] if row["name"] == name]
  return found


def test_the_table_has_every_code_and_finite_numbers(done):
  results, workdir = done
  assert [row["name"] for row in results["rows"]] == [
    "sae",
    "kmeans16",
    "residual16x2",
    "random16",
    "pca48",
    "lookup",
    "lookup+kmeans16",
  ]
  for one in results["rows"]:
    numbers = [
      one[n] for n in ("bits", "fvu", "delta_ce", "kl", "fvu_shuffled")
    ]
    assert np.isfinite(numbers).all()
    assert one["fvu_low"] <= one["fvu"] <= one["fvu_high"]
    assert one["fvu_shuffled"] > 1
  for name in ("table.md", "report.html", "plots/rates.png"):
    assert (workdir / name).stat().st_size > 100
  assert json.loads((workdir / "results.json").read_text())["answers"]


def test_numbers_are_those_of_the_trainings(done):
  results, workdir = done
  sae = json.loads((workdir / "dictionaries/results.json").read_text())
  assert row(results, "sae")["fvu"] == pytest.approx(sae["fvu"], rel=1e-5)
  clusters = json.loads((workdir / "kmeans/results.json").read_text())
  for member in clusters["members"]:
    assert row(results, member["name"])["fvu"] == pytest.approx(
      member["fvu"], rel=1e-5
    )
  (residual,) = json.loads((workdir / "residual/results.json").read_text())[
    "members"
  ]
  assert row(results, "residual16x2")["fvu"] == pytest.approx(
    residual["fvu_stages"][1], rel=1e-5
  )


def test_budgets_are_what_the_codes_cost(done):
  results, _ = done
  assert row(results, "kmeans16")["bits"] == 4
  assert row(results, "kmeans16")["parameters"] == 16 * 48
  assert row(results, "kmeans16")["encode_flops"] == 2 * 16 * 48
  assert row(results, "residual16x2")["bits"] == 8
  sae = row(results, "sae")
  whole = rates.support_bits(768, np.array([sae["l0"]]))[0]
  assert sae["bits_support"] == pytest.approx(whole, rel=0.1)
  assert sae["bits"] == pytest.approx(
    sae["bits_support"] + sae["l0"] * sae["value_bits"]
  )
  assert sae["parameters"] >= 2 * 48 * 768


def test_all_components_explain_all_and_all_their_values_lose_nothing(done):
  results, _ = done
  assert row(results, "pca48")["fvu"] < 1e-8
  assert abs(row(results, "pca48")["delta_ce"]) < 1e-3


def test_more_is_better_and_random_centroids_are_worse(done):
  results, _ = done
  fvu = {row["name"]: row["fvu"] for row in results["rows"]}
  assert fvu["residual16x2"] < fvu["kmeans16"] < fvu["random16"]
  assert fvu["lookup+kmeans16"] < fvu["lookup"] < 1


def test_a_dictionary_meets_the_best_clustering_within_its_budget(done):
  results, _ = done
  rows = {row["name"]: row for row in results["rows"]}
  for duel in results["versus"]:
    budget = {"bits": "bits", "parameters": "parameters"}.get(
      duel["budget"], "encode_flops"
    )
    rival, ours = rows[duel["rival"]], rows[duel["dictionary"]]
    assert rival[budget] <= ours[budget]
    assert duel["difference"] == pytest.approx(
      rival[duel["measure"]] - ours[duel["measure"]]
    )
    sure = duel["low"] > 0 or duel["high"] < 0
    assert (duel["better"] != "not told apart") == sure
  assert {duel["budget"] for duel in results["versus"]} == {
    "bits",
    "parameters",
    "FLOPs",
  }


def test_rules_are_better_than_on_shuffled_tokens(done):
  results, _ = done
  one = row(results, "kmeans16")
  assert one["auroc"] > one["auroc_shuffled"]


def test_clusters_have_nearest_latents_beyond_chance(done):
  results, _ = done
  for pair in results["nearest_latents"]:
    assert pair["correlation_median"] > pair["correlation_null"]
    assert len(pair["latent_by_cosine"]) == int(pair["clusters"][6:])


def test_a_transcoder_is_refused_before_any_work(tmp_path):
  bad = config(**{"run.activations.write": "blocks.{layer}.mlp_out"})
  with pytest.raises(ValueError, match=r"one site"):
    clusters_vs_sae.run(bad, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_what_a_clustering_refuses_is_refused_before_any_work(tmp_path):
  bad = config(**{"clusterings.kmeans.method": "dbscan"})
  with pytest.raises(ValueError, match=r"dbscan"):
    clusters_vs_sae.run(bad, tmp_path / "run")
  with pytest.raises(ValueError, match=r"probe_seeds"):
    clusters_vs_sae.plan(config(**{"eval.probe_seeds": 1}))


def test_rounded_values_cost_as_many_bits_as_they_need():
  rng = np.random.default_rng(0)
  z = np.where(rng.random((500, 20)) < 0.2, rng.exponential(1, (500, 20)), 0)
  z = z.astype(np.float32)
  ways = np.eye(20, dtype=np.float32)
  noise = rng.standard_normal((500, 20)).astype(np.float32)

  def bits(scale):
    return codes.value_bits(
      z, lambda a: a @ ways, z + scale * noise, signed=False
    )

  assert bits(1.0) < bits(0.1) < bits(0.01)


def test_memberships_are_one_latent_of_each_stage():
  x = np.array([[0.0, 0], [0, 9], [10, 0]], np.float32)
  q = of_centroids(np.array([[0, 0], [0, 10], [10, 0]], np.float32))
  code = codes.of_quantiser("k", "kmeans", q)
  z = code.latents(x)
  assert scipy.sparse.issparse(z)
  np.testing.assert_allclose(z.toarray(), np.diag([1, 0.5, 1]), atol=1e-5)


def test_a_dictionary_of_the_study_loads(done):
  _, workdir = done
  assert dictionaries.load(workdir / "dictionaries").config.width == 768
