"""Continuations against Hugging Face's `generate`."""

import dataclasses

import numpy as np
import pytest
import torch

from gemma_jax import models
from tests.models.torch_models import tiny

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("quick_compiles")]

PAD = 3
PROMPT = np.random.default_rng(0).integers(4, 1000, (3, 40))[:, :20]


def continued(theirs, mask, new):
  with torch.no_grad():
    return theirs.generate(
      torch.tensor(PROMPT),
      attention_mask=torch.tensor(mask.astype(int)),
      do_sample=False,
      max_new_tokens=new,
      pad_token_id=PAD,
    ).numpy()[:, 20:]


def load(theirs, directory, mesh, **changes):
  """Ours from what theirs saves, with other ids of special tokens."""
  theirs.save_pretrained(directory)
  ours = models.load_model(directory, mesh=mesh)
  cfg = dataclasses.replace(ours.config, **changes)
  return dataclasses.replace(ours, config=cfg)


# With a small embedding a tied model does not repeat its last token.
VARIED = {"embedding": 0.3, "matrices": 3.0}


@pytest.mark.parametrize(
  "preset",
  [
    "gemma3-tiny",
    "neox-tiny",
    "llama-tiny",
    pytest.param("gemma2-tiny", marks=pytest.mark.slow),
    pytest.param("gpt2-tiny", marks=pytest.mark.slow),
  ],
)
def test_greedy_continuations_of_padded_rows_equal_hugging_faces(
  preset, tmp_path, one_device
):
  theirs, new = tiny(preset, **VARIED), 24
  lengths = np.array([20, 13, 4])
  mask = np.arange(20) >= 20 - lengths[:, None]
  expected = continued(theirs, mask, new)
  assert expected.shape == (3, new)
  assert len(np.unique(expected)) > 15
  # As theirs does, ours never ends.
  unused = int(np.setdiff1d(np.arange(1000), expected)[-1])
  endless = load(theirs, tmp_path, one_device, eos_ids=(unused,))

  def added(prompt, mask, **kwargs):
    out = endless.generate(prompt, mask=mask, max_new_tokens=new, **kwargs)
    np.testing.assert_array_equal(out[:, :20], prompt)
    return out[:, 20:]

  np.testing.assert_array_equal(added(PROMPT, mask), expected)
  np.testing.assert_array_equal(added(PROMPT, mask, cache=False), expected)
  turned = [np.roll(x, n) for x, n in zip(PROMPT, lengths, strict=True)]
  turned = added(np.stack(turned), mask[:, ::-1])
  np.testing.assert_array_equal(turned, expected)


@pytest.mark.parametrize("preset", ["gemma2-tiny", "llama-tiny"])
def test_each_row_ends_where_hugging_faces_does_at_either_of_two_tokens(
  preset, tmp_path, one_device
):
  theirs, new = tiny(preset, **VARIED), 12
  everything = np.ones(PROMPT.shape, bool)
  free = continued(theirs, everything, new)
  # One row's fourth token and another's seventh; the third row has neither.
  ends = [int(free[0, 3]), int(free[1, 6])]
  theirs.generation_config.eos_token_id = ends
  expected = continued(theirs, everything, new)
  assert (expected != PAD).sum(axis=1).tolist() == [4, 7, new]
  theirs.config.eos_token_id, theirs.config.pad_token_id = ends, PAD
  ours = load(theirs, tmp_path, one_device)
  assert (ours.config.eos_ids, ours.config.pad_id) == (tuple(ends), PAD)
  for cache in (True, False):
    got = ours.generate(PROMPT, max_new_tokens=new, cache=cache)
    np.testing.assert_array_equal(got[:, 20:], expected)
