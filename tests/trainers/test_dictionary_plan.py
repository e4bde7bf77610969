"""What the main job refuses, and what it warns of."""

import dataclasses
import types
import typing

import numpy as np
import pytest

from configs.base import RECIPE
from gemma_jax.dictionaries import core, linear
from gemma_jax.dictionaries.presets import preset
from gemma_jax.dictionaries.recipe import Recipe
from tests.trainers.runs import smoke
from trainers import dictionary, dictionary_task, stores


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
    (
      {"train.batch_size": 2**22, "train.sparse": False}
      | {"data.train_tokens": 2**22},
      "more activations than BatchTopK over all latents can count",
    ),
    ({"model.name": "random:gemma9"}, "no preset 'gemma9'"),
    ({"model.name": "/nowhere"}, "No model at '/nowhere'"),
    ({"mesh.tensor": 3}, "devices"),
    (
      {"activations.read": ["blocks.1.mlp_in", "b:blocks.1.mlp_in"]},
      r"config\.models has no 'b'",
    ),
    ({"models": {"b": "random:gemma2-tiny"}}, "begins with 'b:'"),
    (
      {"models": {"b": "random:gemma2-tiny"}}
      | {"activations.write": "b:blocks.2.mlp_out"},
      "are of two models",
    ),
    ({"models": {"": "random:gemma2-tiny"}}, "expected a short name"),
    ({"models": {"b": None}}, "where the model comes from"),
    ({"eval.splice_batch_size": 0}, r"eval\.splice_batch_size=0 must be at le"),
    ({"train.batch_size": -512}, r"train\.batch_size=-512 must be at least 1"),
    ({"dictionary.k": 0.0}, r"k=0.0 must be in \(0, 768\]"),
    ({"seed": -1}, "seed=-1 must be at least 0"),
    ({"sweep.seed": [0, 1.5]}, r"sweep\.seed=1.5 must be a whole number"),
    ({"sweep.width": [256.0]}, r"sweep\.width=256.0 must be a whole number"),
    ({"sweep.learning_rate": ["a"]}, r"sweep\.learning_rate='a' must be a num"),
    ({"sweep.learning_rate": [float("nan")]}, "nan must be at least 0"),
    (
      {"recipe.sparsity": "l0", "recipe.sparsity_coefficient": 1.0},
      "sparsity 'l0' needs activation jumprelu",
    ),
    (
      {"recipe.pre_activation_coefficient": 1.0},
      "pre_activation_coefficient needs activation jumprelu",
    ),
    (
      {"dictionary.activation": "relu", "train.sparse": True},
      "train.sparse=True: the step of activation 'relu'",
    ),
    (
      {"data.train_tokens": 600},
      "train_tokens=600 cannot start 768 latents",
    ),
    (
      {"activations.write": "blocks.2.hook_mlp_out"}
      | {"activations.read": "blocks.2.mlp_out"},
      "would learn the identity",
    ),
    ({"track": ["mlflow"]}, "Unknown trackers"),
    ({"data.corpus": {"kind": "novel"}}, "unknown corpus kind"),
  ],
)
def test_a_bad_config_is_refused_by_name(changes, message, tmp_path):
  with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){message}"):
    dictionary.run(smoke(**changes), tmp_path / "run")
  assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_config_has_every_field_of_a_recipe_by_its_type():
  given = {
    name: kind for kind, names in RECIPE.items() for name in names.split()
  }
  assert given == {
    field.name: (typing.get_args(field.type) or (field.type,))[0]
    for field in dataclasses.fields(Recipe)
  }


def test_a_model_that_cuts_the_text_otherwise_is_refused(monkeypatch):
  sites = ["blocks.1.resid_post", "b:blocks.1.resid_post"]
  changes = {"models": {"b": "random:gemma3-tiny"}, "dictionary.skip": False}
  changes |= {"activations.read": sites, "activations.write": sites}
  p = dictionary.prepare(smoke(**changes))
  own = types.SimpleNamespace(tokens=np.arange(6))
  stream = types.SimpleNamespace(collect=lambda: own)
  monkeypatch.setattr(stores, "windows", lambda *_: {"heldout": stream})
  dictionary._require_alike(p, "b", None, own)
  other = types.SimpleNamespace(tokens=own.tokens + 1)
  with pytest.raises(
    ValueError, match=r"models\.b \(random:gemma3-tiny\) does"
  ):
    dictionary._require_alike(p, "b", None, other)


def test_a_corpus_shorter_than_a_batch_says_how_much_is_missing(tmp_path):
  for name in ("a", "b", "c", "d", "e", "f"):
    (tmp_path / f"{name}.txt").write_text(f"{name} short text " * 9)
  corpus = {"kind": "text", "path": str(tmp_path)}
  changes = {"data.corpus": corpus, "data.heldout_fraction": 0.5}
  with pytest.raises(ValueError, match="fewer than one batch of 512"):
    dictionary.run(smoke(**changes), tmp_path / "run")


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
