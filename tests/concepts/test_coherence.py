"""Coherence of tokens: exact moments, and p that is right where it should be.

Strata of few tokens are enumerated: every set that could be drawn.
"""

import itertools

import numpy as np
import pytest
from scipy import stats

from gemma_jax.concepts import coherence

SIZES = (400, 250, 90, 600)


def unit_rows(x):
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def strata_of(sizes):
  return np.repeat(np.arange(len(sizes)), sizes)


def tokens_of(rng, sizes, width=24, spread=2.0):
  """Embeddings of strata that differ in mean and in how wide they spread."""
  labels = strata_of(sizes)
  offset = rng.normal(size=(len(sizes), width))
  scale = np.linspace(1, spread, len(sizes))[labels, None]
  return unit_rows(
    offset[labels] + scale * rng.normal(size=(len(labels), width))
  )


def random_sets(rng, labels, sets):
  """Different tokens of the given strata [n, m], -1 where these are."""
  found = np.full(sets.shape, -1)
  for row, own in zip(found, sets, strict=True):
    for s in set(own.tolist()) - {-1}:
      here = own == s
      row[here] = rng.choice(np.flatnonzero(labels == s), here.sum(), False)
  return found


def mean_cosine(unit, tokens):
  pairs = list(itertools.combinations(tokens, 2))
  return np.mean([unit[i].astype(float) @ unit[j] for i, j in pairs])


def uniformity(p):
  return stats.kstest(p, "uniform").pvalue


@pytest.mark.parametrize("components", [0, 3])
def test_removed_components_are_the_first_singular_vectors(components):
  rng = np.random.default_rng(0)
  embed = rng.normal(2, 1, (5000, 12)) * np.linspace(1, 3, 12)
  usable = rng.random(5000) < 0.9
  found = coherence.embeddings(embed, usable, components=components)
  centred = embed[usable] - embed[usable].mean(0)
  right = np.linalg.svd(centred, full_matrices=False)[2][:components]
  expected = unit_rows(centred - centred @ right.T @ right)
  assert found.dtype == np.float32
  np.testing.assert_allclose(found[usable], expected, atol=2e-6)
  assert not found[~usable].any()


def test_moments_are_those_of_all_sets_that_could_be_drawn():
  sizes = (3, 5, 2, 4)
  labels = strata_of(sizes)
  unit = tokens_of(np.random.default_rng(1), sizes, width=5)
  null = coherence.fit(unit, labels)
  sets = [(0, 0, 0), (1, 2, 1), (3, 3, 2), (2, 2, 0), (1, 0, 2, 3), (0, 2)]
  padded = np.full((len(sets), 6), -1)
  for row, own in zip(padded, sets, strict=True):
    row[1 : 1 + len(own)] = own
  mean, variance = null.moments(padded)
  for i, own in enumerate(sets):
    members = (np.flatnonzero(labels == s) for s in own)
    every = [s for s in itertools.product(*members) if len({*s}) == len(s)]
    values = [mean_cosine(unit, each) for each in every]
    assert mean[i] == pytest.approx(np.mean(values), abs=1e-6)
    assert variance[i] == pytest.approx(np.var(values), rel=1e-5)


def test_moments_are_those_of_simulated_sets():
  rng = np.random.default_rng(2)
  labels, unit = strata_of(SIZES), tokens_of(rng, SIZES)
  null = coherence.fit(unit, labels)
  sets = np.array([[0, 0, 0, 0, 0], [0, 1, 2, 3, 3], [3, 3, 0, 1, -1]])
  n = 5000
  for own, expected, spread in zip(sets, *null.moments(sets), strict=True):
    total, m = np.zeros((n, unit.shape[1])), (own >= 0).sum()
    for s in set(own.tolist()) - {-1}:
      order = np.argsort(rng.random((n, SIZES[s])), axis=1)
      drawn = np.flatnonzero(labels == s)[order[:, : (own == s).sum()]]
      total += unit[drawn].sum(1)
    values = ((total**2).sum(1) - m) / (m * (m - 1))
    assert abs(values.mean() - expected) < 4 * values.std() / np.sqrt(n)
    # A variance has its standard error from the fourth moment.
    squares = (values - values.mean()) ** 2
    assert abs(squares.mean() - spread) < 4 * squares.std() / np.sqrt(n)


