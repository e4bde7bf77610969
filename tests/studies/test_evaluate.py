"""Dictionaries of several origins on the same text."""

import json

import jax.numpy as jnp
import pytest

from configs import evaluate as config_file
from configs import gemma3_sae
from gemma_jax import dictionaries
from studies import evaluate, jobs
from trainers import dictionary


def config(*paths, **changes):
  base = config_file.get_config("smoke").to_dict()
  quick = {"eval.splice_tokens": 1_000, "eval.probe_tokens": 1_500}
  return jobs.changed(base, {"dictionaries": list(paths)} | quick | changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """The workdir of a short run, and the same dictionary as SAELens has it."""
  root = tmp_path_factory.mktemp("evaluate")
  base = gemma3_sae.get_config("smoke").to_dict()
  changes = {
    "train.steps": 40,
    "dictionary.activation": "batchtopk",
    "dictionary.matryoshka": True,
  }
  dictionary.run(jobs.changed(base, changes), root / "run")
  found = dictionaries.load(root / "run")
  found.save(root / "sae_lens", format="sae_lens")
  return root


@pytest.fixture(scope="module")
def evaluated(trained):
  both = config(trained / "run", trained / "sae_lens")
  both["dictionaries"] = [str(path) for path in both["dictionaries"]]
  both["data"] = gemma3_sae.get_config("smoke").data.to_dict()
  return evaluate.run(both, trained / "out"), trained / "out"


def test_the_numbers_are_those_of_the_training_run(evaluated, trained):
  own = json.loads((trained / "run/results.json").read_text())
  found = evaluated[0]["members"][0]
  for name in ("fvu", "l0", "fvu_mean", "dead_fraction", "nmse0"):
    assert found[name] == pytest.approx(own[name], rel=1e-5), name


def test_a_dictionary_in_another_format_gets_the_same_numbers(evaluated):
  ours, theirs = evaluated[0]["members"]
  for name in ("fvu", "l0", "delta_ce", "kl"):
    assert theirs[name] == pytest.approx(ours[name], rel=1e-4), name


def test_every_ablation_is_reported_with_its_gap_and_interval(evaluated):
  member = evaluated[0]["members"][0]
  splice = member["splice"]
  prefixes = {"prefix 48", "prefix 144", "prefix 336"}
  assert prefixes < set(splice)
  assert {"zero", "mean", "resample", "spliced", "clean"} == (
    set(splice) - prefixes
  )
  assert splice["prefix 48"]["kl"] > splice["spliced"]["kl"] > 0
  shares = list(member["l0_prefixes"].values())
  assert shares == sorted(shares)
  assert shares[-1] == pytest.approx(member["l0"], rel=1e-5)
  for name, recovered in splice["spliced"]["ce_recovered"].items():
    gap = splice[name]["ce"] - splice["clean"]["ce"]
    assert recovered["gap"] == pytest.approx(gap)
    assert len(recovered["interval"]) == 2
  low, high = splice["spliced"]["delta_ce_interval"]
  assert low <= splice["spliced"]["delta_ce"] <= high


def test_probing_has_its_baselines_and_its_noise(evaluated):
  found = evaluated[0]["members"][0]
  methods = found["sparse_probing"]
  assert {"latents_k1", "latents_k5", "raw", "random_k5"} <= set(methods)
  for value in methods.values():
    assert value["mdd"] == pytest.approx(2.8 * value["reseed_sd"])
  assert methods["raw"]["value"] > methods["random_k1"]["value"]
  # The tiny model's tokenizer has hardly any words.
  assert "words" in found["absorption"]["left_out"]
  assert {"latents", "random", "shuffled"} == set(found["explained"])
  assert "auroc" in " ".join(evaluated[0]["definitions"])


def test_it_leaves_a_table_a_picture_and_a_page(evaluated):
  _, out = evaluated
  for name in ("results.json", "sweep.csv", "report.html", "plots/pareto.png"):
    assert (out / name).stat().st_size > 100, name


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"dictionaries": []}, "dictionaries is empty"),
    ({"eval.probes": 3}, r"eval\.probes is unknown"),
    ({"dictionaries": ["/nowhere"]}, "nowhere"),
  ],
)
def test_what_cannot_be_evaluated_is_refused(trained, changes, message):
  given = config(str(trained / "run"), **changes)
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    evaluate.prepare(given)


def test_a_dictionary_of_another_width_is_refused(tmp_path):
  cfg = dictionaries.DictionaryConfig(
    d_in=20,
    d_out=20,
    width=32,
    activation="relu",
    k=None,
    prefix_widths=(32,),
    read="blocks.2.resid_post",
    write="blocks.2.resid_post",
    model="random:gemma3-tiny",
  )
  params = {name: jnp.ones(shape) for name, shape in cfg.shapes().items()}
  dictionaries.Dictionary(cfg, params).save(tmp_path / "narrow")
  with pytest.raises(ValueError, match=r"vectors of 20.*has 48"):
    evaluate.prepare(config(str(tmp_path / "narrow")))
