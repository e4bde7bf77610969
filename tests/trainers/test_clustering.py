"""Clusterings of a site, from text to the page; stopped and begun again."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from configs import gemma3_270m_clustering
from gemma_jax import activations, checkpoints
from gemma_jax.clustering import quantise
from gemma_jax.clustering.quantise import Quantiser
from gemma_jax.clustering.rows import as_rows
from studies import jobs
from tests.clustering.test_kmeans import mesh
from trainers import clustering, clustering_fit, loop

CONFIG = "configs/gemma3_270m_clustering.py:smoke"
SMALL = {
  "data.train_tokens": 4_000,
  "data.heldout_tokens": 1_500,
  "cluster.counts": [4, 32],
  "cluster.max_iter": 5,
  "eval.splice_tokens": 200,
  "eval.splice_batch_size": 8,
  "eval.silhouette_rows": 60,
  "eval.clusters": 2,
  "eval.contexts": 2,
  "eval.stability_seeds": 0,
  "eval.gap_draws": 0,
}
QUICK = {"eval.splice_tokens": 0, "eval.silhouette_rows": 0}
QUICK |= {"eval.clusters": 1, "eval.contexts": 1}

pytestmark = pytest.mark.usefixtures("quick_compiles")


def config(**changes):
  """The smoke config, smaller still, with `{"cluster.stages": 3}` and so on."""
  smoke = gemma3_270m_clustering.get_config("smoke").to_dict()
  return jobs.changed(smoke, SMALL | changes)


def quick(**changes):
  """The same, of one count, with hardly any evaluation."""
  return config(**QUICK | {"cluster.counts": [16]} | changes)


def fitted(workdir, member):
  """What a clustering's own file holds, byte for byte."""
  path = clustering.place(workdir, member) / "stage0"
  return (path / clustering_fit.DONE).read_bytes()


def finite(value):
  """Whether every number in nested dicts and lists is."""
  if isinstance(value, dict):
    value = list(value.values())
  if isinstance(value, list):
    return all(map(finite, value))
  return not isinstance(value, float) or np.isfinite(value)


@pytest.fixture(scope="module")
def done(tmp_path_factory, quick_compiles):
  del quick_compiles
  workdir = tmp_path_factory.mktemp("clustering") / "run"
  return clustering.run(config(), workdir), workdir


def test_results_hold_what_the_definitions_say(done):
  results, workdir = done
  assert json.loads((workdir / "results.json").read_text()) == json.loads(
    json.dumps(results)
  )
  assert finite(results["members"])
  for member in results["members"]:
    for name in results["definitions"]:
      group, _, inner = name.partition(".")
      if inner:
        assert group in member, name
      elif name in ("bits", "fvu_stages", "fvu_shuffled", "bits_entropy"):
        assert name in member, name
    assert {"fvu", "fvu_interval", "silhouette", "seconds_train"} <= {*member}
    for name, values in member["tokens"].items():
      assert f"tokens.{name}" in results["definitions"]
      assert set(values) == {"value", "null"}
    assert member["seconds_train"] > 0


def test_numbers_of_a_member_are_those_of_its_saved_quantiser(done):
  results, workdir = done
  store = activations.ActivationStore.open(results["stores"]["heldout"])
  train = activations.ActivationStore.open(results["stores"]["train"])
  site = results["site"]
  x = np.float32(store.read(0, len(store), site))
  y = np.float32(train.read(0, len(train), site))
  for member in results["members"]:
    q = Quantiser.load(clustering.place(workdir, member["name"]) / "quantiser")
    made = np.asarray(q.reconstruct(x), np.float64)
    fvu = ((x - made) ** 2).sum() / ((x - x.mean(0, np.float64)) ** 2).sum()
    assert member["fvu"] == pytest.approx(fvu, rel=1e-4)
    left = y - np.asarray(q.reconstruct(y), np.float64)
    inertia = np.mean((left**2).sum(1))
    assert member["inertia"] == pytest.approx(inertia, rel=1e-4)
    counts = np.bincount(q.encode(x)[:, 0], minlength=member["clusters"])
    assert member["empty_fraction"] == (counts == 0).mean()
    assert member["bits"] == np.log2(member["clusters"])
    assert member["parameters"] == member["clusters"] * x.shape[1]
    # And its labels are of all rows of the training store.
    path = clustering.place(workdir, member["name"]) / "stage0"
    arrays = clustering_fit.load_file(path / clustering_fit.DONE)
    assert len(arrays["labels"]) == len(train) == results["tokens_train"]
    assert arrays["counts"].sum() == len(train)
    np.testing.assert_array_equal(q.encode(y)[:, 0], arrays["labels"])


