"""Spliced cross-entropy against logits worked out one by one."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from gemma_jax import models
from gemma_jax.metrics import (
  ce_recovered,
  head_losses,
  spliced_cross_entropy,
)

READ, WRITE = "blocks.2.mlp_in", "blocks.2.mlp_out"
W, T = 5, 14

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module", params=["gemma2-tiny", "gemma3-tiny"])
def model(request, one_device):
  return models.load_model(f"random:{request.param}", mesh=one_device)


@pytest.fixture(scope="module")
def gemma2(one_device):
  return models.load_model("random:gemma2-tiny", mesh=one_device)


@pytest.fixture(scope="module")
def text():
  """(tokens, mask): BOS first, and a tail of padding in every window."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(4, 250, (W, T)).astype(np.int32)
  mask = np.ones((W, T), bool)
  tokens[:, 0], mask[:, 0] = 2, False
  for i in range(W):
    tokens[i, T - i :], mask[i, T - i :] = 0, False
  mask[2, 6] = False  # and a special token in the middle
  return tokens, mask


def identity(x, y):
  return y


def zero(x, y):
  return jnp.zeros_like(y)


def halve(x, y):
  return 0.5 * y


def splice(model, text, replacements, **options):
  sites = {"read": READ, "write": WRITE, "batch_size": W}
  return spliced_cross_entropy(model, *text, replacements, **(sites | options))


def by_hand(model, text, value=None):
  """(ce, kl) means in float64, with `value(y)` in the place of WRITE."""
  tokens, mask = text
  edits = {}
  if value is not None:
    keep = jnp.asarray(mask)[..., None]
    edits = {WRITE: lambda y: jnp.where(keep, value(y), y)}
  clean, _ = model.forward(tokens)
  logits, _ = model.forward(tokens, edits=edits)
  clean, logp = (
    special.log_softmax(np.asarray(a, np.float64), axis=-1)[:, :-1]
    for a in (clean, logits)
  )
  counted = mask[:, 1:]
  targets = tokens[:, 1:, None]
  ce = -np.take_along_axis(logp, targets, -1)[..., 0][counted].mean()
  kl = np.sum(np.exp(clean) * (clean - logp), -1)[counted].mean()
  return ce, kl


@pytest.fixture(scope="module")
def numbers(model, text):
  return splice(model, text, {"same": identity, "zero": zero, "half": halve})


def test_clean_loss_is_that_of_the_logits_on_unmasked_targets(
  model, text, numbers
):
  assert set(numbers) == {"clean", "same", "zero", "half"}
  clean = numbers["clean"]
  assert clean["ce"] == pytest.approx(by_hand(model, text)[0], rel=1e-5)
  assert clean["tokens"] == text[1][:, 1:].sum()
  assert clean["kl"] == pytest.approx(0, abs=1e-6)


def test_the_identity_changes_nothing(numbers):
  same = numbers["same"]
  assert same["ce"] == pytest.approx(numbers["clean"]["ce"], abs=1e-6)
  assert abs(same["kl"]) < 1e-6


def test_loss_and_kl_of_a_replacement_are_those_of_its_logits(
  model, text, numbers
):
  for name, value in (("zero", jnp.zeros_like), ("half", lambda y: y / 2)):
    ce, kl = by_hand(model, text, value)
    assert numbers[name]["ce"] == pytest.approx(ce, rel=1e-5)
    assert numbers[name]["kl"] == pytest.approx(kl, rel=1e-3)
    assert numbers[name]["tokens"] == numbers["clean"]["tokens"]
  assert numbers["zero"]["kl"] > numbers["half"]["kl"] > 1e-4


def test_a_function_gets_the_site_read_and_the_site_replaced(gemma2, text):
  _, sites = gemma2.forward(text[0], capture=(READ, WRITE))

  def as_they_are(x, y):
    same = jnp.allclose(x, sites[READ], atol=1e-4)
    same &= jnp.allclose(y, sites[WRITE], atol=1e-4)
    return jnp.where(same, y, jnp.nan)

  got = splice(gemma2, text, {"checked": as_they_are})
  assert got["checked"]["ce"] == pytest.approx(got["clean"]["ce"], abs=1e-6)


