"""Small windows to harvest from."""

import numpy as np

from gemma_jax.data import Windows

SITES = ("blocks.1.mlp_in", "blocks.1.mlp_out")
BOS, PAD, CONTEXT = 2, 0, 12


def make_windows(count, seed=0):
  """Windows of 12 tokens of three documents, each padded by its own amount."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(4, 200, (count, CONTEXT)).astype(np.int32)
  tokens[:, 0] = BOS
  mask = np.ones((count, CONTEXT), bool)
  mask[:, 0] = False
  document = np.sort(rng.integers(0, 3, (count, 1)), axis=0)
  document = np.repeat(document, CONTEXT, 1).astype(np.int32)
  for i, length in enumerate(rng.integers(1, CONTEXT, count)):
    tokens[i, length:], mask[i, length:] = PAD, False
    document[i, length:] = -1
  names = tuple((f"id{i}", "source", f"name{i}") for i in range(3))
  return Windows(tokens, mask, document, names)
