"""Latents of two dictionaries, against NumPy, brute force and planted pairs."""

import itertools

import numpy as np
import pytest
from scipy import sparse

from gemma_jax.alignment.correlations import Correlations, PairwiseCorrelation
from gemma_jax.alignment.matching import (
  METHODS,
  Matches,
  match,
  shift_null,
  significance,
  transport,
)

TOKENS = 6000


def codes(rng, tokens, latents, density=0.05):
  """Independent codes, half-normal where they fire."""
  fired = rng.random((tokens, latents)) < density
  return np.abs(rng.normal(size=(tokens, latents))) * fired


def correlate(a, b):
  return Correlations().update(a, b).compute()


def given(pearson, fired=100, together=100):
  """Correlations as they are, of latents that fire often enough."""
  pearson = np.asarray(pearson, float)
  m, n = pearson.shape
  return PairwiseCorrelation(
    pearson,
    np.full(m, fired),
    np.full(n, fired),
    np.full((m, n), together),
    1000,
  )


def pairs(matches):
  return set(zip(matches.a.tolist(), matches.b.tolist(), strict=True))


def test_correlations_are_those_of_numpy():
  rng = np.random.default_rng(0)
  a = codes(rng, 700, 6)
  b = np.concatenate([a[:, :3] + codes(rng, 700, 3), codes(rng, 700, 4)], 1)
  found = correlate(a, b)
  expected = np.corrcoef(a.T, b.T)[:6, 6:]
  np.testing.assert_allclose(found.pearson, expected, atol=5e-6)
  np.testing.assert_array_equal(found.fired_a, (a > 0).sum(0))
  np.testing.assert_array_equal(found.fired_b, (b > 0).sum(0))
  together = [[((x > 0) & (y > 0)).sum() for y in b.T] for x in a.T]
  np.testing.assert_array_equal(found.together, together)
  assert found.count == 700


def test_an_offset_costs_no_precision():
  """Of float32 products about 0 nothing would be left."""
  rng = np.random.default_rng(1)
  a = rng.normal(size=(5000, 4))
  b = a[:, ::-1] + rng.normal(size=a.shape)
  expected = np.corrcoef(a.T, b.T)[:4, 4:]
  found = correlate(a + 1e4, b - 1e4).pearson
  np.testing.assert_allclose(found, expected, atol=5e-6)


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_array])
def test_batches_of_any_length_add_up(form):
  rng = np.random.default_rng(2)
  a, b = codes(rng, 5000, 5), codes(rng, 5000, 7)
  whole, parts = correlate(form(a), form(b)), Correlations()
  for part in np.split(np.arange(5000), [0, 1, 14, 300, 4500]):
    parts.update(form(a[part]), form(b[part]))
  parts = parts.compute()
  np.testing.assert_allclose(parts.pearson, whole.pearson, atol=5e-6)
  for name in ("fired_a", "fired_b", "together", "count"):
    np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))


def test_sparse_codes_are_dense_ones():
  rng = np.random.default_rng(3)
  a, b = codes(rng, 500, 5), codes(rng, 500, 7)
  dense = correlate(a, b)
  # Zeros that are stored, and values that are stored in halves.
  stored = sparse.csr_array(a + 1)
  stored.data -= 1
  whole = sparse.csr_matrix(b)
  halves = np.repeat(whole.data / 2, 2), np.repeat(whole.indices, 2)
  halves = sparse.csr_matrix((*halves, 2 * whole.indptr), shape=b.shape)
  for x, y in ((stored, halves), (stored, b), (a, sparse.coo_array(b))):
    before = [z.data.copy() for z in (x, y) if sparse.issparse(z)]
    found = correlate(x, y)
    np.testing.assert_allclose(found.pearson, dense.pearson, atol=5e-6)
    np.testing.assert_array_equal(found.together, dense.together)
    after = [z.data for z in (x, y) if sparse.issparse(z)]
    for p, q in zip(before, after, strict=True):
      np.testing.assert_array_equal(p, q)


def test_latents_that_never_change_correlate_with_none():
  rng = np.random.default_rng(4)
  a = codes(rng, 400, 3)
  a[:, 1], a[:, 2] = 0, 0.1
  found = correlate(a, a)
  np.testing.assert_allclose(found.pearson, np.diag([1, 0, 0]), atol=5e-6)
  assert pairs(match(found, least=5)) == {(0, 0)}


def test_codes_that_cannot_be_correlated_are_errors():
  a = np.ones((4, 3))
  for x, y in ((a, a[:3]), (a[0], a[0])):
    with pytest.raises(ValueError, match="pair the tokens first"):
      Correlations().update(x, y)
  with pytest.raises(ValueError, match="of its own"):
    Correlations().update(a, a).update(a, a[:, :2])
  bad = np.where(np.arange(12).reshape(4, 3) == 5, np.nan, a)
  for form in (np.asarray, sparse.csr_array):
    with pytest.raises(ValueError, match="1 others"):
      Correlations().update(form(a), form(bad))
  with pytest.raises(ValueError, match="2 tokens"):
    Correlations().update(a[:1], a[:1]).compute()


