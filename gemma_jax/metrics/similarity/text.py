"""Texts of two models: how alike on the surface, and how likely to each.

Surface scores are baselines; cross-likelihood compares models of different
tokenizers, for which distributions over tokens cannot be.
"""

import math
import re
from collections import Counter

import numpy as np

_ORDERS = 6
_BETA = 2


def chrf(hypothesis: str, reference: str) -> float:
  """chrF2: F-score of character 1- to 6-grams, in [0, 1].

  (1 + 4) P R / (4 P + R) with P and R means over n, white space left out
  (Popovic 2015, "chrF: character n-gram F-score for automatic MT evaluation").
  Means are over the n of which both texts have n-grams, as in sacreBLEU.

  Args:
    hypothesis: text.
    reference: text that it should be like.
  """
  a, b = ("".join(text.split()) for text in (hypothesis, reference))
  orders = range(1, min(_ORDERS, len(a), len(b)) + 1)
  if not orders:
    return float(a == b)
  precision = recall = 0.0
  for n in orders:
    x, y = (
      Counter(text[i : i + n] for i in range(len(text) - n + 1))
      for text in (a, b)
    )
    shared = (x & y).total()
    precision += shared / x.total() / len(orders)
    recall += shared / y.total() / len(orders)
  if not precision + recall:
    return 0.0
  square = _BETA**2
  return (1 + square) * precision * recall / (square * precision + recall)


def rouge_l(hypothesis: str, reference: str) -> float:
  """ROUGE-L: F1 of the longest common subsequence of words, in [0, 1].

  2 L / (words + words) (Lin 2004, "ROUGE: a package for automatic evaluation of
  summaries", section 3, with beta = 1). Words are runs of letters, digits
  and underscores, in lower case.

  Args:
    hypothesis: text.
    reference: text that it should be like.
  """
  a, b = (
    re.findall(r"\w+", text.casefold()) for text in (hypothesis, reference)
  )
  if not a or not b:
    return float(a == b)
  return 2 * _common(a, b) / (len(a) + len(b))


def edit_ratio(a: str, b: str) -> float:
  """1 less the edits from one to the other over the longer length, in [0, 1].

  Edits insert, delete or replace a character (Levenshtein 1966).

  Args:
    a: text.
    b: text.
  """
  if not a or not b:
    return float(a == b)
  codes = np.array([ord(character) for character in b])
  steps = np.arange(len(b) + 1)
  row = steps
  for i, character in enumerate(a, 1):
    new = np.empty_like(row)
    new[0] = i
    new[1:] = np.minimum(row[:-1] + (codes != ord(character)), row[1:] + 1)
    # Insertions: the least of what stands to the left, and the way from there.
    row = np.minimum.accumulate(new - steps) + steps
  return 1 - int(row[-1]) / max(len(a), len(b))


def bits_per_byte(log_probabilities, text: str) -> float:
  """What a text costs a model, in bits for each byte of its UTF-8.

  Args:
    log_probabilities: nats, of each of the text's tokens given all before.
    text: what these tokens spell.

  Raises:
    ValueError: an empty text, or log-probabilities that are not [tokens], not
      finite, or positive.
  """
  found = np.asarray(log_probabilities).astype(np.float64)
  if found.ndim != 1 or not np.isfinite(found).all() or (found > 0).any():
    raise ValueError(
      "expected log-probabilities [tokens], finite and at most 0, got "
      f"{found.shape} with {np.sum(~np.isfinite(found) | (found > 0))} others"
    )
  size = len(text.encode())
  if not size or not len(found):
    raise ValueError(
      f"expected a text and its tokens, got {size} bytes and {len(found)} "
      "tokens"
    )
  return float(-found.sum() / math.log(2) / size)


def cross_likelihood(bits_aa, bits_ab, bits_ba, bits_bb) -> np.ndarray:
  """How much likelier each model finds its own answers than the other's.

  D = ([b_A(y_B) - b_A(y_A)] + [b_B(y_A) - b_B(y_B)]) / 2 in bits per byte: 0
  where each finds the other's answer as likely as its own, and 0 for a model
  and itself. Needs no common tokenizer. Negative where the other's answers
  are likelier, as greedy ones can be.

  Args:
    bits_aa: b_A(y_A), `bits_per_byte` of A for its own answer, any shape.
    bits_ab: b_A(y_B), of A for B's answer.
    bits_ba: b_B(y_A), of B for A's answer.
    bits_bb: b_B(y_B), of B for its own answer.

  Returns:
    float64, of the same shape.

  Raises:
    ValueError: other shapes, or values that are not finite or negative.
  """
  given = {"aa": bits_aa, "ab": bits_ab, "ba": bits_ba, "bb": bits_bb}
  bits = {name: np.asarray(b, np.float64) for name, b in given.items()}
  if len({b.shape for b in bits.values()}) != 1:
    raise ValueError(
      "expected four of one shape, a number for each prompt, got "
      f"{ {name: b.shape for name, b in bits.items()} }"
    )
  bad = [
    name for name, b in bits.items() if not (np.isfinite(b) & (b >= 0)).all()
  ]
  if bad:
    raise ValueError(
      f"expected bits per byte that are finite and not negative, got others in "
      f"{', '.join(bad)}"
    )
  return (bits["ab"] - bits["aa"] + bits["ba"] - bits["bb"]) / 2


def _common(a: list[str], b: list[str]) -> int:
  """Length of the longest common subsequence.

  Bits of one integer are a row of the table (Hyyro 2004, "Bit-parallel LCS-
  length computation revisited").
  """
  places: dict[str, int] = {}
  for i, word in enumerate(a):
    places[word] = places.get(word, 0) | 1 << i
  full = (1 << len(a)) - 1
  row = full
  for word in b:
    match = row & places.get(word, 0)
    row = (row + match | row - match) & full
  return len(a) - row.bit_count()
