"""The main job on a tiny model: complete, resumable, and clear when refused."""

import importlib
import json

import jax
import numpy as np
import pytest

from gemma_jax import dictionaries, metrics
from gemma_jax.activations import ActivationStore, Joined
from tests.trainers.runs import quick, smoke
from trainers import dictionary, loop


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """(workdir, results) of the smoke run on eight devices."""
  workdir = tmp_path_factory.mktemp("smoke") / "run"
  return workdir, dictionary.run(smoke(), workdir)


def test_a_run_leaves_everything_that_the_design_promises(finished):
  workdir, results = finished
  for name in (
    "config.json",
    "metrics.jsonl",
    "results.json",
    "report.html",
    "checkpoints",
    "plots/fvu_prefixes.png",
    "plots/training.png",
    "plots/latent_density.png",
    "plots/norms.png",
  ):
    assert (workdir / name).exists(), name
  assert json.loads((workdir / "results.json").read_text()) == results
  assert set(results["definitions"]) >= {
    "fvu",
    "fvu_linear",
    "ce_recovered",
    "kl",
    "dead_fraction",
  }
  rows = loop.read_metrics(workdir / "metrics.jsonl")
  assert [row["step"] for row in rows] == [10, 20, 30, 40, 50, 60]
  assert rows[0]["host_memory_peak"] > 2**20
  assert rows[-1]["fvu"] < rows[0]["fvu"]
  assert json.loads((workdir / "config.json").read_text()) == json.loads(
    json.dumps(smoke())
  )


def test_results_hold_together(finished):
  _, r = finished
  assert r["fvu"] < r["fvu_linear"] < 1
  assert abs(r["fvu_mean"] - 1) < 1e-6
  assert r["fvu_shuffled"] > 1
  assert r["fvu_prefixes"][str(768)] == r["fvu"]
  assert len(r["fvu_prefixes"]) == 4
  assert r["delta_ce"] == pytest.approx(r["ce_spliced"] - r["ce_clean"])
  gap = r["ce_ablated"] - r["ce_clean"]
  assert r["ce_gap"] == pytest.approx(gap)
  assert r["ce_recovered"] == pytest.approx(1 - r["delta_ce"] / gap)
  assert 0 < r["kl"] < r["kl_ablated"]
  assert r["tokens_train"] == 60 * 512
  assert r["tokens_heldout"] == 4_000


def test_the_saved_dictionary_gives_the_reported_fvu(finished, own_cache):
  workdir, results = finished
  d = dictionaries.load(workdir)
  for path in own_cache.glob("activations/*"):
    store = ActivationStore.open(path)
    if len(store) != 4_000 or d.config.read not in store.sites:
      continue
    x = np.asarray(store.read(0, 4_000, d.config.read), np.float32)
    y = np.asarray(store.read(0, 4_000, d.config.write), np.float32)
    got = metrics.fvu(y, d.reconstruct(x))
    assert got == pytest.approx(results["fvu"], rel=1e-4)
    acts = np.asarray(d.encode(x))
    assert (acts > 0).sum(1).mean() == pytest.approx(results["l0"], rel=1e-3)
    return
  raise AssertionError("the held-out store is not in the cache")


