import itertools

import numpy as np
import pytest
from sklearn import metrics
from sklearn.metrics.cluster import contingency_matrix

from gemma_jax.clustering import agreement


def random_labels(rows, clusters, seed):
  """Labels with sizes that fall as 1 / rank, and gaps."""
  weights = 1 / np.arange(1, clusters + 1)
  rng = np.random.default_rng(seed)
  return 3 * rng.choice(clusters, rows, p=weights / weights.sum()) - 5


PAIRS = {
  "one row": ([4], [9]),
  "two rows": ([0, 1], [1, 1]),
  "single clusters": ([1] * 7, [2] * 7),
  "one single cluster": ([1] * 9, np.arange(9) // 3),
  "all singletons": (np.arange(30), np.arange(30)[::-1]),
  "singletons and pairs": (np.arange(30), np.arange(30) // 2),
  "small": (random_labels(20, 3, 0), random_labels(20, 4, 1)),
  "two large": (random_labels(5_000, 2, 0), random_labels(5_000, 2, 1)),
  "many": (random_labels(4_000, 300, 0), random_labels(4_000, 90, 1)),
  "nearly singletons": (
    random_labels(400, 10**5, 0),
    random_labels(400, 10**4, 1),
  ),
  "related": (np.arange(900) // 30, np.arange(900) // 37),
}
pairs = pytest.mark.parametrize("pair", PAIRS)


@pairs
def test_agreement_is_scikit_learns(pair):
  a, b = PAIRS[pair]
  for ours, theirs in (
    (agreement.adjusted_rand_index, metrics.adjusted_rand_score),
    (
      agreement.normalised_mutual_information,
      metrics.normalized_mutual_info_score,
    ),
    (
      agreement.adjusted_mutual_information,
      metrics.adjusted_mutual_info_score,
    ),
  ):
    expected = theirs(a, b)
    assert ours(a, b) == pytest.approx(expected, abs=1e-9), ours.__name__
    assert ours(b, a) == pytest.approx(expected, abs=1e-9), ours.__name__


def test_blocks_of_the_expected_information_change_nothing(monkeypatch):
  monkeypatch.setattr(agreement, "_TERMS", 50)
  a, b = random_labels(500, 30, 0), random_labels(500, 20, 1)
  expected = metrics.adjusted_mutual_info_score(a, b)
  found = agreement.adjusted_mutual_information(a, b)
  assert found == pytest.approx(expected, abs=1e-9)


def test_a_contingency_table_counts_pairs_of_labels():
  a, b = PAIRS["many"]
  found = agreement.contingency(a, b)
  np.testing.assert_array_equal(found.toarray(), contingency_matrix(a, b))
  assert found.dtype == np.int64
  assert found.nnz < found.shape[0] * found.shape[1]


def test_new_names_for_the_same_clusters_agree_entirely():
  a = random_labels(500, 20, 0)
  names = np.random.default_rng(0).permutation(60)
  b = names[a + 5]
  assert agreement.adjusted_rand_index(a, b) == 1
  assert agreement.adjusted_mutual_information(a, b) == 1
  assert agreement.normalised_mutual_information(a, b) == pytest.approx(1)


def test_random_labels_agree_by_chance_and_only_nmi_does_not_see_it():
  rng = np.random.default_rng(0)
  a, b = rng.integers(0, 2_000, (2, 10_000))
  assert agreement.normalised_mutual_information(a, b) > 0.5
  assert abs(agreement.adjusted_mutual_information(a, b)) < 0.01
  assert abs(agreement.adjusted_rand_index(a, b)) < 0.001


def test_chance_in_large_tables_is_chi_squared():
  # Of A x B clusters, 2 N I has A B - A - B + 1 degrees of freedom.
  rows = 400_000
  a, b = np.arange(rows) % 4, np.arange(rows) // 4 % 5
  chance = 3 * 4 / (2 * rows)
  entropy = np.log(20) / 2
  assert agreement.adjusted_mutual_information(a, b) == pytest.approx(
    -chance / (entropy - chance), rel=1e-4
  )


def test_singletons_say_nothing_above_chance_however_many():
  b = random_labels(20_000, 3_000, 0)
  found = agreement.adjusted_mutual_information(np.arange(20_000), b)
  assert found == pytest.approx(0, abs=1e-9)


def test_stability_is_the_mean_over_pairs_of_labelings():
  rng = np.random.default_rng(0)
  labelings = [random_labels(300, 6, 0)]
  for flips in (10, 60):
    labels = labelings[0].copy()
    labels[:flips] = rng.permutation(labels[:flips])
    labelings.append(labels)
  found = agreement.stability(labelings)
  expected = [
    metrics.adjusted_mutual_info_score(a, b)
    for a, b in itertools.combinations(labelings, 2)
  ]
  np.testing.assert_allclose(found.pairs, expected, atol=1e-9)
  assert found.mean == pytest.approx(np.mean(expected))
  assert found.sd == pytest.approx(np.std(expected, ddof=1))
  alone = agreement.stability(labelings[:2])
  assert alone.mean == pytest.approx(expected[0])
  assert np.isnan(alone.sd)
  same = agreement.stability([labelings[0], -labelings[0], labelings[0] + 7])
  assert (same.mean, same.sd) == (1, 0)


def conditional_entropy(of, given):
  """H(of | given), bits, cluster by cluster."""
  total = 0
  for value in np.unique(given):
    _, counts = np.unique(of[given == value], return_counts=True)
    p = counts / counts.sum()
    total -= counts.sum() / len(of) * np.sum(p * np.log2(p))
  return total


def test_token_information_is_that_of_its_definitions():
  labels, tokens = random_labels(600, 12, 0), random_labels(600, 40, 1)
  tokens[:300] = labels[:300]
  found = agreement.token_information(labels, tokens)
  assert set(found) == set(agreement.DEFINITIONS) - {"null"}
  value = {name: both["value"] for name, both in found.items()}
  commonest = sum(
    np.unique(tokens[labels == i], return_counts=True)[1].max()
    for i in np.unique(labels)
  )
  assert value == pytest.approx(
    {
      "nmi": metrics.normalized_mutual_info_score(labels, tokens),
      "token_given_cluster": conditional_entropy(tokens, labels),
      "cluster_given_token": conditional_entropy(labels, tokens),
      "purity": commonest / 600,
    }
  )


def test_clusters_that_are_tokens_are_far_from_their_null():
  tokens = random_labels(2_000, 50, 0)
  found = agreement.token_information(-tokens, tokens)
  value = {name: both["value"] for name, both in found.items()}
  null = {name: both["null"] for name, both in found.items()}
  ideal = {"token_given_cluster": 0, "cluster_given_token": 0, "purity": 1}
  assert value == pytest.approx({"nmi": 1, **ideal}, abs=1e-9)
  assert null["nmi"] < 0.2
  assert null["token_given_cluster"] > 3
  assert null["cluster_given_token"] > 3
  assert null["purity"] < 0.4


def test_clusters_without_tokens_are_at_their_null():
  labels, tokens = random_labels(5_000, 900, 0), random_labels(5_000, 900, 1)
  found = agreement.token_information(labels, tokens)
  for both in found.values():
    assert both["value"] == pytest.approx(both["null"], rel=0.02)
  # Chance alone gives small clusters a commonest token.
  assert found["nmi"]["null"] > 0.3
  assert agreement.token_information(labels, tokens) == found
  other = agreement.token_information(labels, tokens, seed=1)
  assert other["nmi"]["value"] == found["nmi"]["value"]
  assert other["nmi"]["null"] != found["nmi"]["null"]


def test_what_are_not_two_labelings_is_refused():
  a = np.arange(6)
  for b in (np.arange(5), np.arange(6.0), a.reshape(2, 3)):
    with pytest.raises(ValueError, match="two labelings"):
      agreement.adjusted_rand_index(a, b)
  with pytest.raises(ValueError, match="two labelings"):
    agreement.adjusted_mutual_information(a[:0], a[:0])
  with pytest.raises(ValueError, match="at least two labelings"):
    agreement.stability([a])