def test_masked_positions_keep_what_they_had(gemma2, text):
  masked = jnp.asarray(~text[1])[..., None]

  def ruins_the_masked(x, y):
    return jnp.where(masked, jnp.nan, y)

  got = splice(gemma2, text, {"ruined": ruins_the_masked})
  assert got["ruined"]["ce"] == pytest.approx(got["clean"]["ce"], abs=1e-6)
  # The same function acts where everything counts, so it is not idle.
  whole = splice(
    gemma2, (text[0], np.ones_like(text[1])), {"ruined": ruins_the_masked}
  )
  assert np.isnan(whole["ruined"]["ce"])


@pytest.mark.parametrize("batch_size", [3, 8])
def test_a_last_batch_that_is_not_full_changes_nothing(
  batch_size, gemma2, text
):
  expected = splice(gemma2, text, {"zero": zero})
  got = splice(gemma2, text, {"zero": zero}, batch_size=batch_size)
  for name, numbers in expected.items():
    assert got[name]["tokens"] == numbers["tokens"]
    assert got[name]["ce"] == pytest.approx(numbers["ce"], rel=1e-5)
    assert got[name]["kl"] == pytest.approx(numbers["kl"], abs=1e-5)


def test_blocks_of_logits_are_only_a_matter_of_memory(
  gemma2, text, monkeypatch
):
  expected = splice(gemma2, text, {"zero": zero})
  monkeypatch.setattr(head_losses, "ROWS", 9)
  monkeypatch.setattr(head_losses, "TOKENS", 17)
  got = splice(gemma2, text, {"zero": zero})
  for name, numbers in expected.items():
    assert got[name]["ce"] == pytest.approx(numbers["ce"], rel=1e-5)
    assert got[name]["kl"] == pytest.approx(numbers["kl"], abs=1e-5)


def test_an_sae_reads_the_site_that_it_replaces(gemma2, text):
  got = splice(gemma2, text, {"same": lambda x, y: x, "zero": zero}, read=WRITE)
  assert abs(got["same"]["kl"]) < 1e-6
  assert got["zero"]["ce"] == pytest.approx(
    by_hand(gemma2, text, jnp.zeros_like)[0], rel=1e-5
  )


def test_sites_may_go_by_their_other_names(gemma2, text):
  root = "model.layers.2"
  got = splice(
    gemma2,
    text,
    {"zero": zero},
    read=f"{root}.pre_feedforward_layernorm.output",
    write=f"{root}.post_feedforward_layernorm.output",
  )
  assert got == splice(gemma2, text, {"zero": zero})


def test_sites_of_two_blocks_are_refused(gemma2, text):
  with pytest.raises(ValueError, match="must be sites of one block"):
    splice(gemma2, text, {"zero": zero}, read="blocks.1.mlp_in")


def test_eight_devices_give_the_numbers_of_one(gemma2, text):
  spread = models.load_model("random:gemma2-tiny")
  got = splice(spread, text, {"zero": zero}, batch_size=8)
  expected = splice(gemma2, text, {"zero": zero})
  for name, numbers in expected.items():
    assert got[name]["ce"] == pytest.approx(numbers["ce"], rel=1e-5)
    assert got[name]["tokens"] == numbers["tokens"]


@pytest.mark.parametrize(
  ("clean", "spliced", "ablated", "expected"),
  [
    (2.0, 2.0, 5.0, 1.0),  # the identity
    (2.0, 5.0, 5.0, 0.0),  # no better than ablating
    (2.0, 2.3, 5.0, 0.9),
    (2.0, 8.0, 5.0, -1.0),  # worse than ablating
    (5.0, 4.0, 2.0, 2 / 3),  # a site that harms
  ],
)
def test_ce_recovered_is_the_share_of_the_ablations_cost(
  clean, spliced, ablated, expected
):
  assert ce_recovered(clean, spliced, ablated) == pytest.approx(expected)


def test_where_ablation_costs_nothing_no_share_is_defined():
  assert np.isnan(ce_recovered(2.0, 2.1, 2.0))
