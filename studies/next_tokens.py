"""Next-token distributions of two models, by blocks of tokens."""

import functools
from collections.abc import Sequence

import jax
import numpy as np

from gemma_jax import models
from gemma_jax.metrics import similarity

ROWS = 128  # tokens of which two models' logits exist at once


def distributions(
  a,
  b,
  names: Sequence[str],
  *,
  tokens: int = 0,
  other: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
  """Measures of next-token distributions, means over each text's tokens, [N].

  Args:
    a: one model, a `comparisons.Side` with its head.
    b: the other, of the same vocabulary.
    names: of `guard.TOKENS`.
    tokens: of each text, spread evenly; 0: all.
    other: for each prompt, the one of which b's distributions are taken.
  """
  text, first, second = token_rows(a.reading["count"], other, tokens)
  spare = -len(first) % ROWS
  first, second = np.pad(first, (0, spare)), np.pad(second, (0, spare))
  parts = []
  for start in range(0, len(first), ROWS):
    part = slice(start, start + ROWS)
    parts.append(
      jax.device_get(
        _distances(
          tuple(names),
          (a.subject.config, b.subject.config),
          (a.head, b.head),
          a.reading["last"][first[part]],
          b.reading["last"][second[part]],
        )
      )
    )
  whole = {n: np.concatenate([part[n] for part in parts]) for n in names}
  return {
    n: np.bincount(text, x[: len(text)].astype(np.float64)) / np.bincount(text)
    for n, x in whole.items()
  }


def token_rows(count: np.ndarray, other: np.ndarray | None, tokens: int = 0):
  """Text, row of one model and row of the other, of each token compared.

  Args:
    count: tokens of each text, [N].
    other: for each text, that of the other model's row; None: the same.
    tokens: of each text, spread evenly; 0: all.
  """
  offsets = [
    np.unique(np.linspace(0, n - 1, min(n, tokens or n)).round().astype(int))
    for n in count
  ]
  text = np.repeat(np.arange(len(count)), [len(own) for own in offsets])
  offset, starts = np.concatenate(offsets), np.cumsum(count) - count
  beside = text if other is None else other[text]
  return text, starts[text] + offset, starts[beside] + offset % count[beside]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _distances(names, configs, heads, x, y):
  logits = [
    models.unembed(cfg, head, rows.astype(head["embed"].dtype))
    for cfg, head, rows in zip(configs, heads, (x, y), strict=True)
  ]
  # Rows of the embedding beyond the tokenizer's are padding.
  size = min(z.shape[-1] for z in logits)
  return {
    name: getattr(similarity, name)(*(z[:, :size] for z in logits))
    for name in names
  }
