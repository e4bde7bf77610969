"""Texts by hand, and against tables written out."""

import itertools

import numpy as np
import pytest

from gemma_jax.metrics.similarity import (
  bits_per_byte,
  chrf,
  cross_likelihood,
  edit_ratio,
  rouge_l,
)


def test_chrf_is_the_f_score_by_hand():
  # 1-grams 2 of 3 and 2 of 4; 2-grams 1 of 2 and 1 of 3; 3-grams 0.
  precision, recall = (2 / 3 + 1 / 2 + 0) / 3, (2 / 4 + 1 / 3 + 0) / 3
  expected = 5 * precision * recall / (4 * precision + recall)
  assert chrf("abx", "abcd") == pytest.approx(expected)
  assert chrf("a b\tx", " ab cd\n") == pytest.approx(expected)


def test_chrf_counts_repeated_grams_and_weighs_recall():
  # 1-grams 1 of 3 and 1 of 1.
  assert chrf("aaa", "a") == pytest.approx(5 / 3 / (4 / 3 + 1))
  assert chrf("a", "aaa") == pytest.approx(5 / 3 / (4 + 1 / 3))


def test_chrf_looks_at_no_more_than_6_characters():
  # Shared: nothing longer than 6; of each n, 12 - n + 1 grams less the middle.
  a, b = "abcdefghijkl", "abcdefmnopqr"
  shares = [(6 - n + 1) / (12 - n + 1) for n in range(1, 7)]
  assert chrf(a, b) == pytest.approx(np.mean(shares))


def test_rouge_is_twice_the_subsequence_over_both_lengths():
  reference = "police killed the gunman"
  assert rouge_l("police kill the gunman", reference) == pytest.approx(3 / 4)
  assert rouge_l("the gunman kill police", reference) == pytest.approx(1 / 2)
  assert rouge_l("The gunman!", reference) == pytest.approx(2 * 2 / 6)


def test_the_subsequence_is_that_of_the_table():
  rng = np.random.default_rng(0)
  for _ in range(30):
    a, b = (rng.integers(5, size=rng.integers(1, 80)) for _ in range(2))
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, j in itertools.product(range(len(a)), range(len(b))):
      longer = max(table[i, j + 1], table[i + 1, j])
      table[i + 1, j + 1] = table[i, j] + 1 if a[i] == b[j] else longer
    expected = 2 * table[-1, -1] / (len(a) + len(b))
    found = rouge_l(" ".join(map(str, a)), " ".join(map(str, b)))
    assert found == pytest.approx(expected)


def test_edits_are_those_by_hand():
  assert edit_ratio("kitten", "sitting") == pytest.approx(1 - 3 / 7)
  assert edit_ratio("flaw", "lawn") == pytest.approx(1 - 2 / 4)
  assert edit_ratio("für 🎉", "fur 🎉") == pytest.approx(4 / 5)


def test_edits_are_those_of_the_table():
  rng = np.random.default_rng(1)
  for _ in range(30):
    a, b = ("".join(rng.choice(list("abc"), rng.integers(1, 40))) for _ in "ab")
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    table[:, 0], table[0] = range(len(a) + 1), range(len(b) + 1)
    for i, j in itertools.product(range(len(a)), range(len(b))):
      table[i + 1, j + 1] = min(
        table[i, j] + (a[i] != b[j]), table[i, j + 1] + 1, table[i + 1, j] + 1
      )
    expected = 1 - table[-1, -1] / max(len(a), len(b))
    assert edit_ratio(a, b) == edit_ratio(b, a) == pytest.approx(expected)


@pytest.mark.parametrize("measure", [chrf, rouge_l, edit_ratio])
def test_the_same_text_is_1_and_another_0(measure):
  assert measure("Ein Text, 日本語.", "Ein Text, 日本語.") == pytest.approx(1)
  assert measure("abc", "xyz") == 0
  assert measure("", "") == 1
  assert measure("", "xyz") == measure("abc", "") == 0


def test_bits_are_for_each_byte_of_the_utf8():
  nats = np.log([0.5, 0.25, 0.125])
  assert bits_per_byte(nats, "abcdef") == pytest.approx(1)
  assert bits_per_byte(nats, "日本") == pytest.approx(1)
  # However the model's tokens split it.
  assert bits_per_byte([nats.sum()], "abcdef") == pytest.approx(1)


@pytest.mark.parametrize(
  ("nats", "text", "message"),
  [
    ([0.1], "a", "at most 0"),
    ([-np.inf], "a", "with 1 others"),
    ([[-1.0]], "a", r"\[tokens\]"),
    ([-1.0], "", "0 bytes and 1 tokens"),
    ([], "a", "1 bytes and 0 tokens"),
  ],
)
def test_log_probabilities_that_are_none_are_an_error(nats, text, message):
  with pytest.raises(ValueError, match=message):
    bits_per_byte(nats, text)


def test_a_model_and_itself_are_not_apart():
  rng = np.random.default_rng(2)
  own = rng.random(5)
  np.testing.assert_array_equal(cross_likelihood(own, own, own, own), 0)
  # Samples: two answers of one model, each as likely to its twin.
  first, second = rng.random((2, 5))
  found = cross_likelihood(first, second, first, second)
  np.testing.assert_allclose(found, 0, atol=1e-15)


def test_cross_likelihood_is_the_mean_excess_and_symmetric():
  aa, ab, ba, bb = 1.0, 3.0, 2.5, 0.5
  assert cross_likelihood(aa, ab, ba, bb) == 2.0
  assert cross_likelihood(bb, ba, ab, aa) == 2.0
  many = cross_likelihood([aa, 1], [ab, 1], [ba, 1], [bb, 1])
  np.testing.assert_array_equal(many, [2, 0])


def test_bits_that_do_not_fit_are_errors():
  with pytest.raises(ValueError, match="one shape"):
    cross_likelihood([1.0, 2], [1.0, 2], [1.0, 2], [1.0])
  for value in (-1, np.nan):
    with pytest.raises(ValueError, match="others in ab"):
      cross_likelihood(1.0, value, 1.0, 1.0)
