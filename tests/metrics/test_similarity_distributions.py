"""Next-token distributions, against SciPy and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from gemma_jax.metrics.similarity import (
  hellinger,
  jsd,
  kl,
  rbo,
  top1_agreement,
  topk_overlap,
)

ALL = (kl, jsd, hellinger, top1_agreement, topk_overlap, rbo)


@pytest.fixture
def logits():
  rng = np.random.default_rng(0)
  a = rng.normal(size=(3, 5, 400)).astype(np.float32) * 3
  b = a + 2 * rng.normal(size=a.shape).astype(np.float32)
  return a, b


def test_divergences_are_those_of_scipy(logits):
  a, b = logits
  p, q = (special.softmax(x.astype(np.float64), axis=-1) for x in logits)
  np.testing.assert_allclose(kl(a, b), entropy(p, q, axis=-1), rtol=1e-5)
  np.testing.assert_allclose(kl(b, a), entropy(q, p, axis=-1), rtol=1e-5)
  expected = jensenshannon(p, q, base=2, axis=-1) ** 2
  np.testing.assert_allclose(jsd(a, b), expected, rtol=1e-5)
  overlap = np.sqrt(p * q).sum(-1)
  np.testing.assert_allclose(hellinger(a, b), np.sqrt(1 - overlap), rtol=1e-5)
  assert 0.1 < expected.min() < expected.max() < 0.9


def test_kl_is_in_nats_and_takes_probabilities_too():
  p, q = np.log([0.5, 0.25, 0.25]), np.log([0.25, 0.25, 0.5])
  expected = 0.5 * np.log(2) - 0.25 * np.log(2)
  assert kl(p, q) == pytest.approx(expected, rel=1e-6)
  assert kl(p + 7, q - 50) == pytest.approx(expected, rel=1e-5)


def test_near_distributions_do_not_drown_in_rounding():
  rng = np.random.default_rng(1)
  a = rng.normal(size=(20, 50_000)).astype(np.float32)
  b = (a + 1e-3 * rng.normal(size=a.shape)).astype(np.float32)
  p, q = (special.softmax(x.astype(np.float64), axis=-1) for x in (a, b))
  expected = entropy(p, q, axis=-1)
  assert expected.max() < 1e-6
  np.testing.assert_allclose(kl(a, b), expected, rtol=1e-2)
  for measure in (kl, jsd, hellinger):
    assert float(jnp.abs(measure(a, a)).max()) < 1e-9


def test_bounds_are_met_and_both_orders_agree(logits):
  a, b = logits
  for measure in (jsd, hellinger, topk_overlap, rbo, top1_agreement):
    found = measure(a, b)
    np.testing.assert_allclose(found, measure(b, a), rtol=1e-5)
    assert found.shape == (3, 5)
    assert found.dtype == jnp.float32
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
  for measure in (topk_overlap, rbo, top1_agreement):
    np.testing.assert_allclose(measure(a, a), 1, rtol=1e-6)


def test_distributions_without_common_tokens_are_as_far_as_can_be():
  a = np.array([0, 0, -np.inf, -np.inf])
  b = a[::-1].copy()
  assert jsd(a, b) == 1
  assert hellinger(a, b) == pytest.approx(1, abs=1e-6)
  assert kl(a, b) == np.inf
  assert kl(a, np.zeros(4)) == pytest.approx(np.log(2), rel=1e-6)
  assert kl(a, a) == 0
  assert jsd(a, a) == 0


def test_tops_are_compared_as_sets():
  a = np.array([[9.0, 8, 7, 6, 5, 0], [1, 2, 3, 4, 5, 6]])
  b = np.array([[8.0, 9, 0, 1, 6, 5], [1, 2, 3, 4, 5, 6]])
  np.testing.assert_array_equal(top1_agreement(a, b), [0, 1])
  # {0, 1, 2} and {1, 0, 4}
  np.testing.assert_allclose(topk_overlap(a, b, k=3), [2 / 4, 1])


def ranked(tokens, size=20):
  """Logits whose order begins with these tokens."""
  out = -np.arange(size) - 100.0
  out[list(tokens)] = -np.arange(len(tokens))
  return out


def test_rbo_is_the_sum_by_hand():
  a, b = ranked([0, 1, 2]), ranked([1, 3, 0])
  # Shared at depths 1, 2, 3: none, {1}, {0, 1}.
  agreement = np.array([0, 1 / 2, 2 / 3])
  for p in (0.9, 0.5):
    powers = p ** np.arange(1, 4)
    expected = 2 / 3 * p**3 + (1 - p) / p * agreement @ powers
    assert rbo(a, b, p=p, depth=3) == pytest.approx(expected, rel=1e-5)


def test_rbo_of_disjoint_tops_is_0():
  a, b = ranked(range(10)), ranked(range(10, 20))
  assert rbo(a, b, depth=10) == 0
  assert rbo(a, b) > 0


def test_rbo_follows_its_definition_at_every_depth(logits):
  a, b = logits[0][0, 0], logits[1][0, 0]
  first, second = (np.argsort(-x, kind="stable") for x in (a, b))
  p, depth = 0.9, 60
  total = 0
  for d in range(1, depth + 1):
    share = len(set(first[:d]) & set(second[:d])) / d
    total += (1 - p) / p * share * p**d
  expected = total + share * p**depth
  assert 0.05 < expected < 0.95
  assert rbo(a, b, depth=depth) == pytest.approx(expected, rel=1e-5)


def test_bfloat16_logits_are_worked_on_in_float32(logits):
  a, b = (jnp.asarray(x, jnp.bfloat16) for x in logits)
  expected = kl(a.astype(jnp.float32), b.astype(jnp.float32))
  assert kl(a, b).dtype == jnp.float32
  np.testing.assert_array_equal(kl(a, b), expected)


def test_all_can_be_jitted(logits):
  for measure in ALL:
    found = jax.jit(measure)(*logits)
    np.testing.assert_allclose(found, measure(*logits), rtol=1e-5)


@pytest.mark.parametrize("measure", ALL)
def test_other_vocabularies_and_undefined_logits_are_refused(measure):
  with pytest.raises(ValueError, match="cross_likelihood"):
    measure(np.zeros((2, 30)), np.zeros((2, 31)))
  with pytest.raises(ValueError, match="same places"):
    measure(np.zeros((2, 30)), np.zeros((1, 30)))
  for value in (np.nan, np.inf):
    with pytest.raises(ValueError, match="1 NaN or \\+inf in b"):
      measure(np.zeros(30), np.append(np.zeros(29), value))


def test_ranks_and_persistence_out_of_range_are_errors():
  for k in (0, 31):
    with pytest.raises(ValueError, match="1 to 30 ranks"):
      topk_overlap(np.zeros(30), np.zeros(30), k=k)
  for p in (0, 1):
    with pytest.raises(ValueError, match="persistence"):
      rbo(np.zeros(30), np.zeros(30), p=p)
