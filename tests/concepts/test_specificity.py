"""Whether damage is specific, with SciPy and by hand."""

import numpy as np
import pytest
from scipy import stats

from gemma_jax.concepts import specificity


def test_the_numbers_are_those_of_scipy():
  rng = np.random.default_rng(0)
  concept, control = rng.normal(0.3, 0.2, 24), rng.normal(0.02, 0.1, 20)
  got = specificity.assess(concept, control, control[:5])
  test = stats.mannwhitneyu(concept, control)
  assert got.auroc == pytest.approx(test.statistic / (24 * 20))
  assert got.cliffs_delta == pytest.approx(2 * got.auroc - 1)
  assert got.effect == pytest.approx(concept.mean())
  assert got.general == pytest.approx(control[:5].mean())
  assert got.low < got.difference < got.high
  assert got.difference == pytest.approx(concept.mean() - control.mean())
  assert got.d_z == pytest.approx(concept.mean() / concept.std(ddof=1))
  error = control.std(ddof=1) / 20**0.5
  ratio = concept.mean() / (abs(control.mean()) + error)
  assert got.ratio == pytest.approx(ratio)
  assert got.p <= 1e-3


def test_no_difference_is_significant_at_the_nominal_rate():
  rng = np.random.default_rng(1)
  p = [
    specificity.assess(*rng.standard_t(3, (2, 12)), draws=199, resamples=100).p
    for _ in range(300)
  ]
  assert (
    stats.binomtest(int(np.sum(np.array(p) <= 0.05)), 300, 0.05).pvalue > 0.01
  )


def test_a_control_of_nothing_does_not_blow_up_the_ratio():
  concept = np.array([0.1, 0.2, 0.3])
  control = np.array([1e-3, -1e-3, 1e-3, -1e-3])
  error = control.std(ddof=1) / 2
  assert specificity.specificity_ratio(concept, control) == pytest.approx(
    0.2 / error
  )
  assert specificity.specificity_ratio(concept, np.zeros(4)) == 0
