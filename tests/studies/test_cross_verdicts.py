"""Sentences about effects say what the numbers bear out, and no more."""

import pytest

from studies import cross_verdicts


def effects(route, *, p=0.01, low=0.6, ends=True):
  """Of a route, with a map whose directions beat another's or do not."""
  prints = {"matched": 0.4, "low": 0.2, "high": 0.6, "null": 0.1, "p": p}
  if not ends:
    prints |= {"low": None, "high": None}
  inject = [
    {"vector": name, "dose": dose, "effect": effect * dose, **limits}
    for dose in (1.0, 4.0)
    for name, effect, limits in (
      ("native", 0.5, {"low": 1.5, "high": 2.5}),
      ("transferred", 0.2, {"low": low if ends else None, "high": 1.0}),
      ("other", 0.1, {"low": 0.3, "high": 0.5}),
      ("random", 0.0, {"low": -0.1, "high": 0.1}),
    )
  ]
  substitution = [
    {"count": count, "codes": codes, "recovered": kept, "low": 0.5, "high": 0.9}
    for count in (10, 300)
    for codes, kept in (("matched", 0.7), ("dealt", 0.05))
  ]
  return {
    "route": route,
    "fingerprints": prints,
    "inject": inject,
    "substitution": substitution,
  }


def said(*rows):
  nothing = dict.fromkeys(("rows", "unseen", "differences", "matches"), ())
  return cross_verdicts.verdicts(nothing | {"causal": rows})


def test_firing_is_compared_where_both_are_known():
  rows = [
    {"map": name, "route": route, "auroc_median": auroc, "top_k_recall": None}
    for route, ridge, network in (("a", 0.6, 0.9), ("b", 0.7, 0.7))
    for name, auroc in (("ridge", ridge), ("translator", network))
  ]
  assert cross_verdicts._firing(rows, "translator") == [
    "The translator has more than the ridge map, as values without intervals: "
    "median AUROC of firing on 1 of 2 routes."
  ]
  assert cross_verdicts._firing(rows, "hypernetwork") == []


def test_both_ways_share_one_sentence_about_fingerprints():
  lines = said(effects("a:1 > b:2"), effects("b:2 > a:1"))
  assert [line for line in lines if "fingerprints" in line] == [
    "a:1 | b:2: matched latents share their effects on documents (correlation "
    "of ablation fingerprints 0.40 [0.20, 0.60], of mismatched latents 0.10; "
    "matches dealt anew p = 0.01)."
  ]
  assert len(lines) == 5


@pytest.mark.parametrize("p", [0.2, float("nan")])
def test_what_chance_may_have_done_is_not_shown(p):
  assert "are not shown to share" in said(effects("a:1 > b:2", p=p))[0]


@pytest.mark.parametrize(
  ("changes", "word"),
  [
    ({"low": 0.6}, "[0.60, 1.00] nats, more than"),
    ({"low": 0.3}, "[0.30, 1.00] nats, not shown to be more than"),
    ({"ends": False}, "0.80 nats, not shown to be more than"),
  ],
)
def test_a_direction_is_held_against_that_of_another_match(changes, word):
  _, line, _ = said(effects("a:1 > b:2", **changes))
  assert "dose 4, a match's direction raises" in line
  assert word in line
  assert (
    "another match (0.40); the native by 2.00, one at random by 0.00" in line
  )


def test_substitution_is_of_as_many_latents_as_were_tried():
  assert said(effects("a:1 > b:2"))[2] == (
    "a:1 > b:2: codes of 300 latents from their matches keep 0.70 [0.50, 0.90] "
    "of the KL that their means lose, those of matches dealt anew 0.05."
  )