def test_more_clusters_explain_more_and_controls_explain_nothing(done):
  few, many = done[0]["members"]
  assert many["fvu"] < few["fvu"] < 1
  assert many["bits_entropy"] > few["bits_entropy"]
  for member in (few, many):
    assert member["fvu_shuffled"] >= 1
    assert member["fvu_train_mean"] >= 1
    assert member["bits_entropy"] <= member["bits"] + 1e-9
    low, high = member["fvu_interval"]
    assert low <= member["fvu"] <= high
    assert -1 <= member["silhouette"] <= 1


def test_spliced_members_cost_loss(done):
  for member in done[0]["members"]:
    spliced = member["splice"]
    assert member["ce_clean"] > 0
    assert spliced["tokens"] >= 200 * 0.9
    assert member["kl"] > 0
    assert member["delta_ce"] == pytest.approx(
      spliced["ce"] - member["ce_clean"], abs=1e-9
    )
    zero = spliced["ce_recovered"]["zero"]
    assert zero["value"] == member["ce_recovered"]
    assert zero["value"] == pytest.approx(
      1 - member["delta_ce"] / zero["gap"], rel=1e-6
    )


def test_the_metrics_have_a_line_for_every_iteration(done):
  results, workdir = done
  for member in results["members"]:
    path = clustering.place(workdir, member["name"]) / "stage0"
    rows = loop.read_metrics(path / "metrics.jsonl")
    about = json.loads((path / "kmeans.json").read_text())
    assert [row["step"] for row in rows] == [*range(1, about["n_iter"] + 1)]
    inertia = [row["inertia"] for row in rows]
    assert (np.diff(inertia) < 0).all()
    assert about["inertia"] / results["tokens_train"] < inertia[-1]


def test_the_page_and_the_table_name_every_member(done):
  _, workdir = done
  page = (workdir / "report.html").read_text()
  table = (workdir / "clusters.csv").read_text().splitlines()
  assert len(table) == 3
  for line, name in zip(table[1:], ("kmeans4", "kmeans32"), strict=True):
    assert line.startswith(f"{name},")
    assert name in page
  assert (workdir / "plots/rate.png").stat().st_size > 1_000


def test_a_finished_run_does_nothing(done, monkeypatch):
  results, workdir = done
  monkeypatch.setattr(clustering.stores, "harvest", None)  # would fail
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
  again = clustering.run(config(), workdir)
  assert again == json.loads(json.dumps(results))
  assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*")} == before


def test_a_workdir_of_another_config_is_refused(done):
  with pytest.raises(ValueError, match=r"cluster\.max_iter: 5 there, 6 here"):
    clustering.run(config(**{"cluster.max_iter": 6}), done[1])


