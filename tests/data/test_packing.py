import random
import types

import numpy as np
import pytest

from gemma_jax import data
from gemma_jax.data import packing

PAD, EOS, BOS = 0, 1, 2


class Words:
  """One token per word, its number, with offsets."""

  def encode_batch(self, texts, add_special_tokens):
    assert not add_special_tokens
    encodings = []
    for text in texts:
      ids, offsets, at = [], [], 0
      for word in text.split(" "):
        ids.append(int(word))
        offsets.append((at, at + len(word)))
        at += len(word) + 1
      encodings.append(types.SimpleNamespace(ids=ids, offsets=offsets))
    return encodings


def _documents(*texts):
  return [
    data.Document(text, "s", f"d{i}", f"d{i}") for i, text in enumerate(texts)
  ]


def _make(*texts, **options):
  options = {"context": 4, "bos_id": BOS, "pad_id": PAD} | options
  return data.make_windows(_documents(*texts), Words(), **options)


TEXTS = ("10 11 12 13", "20 21")
B, P = BOS, PAD


@pytest.mark.parametrize(
  ("options", "tokens", "counted"),
  [
    (
      {"bos": "both"},
      [[B, 10, 11, 12], [B, 13, B, 20], [B, 21, P, P]],
      "0111 0101 0100",
    ),
    (
      {"bos": "window"},
      [[B, 10, 11, 12], [B, 13, 20, 21]],
      "0111 0111",
    ),
    (
      {"bos": "document"},
      [[B, 10, 11, 12], [13, B, 20, 21]],
      "0111 1011",
    ),
    (
      {"bos": "none", "bos_id": None},
      [[10, 11, 12, 13], [20, 21, P, P]],
      "1111 1100",
    ),
    (
      {"bos": "document", "packing": "document"},
      [[B, 10, 11, 12], [13, P, P, P], [B, 20, 21, P]],
      "0111 1000 0110",
    ),
    (
      {"bos": "none", "packing": "document"},
      [[10, 11, 12, 13], [20, 21, P, P]],
      "1111 1100",
    ),
    (
      {"bos": "window", "stride": 1},
      [[B, 10, 11, 12], [B, 11, 12, 13], [B, 12, 13, 20], [B, 13, 20, 21]],
      "0111 0001 0001 0001",
    ),
    (
      {"bos": "both", "stride": 2},
      [[B, 10, 11, 12], [B, 12, 13, B], [B, B, 20, 21]],
      "0111 0010 0011",
    ),
    (
      {"bos": "none", "stride": 2, "packing": "document"},
      [[10, 11, 12, 13], [20, 21, P, P]],
      "1111 1100",
    ),
    (
      {"bos": "both", "stride": 2, "packing": "document"},
      [[B, 10, 11, 12], [B, 12, 13, P], [B, 20, 21, P]],
      "0111 0010 0110",
    ),
  ],
)
def test_windows_look_as_drawn(options, tokens, counted):
  windows = _make(*TEXTS, **options)
  np.testing.assert_array_equal(windows.tokens, tokens)
  mask = [[c == "1" for c in row] for row in counted.split()]
  np.testing.assert_array_equal(windows.mask, mask)
  text = windows.tokens >= 10
  np.testing.assert_array_equal(windows.begin >= 0, text)
  np.testing.assert_array_equal(windows.document < 0, windows.tokens == PAD)


@pytest.mark.parametrize("packing_", packing.PACKINGS)
@pytest.mark.parametrize("bos", packing.BOS)
@pytest.mark.parametrize("stride", [None, 1, 3, 5])
def test_every_token_counts_once_and_in_order(packing_, bos, stride):
  generator = random.Random(0)
  texts = [
    " ".join(str(100 * i + j) for j in range(generator.randint(1, 30)))
    for i in range(1, 20)
  ]
  windows = _make(*texts, context=7, packing=packing_, bos=bos, stride=stride)
  counted = windows.tokens[windows.mask].tolist()
  assert counted == [int(word) for text in texts for word in text.split()]
  # Spans lead from every position back to its document's text.
  inside = windows.begin >= 0
  for token, document, begin, end in zip(
    windows.tokens[inside],
    windows.document[inside],
    windows.begin[inside],
    windows.end[inside],
    strict=True,
  ):
    assert texts[document][begin:end] == str(token)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"bos": "some"}, r"bos to be one of \['both', 'window', .*got 'some'"),
    ({"bos_id": None}, r'a bos_id, as bos=\'both\' places it.*bos="none"'),
    ({"stride": 0}, r"stride in \[1, 3\].*context 4.*got 0"),
    ({"stride": 4}, r"stride in \[1, 3\].*got 4"),
    ({"document_tokens": 0}, "document_tokens >= 1 or None, got 0"),
  ],
)
def test_options_out_of_range_say_what_to_change(options, message):
  with pytest.raises(ValueError, match=message):
    _make("10 11 12", **options)


def test_all_of_a_window_is_text_without_its_bos():
  assert _make("10 11 12 13", bos="none", stride=4).tokens.shape == (1, 4)


def test_windows_that_repeat_are_dropped_if_asked():
  texts = ("10 11 12", "10 11 12", "20 21 22", "10 11 12")
  assert len(_make(*texts).tokens) == 4
  windows = _make(*texts, drop_duplicates=True)
  assert windows.tokens[:, 1].tolist() == [10, 20]
  assert [name for _, _, name in windows.documents] == ["d0", "d2"]
  assert windows.document[:, 0].tolist() == [0, 1]
  # What was dropped uses up no budget.
  limited = _make(*texts, drop_duplicates=True, max_tokens=6)
  assert limited.num_tokens == 6


def test_a_set_of_hashes_forgets_none():
  generator = random.Random(0)
  values = [generator.randrange(2**64) for _ in range(20_000)]
  values += [0, 2**64 - 1]
  seen = packing.Seen()
  assert all(seen.add(value) for value in values)
  assert not any(seen.add(value) for value in values)
  assert seen._settled.size > 10_000


def test_budgets_are_apportioned_to_the_last_token():
  shares = np.array([0.5, 0.3, 0.2])
  assert packing.apportion(10, shares).tolist() == [5, 3, 2]
  assert packing.apportion(7, shares).tolist() == [4, 2, 1]
  assert packing.apportion(0, shares).tolist() == [0, 0, 0]
  thirds = np.ones(3)
  assert packing.apportion(8, thirds).tolist() == [3, 3, 2]
