"""Adjusted p: against the textbook, its formulas, and in any shape."""

import numpy as np
import pytest

from gemma_jax.statistics import benjamini_hochberg, benjamini_yekutieli, holm

FIVE = [0.01, 0.02, 0.03, 0.04, 0.05]
RANDOM = np.random.default_rng(0).random(40) ** 3


def test_the_textbook_case():
  np.testing.assert_allclose(holm(FIVE), [0.05, 0.08, 0.09, 0.09, 0.09])
  np.testing.assert_allclose(benjamini_hochberg(FIVE), [0.05] * 5)


def test_the_formulas():
  m, order = len(RANDOM), np.argsort(RANDOM)
  p, back = RANDOM[order], np.argsort(order)
  rank = np.arange(1, m + 1)
  down = np.minimum(1, np.maximum.accumulate(p * (m - rank + 1)))
  up = np.minimum(1, np.minimum.accumulate((p * m / rank)[::-1])[::-1])
  np.testing.assert_allclose(holm(RANDOM), down[back])
  np.testing.assert_allclose(benjamini_hochberg(RANDOM), up[back])
  assert (down == 1).any()
  assert (down < 1).any()


def test_any_dependence_costs_the_harmonic_number():
  for p in (FIVE, RANDOM):
    harmonic = np.sum(1 / np.arange(1, len(p) + 1))
    expected = np.minimum(1, harmonic * benjamini_hochberg(p))
    np.testing.assert_allclose(benjamini_yekutieli(p), expected)


@pytest.mark.parametrize(
  "adjust", [holm, benjamini_hochberg, benjamini_yekutieli]
)
def test_tests_that_were_not_made_do_not_count(adjust):
  p = np.array([[0.01, np.nan, 0.02], [0.03, 0.04, 0.05]])
  before = p.copy()
  got = adjust(p)
  np.testing.assert_array_equal(p, before)
  assert np.isnan(got[0, 1])
  np.testing.assert_allclose(got[~np.isnan(p)], adjust(FIVE))
  assert np.isnan(adjust([np.nan, np.nan])).all()
  assert adjust(0.3) == pytest.approx(0.3)
  assert adjust([]).shape == (0,)


@pytest.mark.parametrize("p", [-0.1, 1.1, np.inf])
def test_what_is_no_probability_is_refused(p):
  with pytest.raises(ValueError, match="p from 0 to 1"):
    holm([0.5, p, np.nan])