def test_the_value_is_the_mean_cosine_over_pairs():
  rng = np.random.default_rng(3)
  labels, unit = strata_of(SIZES), tokens_of(rng, SIZES)
  tokens = random_sets(rng, labels, rng.integers(-1, 4, (40, 6)))
  tokens[0], tokens[1, 2:] = -1, -1
  null = coherence.fit(unit, labels)
  found = coherence.score(tokens, unit, labels, null, draws=100)
  mean, variance = null.moments(np.where(tokens < 0, -1, labels[tokens]))
  for i, row in enumerate(tokens):
    own = row[row >= 0]
    if len(own) < 3:
      assert np.isnan(found.value[i])
      assert (found.z[i], found.p[i]) == (0, 1)
      continue
    expected = mean_cosine(unit, own)
    assert found.value[i] == pytest.approx(expected, abs=1e-6)
    z = (expected - mean[i]) / np.sqrt(variance[i])
    assert found.z[i] == pytest.approx(z, abs=1e-3)
  # Where none stands in a row changes nothing.
  front = coherence.score(
    np.sort(tokens, axis=1), unit, labels, null, draws=100
  )
  np.testing.assert_allclose(front.value, found.value, atol=1e-6)


def test_random_sets_have_a_uniform_p_and_planted_ones_the_least():
  rng = np.random.default_rng(4)
  labels, unit = strata_of(SIZES), tokens_of(rng, SIZES)
  planted = rng.choice(len(unit), (5, 8), False)
  for group in planted:
    unit[group] = unit_rows(
      unit[group] + 4 * unit_rows(rng.normal(size=(1, 24)))
    )
  sets = rng.integers(0, 4, (600, 8))
  sets[::3, 5:] = -1
  sets[1::3] = 2
  others = np.where(np.isin(np.arange(len(unit)), planted), -1, labels)
  tokens = np.concatenate([random_sets(rng, others, sets), planted])
  null = coherence.fit(unit, others)
  found = coherence.score(tokens[:600], unit, others, null)
  assert uniformity(found.p) > 0.01
  # A small stratum is judged by itself.
  assert uniformity(found.p[1::3]) > 0.01
  assert abs(found.z.mean()) < 4 / np.sqrt(600)
  assert found.z.std() == pytest.approx(1, abs=0.1)
  found = coherence.score(tokens, unit, labels, coherence.fit(unit, labels))
  assert (found.p[600:] == 1 / 20_001).all()
  assert found.p[:600].min() > 1 / 20_001


def test_tokens_of_one_script_are_not_coherent_merely_for_it():
  rng = np.random.default_rng(5)
  script = rng.integers(0, 2, 3000)
  embed = rng.normal(size=(3000, 32)) + 3.0 * script[:, None]
  usable = np.ones(3000, bool)
  unit = coherence.embeddings(embed, usable, components=0)
  labels = coherence.strata(usable, script)
  tokens = np.stack(
    [rng.choice(np.flatnonzero(script == i % 2), 8, False) for i in range(600)]
  )
  mixed = np.stack([rng.choice(3000, 8, False) for _ in range(600)])
  found = coherence.score(
    np.concatenate([tokens, mixed]), unit, labels, coherence.fit(unit, labels)
  )
  assert found.value[:600].mean() > 0.6
  assert uniformity(found.p[:600]) > 0.01
  # The script is what the first component takes away.
  without = coherence.embeddings(embed, usable, components=1)
  assert abs(mean_cosine(without, tokens[0])) < 0.1