@pytest.mark.parametrize(
  ("changes", "member", "stages", "fvu"),
  [
    ({"cluster.method": "spherical"}, "spherical16", 1, 1),
    ({"cluster.minibatch": 800, "cluster.max_iter": 3}, "kmeans16", 1, 0.95),
    (
      {
        "cluster.method": "residual",
        "cluster.stages": 3,
        "cluster.normalise": "standardise",
        "eval.splice_tokens": 100,
      },
      "residual16x3",
      3,
      0.8,
    ),
    (
      {
        "cluster.method": "product",
        "cluster.stages": 4,
        "cluster.init": "bisecting",
      },
      "product16x4",
      4,
      0.9,
    ),
    (
      {"cluster.minibatch": 800, "cluster.method": "spherical"},
      "spherical16",
      1,
      1,
    ),
  ],
)
def test_every_method_runs_to_its_results(
  done, changes, member, stages, fvu, tmp_path
):
  del done  # its harvest is there
  results = clustering.run(quick(**changes), tmp_path / "run")
  (found,) = results["members"]
  assert found["name"] == member
  assert found["stages"] == stages
  assert found["bits"] == 4 * stages
  assert finite(found)
  assert found["fvu"] < fvu <= 1 <= found["fvu_shuffled"]
  if changes.get("cluster.method") == "residual":
    assert len(found["fvu_stages"]) == 3
    assert (np.diff(found["fvu_stages"]) < 0).all()
    assert found["fvu_stages"][-1] == found["fvu"]
    assert found["kl"] > 0
  else:
    assert found["fvu_stages"] == [found["fvu"]]
    assert "kl" not in found
  q = Quantiser.load(tmp_path / "run/members" / member / "quantiser")
  assert q.stages == stages
  if q.kind == "spherical":
    norms = np.linalg.norm(q.centroids[0], axis=1)
    np.testing.assert_allclose(norms, 1, rtol=1e-5)


@pytest.mark.parametrize("rank", [0, 3])
def test_a_mixture_says_how_likely_held_out_rows_are(done, rank, tmp_path):
  del done
  changes = {"cluster.method": "mixture", "cluster.rank": rank}
  results = clustering.run(quick(**changes), tmp_path / "run")
  (found,) = results["members"]
  likely = found["log_likelihood"]
  # Rows of several tokens are no single Gaussian with diagonal covariance.
  assert likely["over_diagonal_per_row"] > 0
  assert likely["per_dim"] == pytest.approx(likely["per_row"] / 48)
  assert (tmp_path / "run/members/mixture16/mixture.safetensors").exists()


def test_clusters_of_a_sample_are_made_again(done, tmp_path):
  del done
  changes = {
    "eval.stability_seeds": 2,
    "eval.gap_draws": 2,
    "eval.silhouette_rows": 100,
  }
  results = clustering.run(quick(**changes), tmp_path / "run")
  (found,) = results["members"]
  assert 0.1 < found["stability"]["ami"] < 1
  assert found["gap_permuted"]["value"] > found["gap_gaussian"]["value"]
  assert found["davies_bouldin"] > 0


# ------------------------------------------------------------- interruptions
class Killed(Exception):
  """Stands for SIGKILL."""


def killed_in(monkeypatch, iteration):
  """The next clusterings end in their iteration of that number, all told."""
  real, save = clustering_fit._recorded, checkpoints.Checkpoints.save
  count = itertools.count(1)

  def recorded(*args):
    for now in real(*args):
      if next(count) == iteration:
        raise Killed
      yield now

  def saved(self, *args):
    save(self, *args)
    self._manager.wait_until_finished()  # nothing goes on after a kill

  monkeypatch.setattr(clustering_fit, "_recorded", recorded)
  monkeypatch.setattr(checkpoints.Checkpoints, "save", saved)


def test_a_killed_run_ends_bit_for_bit_as_one_left_alone(
  done, tmp_path, monkeypatch
):
  alone, broken = done[1], tmp_path / "run"
  # In the middle of the first member, then of the second.
  for iteration in (4, 2 + 4):
    with monkeypatch.context() as patch:
      killed_in(patch, iteration)
      with pytest.raises(Killed):
        clustering.run(config(), broken)

  def killed(*args, **kwargs):
    raise Killed

  monkeypatch.setattr(clustering.evaluate, "evaluate", killed)
  with pytest.raises(Killed):
    clustering.run(config(), broken)
  for member in ("kmeans4", "kmeans32"):
    assert fitted(broken, member) == fitted(alone, member)
    where = clustering.place(broken, member) / "stage0"
    rows = loop.read_metrics(where / "metrics.jsonl")
    about = json.loads((where / "kmeans.json").read_text())
    assert [row["step"] for row in rows] == [*range(1, about["n_iter"] + 1)]


def fit(workdir, x, **changes):
  options = {
    "seed": 0,
    "init": "random",
    "max_iter": 6,
    "tol": 0.0,
    "spherical": False,
    "minibatch": None,
    "checkpoint_every": 2,
    "mesh": mesh(1),
  }
  return clustering_fit.fit(as_rows(x), 8, workdir, **options | changes)


