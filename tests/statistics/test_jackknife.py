"""Pseudo-values: of means, of variances, of CKA."""

import numpy as np
import pytest

from gemma_jax.metrics import similarity
from gemma_jax.statistics import pseudo_values


def test_of_a_mean_they_are_the_values():
  x = np.random.default_rng(0).normal(size=12)
  found = pseudo_values(lambda units: x[units].mean(), len(x))
  np.testing.assert_allclose(found, x, rtol=1e-12)


def test_their_mean_takes_the_bias_of_a_variance_away():
  x = np.random.default_rng(1).normal(size=9)
  found = pseudo_values(lambda units: x[units].var(), len(x))
  assert found.mean() == pytest.approx(x.var(ddof=1), rel=1e-12)


def test_their_spread_is_that_of_cka_over_samples():
  rng = np.random.default_rng(2)

  def draw():
    shared = rng.normal(size=(60, 4))
    x, y = (np.hstack([shared, rng.normal(size=(60, 4))]) for _ in range(2))
    return x, y

  values, errors = [], []
  for _ in range(60):
    x, y = draw()
    own = pseudo_values(
      lambda units, x=x, y=y: similarity.linear_cka(x[units], y[units]), 60
    )
    values.append(similarity.linear_cka(x, y))
    errors.append(own.std(ddof=1) / np.sqrt(60))
  assert np.mean(errors) == pytest.approx(np.std(values), rel=0.3)


@pytest.mark.parametrize(
  ("statistic", "n", "message"),
  [
    (lambda units: 1.0, 1, "at least 2"),
    (lambda units: np.nan if 3 not in units else 1.0, 6, r"without \[3\]"),
  ],
)
def test_bad_input_is_refused(statistic, n, message):
  with pytest.raises(ValueError, match=message):
    pseudo_values(statistic, n)
