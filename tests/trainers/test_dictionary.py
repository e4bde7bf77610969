"""The main job on a tiny model: complete, resumable, and clear when refused."""

import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from configs import gemma2b_transcoder
from gemma_jax import dictionaries, metrics
from gemma_jax.activations import ActivationStore
from gemma_jax.dictionaries import core, linear
from gemma_jax.dictionaries.recipe import preset
from trainers import dictionary, dictionary_task, loop

SMOKE = "configs/gemma2b_transcoder.py:smoke"


def smoke(**changes):
  """The smoke config with `{"train.steps": 20}` and the like applied."""
  config = gemma2b_transcoder.get_config("smoke").to_dict()
  for path, value in changes.items():
    *groups, name = path.split(".")
    inner = config
    for group in groups:
      inner = inner[group]
    inner[name] = value
  return config


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
  results = dictionary.run(smoke(seed=1, **{"train.steps": 10}), tmp_path / "b")
  assert results["tokens_train"] == 10 * 512


def test_a_workdir_of_another_config_is_refused_with_what_differs(finished):
  workdir, _ = finished
  with pytest.raises(ValueError, match=r"train\.steps: 60 there, 61 here"):
    dictionary.run(smoke(**{"train.steps": 61}), workdir)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"train.stepz": 3}, r"train\.stepz is unknown: did you mean train\.steps"),
    ({"activations.read": "blocks.9.mlp_in"}, "layer 9 does not exist.*0..4"),
    ({"activations.read": "blocks.1.mlp_inn"}, "Did you mean 'mlp_in'"),
    ({"activations.read": "blocks.*.mlp_in"}, "one layer each"),
    ({"activations.read": "blocks.1.mlp_in"}, "must be in one block"),
    ({"activations.read": "blocks.2.resid_post"}, "not after what is written"),
    ({"dictionary.group_sizes": [48, 96]}, "they add up to 144"),
    (
      {"dictionary.prefix_widths": [768], "dictionary.group_sizes": [768]},
      "Give one of prefix_widths and group_sizes",
    ),
    ({"dictionary.activation": "elu"}, "default has no 'elu'; it has relu"),
    ({"dictionary.k": 1e4}, r"k=10000.0 must be in \(0, 768\]"),
    ({"recipe.preset": "sae_lense"}, "expected one of default, sae_lens"),
    ({"recipe.learning_rat": 1.0}, "Did you mean 'learning_rate'"),
    ({"recipe.normalise": "no"}, "recipe.normalise 'no'; expected one of none"),
    ({"sweep.k": [4.0, 4.0]}, "has a value twice"),
    ({"sweep.kk": [4.0]}, r"sweep\.kk is unknown: did you mean sweep\.k"),
    ({"train.mesh": {"member": 8, "data": 1, "latent": 1}}, "1 members of"),
    ({"train.mesh": {"member": 1, "data": 1, "latent": 5}}, "5 devices|of 5"),
    ({"train.mesh.latent": 16}, "devices"),
    ({"layer": None}, "needs config.layer"),
    ({"data.train_tokens": 100}, "less than one batch"),
    ({"model.name": "random:gemma9"}, "no preset 'gemma9'"),
    ({"model.name": "/nowhere"}, "No model at '/nowhere'"),
    ({"mesh.tensor": 3}, "devices"),
    ({"track": ["mlflow"]}, "Unknown trackers"),
    ({"data.corpus": {"kind": "novel"}}, "unknown corpus kind"),
  ],
)
def test_a_bad_config_is_refused_by_name(changes, message, tmp_path):
  with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){message}"):
    dictionary.run(smoke(**changes), tmp_path / "run")
  assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_corpus_shorter_than_a_batch_says_how_much_is_missing(tmp_path):
  for name in ("a", "b", "c", "d", "e", "f"):
    (tmp_path / f"{name}.txt").write_text(f"{name} short text " * 9)
  corpus = {"kind": "text", "path": str(tmp_path)}
  changes = {"data.corpus": corpus, "data.heldout_fraction": 0.5}
  with pytest.raises(ValueError, match="fewer than one batch of 512"):
    dictionary.run(smoke(**changes), tmp_path / "run")


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_an_sae_is_a_transcoder_from_a_site_to_itself(kind, tmp_path):
  config = smoke(
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
    dictionary.run(smoke(**changes), workdir)
    rows = loop.read_metrics(workdir / "metrics.jsonl")
    found[stride] = [[row[n] for n in ("step", "fvu", "l0")] for row in rows]
  np.testing.assert_allclose(found[5], found[1], rtol=1e-4)
  assert len(found[5]) == 2


def test_a_crosscoder_reads_and_writes_several_layers(tmp_path):
  layers = ["blocks.1.resid_post", "blocks.2.resid_post"]
  config = smoke(
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


def test_a_batch_with_nan_stops_names_the_step_and_keeps_the_checkpoint(
  tmp_path, monkeypatch
):
  real = dictionary_task.make

  def poisoned(*args, **kwargs):
    task = real(*args, **kwargs)

    def batches(start, sharding):
      for step, batch in enumerate(task.batches(start, sharding), start):
        if step == 47:
          batch["x"] = batch["x"] * np.nan
        yield batch

    return loop.dataclasses.replace(task, batches=batches)

  monkeypatch.setattr(dictionary_task, "make", poisoned)
  with pytest.raises(FloatingPointError, match="not finite at step 47"):
    dictionary.run(smoke(), tmp_path / "run")
  monkeypatch.undo()
  kept = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
  assert "40" in kept
  assert "60" not in kept
  results = dictionary.run(smoke(), tmp_path / "run")
  assert np.isfinite(results["fvu"])


def test_parameters_are_split_over_the_mesh(tmp_path):
  config = smoke(**{"mesh": {"data": 2, "fsdp": 2, "tensor": 2}})
  config["train"]["steps"] = 20
  assert len(jax.devices()) == 8
  results = dictionary.run(config, tmp_path / "split")
  assert results["fvu"] < 1


def run_to_end(workdir, cache, steps):
  subprocess.run(
    command(workdir, cache, f"--config.train.steps={steps}"), check=True
  )
  return (workdir / "dictionary/dictionary.safetensors").read_bytes()


def test_runs_killed_at_random_moments_end_bit_for_bit_as_one_left_alone(
  tmp_path,
):
  steps, kills = 120, int(os.environ.get("GEMMA_JAX_KILLS", "2"))
  first = tmp_path / "cache"
  began = time.monotonic()
  alone = run_to_end(tmp_path / "alone", first, steps)
  long = time.monotonic() - began
  rng = random.Random(0)
  for i in range(kills):
    workdir, cache = tmp_path / f"killed{i}", tmp_path / f"cache{i}"
    # Those to be killed need not compile, so they take about half as long.
    shutil.copytree(first / "compiled", cache / "compiled")
    args = command(workdir, cache, f"--config.train.steps={steps}")
    process = subprocess.Popen(args, stderr=subprocess.DEVNULL)
    time.sleep(rng.uniform(0.15, 0.55) * long)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert run_to_end(workdir, cache, steps) == alone
    rows = loop.read_metrics(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(10, steps + 1, 10))


def test_sigterm_saves_exits_zero_and_the_same_command_resumes(tmp_path):
  workdir = tmp_path / "run"
  args = command(workdir, tmp_path / "cache", "--config.train.steps=100000")
  process = subprocess.Popen(args, stderr=subprocess.PIPE, text=True)
  log = workdir / "metrics.jsonl"
  for _ in range(600):
    if log.exists() and log.stat().st_size:
      break
    time.sleep(0.1)
  process.send_signal(signal.SIGTERM)
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == 0, stderr
  assert "resume with the same command" in stderr
  steps = [p.name for p in (workdir / "checkpoints").iterdir()]
  assert any(f"stopped at step {step}:" in stderr for step in steps)


@pytest.mark.parametrize(
  ("changes", "warned"),
  [
    ({}, []),
    ({"bandwidth": 1e-5}, ["recipe.bandwidth=1e-05"]),
    ({"normalise": "none", "target": "input"}, []),
    ({"threshold_init": 1e3}, ["recipe.threshold_init=1e+03"]),
  ],
)
def test_thresholds_of_another_scale_are_warned_of(changes, warned, caplog):
  x = np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32)
  how = preset("default", "jumprelu", changes)
  norm = core.normalisation(linear.moments([(x, x)]), how)
  dictionary_task._check_thresholds(how, norm, x)
  assert len(caplog.messages) == len(warned)
  for message, start in zip(caplog.messages, warned, strict=True):
    assert message.startswith(start)
    assert "is about 0.7" in message


@pytest.mark.parametrize(
  ("row", "said"),
  [
    ({"dead_fraction": 0.2, "l0": 12, "fvu": 0.4}, []),
    ({"dead_fraction": 0.95, "l0": 12, "fvu": 0.4}, ["95% of the latents"]),
    ({"dead_fraction": 0.2, "l0": 0, "fvu": 0.4}, ["no latent fires"]),
    ({"dead_fraction": 0.2, "l0": 12, "fvu": 7.0}, ["FVU is 7"]),
  ],
)
def test_a_training_that_goes_wrong_is_told(row, said):
  found = dictionary_task._watch(row)
  assert len(found) == len(said)
  for message, part in zip(found.values(), said, strict=True):
    assert part in message
