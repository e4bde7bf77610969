"""Means of tokens and positions, by brute force."""

import jax
import numpy as np
import pytest

from gemma_jax.alignment import lookups
from gemma_jax.alignment.lookups import fit_lookup, fit_position

pytestmark = pytest.mark.usefixtures("quick_compiles")


def rows(n=500, tokens=40, seed=0):
  rng = np.random.default_rng(seed)
  return rng.zipf(1.5, n) % tokens * 1_000, rng.normal(1e3, 1, (n, 3))


def by_hand(tokens, y, asked, least):
  found = np.tile(y.mean(0), (len(asked), 1))
  for i, token in enumerate(asked):
    if np.sum(tokens == token) >= least:
      found[i] = y[tokens == token].mean(0)
  return found


@pytest.mark.parametrize("least", [1, 2, 10])
@pytest.mark.parametrize("block", [1, 30, 10_000])
def test_a_token_gives_its_mean_and_a_rare_one_that_of_all(
  least, block, monkeypatch
):
  monkeypatch.setattr(lookups, "BLOCK", block)
  tokens, y = rows()
  found = fit_lookup(tokens, np.float32(y), least=least)
  asked = np.append(np.unique(tokens), [-5, 1, 10**6])
  expected = by_hand(tokens, y, asked, least)
  np.testing.assert_allclose(found(asked), expected, rtol=1e-6)
  counts = np.bincount(tokens)
  frequent = counts >= least
  assert len(found.tokens) == frequent.sum()
  assert found.parameters == (frequent.sum() + 1) * 3
  covered = counts[frequent].sum() / 500
  assert found.about == {"rows": 500, "least": least, "covered": covered}


def test_where_every_token_is_rare_all_is_the_mean():
  y = rows()[1]
  found = fit_lookup(np.arange(500), y)
  expected = np.broadcast_to(y.mean(0), (2, 2, 3))
  np.testing.assert_allclose(found([[0, 1], [2, 900]]), expected, rtol=1e-6)


def test_jit_equals_no_jit():
  tokens, y = rows()
  found, asked = fit_lookup(tokens, y), tokens.reshape(50, 10)
  expected = found(asked)
  assert expected.shape == (50, 10, 3)
  np.testing.assert_array_equal(jax.jit(found)(asked), expected)
  np.testing.assert_array_equal(
    jax.jit(lambda m, t: m(t))(found, asked), expected
  )


def test_positions_are_looked_up_alike():
  y = rows()[1]
  positions = np.arange(500) % 20
  found = fit_position(positions, y)
  expected = y.reshape(25, 20, 3).mean(0)
  np.testing.assert_allclose(found(np.arange(20)), expected, rtol=1e-6)
  assert found.name == "position"


def test_what_has_no_table_is_refused():
  tokens, y = rows()
  with pytest.raises(ValueError, match="token for each row"):
    fit_lookup(tokens[1:], y)
  with pytest.raises(ValueError, match="position for each row"):
    fit_position(tokens[:0], y[:0])
  with pytest.raises(ValueError, match="whole numbers"):
    fit_lookup(tokens / 2, y)
  with pytest.raises(ValueError, match="least >= 1"):
    fit_lookup(tokens, y, least=0)
  y[7, 1] = np.inf
  with pytest.raises(ValueError, match="first in row 7"):
    fit_lookup(tokens, y)
