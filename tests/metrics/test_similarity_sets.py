"""Codes of the same tokens, by hand and against Python sets."""

import itertools

import numpy as np
import pytest
from scipy import sparse

from gemma_jax.metrics.similarity import (
  code_cosine,
  frequency_null,
  jaccard,
  ruzicka,
  token_overlaps,
)

X = np.array([[1.0, 2, 0, 0], [0, 0, 0, 0], [0, 3, 1, 0], [0, 0, 0, 5]])
Y = np.array([[3.0, 0, 0, 4], [0, 0, 0, 0], [0, 1, 2, 0], [0, 0, 0, 0]])


def forms(codes):
  """The same codes, dense and sparse, with zeros and halves stored."""
  yield codes
  yield codes.astype(np.float32)
  stored = sparse.csr_array(codes + 1)
  stored.data -= 1
  yield stored
  whole = sparse.csr_matrix(codes)
  halves = np.repeat(whole.data / 2, 2), np.repeat(whole.indices, 2)
  yield sparse.csr_matrix((*halves, 2 * whole.indptr), shape=codes.shape)


def test_overlaps_of_tokens_are_those_by_hand():
  nan = np.nan
  expected = {
    "jaccard": [1 / 3, nan, 1, 0],
    "ruzicka": [1 / 9, nan, 2 / 5, 0],
    "cosine": [3 / np.sqrt(5 * 25), nan, 5 / np.sqrt(10 * 5), 0],
  }
  for x, y in itertools.product(forms(X), forms(Y)):
    for kind, values in expected.items():
      found = token_overlaps(x, y, kind=kind)
      np.testing.assert_allclose(found, values, rtol=1e-12)
  for measure, kind in zip((jaccard, ruzicka, code_cosine), expected, strict=1):
    # The token without any active latent is left out.
    mean = np.nansum(expected[kind]) / 3
    assert measure(X, Y) == measure(Y, X) == pytest.approx(mean)
    assert measure(X, X) == pytest.approx(1)


def test_jaccard_is_that_of_sets():
  rng = np.random.default_rng(0)
  x, y = rng.random((2, 50, 30)) < 0.2
  expected = []
  for a, b in zip(x, y, strict=True):
    a, b = set(np.flatnonzero(a)), set(np.flatnonzero(b))
    expected.append(len(a & b) / len(a | b))
  np.testing.assert_allclose(token_overlaps(x, y), expected)


def fire(rng, tokens, density):
  return rng.random((tokens, len(density))) < density


def zipf(exponent, latents=4096, l0=70):
  """Densities that fall with rank, none above 1, and sum to l0."""
  density = np.arange(1, latents + 1.0) ** -exponent
  for _ in range(50):
    density = np.minimum(density * l0 / density.sum(), 1)
  return density


def test_independent_latents_overlap_more_the_less_uniform_they_are():
  rng = np.random.default_rng(1)
  found = {}
  for exponent in (0, 0.5, 1):
    x, y = (fire(rng, 200, zipf(exponent)) for _ in range(2))
    found[exponent] = jaccard(x, y)
  share = 70 / 4096
  assert found[0] == pytest.approx(share / (2 - share), abs=0.001)
  assert found[0.5] == pytest.approx(0.02, abs=0.01)
  assert found[1] > 5 * found[0.5] > 5 * found[0]


def test_the_frequency_null_is_the_overlap_of_unrelated_tokens():
  rng = np.random.default_rng(2)
  positions = np.arange(300) % 30
  x, y = (fire(rng, 300, zipf(1, 512, 20)) for _ in range(2))
  unrelated = frequency_null(x, y, positions, draws=39)
  assert unrelated.score > 0.1
  assert unrelated.null.mean() == pytest.approx(unrelated.score, abs=0.01)
  assert abs(unrelated.excess) < 0.01
  # A tenth of the latents of x also fire in y.
  y = y | (x & (rng.random(x.shape) < 0.1))
  related = frequency_null(sparse.csr_array(x), y, positions, draws=39)
  assert related.p == 1 / 40
  assert related.excess > 0.02
  assert related.excess == pytest.approx(related.score - related.null.mean())


def test_latents_of_a_position_are_no_excess():
  """What both models do at the first position is in the null."""
  rng = np.random.default_rng(3)
  positions = np.tile(np.arange(16), 20)
  x, y = (fire(rng, 320, np.full(50, 0.1)) for _ in range(2))
  for codes in (x, y):
    codes[positions == 0] = False
    codes[positions == 0, :25] = True
  within = frequency_null(x, y, positions, draws=39)
  across = frequency_null(x, y, np.zeros_like(positions), draws=39)
  assert abs(within.excess) < 0.01
  assert across.excess > 0.03


def test_bins_of_positions_double_in_width():
  """Tokens change places within 0, 1-2, 3-6 and 7-8 of a text, no further."""
  seen = []

  def measure(x, y):
    seen.append(np.asarray(y.toarray())[:, 0])
    return 0.0

  own = np.arange(1.0, 10)[:, None]
  frequency_null(own, own, np.arange(9), measure=measure, draws=200)
  orders = np.stack(seen)
  reached = [set(column - 1) for column in orders.T.astype(int)]
  bins = [{0}, {1, 2}, {3, 4, 5, 6}, {7, 8}]
  assert reached == [b for b in bins for _ in b]


@pytest.mark.parametrize(
  ("x", "y", "kind", "message"),
  [
    (X, X[:, :3], "jaccard", "match the latents first"),
    (X, X[:3], "jaccard", "same tokens"),
    (X[0], X[0], "jaccard", r"\[n, M\], got \(4,\)"),
    (X, -Y, "ruzicka", "not negative"),
    (X, np.where(Y > 3, np.nan, Y), "cosine", "1 others"),
    (X, Y, "dice", "ruzicka"),
  ],
)
def test_codes_that_cannot_be_compared_are_errors(x, y, kind, message):
  with pytest.raises(ValueError, match=message):
    token_overlaps(x, y, kind=kind)


def test_codes_without_latents_and_bad_positions_are_errors():
  with pytest.raises(ValueError, match="none on any of 4 tokens"):
    jaccard(0 * X, 0 * X)
  for positions in ([0, 1, 2, -1], [0.0, 1, 2, 3]):
    with pytest.raises(ValueError, match="whole numbers from 0"):
      frequency_null(X, Y, positions)
