"""Continuations with and without the cache of keys and values."""

import dataclasses

import numpy as np
import pytest

from gemma_jax import models
from gemma_jax.models import attention, edits

pytestmark = pytest.mark.usefixtures("quick_compiles")

# A window, learned positions; test_generate_torch.py has every family.
FAMILIES = ("gemma3", "gpt2")
LENGTHS = np.array([[20], [7], [14]])  # two beyond the window of 12


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, one_device):
  return models.load_model(f"random:{request.param}-tiny", mesh=one_device)


@pytest.fixture(scope="module")
def tokens():
  return np.random.default_rng(0).integers(4, 1000, (3, 20))


def alone(model, tokens, row, **kwargs):
  """The continuation of one unpadded row, without the cache."""
  prompt = tokens[row : row + 1, : LENGTHS[row, 0]]
  out = model.generate(prompt, max_new_tokens=16, cache=False, **kwargs)
  return out[0, prompt.shape[1] :]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_continues_as_its_rows_do_alone(model, tokens, side):
  index = np.arange(20)[None]
  mask = index < LENGTHS if side == "right" else index >= 20 - LENGTHS
  padded = np.zeros_like(tokens)
  for row, length in enumerate(LENGTHS[:, 0]):
    padded[row, mask[row]] = tokens[row, :length]
  out = model.generate(padded, mask=mask, max_new_tokens=16)
  np.testing.assert_array_equal(out[:, :20], padded)
  for row in range(3):
    np.testing.assert_array_equal(out[row, 20:], alone(model, tokens, row))


def test_edits_act_on_the_prompt_and_on_every_token_after_it(model, tokens):
  rng = np.random.default_rng(1)
  steer = {
    "blocks.*.mlp_out": edits.scale(-0.5),
    "blocks.2.resid_post": edits.add(rng.normal(size=model.config.width)),
  }
  cached = model.generate(tokens, max_new_tokens=16, edits=steer)
  whole = model.generate(tokens, max_new_tokens=16, edits=steer, cache=False)
  clean = model.generate(tokens, max_new_tokens=16)
  np.testing.assert_array_equal(cached, whole)
  assert (cached != clean).any()


def test_samples_are_the_same_with_and_without_the_cache(model, tokens):
  one, two = (
    model.generate(tokens, max_new_tokens=8, temperature=0.8, cache=c, seed=3)
    for c in (True, False)
  )
  np.testing.assert_array_equal(one, two)


def test_the_prompt_alone_comes_back_when_nothing_is_added(model, tokens):
  out = model.generate(tokens, max_new_tokens=0)
  np.testing.assert_array_equal(out, tokens)


def test_more_tokens_than_the_context_holds_is_an_error(model, tokens):
  with pytest.raises(ValueError, match=r"257 tokens long.*longest is 256"):
    model.generate(tokens, max_new_tokens=237)


@pytest.mark.parametrize(
  "cache", [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_the_models_attention_runs_in_generation(
  model, tokens, cache, monkeypatch
):
  used = set()
  choose = attention.choose

  def spy(cfg, implementation, length, dtype):
    used.add(implementation)
    return choose(cfg, implementation, length, dtype)

  monkeypatch.setattr(attention, "choose", spy)
  chunked = dataclasses.replace(model, attention="chunked")
  out = chunked.generate(tokens[:, :15], max_new_tokens=3, cache=cache)
  assert used == {"chunked"}
  expected = model.generate(tokens[:, :15], max_new_tokens=3, cache=cache)
  np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("count", [-1, 2.0, "3"])
def test_a_count_that_is_none_is_an_error(model, tokens, count):
  with pytest.raises(ValueError, match="max_new_tokens="):
    model.generate(tokens, max_new_tokens=count)