def test_hungarian_is_the_best_of_all_assignments():
  rng = np.random.default_rng(5)
  for _ in range(10):
    r = rng.uniform(-0.5, 1, (5, 6))
    found = match(given(r))
    ways = itertools.permutations(range(6), 5)
    best = max(sum(max(r[i, j], 0) for i, j in enumerate(way)) for way in ways)
    assert found.r.sum() == pytest.approx(best)
    np.testing.assert_array_equal(found.r, r[found.a, found.b])
    assert (found.r > 0).all()


def test_greedy_takes_the_best_pair_that_is_left():
  rng = np.random.default_rng(6)
  for _ in range(10):
    # Rounded, so that there are ties.
    r = np.round(rng.uniform(-0.5, 1, (12, 9)), 1)
    taken, expected = set(), []
    for i, j in sorted(np.ndindex(r.shape), key=lambda at: -r[at]):
      if r[i, j] > 0 and not {("a", i), ("b", j)} & taken:
        taken |= {("a", i), ("b", j)}
        expected.append(r[i, j])
    found = match(given(r), how="greedy")
    assert len(set(found.b)) == len(found.b)
    if len(np.unique(r)) == r.size:
      np.testing.assert_allclose(sorted(found.r), sorted(expected))
    assert found.r.max() == max(expected)


def test_mutual_pairs_are_the_best_of_each_other():
  rng = np.random.default_rng(7)
  r = rng.uniform(-0.5, 1, (30, 20))
  expected = {
    (i, j)
    for i, j in np.ndindex(r.shape)
    if r[i, j] == r[i].max() == r[:, j].max()
  }
  assert pairs(match(given(r), how="mutual")) == expected


def test_transport_has_uniform_marginals_and_known_odds():
  rng = np.random.default_rng(8)
  scores = rng.random((7, 4))
  plan = transport(scores, epsilon=0.1, iterations=500)
  np.testing.assert_allclose(plan.sum(1), 1 / 7, rtol=1e-4)
  np.testing.assert_allclose(plan.sum(0), 1 / 4, rtol=1e-4)
  # Scaling rows and columns leaves odds ratios as they are.
  logs = np.log(plan.astype(np.float64)) - scores / 0.1
  logs -= logs[:1]
  np.testing.assert_allclose(logs - logs[:, :1], 0, atol=1e-3)
  # Two by two they decide everything: x / (1/2 - x) = exp(difference / 2).
  plan = transport([[0.9, 0.1], [0.2, 0.3]], epsilon=0.25)
  odds = np.exp((0.9 + 0.3 - 0.1 - 0.2) / 0.25 / 2)
  x = 0.5 * odds / (1 + odds)
  expected = [[x, 0.5 - x], [0.5 - x, x]]
  np.testing.assert_allclose(plan, expected, rtol=1e-5)


def test_latents_that_fired_too_rarely_are_in_no_match():
  r = np.eye(4)
  often = given(r)
  for how in METHODS:
    assert pairs(match(often, how=how)) == {(i, i) for i in range(4)}
    few = given(r)
    few.fired_a[0] = few.fired_b[1] = 29
    few.together[2, 2] = 9
    assert pairs(match(few, how=how)) == {(3, 3)}
    assert not len(match(given(r, fired=29), how=how).a)


def plant(rng, kept=160, alone=40, copies=30):
  """a, b and for each latent of a its counterparts: the last 40 have none."""
  a = codes(rng, TOKENS, kept + alone)
  of = np.concatenate([np.arange(kept), rng.choice(kept, copies, False)])

  def noisy(latents):
    # Some firings are missed, others come from nowhere, sizes differ.
    x = a[:, latents] * (rng.random((TOKENS, len(latents))) < 0.9)
    x = x * rng.uniform(0.7, 1.3, x.shape)
    return x + codes(rng, TOKENS, len(latents), 0.005)

  b = np.concatenate([noisy(of), codes(rng, TOKENS, alone)], axis=1)
  order = rng.permutation(b.shape[1])
  of = np.concatenate([of, np.full(alone, -1)])[order]
  return sparse.csr_array(a), sparse.csr_array(b[:, order]), of


def test_planted_pairs_are_found_and_latents_without_one_refused():
  """Among duplicates and noise; one latent in five has no counterpart."""
  a, b, of = plant(np.random.default_rng(9))
  documents = np.arange(TOKENS) // 100
  null = shift_null(a, b, documents, draws=39)
  correlations = correlate(a, b)
  for how in METHODS:
    found = match(correlations, how=how)
    for pooled in (False, True):
      stands = significance(found, null, pooled=pooled).matched
      right = of[found.b] == found.a
      assert (right & stands).sum() >= 0.99 * 160
      assert (~right & stands).sum() <= 0.05 * stands.sum()
  assert len(match(correlations).a) > 190


