"""Gemma 3 270M itself, against Hugging Face in float32 and eager mode."""

import pydoc_data.topics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax.tree_util import Partial

from gemma_jax import metrics, models
from gemma_jax.models import DEMO, gemma
from tests.models.torch_models import relative, torch_sites

pytestmark = pytest.mark.torch

LENGTH = 700  # beyond the window of 512


@pytest.fixture(scope="module")
def theirs():
  return transformers.AutoModelForCausalLM.from_pretrained(
    models.resolve(DEMO), attn_implementation="eager", dtype=torch.float32
  ).eval()


@pytest.fixture(scope="module")
def ours(one_device):
  return models.load_model(DEMO, dtype="float32", mesh=one_device)


@pytest.fixture(scope="module")
def tokens(ours):
  text = pydoc_data.topics.topics["typesseq"]
  return np.array([ours.tokenizer(text)["input_ids"][:LENGTH]])


def test_logits_and_every_site_equal_hugging_face_beyond_the_window(
  theirs, ours, tokens
):
  logits, expected = torch_sites(theirs, tokens)
  got, found = ours.forward(tokens, capture=tuple(expected))
  assert tokens.shape == (1, LENGTH)
  assert np.abs(np.asarray(got) - logits).max() < 1e-3
  worst = {k: relative(np.asarray(found[k]), v) for k, v in expected.items()}
  assert max(worst.values()) < 1e-4, worst


@pytest.mark.slow
def test_greedy_continuations_of_a_padded_batch_agree_for_64_tokens(
  theirs, ours, tokens
):
  """Padded on the left there, and on the right here."""
  prompts = [tokens[0, :40], np.concatenate([tokens[0, :1], tokens[0, 90:114]])]
  left, right = np.zeros((2, 2, 40), np.int64)
  mask = np.zeros((2, 40), bool)
  for row, prompt in enumerate(prompts):
    left[row, 40 - len(prompt) :] = right[row, : len(prompt)] = prompt
    mask[row, : len(prompt)] = True
  with torch.no_grad():
    expected = theirs.generate(
      torch.tensor(left),
      attention_mask=torch.tensor(mask[:, ::-1].copy()).long(),
      do_sample=False,
      max_new_tokens=64,
      pad_token_id=0,
    ).numpy()
  assert expected.shape == (2, 104)
  assert (expected[0, 40:] != expected[1, 40:]).mean() > 0.5
  got = ours.generate(right, mask=mask, max_new_tokens=64)
  np.testing.assert_array_equal(got[:, 40:], expected[:, 40:])
  whole = ours.generate(right, mask=mask, max_new_tokens=16, cache=False)
  np.testing.assert_array_equal(whole, got[:, :56])


@pytest.mark.slow
def test_the_true_mlp_in_the_transcoders_place_changes_nothing(ours, tokens):
  layer = 9
  weights = jax.tree.map(lambda x: x[layer], ours.params["blocks"])

  def of(weights, x, y):
    return gemma.mlp(ours.config, weights, x, lambda name, value: value)

  mlp = Partial(of, weights)
  read, write = f"blocks.{layer}.mlp_in", f"blocks.{layer}.mlp_out"
  _, found = ours.forward(tokens, capture=(read, write), stop_at=write)
  assert metrics.fvu(found[write], mlp(found[read], None)) < 1e-6
  # Without the gain the input is another one, and it must show.
  _, bare = ours.forward(
    tokens, capture=(f"blocks.{layer}.mlp_norm",), stop_at=write
  )
  wrong = mlp(bare[f"blocks.{layer}.mlp_norm"], None)
  assert metrics.fvu(found[write], wrong) > 0.1

  mask = np.arange(LENGTH)[None] >= LENGTH - 128
  loss = metrics.spliced_cross_entropy(
    ours,
    tokens,
    mask,
    {"mlp": mlp, "zero": lambda x, y: jnp.zeros_like(y)},
    read=read,
    write=write,
    batch_size=1,
  )
  assert abs(loss["mlp"]["ce"] - loss["clean"]["ce"]) < 1e-4
  assert loss["mlp"]["kl"] < 1e-4
  assert loss["zero"]["ce"] - loss["clean"]["ce"] > 0.01


@pytest.mark.slow
def test_bfloat16_is_as_near_to_float32_as_hugging_faces(
  theirs, tokens, one_device
):
  """Each against float32, for bfloat16 rounds along another way in each."""
  tokens = tokens[:, :256]
  half = transformers.AutoModelForCausalLM.from_pretrained(
    models.resolve(DEMO), attn_implementation="eager", dtype=torch.bfloat16
  ).eval()
  with torch.no_grad():
    exact, rough = (
      model(torch.tensor(tokens), use_cache=False).logits.float().numpy()
      for model in (theirs, half)
    )
  ours = models.load_model(DEMO, dtype="bfloat16", mesh=one_device)
  assert ours.params["embed"].dtype == jnp.bfloat16
  got, _ = ours.forward(tokens)

  def error(logits):
    return float(np.sqrt(np.mean(np.square(np.asarray(logits) - exact))))

  def kl(logits):
    p, q = (jax.nn.log_softmax(jnp.asarray(x)) for x in (exact, logits))
    return float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1)))

  assert 0 < error(got) <= 1.2 * error(rough)
  assert 0 < kl(got) <= 1.2 * kl(rough)