def cloud():
  return np.random.default_rng(0).standard_normal((500, 4), np.float32)


@pytest.mark.parametrize("iteration", [1, 4, 5])
@pytest.mark.parametrize("minibatch", [None, 100])
def test_a_killed_fit_goes_on_bit_for_bit(
  minibatch, iteration, tmp_path, monkeypatch
):
  x, changes = cloud(), {"minibatch": minibatch}
  alone = fit(tmp_path / "alone", x, **changes)
  with monkeypatch.context() as patch:
    killed_in(patch, iteration)
    with pytest.raises(Killed):
      fit(tmp_path / "broken", x, **changes)
  made = []
  real = clustering_fit._recorded
  monkeypatch.setattr(
    clustering_fit,
    "_recorded",
    lambda *args: (made.append(now) or now for now in real(*args)),
  )
  broken = fit(tmp_path / "broken", x, **changes)
  # The killed one saved every second iteration, and not the one it died in.
  saved = (iteration - 1) // 2 * 2
  assert [now.number for now in made] == [*range(saved + 1, 7)]
  np.testing.assert_array_equal(broken.centroids, alone.centroids)
  assert (broken.inertia, broken.n_iter) == (alone.inertia, alone.n_iter)


def test_a_killed_residual_quantiser_goes_on_in_its_stage(
  tmp_path, monkeypatch
):
  x = cloud()

  def quantiser(workdir):
    stages = itertools.count()
    return quantise.fit_residual(
      x,
      8,
      2,
      fit=lambda rows, k, *, seed: fit(
        workdir / f"stage{next(stages)}", rows, seed=seed
      ),
    )

  alone = quantiser(tmp_path / "alone")
  with monkeypatch.context() as patch:
    killed_in(patch, 6 + 3)
    with pytest.raises(Killed):
      quantiser(tmp_path / "broken")
  assert (tmp_path / "broken/stage0" / clustering_fit.DONE).exists()
  assert not (tmp_path / "broken/stage1" / clustering_fit.DONE).exists()
  broken = quantiser(tmp_path / "broken")
  np.testing.assert_array_equal(broken.centroids, alone.centroids)
  np.testing.assert_array_equal(broken.coordinates.mean, alone.coordinates.mean)


@pytest.mark.parametrize("minibatch", [None, 100])
def test_one_killed_after_its_last_iteration_makes_no_more(
  minibatch, tmp_path, monkeypatch
):
  x = cloud()
  alone = fit(tmp_path / "alone", x, minibatch=minibatch)
  real = clustering_fit.Lloyd.finish

  def killed(self, last):
    raise Killed

  monkeypatch.setattr(clustering_fit.Lloyd, "finish", killed)
  with pytest.raises(Killed):
    fit(tmp_path / "broken", x, minibatch=minibatch)
  monkeypatch.setattr(clustering_fit.Lloyd, "finish", real)
  broken = fit(tmp_path / "broken", x, minibatch=minibatch)
  assert broken.n_iter == alone.n_iter == 6
  np.testing.assert_array_equal(broken.centroids, alone.centroids)


def test_one_killed_when_it_had_converged_makes_no_more(tmp_path, monkeypatch):
  x = cloud()
  often = {"tol": 0.01, "max_iter": 100, "checkpoint_every": 1}
  alone = fit(tmp_path / "alone", x, **often)
  assert 1 < alone.n_iter < 100
  real = clustering_fit.Lloyd.finish

  def killed(self, last):
    raise Killed

  monkeypatch.setattr(clustering_fit.Lloyd, "finish", killed)
  with pytest.raises(Killed):
    fit(tmp_path / "broken", x, **often)
  monkeypatch.setattr(clustering_fit.Lloyd, "finish", real)
  broken = fit(tmp_path / "broken", x, **often)
  assert broken.n_iter == alone.n_iter
  np.testing.assert_array_equal(broken.centroids, alone.centroids)