def test_rare_independent_latents_are_never_matched():
  """Their best correlations are large, as measured for the reference."""
  rng = np.random.default_rng(10)

  def rare(latents, tokens=20_000, density=2e-4):
    fired = round(tokens * latents * density)
    places = (rng.integers(0, size, fired) for size in (tokens, latents))
    values = np.abs(rng.normal(size=fired))
    return sparse.coo_array((values, tuple(places)), (tokens, latents)).tocsr()

  a, b = rare(60), rare(4000)
  found = correlate(a, b)
  best = found.pearson.max(axis=1)
  assert best.mean() > 0.1
  assert np.quantile(best, 0.95) > 0.5
  for how in METHODS:
    assert not len(match(found, how=how).a)
  # Even if they were, shifted tokens would correlate as well.
  taken = match(found, least=3)
  assert len(taken.a) > 20
  null = shift_null(a, b, np.arange(20_000) // 500, draws=39, least=3)
  assert not significance(taken, null).matched.any()


def test_what_documents_are_about_is_no_match():
  """Latents that fire in the same documents, but not on the same tokens."""
  rng = np.random.default_rng(11)
  documents = np.arange(TOKENS) // 100
  topic = rng.random((60, 20)) < 0.2
  a, b = (
    codes(rng, TOKENS, 20, density=0.3) * topic[documents] for _ in range(2)
  )
  found = match(correlate(a, b))
  assert (found.a == found.b).all()
  assert found.r.min() > 0.05
  within = shift_null(a, b, documents, draws=39)
  assert not significance(found, within).matched.any()
  # One document of everything: topics are no longer in the null.
  across = shift_null(a, b, np.zeros(TOKENS), draws=39)
  assert significance(found, across).matched.mean() > 0.8


def test_shifts_keep_documents_and_the_order_of_their_tokens():
  """A latent of b for every token shows where each of them went."""
  documents = np.array([5, 3, 5, 3, 5, 5])
  here = {d: np.flatnonzero(documents == d) for d in (3, 5)}
  seen = set()
  for seed in range(40):
    # Latent j of b fires on token j; what of a correlates, where it went.
    moved = np.stack(
      [
        shift_null(
          np.eye(6), np.eye(6)[:, [j]], documents, draws=1, least=1, seed=seed
        )[0]
        for j in range(6)
      ],
      axis=1,
    )
    order = moved.argmax(axis=1)
    np.testing.assert_allclose(moved, np.eye(6)[order], atol=5e-6)
    for tokens in here.values():
      place = np.searchsorted(tokens, order[tokens])
      assert (tokens[place] == order[tokens]).all()
      steps = (place - np.arange(len(tokens))) % len(tokens)
      assert len(set(steps.tolist())) == 1
    seen.add(tuple(order.tolist()))
  assert len(seen) == 8


def test_p_is_the_share_of_draws_as_good():
  null = np.array([[0.1, 0.5], [0.2, 0.6], [0.3, 0.7]])
  matches = Matches(np.array([0, 1]), np.array([4, 2]), np.array([0.3, 0.65]))
  found = significance(matches, null, alpha=0.5)
  np.testing.assert_allclose(found.p, [2 / 4, 2 / 4])
  np.testing.assert_allclose(found.p_pooled, [5 / 7, 2 / 7])
  np.testing.assert_allclose(found.q, [0.5, 0.5])
  assert found.matched.all()
  found = significance(matches, null, alpha=0.5, pooled=True)
  np.testing.assert_allclose(found.q, [5 / 7, 4 / 7])
  assert not found.matched.any()
  empty = Matches(*(np.empty(0, int),) * 2, np.empty(0))
  assert significance(empty, null, alpha=0.5).matched.shape == (0,)


def test_what_cannot_be_matched_or_tested_is_an_error():
  matches = Matches(np.array([3]), np.array([0]), np.array([0.5]))
  with pytest.raises(ValueError, match="one of"):
    match(given(np.eye(2)), how="auction")
  with pytest.raises(ValueError, match="least >= 1"):
    match(given(np.eye(2)), least=0)
  with pytest.raises(ValueError, match="1 / alpha - 1 draws"):
    significance(matches, np.zeros((18, 4)))
  with pytest.raises(ValueError, match=r"\(99, 3\) and a match of latent 3"):
    significance(matches, np.zeros((99, 3)))
  x = np.eye(4)
  with pytest.raises(ValueError, match="blocks of tokens"):
    shift_null(x, x, np.arange(4))
  with pytest.raises(ValueError, match=r"got \(3,\) and 99"):
    shift_null(x, x, np.arange(3))