def test_a_set_of_all_tokens_of_its_stratum_is_as_coherent_as_any():
  """Random sets repeat no token: here there is only one."""
  sizes = (4, 300)
  labels = strata_of(sizes)
  unit = tokens_of(np.random.default_rng(6), sizes)
  found = coherence.score(
    np.arange(4)[None], unit, labels, coherence.fit(unit, labels), draws=50
  )
  assert found.p[0] == 1


def test_strata_are_scripts_by_fifths_of_the_usable_ids():
  usable = np.arange(2000) % 2 == 0
  script = np.where(np.arange(2000) % 4 == 0, 7, -1)
  found = coherence.strata(usable, script)
  assert (found[~usable] == -1).all()
  np.testing.assert_array_equal(np.bincount(found[usable]), [100] * 10)
  assert len(set(found[:400][usable[:400]])) == 2
  for s in range(10):
    ids = np.flatnonzero(found == s)
    assert np.ptp(ids) < 400
    assert len(set(script[ids])) == 1


def test_frequencies_replace_the_order_of_ids():
  rng = np.random.default_rng(7)
  usable, script = np.ones(500, bool), np.zeros(500, int)
  frequency = rng.permutation(500)
  found = coherence.strata(usable, script, bins=4, frequency=frequency)
  order = np.argsort(-frequency)
  np.testing.assert_array_equal(found[order], np.repeat(np.arange(4), 125))


def test_small_strata_are_joined_within_their_script_or_are_the_rest():
  script = np.zeros(1000, int)
  script[:60], script[200:230], script[900:] = 1, 1, 1
  script[300:320], script[700:720] = 2, 3
  found = coherence.strata(np.ones(1000, bool), script)
  # Script 1 has 60, 30, 0, 0 and 100 tokens in the bins: the 30 join the 60.
  groups = {frozenset(np.flatnonzero(found == s)) for s in set(found)}
  assert frozenset([*range(60), *range(200, 230)]) in groups
  assert frozenset(range(900, 1000)) in groups
  assert frozenset([*range(300, 320), *range(700, 720)]) in groups
  assert set(found) == set(range(8))
  assert np.bincount(found).sum() == 1000


def test_arrays_that_do_not_fit_are_errors():
  embed, usable = np.ones((5, 4)), np.ones(5, bool)
  broken = np.where(np.arange(5)[:, None] == 2, np.inf, embed)
  for args, components, message in (
    ((embed[0], usable), 1, r"\[V, D\]"),
    ((embed, usable[1:]), 1, "each of the V"),
    ((embed, usable.astype(int)), 1, "a bool"),
    ((embed, usable), 4, "Remove fewer"),
    ((broken, usable), 1, "finite"),
  ):
    with pytest.raises(ValueError, match=message):
      coherence.embeddings(*args, components=components)
  with pytest.raises(ValueError, match="a script and a frequency"):
    coherence.strata(usable, np.zeros(4))
  with pytest.raises(ValueError, match="usable tokens, got 5 and 0"):
    coherence.strata(~usable, np.zeros(5))
  with pytest.raises(ValueError, match="without gaps"):
    coherence.fit(embed, np.array([0, 0, 2, 2, -1]))


@pytest.mark.parametrize(
  ("tokens", "draws", "message"),
  [
    ([0, 1, 2], 9, r"\[n, m\], got int64 \(3,\)"),
    ([[0.0, 1, 2]], 9, "whole numbers"),
    ([[0, 1, 900]], 9, "below V = 9"),
    ([[0, 1, 8]], 9, "1 without and 0 rows"),
    ([[0, 1, 1]], 9, "0 without and 1 rows"),
    ([[0, 1, 2]], 0, "at least 1 draw"),
  ],
)
def test_sets_that_cannot_be_scored_are_errors(tokens, draws, message):
  unit = tokens_of(np.random.default_rng(8), (9,))
  labels = np.array([0] * 8 + [-1])
  null = coherence.fit(unit, labels)
  with pytest.raises(ValueError, match=message):
    coherence.score(tokens, unit, labels, null, draws=draws)
  with pytest.raises(ValueError, match="a stratum"):
    coherence.score([[0, 1, 2]], unit, labels[1:], null)
