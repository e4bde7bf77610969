"""Wrong partners: everyone has one, and it is wrong in the way asked for."""

import numpy as np
import pytest

from gemma_jax.alignment.controls import shuffled


def labels(n=300, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 9, n), rng.zipf(1.6, n) % 50


def dealt(how, documents, tokens, seed=0):
  found = shuffled(documents, how, seed=seed, tokens=tokens)
  np.testing.assert_array_equal(np.sort(found.order), np.arange(len(documents)))
  return found


@pytest.mark.parametrize("seed", range(20))
def test_across_gives_a_row_of_another_document(seed):
  documents, tokens = labels(seed=seed)
  order, alone = dealt("across", documents, tokens, seed)
  assert not alone.any()
  assert np.all(documents[order] != documents)


@pytest.mark.parametrize("how", ["within", "same_token"])
@pytest.mark.parametrize("seed", range(20))
def test_others_give_another_row_of_the_same_group(how, seed):
  documents, tokens = labels(seed=seed)
  order, alone = dealt(how, documents, tokens, seed)
  group = documents if how == "within" else tokens
  np.testing.assert_array_equal(group[order], group)
  np.testing.assert_array_equal(order == np.arange(300), alone)
  np.testing.assert_array_equal(alone, np.bincount(group)[group] == 1)


def test_two_halves_are_exchanged():
  documents = np.repeat([5, 3], 4)
  order, alone = dealt("across", documents, None)
  assert np.all(documents[order] != documents)
  assert not alone.any()


@pytest.mark.parametrize("seed", range(10))
def test_of_a_document_with_most_rows_some_have_no_other(seed):
  # Three rows of the others serve three of the seven, whatever the order.
  documents = np.random.default_rng(seed).permutation([1] * 7 + [2, 2, 3])
  order, alone = dealt("across", documents, None, seed)
  np.testing.assert_array_equal(documents[order] == documents, alone)
  assert alone.sum() == 4
  assert np.all(order != np.arange(10))


def test_a_single_document_leaves_all_alone():
  order, alone = dealt("across", np.zeros(5, int), None)
  assert alone.all()
  assert len(order) == 5


@pytest.mark.parametrize("how", ["across", "within", "same_token"])
def test_the_seed_decides(how):
  documents, tokens = labels()
  first = dealt(how, documents, tokens, 1).order
  np.testing.assert_array_equal(first, dealt(how, documents, tokens, 1).order)
  assert np.any(first != dealt(how, documents, tokens, 2).order)


def test_what_cannot_be_dealt_is_refused():
  documents, tokens = labels()
  with pytest.raises(ValueError, match=r"expected one of .* got 'between'"):
    shuffled(documents, "between", seed=0)
  with pytest.raises(ValueError, match="tokens"):
    shuffled(documents, "same_token", seed=0)
  with pytest.raises(ValueError, match=r"\(300,\) and \(299,\)"):
    shuffled(documents, "same_token", seed=0, tokens=tokens[1:])
  with pytest.raises(ValueError, match="documents"):
    shuffled(documents[:0], "within", seed=0)