def test_a_finished_run_is_not_run_again(finished):
  workdir, results = finished
  before = (workdir / "metrics.jsonl").stat().st_mtime_ns
  assert dictionary.run(smoke(), workdir) == results
  assert (workdir / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_second_training_uses_the_first_ones_activations(
  finished, tmp_path, monkeypatch
):
  def refuse(*args, **kwargs):
    raise AssertionError("the harvest was repeated")

  module = importlib.import_module("gemma_jax.activations.harvester")
  monkeypatch.setattr(module, "Writer", refuse)
  results = dictionary.run(quick(seed=1, **{"train.steps": 10}), tmp_path / "b")
  assert results["tokens_train"] == 10 * 512


def test_a_workdir_of_another_config_is_refused_with_what_differs(finished):
  workdir, _ = finished
  with pytest.raises(ValueError, match=r"train\.steps: 60 there, 61 here"):
    dictionary.run(smoke(**{"train.steps": 61}), workdir)


@pytest.mark.parametrize(
  "kind", ["topk", pytest.param("batchtopk", marks=pytest.mark.slow)]
)
def test_an_sae_is_a_transcoder_from_a_site_to_itself(kind, tmp_path):
  config = quick(
    **{
      "activations.read": "blocks.2.resid_post",
      "activations.write": "blocks.2.resid_post",
      "dictionary.activation": kind,
      "dictionary.skip": False,
      "dictionary.group_sizes": [],
      "train.steps": 30,
    }
  )
  results = dictionary.run(config, tmp_path / "sae")
  assert results["fvu"] < 0.9
  assert results["fvu_linear"] < 1e-4  # the identity is linear
  assert not dictionaries.load(tmp_path / "sae").config.is_transcoder
  if kind == "topk":
    assert results["l0"] <= 12


def test_several_steps_in_one_dispatch_are_the_same_steps(tmp_path):
  found = {}
  for stride in (1, 5):
    changes = {"train.steps_per_dispatch": stride, "train.steps": 20}
    workdir = tmp_path / str(stride)
    dictionary.run(quick(**changes), workdir)
    rows = loop.read_metrics(workdir / "metrics.jsonl")
    found[stride] = [[row[n] for n in ("step", "fvu", "l0")] for row in rows]
  np.testing.assert_allclose(found[5], found[1], rtol=1e-4)
  assert len(found[5]) == 2


@pytest.mark.slow
def test_a_crosscoder_reads_and_writes_several_layers(tmp_path):
  layers = ["blocks.1.resid_post", "blocks.2.resid_post"]
  config = quick(
    **{
      "activations.read": layers,
      "activations.write": layers,
      "dictionary.skip": False,
      "train.steps": 40,
    }
  )
  results = dictionary.run(config, tmp_path / "run")
  found = dictionaries.load(tmp_path / "run")
  assert found.config.parts == (48, 48)
  assert found.params["W_dec"].shape == (768, 96)
  assert results["sites"] == ["+".join(layers)] * 2
  assert results["fvu"] < 0.9
  assert "ce_spliced" not in results  # of one site only
  assert (tmp_path / "run/report.html").exists()


def test_a_crosscoder_reads_and_writes_several_models(tmp_path):
  both = ["blocks.2.resid_post", "other:blocks.1.mlp_out"]
  changes = {
    "models": {"other": "random:gemma3-tiny"},
    "activations.read": both,
    "activations.write": both,
    "dictionary.skip": False,
    "train.steps": 40,
  }
  planned = dictionary.plan(smoke(**changes))
  assert planned["model"] == (
    "gemma2, 3 of 5 layers run; gemma3, 2 of 8 layers run"
  )
  results = dictionary.run(quick(**changes), tmp_path / "run")
  found = dictionaries.load(tmp_path / "run")
  assert found.config.parts == (48, 48)
  assert results["fvu"] < 0.9
  # What it read is what each model computes on these tokens.
  stores = {
    name: ActivationStore.open(path) for name, path in results["stores"].items()
  }
  store = Joined({"": stores["heldout"], "other": stores["other:heldout"]})
  x = np.concatenate([store.read(0, 4_000, site) for site in both], axis=1)
  y = np.asarray(x, np.float32)
  got = metrics.fvu(y, found.reconstruct(y))
  assert got == pytest.approx(results["fvu"], rel=1e-4)


def test_parameters_are_split_over_the_mesh(tmp_path):
  config = smoke(**{"mesh": {"data": 2, "fsdp": 2, "tensor": 2}})
  config["train"]["steps"] = 20
  assert len(jax.devices()) == 8
  results = dictionary.run(config, tmp_path / "split")
  assert results["fvu"] < 1
