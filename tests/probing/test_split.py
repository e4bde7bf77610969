import numpy as np
import pytest

from gemma_jax.probing import split


def test_no_document_is_on_both_sides():
  rng = np.random.default_rng(0)
  documents = rng.integers(0, 40, 2_000)
  test = split.split(documents, fraction=0.3, seed=1)
  assert not set(documents[test]) & set(documents[~test])
  assert abs(test.mean() - 0.3) < 0.06
  again = split.split(documents, fraction=0.3, seed=1)
  other = split.split(documents, fraction=0.3, seed=2)
  np.testing.assert_array_equal(test, again)
  assert (test != other).any()


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("seed", range(4))
def test_both_sides_hold_a_document(fraction, seed):
  documents = np.array([7] * 98 + [9, 9])
  test = split.split(documents, fraction=fraction, seed=seed)
  assert test.any()
  assert not test.all()


def test_one_document_cannot_be_split():
  with pytest.raises(ValueError, match=r"at least 2 documents, got 1"):
    split.split(np.zeros(10, int), fraction=0.5, seed=0)
  with pytest.raises(ValueError, match=r"in \(0, 1\), got 1"):
    split.split(np.arange(10), fraction=1, seed=0)


def test_subsamples_cap_every_group():
  groups = np.repeat([3, 1, 2], [50, 2, 7])
  rows = split.subsample(groups, 5, seed=0)
  assert (np.diff(rows) > 0).all()
  kept, counts = np.unique(groups[rows], return_counts=True)
  np.testing.assert_array_equal(kept, [1, 2, 3])
  np.testing.assert_array_equal(counts, [2, 5, 5])
  draws = {tuple(split.subsample(groups, 5, seed=s)) for s in range(4)}
  assert len(draws) == 4
  assert split.subsample(groups[:0], 5, seed=0).size == 0
  with pytest.raises(ValueError, match="at least 1 row, got 0"):
    split.subsample(groups, 0, seed=0)
