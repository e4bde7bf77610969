"""Scores of maps: scikit-learn's, SciPy's, and what the mean must not win."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from gemma_jax.alignment import firing, scores
from gemma_jax.alignment.maps import fit_mean
from gemma_jax.alignment.scores import Scores, delta_interval, delta_r2
from gemma_jax.metrics import document_interval, fvu

pytestmark = pytest.mark.usefixtures("quick_compiles")


def rows(n=800, e=6, *, mean=0.0, seed=0):
  """Predictions of different quality, what is true, and a train mean."""
  rng = np.random.default_rng(seed)
  actual = rng.normal(size=(n, e))
  predicted = actual * np.linspace(0, 1, e) + 0.5 * rng.normal(size=(n, e))
  train = actual.mean(0) + 0.1
  return tuple(np.float32(a + mean) for a in (predicted, actual, train))


def sparse(n=800, e=40, *, seed=0):
  """Codes that fire now and then, and predictions."""
  rng = np.random.default_rng(seed)
  rate = np.linspace(0.02, 0.5, e)
  actual = rng.exponential(size=(n, e)) * (rng.random((n, e)) < rate)
  predicted = actual + rng.normal(size=(n, e))
  return np.float32(predicted), np.float32(actual)


@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_r2_is_about_the_train_mean(mean):
  predicted, actual, train = rows(mean=mean)
  found = Scores(train).update(predicted, actual).compute()
  error = np.sum((np.float64(actual) - predicted) ** 2, axis=0)
  away = np.sum((np.float64(actual) - train) ** 2, axis=0)
  np.testing.assert_allclose(found["r2"], 1 - error / away, atol=1e-5)
  assert found["r2_pooled"] == pytest.approx(1 - error.sum() / away.sum())
  expected = np.median(1 - error / away)
  assert found["r2_median"] == pytest.approx(expected, abs=1e-5)
  assert found["fvu"] == pytest.approx(fvu(actual, predicted), rel=1e-5)
  assert (found["rows"], found["columns"]) == (800, 6)


def test_about_the_mean_of_the_rows_themselves_r2_is_scikit_learns():
  predicted, actual, _ = rows()
  found = Scores(actual.mean(0)).update(predicted, actual)
  expected = metrics.r2_score(actual, predicted, multioutput="raw_values")
  np.testing.assert_allclose(found.r2, expected, atol=1e-5)


@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_pearson_is_scipys(mean):
  predicted, actual, train = rows(mean=mean)
  found = Scores(train).update(predicted, actual).compute()
  expected = stats.pearsonr(np.float64(predicted), np.float64(actual))
  np.testing.assert_allclose(found["pearson"], expected.statistic, atol=1e-5)
  expected = np.median(expected.statistic)
  assert found["pearson_median"] == pytest.approx(expected, abs=1e-5)


def test_auroc_is_scikit_learns_to_the_width_of_a_bin():
  predicted, actual = sparse(n=4_000)
  found = Scores(actual.mean(0), codes=True).update(predicted, actual).compute()
  expected = [
    metrics.roc_auc_score(a > 0, p)
    for a, p in zip(actual.T, predicted.T, strict=True)
  ]
  np.testing.assert_allclose(found["auroc"], expected, atol=1 / firing.BINS)
  np.testing.assert_array_equal(found["firings"], (actual > 0).sum(0))
  enough = (actual > 0).sum(0) >= 30
  expected = np.median(np.array(expected)[enough])
  assert found["auroc_median"] == pytest.approx(expected, abs=1 / firing.BINS)


def test_auroc_of_predictions_with_ties_is_exact():
  _, actual = sparse()
  predicted = np.random.default_rng(1).integers(0, 4, actual.shape) + actual
  predicted = np.maximum(np.round(predicted) - 1, 0)
  found = Scores(actual.mean(0), codes=True).update(predicted, actual).compute()
  expected = [
    metrics.roc_auc_score(a > 0, p)
    for a, p in zip(actual.T, predicted.T, strict=True)
  ]
  np.testing.assert_allclose(found["auroc"], expected, atol=1e-9)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_auroc_does_not_need_the_first_rows_to_show_the_scale(factor):
  predicted, actual = sparse(n=4_000)
  predicted, actual = factor * np.maximum(predicted, 0), factor * actual
  found = Scores(actual.mean(0), codes=True)
  # At first most columns predict nothing at all.
  quiet = predicted[:5] * (np.arange(40) < 4)
  found.update(quiet, actual[:5]).update(predicted[5:], actual[5:])
  predicted[:5] = quiet
  expected = [
    metrics.roc_auc_score(a > 0, p)
    for a, p in zip(actual.T, predicted.T, strict=True)
  ]
  np.testing.assert_allclose(found.compute()["auroc"], expected, atol=0.01)


def test_recall_is_of_the_largest_codes_that_fire():
  predicted, actual = sparse()
  actual[:10] = 0
  mean = actual.mean(0)
  found = Scores(mean, codes=True, top=5).update(predicted, actual).compute()

  def recall(guess):
    shares = []
    for p, a in zip(guess, actual, strict=True):
      wanted = [i for i in np.argsort(-a)[:5] if a[i] > 0]
      if wanted:
        shares.append(np.isin(wanted, np.argsort(-p)[:5]).mean())
    return np.mean(shares)

  assert found["top_k_recall"] == pytest.approx(recall(predicted), rel=1e-5)
  floor = recall(np.broadcast_to(mean, actual.shape))
  assert found["top_k_recall_mean"] == pytest.approx(floor, rel=1e-5)


def test_cosines_are_those_of_rows_with_and_without_the_train_mean():
  predicted, actual, train = rows(mean=2.0)
  found = Scores(train).update(predicted, actual).compute()
  for name, shift in (("raw_cosine", 0), ("centred_cosine", train)):
    p, a = np.float64(predicted) - shift, np.float64(actual) - shift
    cosines = np.sum(p * a, axis=1)
    cosines /= np.linalg.norm(p, axis=1) * np.linalg.norm(a, axis=1)
    assert found[name] == pytest.approx(cosines.mean(), abs=1e-5)


@pytest.mark.parametrize(
  ("code", "expected"),
  [
    (lambda x: np.maximum(x, 0), 0.564),
    (lambda x: -np.log(stats.norm.sf(x)), 0.707),
    (np.abs, 0.798),
  ],
)
def test_the_mean_of_codes_has_a_high_cosine_and_wins_nothing(code, expected):
  rng = np.random.default_rng(0)
  train, test = (code(rng.normal(size=(3_000, 300))) for _ in range(2))
  found = fit_mean(np.zeros((3_000, 1)), train)
  predicted = found(np.zeros((3_000, 1)))
  got = Scores(train.mean(0), codes=True).update(predicted, test).compute()
  assert got["raw_cosine"] == pytest.approx(expected, abs=0.005)
  assert got["centred_cosine"] == 0
  assert got["r2_pooled"] == got["r2_median"] == got["pearson_median"] == 0
  np.testing.assert_array_equal(got["r2"], 0)
  np.testing.assert_array_equal(got["pearson"], 0)
  fires = np.isfinite(got["auroc"])
  np.testing.assert_array_equal(got["auroc"][fires], 0.5)
  assert got["top_k_recall"] == got["top_k_recall_mean"]
  assert got["fvu"] == pytest.approx(1, abs=1e-3)


def test_a_mean_that_is_off_by_its_rounding_has_no_direction():
  _, actual = sparse()
  mean = actual.mean(0)
  predicted = np.tile(np.nextafter(mean, np.float32(9)), (800, 1))
  found = Scores(mean).update(predicted, actual).compute()
  assert found["centred_cosine"] == 0


def test_columns_that_fire_rarely_are_in_no_median():
  predicted, actual = sparse()
  actual[:, :30] = 0
  actual[:29, :30] = 1
  actual[29, 0] = 1
  found = Scores(actual.mean(0), codes=True).update(predicted, actual).compute()
  kept = np.array([0, *range(30, 40)])
  assert found["columns"] == 11
  for name in ("r2", "pearson", "auroc"):
    expected = np.median(found[name][kept])
    assert found[f"{name}_median"] == pytest.approx(expected)


def test_columns_without_variance_have_no_score():
  predicted, actual, train = rows()
  actual[:, 2] = train[2]
  actual[:, 3] = train[3] + 1
  predicted[:, 4] = train[4] + 100
  found = Scores(train).update(predicted, actual).compute()
  np.testing.assert_array_equal(np.flatnonzero(np.isnan(found["r2"])), [2])
  pearson = found["pearson"]
  np.testing.assert_array_equal(np.flatnonzero(np.isnan(pearson)), [2, 3])
  assert pearson[4] == 0


def test_constant_predictions_correlate_with_nothing():
  _, actual, train = rows(e=40)
  predicted = np.broadcast_to(train + 10 * np.sqrt(np.arange(40)), (800, 40))
  found = Scores(train).update(predicted, actual).compute()
  np.testing.assert_array_equal(found["pearson"], 0)


def test_batches_of_any_size_give_what_all_rows_give(monkeypatch):
  predicted, actual = sparse()
  mean = actual.mean(0)
  whole = Scores(mean, codes=True).update(predicted, actual).compute()
  monkeypatch.setattr(scores, "_ROWS", 64)
  cut = Scores(mean, codes=True)
  for part in np.split(np.arange(800), [500, 501, 501, 600]):
    cut.update(jnp.asarray(predicted[part]), actual[part])
  cut = cut.compute()
  assert cut.keys() == whole.keys()
  for name, value in whole.items():
    # Bins are placed by the first block.
    tolerance = 1 / firing.BINS if "auroc" in name else 1e-5
    np.testing.assert_allclose(cut[name], value, atol=tolerance)


def test_intervals_are_over_documents():
  predicted, actual, train = rows()
  documents = np.arange(800) // 40
  a, b = Scores(train), Scores(train)
  for part in (slice(0, 300), slice(300, None)):
    a.update(predicted[part], actual[part], documents[part])
    b.update(predicted[part] / 2, actual[part], documents[part])

  def by_document(values):
    return np.square(values).sum(1).reshape(20, 40).sum(1)

  away = by_document(actual - train)
  first, second = (by_document(actual - p) for p in (predicted, predicted / 2))
  low, high = document_interval(first, away, resamples=200)
  got = a.interval(resamples=200)
  np.testing.assert_allclose(got, (1 - high, 1 - low), rtol=1e-4)
  assert got[0] < a.compute()["r2_pooled"] < got[1]
  expected = document_interval(second - first, away)
  np.testing.assert_allclose(delta_interval(a, b), expected, rtol=1e-4)
  gain = a.compute()["r2_pooled"] - b.compute()["r2_pooled"]
  assert expected[0] < gain < expected[1]
  np.testing.assert_allclose(delta_r2(a, b), a.r2 - b.r2)


def test_without_documents_there_are_no_intervals():
  predicted, actual, train = rows()
  found = Scores(train).update(predicted, actual)
  assert found.interval() is None
  assert delta_interval(found, found) is None
  one = Scores(train).update(predicted, actual, np.zeros(800, int))
  assert one.interval() is None


def test_scores_of_other_rows_are_not_compared():
  predicted, actual, train = rows()
  a = Scores(train).update(predicted, actual)
  others = (
    Scores(train).update(predicted[1:], actual[1:]),
    Scores(train + 1).update(predicted, actual),
    Scores(train).update(predicted, actual + 1),
  )
  for b in others:
    with pytest.raises(ValueError, match="score both maps on one stream"):
      delta_r2(a, b)


def test_rows_that_cannot_be_scored_are_refused():
  predicted, actual, train = rows()
  found = Scores(train)
  with pytest.raises(ValueError, match="got none"):
    found.compute()
  with pytest.raises(ValueError, match=r"\[n, 6\]"):
    found.update(predicted[:, :5], actual[:, :5])
  with pytest.raises(ValueError, match=r"\[n, 6\]"):
    found.update(predicted, actual[:-1])
  with pytest.raises(ValueError, match="document for each row"):
    found.update(predicted, actual, np.zeros(3, int))
  with pytest.raises(ValueError, match="codes=False"):
    Scores(train, codes=True, top=2).update(predicted, actual)
  with pytest.raises(ValueError, match="k of 1 to 6, got 32"):
    Scores(train, codes=True)
  with pytest.raises(ValueError, match="finite mean"):
    Scores(train * np.nan)
  found.update(predicted, actual)
  with pytest.raises(ValueError, match="with all rows or with none"):
    found.update(predicted, actual, np.zeros(800, int))
  for which in (0, 1):
    pair = [predicted.copy(), actual.copy()]
    pair[which][17, 1] = np.nan
    with pytest.raises(ValueError, match="first in row 17"):
      found.update(*pair)
  assert found.count == 800
