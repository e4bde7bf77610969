import numpy as np
import pytest
import scipy.optimize

from gemma_jax.probing import logistic


def _data(rows=300, dims=6, tasks=3, seed=0):
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((rows, dims)) * 10 ** rng.uniform(-2, 2, dims) + 3
  truth = rng.standard_normal((tasks, dims)) / x.std(0)
  z = (x - x.mean(0)) @ truth.T
  y = (z + rng.logistic(size=z.shape) > rng.uniform(-1, 1, tasks)).T
  valid = rng.random((tasks, rows)) < 0.8
  return x, y, valid


def _oracle(x, y, weight, l2):
  """The objective as its docstring has it, minimised by SciPy."""
  weight = weight / weight.sum()
  s = (x - x.mean(0)) / x.std(0)
  sign = 2.0 * y - 1

  def loss(p):
    return np.sum(weight * np.logaddexp(0, -sign * (s @ p[1:] + p[0]))) + (
      l2 / 2 * np.sum(p[1:] ** 2)
    )

  start = np.zeros(x.shape[1] + 1)
  p = scipy.optimize.minimize(loss, start, method="BFGS", tol=1e-10)
  return s @ p.x[1:] + p.x[0], loss


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_probes_minimise_their_objective(l2):
  x, y, valid = _data()
  weight = logistic.balanced(y, valid)
  got = logistic.fit(x, y, weight, l2=l2)
  for i in range(len(y)):
    expected, _ = _oracle(x, y[i], weight[i], l2)
    np.testing.assert_allclose(got(x)[i], expected, atol=2e-3)


def test_shared_and_own_features_agree():
  x, y, valid = _data()
  weight = logistic.balanced(y, valid)
  shared = logistic.fit(x, y, weight)
  own = np.broadcast_to(x, (3, *x.shape))
  apart = logistic.fit(own, y, weight)
  np.testing.assert_allclose(
    shared.coefficients, apart.coefficients, rtol=1e-3, atol=1e-6
  )
  np.testing.assert_allclose(shared(x), apart(own), atol=1e-3)


def test_balanced_weights_give_each_class_one_half():
  y = np.array([[1, 0, 0, 0, 1, 0]], bool)
  valid = np.array([[1, 1, 1, 1, 0, 0]], bool)
  expected = [[0.5, 1 / 6, 1 / 6, 1 / 6, 0, 0]]
  np.testing.assert_allclose(logistic.balanced(y, valid), expected)


def test_separable_classes_and_constant_features_converge():
  x = np.stack([np.arange(100.0), np.full(100, 4.0), np.zeros(100)], axis=1)
  y = (x[:, 0] >= 50)[None]
  probe = logistic.fit(x, y, np.ones((1, 100)), l2=1e-4)
  np.testing.assert_array_equal(probe(x) > 0, y)
  np.testing.assert_array_equal(probe.coefficients[0, 1:], 0)


def test_the_validated_penalty_is_strong_where_there_is_nothing_to_learn():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((200, 60))
  noise = rng.random(200) < 0.5
  signal = x[:, 0] > 0
  y = np.stack([noise, signal])
  weight = logistic.balanced(y, np.ones_like(y))
  inner = np.arange(200) % 4 == 0
  got = logistic.fit_validated(x, y, weight, inner)
  strong = logistic.fit(x, y, weight, l2=1e-1)
  np.testing.assert_allclose(got(x)[0], strong(x)[0], atol=1e-3)
  assert np.abs(got(x)[1] - strong(x)[1]).max() > 1


def test_auc_counts_pairs():
  rng = np.random.default_rng(1)
  score = rng.integers(0, 6, 80)  # many ties
  y = rng.random(80) < 0.3
  pairs = score[y][:, None] - score[~y][None]
  expected = np.mean((pairs > 0) + 0.5 * (pairs == 0))
  assert logistic.auc(score, y) == pytest.approx(expected, abs=1e-12)
  assert np.isnan(logistic.auc(score, np.ones(80, bool)))


def test_f1_and_balanced_accuracy_are_their_definitions():
  predicted = np.array([1, 1, 1, 0, 0, 0, 0, 0], bool)
  y = np.array([1, 1, 0, 1, 0, 0, 0, 0], bool)
  precision, recall = 2 / 3, 2 / 3
  expected = 2 * precision * recall / (precision + recall)
  assert logistic.f1(predicted, y) == pytest.approx(expected)
  both = (2 / 3 + 4 / 5) / 2
  assert logistic.balanced_accuracy(predicted, y) == pytest.approx(both)
  nothing = np.zeros(8, bool)
  assert logistic.f1(nothing, nothing) == 0
  assert np.isnan(logistic.balanced_accuracy(predicted, nothing))


def test_the_best_threshold_is_that_of_a_search():
  rng = np.random.default_rng(2)
  for _ in range(20):
    score, y = rng.integers(0, 9, 30) / 3, rng.random(30) < 0.4
    cut = logistic.best_threshold(score, y)
    best = max(logistic.f1(score >= t, y) for t in np.unique(score))
    assert logistic.f1(score >= cut, y) == pytest.approx(best)


def test_what_cannot_be_fitted_is_refused():
  x, y, valid = _data(50)
  weight = logistic.balanced(y, valid)
  with pytest.raises(ValueError, match="l2 > 0"):
    logistic.fit(x, y, weight, l2=0.0)
  with pytest.raises(ValueError, match="rows with weight"):
    logistic.fit(x, y, weight * 0)
  x[3, 2] = np.nan
  with pytest.raises(FloatingPointError, match="not finite"):
    logistic.fit(x, y, weight)
