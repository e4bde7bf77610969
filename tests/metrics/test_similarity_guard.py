"""Which measures are defined for which pair of models."""

import dataclasses

import pytest

from gemma_jax.metrics import similarity
from gemma_jax.metrics.similarity import guard

BASE = guard.Subject("base", 640, "gemma", "270m", ("sae",))
TUNED = dataclasses.replace(BASE, name="tuned")
WIDER = guard.Subject("wider", 1152, "gemma", "1b", ("other sae",))
OTHER = guard.Subject("other", 576, "smollm", "smollm", ("smollm sae",))


def test_the_guard_knows_the_measures_that_there_are():
  for name in guard.MEASURES:
    assert name == "code_cka" or callable(getattr(similarity, name))
  assert len(set(guard.MEASURES)) == len(guard.MEASURES)


def test_everything_is_defined_for_a_model_and_its_tuned_self():
  assert guard.defined(BASE, TUNED) == guard.MEASURES
  assert guard.refusals(BASE, BASE) == {}


def test_another_width_refuses_cosine_and_accepts_cka():
  with pytest.raises(ValueError, match=r"640 and 1152.*linear_cka"):
    guard.check("cosine", BASE, WIDER)
  for name in ("linear_cka", "mutual_knn", "rsa", "jsd"):
    guard.check(name, BASE, WIDER)


def test_another_tokenizer_refuses_kl_and_accepts_cross_likelihood():
  for name in guard.TOKENS:
    with pytest.raises(
      ValueError, match=r"different tokenizers.*cross_likelih"
    ):
      guard.check(name, BASE, OTHER)
  for name in (*guard.TEXTS, *guard.ROWS):
    guard.check(name, BASE, OTHER)


def test_equal_widths_are_not_equal_coordinates():
  twin = dataclasses.replace(BASE, name="twin", origin="another seed")
  with pytest.raises(ValueError, match=r"270m and another seed"):
    guard.check("cosine", BASE, twin)
  # The same dictionary on coordinates that mean something else.
  with pytest.raises(ValueError, match=r"no coordinates"):
    guard.check("jaccard", BASE, twin)
  guard.check("kl", BASE, twin)


def test_other_dictionaries_refuse_overlaps_by_index():
  retrained = dataclasses.replace(TUNED, dictionaries=("its own sae",))
  for name in guard.LATENTS:
    with pytest.raises(ValueError, match=r"match the latents first"):
      guard.check(name, BASE, retrained)
  guard.check("code_cka", BASE, retrained)
  guard.check("cosine", BASE, retrained)


def test_without_a_dictionary_there_are_no_features():
  bare = dataclasses.replace(TUNED, dictionaries=())
  for name in (*guard.LATENTS, "code_cka"):
    with pytest.raises(ValueError, match=r"tuned without a dictionary"):
      guard.check(name, BASE, bare)


def test_one_dictionary_under_two_tokenizers_is_refused():
  recoded = dataclasses.replace(TUNED, vocabulary="new")
  with pytest.raises(ValueError, match=r"code_cka"):
    guard.check("jaccard", BASE, recoded)
  guard.check("cosine", BASE, recoded)


def test_canonical_correlations_want_ten_rows_a_dim():
  least = guard.VARIATE_ROWS * 1280
  with pytest.raises(ValueError, match=f"{least - 1} rows.*at least {least}"):
    guard.check("svcca", BASE, TUNED, rows=least - 1)
  guard.check("svcca", BASE, TUNED, rows=least)
  guard.check("pwcca", BASE, TUNED)


def test_the_order_of_the_pair_does_not_matter():
  for a, b in ((BASE, WIDER), (BASE, OTHER), (BASE, TUNED)):
    assert guard.defined(a, b) == guard.defined(b, a)


def test_an_unknown_measure_is_no_permission():
  with pytest.raises(ValueError, match=r"expected a measure of"):
    guard.check("cka", BASE, TUNED)