def test_what_is_done_is_read_and_not_made_again(tmp_path, monkeypatch):
  x = cloud()
  first = fit(tmp_path / "fit", x)
  monkeypatch.setattr(clustering_fit, "Lloyd", None)  # would fail
  again = fit(tmp_path / "fit", x)
  for name in ("centroids", "labels", "counts"):
    np.testing.assert_array_equal(getattr(again, name), getattr(first, name))
  assert (again.inertia, again.n_iter) == (first.inertia, first.n_iter)


@pytest.mark.slow
def test_sigterm_saves_exits_zero_and_says_how_to_resume(done, tmp_path):
  del done
  workdir = tmp_path / "run"
  # Mini-batches never converge.
  changes = SMALL | {"cluster.minibatch": 1_000, "cluster.max_iter": 10**6}
  changes |= {"cluster.init": "random", "train.checkpoint_every": 10**6}
  changes["cluster.counts"] = (4,)
  process = subprocess.Popen(
    [
      sys.executable,
      "-m",
      "launch.run",
      f"--config={CONFIG}",
      f"--workdir={workdir}",
      f"--cache={os.environ['GEMMA_JAX_CACHE']}",
      *(f"--config.{name}={value}" for name, value in changes.items()),
    ],
    stderr=subprocess.PIPE,
    text=True,
  )
  stage = clustering.place(workdir, "kmeans4") / "stage0"
  log = stage / "metrics.jsonl"
  for _ in range(900):
    if process.poll() is not None or (log.exists() and log.stat().st_size):
      break
    time.sleep(0.1)
  process.send_signal(signal.SIGTERM)
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == 0, stderr
  (step,) = (int(p.name) for p in (stage / "checkpoints").iterdir())
  assert f"stopped at iteration {step}: resume by the same command" in stderr
  assert loop.read_metrics(log)[-1]["step"] == step
  assert not (workdir / "results.json").exists()


# -------------------------------------------------------------------- values
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"cluster.method": "k-means"}, "expected one of kmeans, spherical"),
    ({"cluster.stages": 2}, r"cluster\.stages=2 .* 'residual' or 'product'"),
    ({"cluster.method": "residual", "cluster.stages": 0}, r"stages=0"),
    ({"cluster.counts": []}, r"cluster\.counts=\[\]"),
    ({"cluster.counts": [4, 4_001]}, "from 1 to the 4000 tokens"),
    ({"cluster.counts": [0]}, "from 1 to the 4000 tokens"),
    (
      {"cluster.method": "product", "cluster.stages": 7},
      r"7 parts of the \d+ dims",
    ),
    ({"cluster.normalise": "whitened"}, "expected one of none, mean_square"),
    ({"cluster.shrinkage": "lw"}, "expected 'oas' or a number"),
    ({"cluster.power": 1.5}, "complete whitening"),
    ({"cluster.minibatch": 4_001}, r"minibatch=4001.* 4000 tokens"),
    ({"cluster.minibatch": 0}, r"cluster\.minibatch=0"),
    ({"cluster.minibatch": 100}, "a multiple of the 8 devices"),
    ({"cluster.init": "kmeans++"}, "expected one of k-means"),
    ({"cluster.tol": -1.0}, r"cluster\.tol=-1\.0"),
    ({"cluster.max_iter": 0}, "must be at least 1"),
    ({"train.checkpoint_every": 0}, "must be at least 1"),
    ({"cluster.metod": "kmeans"}, "did you mean cluster.method"),
    ({"activations.read": "blocks.{layer}.resid_pots"}, "resid_post"),
    ({"layer": 99}, "99"),
  ],
)
def test_a_bad_value_is_one_error_before_the_harvest(
  changes, message, tmp_path, monkeypatch
):
  monkeypatch.setattr(clustering.stores, "harvest", None)  # would fail
  with pytest.raises(ValueError, match=message):
    clustering.run(config(**changes), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_the_plan_names_the_members_and_their_bits():
  changes = {"cluster.method": "residual", "cluster.stages": 3}
  plan = clustering.plan(config(**changes))
  assert plan["members"] == {
    "residual4x3": {"bits": 6.0},
    "residual32x3": {"bits": 15.0},
  }
