"""Prompts found in a text."""

import numpy as np
import pytest

from gemma_jax.concepts import mining
from gemma_jax.data import Windows

BOS, PAD = 2, 0


@pytest.fixture
def windows():
  """Four windows of three documents, each begun by BOS."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(10, 60, (4, 40)).astype(np.int32)
  tokens[:, 0] = BOS
  mask = np.ones((4, 40), bool)
  mask[:, 0] = False
  mask[3, 30:] = False
  document = np.array([0, 0, 1, 2], np.int32)[:, None] + np.zeros(
    (4, 40), np.int32
  )
  return Windows(tokens, mask, document, tuple(("", "", str(i)) for i in "012"))


def test_places_are_all_that_count_and_have_text_before_them(windows):
  wanted = np.zeros(100, bool)
  wanted[[11, 12]] = True
  got = {tuple(at) for at in mining.places(windows, wanted).tolist()}
  expected = {
    (w, t)
    for w in range(4)
    for t in range(mining.LEAST + 1, 40)
    if windows.tokens[w, t] in (11, 12) and windows.mask[w, t]
  }
  assert got == expected
  assert expected


def test_places_are_spread_over_words_and_then_documents():
  found = np.stack([np.arange(90), np.full(90, 9)], axis=1)
  words = np.array([0] * 70 + [1] * 18 + [2] * 2)
  documents = np.arange(90) % 5
  got = mining.spread(found, words, documents, 12, np.random.default_rng(0))
  chosen = got[:, 0]
  assert len({*chosen.tolist()}) == 12
  counts = np.bincount(words[chosen], minlength=3)
  assert counts.tolist() == [5, 5, 2]
  for word in (0, 1):
    assert len({*documents[chosen[words[chosen] == word]].tolist()}) == 5
  again = mining.spread(found, words, documents, 12, np.random.default_rng(0))
  np.testing.assert_array_equal(got, again)


def test_prompts_are_the_text_before_the_answer(windows):
  at = np.array([[0, 30], [2, 12]])
  num_bytes = np.arange(100)
  got = mining.prompts(
    windows, at, num_bytes, context=16, bos_id=BOS, pad_id=PAD
  )
  assert got.tokens[0, 0] == BOS
  np.testing.assert_array_equal(got.tokens[0, 1:], windows.tokens[0, 15:30])
  assert got.mask[0].all()
  assert got.edited[0].tolist() == [False] + [True] * 15
  # A window that begins later than the prompt would: padding on the left.
  np.testing.assert_array_equal(got.tokens[1, 4:], windows.tokens[2, :12])
  assert got.mask[1].tolist() == [False] * 4 + [True] * 12
  assert got.edited[1].sum() == 11
  answers = windows.tokens[at[:, 0], at[:, 1]]
  assert got.answers[:, 0].tolist() == answers.tolist()
  assert got.at[:, 0].tolist() == [15, 15]
  assert got.num_bytes.tolist() == answers.tolist()


def test_controls_are_matched_one_to_one():
  wanted = np.array([-1.0, -1.1, -5.0])
  offered = np.array([-9.0, -1.05, -4.9, -1.2, -0.2])
  got = mining.match(wanted, offered)
  assert sorted(got.tolist()) == [1, 2, 3]
  assert offered[got[2]] == -4.9
  with pytest.raises(ValueError, match="3 controls are wanted and 2 offered"):
    mining.match(wanted, offered[:2])
