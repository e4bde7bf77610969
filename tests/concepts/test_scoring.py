"""Scores against random directions, with the real vocabulary of Gemma 3."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from gemma_jax import statistics
from gemma_jax.concepts import coherence, lexemes, lexicon, scoring
from gemma_jax.concepts.projection import Projection

V, D, K = 262_144, 32, 50
ANIMALS = "dog cat horse cow pig sheep goat duck lion tiger wolf bear"


@pytest.fixture(scope="module")
def words(gemma):
  return lexemes.read(gemma, V)


@pytest.fixture(scope="module")
def animals(gemma):
  return np.array(
    [gemma.convert_tokens_to_ids("▁" + w) for w in ANIMALS.split()]
  )


@pytest.fixture(scope="module")
def reference(words, animals):
  """Random embeddings, of which those of animals have a part in common."""
  rng = np.random.default_rng(0)
  table = rng.normal(size=(V, D)).astype(np.float32)
  table[animals] += 2 * rng.normal(size=D)
  unit = coherence.embeddings(table, words.usable)
  strata = coherence.strata(words.usable, words.script)
  return scoring.Reference(
    words,
    lexicon.fit(lexicon.load(), words),
    unit,
    strata,
    coherence.fit(unit, strata),
    None,
  )


def projection(words, count, rng):
  """Directions whose extremes are any usable tokens."""
  usable = np.flatnonzero(words.usable)
  tokens = rng.choice(usable, (2, count, K))
  logits = -np.sort(-np.abs(rng.normal(3.5, 0.2, (2, count, K))), axis=2)
  return Projection(
    tokens[0],
    logits[0],
    tokens[1],
    -logits[1],
    *(np.full(count, x, np.float32) for x in (0, 1, 0, 0)),
  )


def scored(found, null, reference):
  sides = [scoring.words(some, reference.lexemes) for some in (found, null)]
  tails = [
    scoring.above(sides[0].tail, sides[1].tail),
    scoring.among(sides[1].tail),
  ]
  own, other = scoring.evidence(sides, tails, reference)
  return (
    sides,
    own,
    other,
    scoring.calibrate(own.total, sides[0].content, other.total),
  )


@pytest.mark.parametrize("end", [0, 1])
def test_a_planted_concept_is_first_and_on_its_side(
  words, animals, reference, end
):
  rng = np.random.default_rng(1)
  found, null = (projection(words, n, rng) for n in (300, 400))
  tokens = ("top_tokens", "bottom_tokens")[end]
  logits = ("top_logits", "bottom_logits")[end]
  planted = {name: getattr(found, name).copy() for name in (tokens, logits)}
  planted[tokens][7, : len(animals)] = animals
  planted[logits][7] += 3 * (1, -1)[end]
  found = dataclasses.replace(found, **planted)
  sides, own, _, scores = scored(found, null, reference)
  row = 2 * 7 + end
  assert np.argmax(scores.score) == np.argmax(own.total) == row
  assert own.parts["lexicon"][row] < 1e-6
  names = reference.lexicon.names
  assert names[own.category[row]] == "animals"
  assert own.parts["coherence"][row] < 1e-3
  assert scores.score[row] > 0.9
  assert own.parts["lexicon"][row ^ 1] > 1e-3  # not the other sign
  assert sides[0].tokens[row].tolist() == animals[:10].tolist()


def test_random_directions_score_at_the_nominal_rate(words, reference):
  rng = np.random.default_rng(2)
  found, null = (projection(words, n, rng) for n in (500, 400))
  _, own, other, scores = scored(found, null, reference)
  p = scoring.above(own.total, other.total)
  assert stats.kstest(p, "uniform").pvalue > 0.01
  assert (scores.score >= 0.75).mean() <= 0.01
  again = scoring.transfer(other.total, np.ones(800), own.total, scores.q)
  assert (again.score >= 0.75).mean() <= 0.01


def test_words_are_of_different_families_and_both_ends(words, reference, gemma):
  rng = np.random.default_rng(3)
  found = projection(words, 3, rng)
  tops = [gemma.convert_tokens_to_ids(t) for t in ("▁dog", "▁Dog", "▁dogs")]
  found.top_tokens[1, :3] = tops
  got = scoring.words(found, words, count=4)
  assert got.tokens.shape == (6, 4)
  assert got.tokens[2, 0] == tops[0]
  assert got.tokens[2, 1] == found.top_tokens[1, 3]
  assert got.tokens[3, 0] == found.bottom_tokens[1, 0]
  np.testing.assert_allclose(got.tail[2], found.top_logits[1, :4].mean())
  np.testing.assert_allclose(got.tail[3], -found.bottom_logits[1, :4].mean())


def test_p_among_random_directions_is_add_one():
  null = np.array([1.0, 2.0, 2.0, 5.0])
  np.testing.assert_allclose(
    scoring.above(np.array([0.0, 2.0, 5.0, 6.0]), null), [1, 0.8, 0.4, 0.2]
  )
  np.testing.assert_allclose(scoring.among(null), [1, 0.75, 0.75, 0.25])


def test_scores_are_one_less_q_times_content():
  rng = np.random.default_rng(5)
  null = rng.chisquare(8, 4_000)
  total, content = np.array([40.0, 1.0, 14.0]), np.array([1.0, 1.0, 0.5])
  got = scoring.calibrate(total, content, null)
  q = statistics.benjamini_hochberg(stats.chi2.sf(total, 8))
  np.testing.assert_allclose(got.q, q, rtol=0.5, atol=1e-6)
  np.testing.assert_allclose(got.score, (1 - got.q) * content)
  other = scoring.transfer(
    np.array([50.0, 14.5, 0.5]), np.ones(3), total, got.q
  )
  np.testing.assert_allclose(other.q, [got.q[0], got.q[2], 1])


def test_browns_p_is_uniform_for_parts_that_depend_on_one_another():
  rng = np.random.default_rng(6)
  shared = rng.normal(size=(6_000, 1))
  p = stats.norm.sf((shared + rng.normal(size=(6_000, 4))) / 2**0.5)
  total = -2 * np.log(p).sum(axis=1)
  got = scoring.brown(total[:3_000], total[3_000:])
  assert 0.03 < np.mean(got <= 0.05) < 0.07
  assert np.mean(stats.chi2.sf(total, 8) <= 0.05) > 0.08  # Fisher's is not
  assert scoring.brown(np.array([2.0]), np.ones(9)) == 0


def test_random_directions_have_the_spread_of_the_vectors():
  rng = np.random.default_rng(4)
  scale = np.array([1, 100, 0.01])
  vectors = rng.normal(size=(5_000, 3)) * scale
  got = scoring.null_directions(vectors, 4_000, seed=0)
  np.testing.assert_allclose(got.std(0), vectors.std(0), rtol=0.05)
  np.testing.assert_array_equal(got, scoring.null_directions(vectors, 4_000, 0))
