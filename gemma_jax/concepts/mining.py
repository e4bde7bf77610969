"""Prompts for a vector, found in a text: places where its words come next.

A place is a window and the position of an answer in it. Places are sought by
what a vector says, never by where it acts, so that no test looks at what it
was chosen by.
"""

import numpy as np
from scipy import optimize

from gemma_jax.concepts.damage import Prompts
from gemma_jax.data import Windows

LEAST = 8  # tokens before an answer


def places(windows: Windows, wanted: np.ndarray) -> np.ndarray:
  """Where a wanted token stands behind some text, int [n, 2].

  Args:
    windows: of a text.
    wanted: bool [V].
  """
  here = wanted[windows.tokens] & windows.mask
  here[:, : LEAST + 1] = False
  return np.argwhere(here)


def spread(
  found: np.ndarray,
  groups: np.ndarray,
  documents: np.ndarray,
  count: int,
  rng: np.random.Generator,
) -> np.ndarray:
  """Up to `count` places, evenly over groups and then over documents.

  Args:
    found: places [n, 2].
    groups: int [n], such as the word that comes next.
    documents: int [n], that the places are in.
    count: how many are wanted.
    rng: decides among the places of a document.
  """
  order = rng.permutation(len(found))
  groups, documents = groups[order], documents[order]
  both = np.stack([groups, documents], axis=1)
  repeat = _turns(np.unique(both, axis=0, return_inverse=True)[1].ravel())
  first = order[np.argsort(_turns(groups, repeat), kind="stable")]
  return found[first[:count]]


def _turns(labels: np.ndarray, before: np.ndarray | float = 0) -> np.ndarray:
  """For each row, how many of its label come earlier, in order of `before`."""
  order = np.lexsort((np.broadcast_to(before, labels.shape), labels))
  starts = np.flatnonzero(np.diff(labels[order], prepend=labels.min() - 1))
  sizes = np.diff(np.append(starts, len(labels)))
  out = np.empty(len(labels))
  out[order] = np.arange(len(labels)) - np.repeat(starts, sizes)
  return out


def prompts(
  windows: Windows,
  at: np.ndarray,
  num_bytes: np.ndarray,
  *,
  context: int,
  bos_id: int | None,
  pad_id: int,
) -> Prompts:
  """The text before each place, and the token there as the answer.

  Args:
    windows: that the places are in, the first position a BOS if there is one.
    at: places [P, 2].
    num_bytes: of each token of the vocabulary, int [V].
    context: T, positions of a prompt with its BOS.
    bos_id: begins prompts; None for models without.
    pad_id: fills short ones.
  """
  tokens = np.full((len(at), context), pad_id, np.int32)
  mask = np.zeros((len(at), context), bool)
  answers = windows.tokens[at[:, 0], at[:, 1]].astype(np.int32)
  for row, (window, position) in enumerate(at.tolist()):
    own = windows.tokens[window, max(0, position - context) : position]
    tokens[row, context - len(own) :] = own
    mask[row, context - len(own) :] = True
    if bos_id is not None:
      tokens[row, context - len(own)] = bos_id
  edited = mask.copy()
  if bos_id is not None:
    edited[np.arange(len(at)), mask.argmax(1)] = False
  return Prompts(
    tokens,
    mask,
    edited,
    answers[:, None],
    np.full((len(at), 1), context - 1, np.int32),
    num_bytes[answers].astype(np.float64),
  )


def match(wanted: np.ndarray, offered: np.ndarray) -> np.ndarray:
  """For each of n values another of m offered, as near in sum as can be.

  Args:
    wanted: float [n], clean log-probabilities of a concept's prompts.
    offered: float [m], of prompts that may serve as controls, m >= n.

  Returns:
    int [n], indices into `offered`, no two alike.

  Raises:
    ValueError: fewer are offered than wanted.
  """
  if len(offered) < len(wanted):
    raise ValueError(
      f"{len(wanted)} controls are wanted and {len(offered)} offered; take a "
      "larger pool of prompts, or fewer prompts a concept"
    )
  away = np.abs(wanted[:, None] - offered[None])
  return optimize.linear_sum_assignment(away)[1]
