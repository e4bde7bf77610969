"""Text around a row of a store, and what a direction says of the vocabulary."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from gemma_jax.activations import ActivationStore
from gemma_jax.data import Windows
from gemma_jax.models import Model
from gemma_jax.report.page import Context

BEFORE, AFTER = 32, 16  # tokens shown around a peak
ToText = Callable[[Sequence[int]], list[str]]


def to_text(model: Model) -> ToText:
  """Token ids -> what each of them reads as."""
  tokenizer = model.tokenizer
  if tokenizer is None:
    return lambda ids: [f"<{i}>" for i in ids]
  return lambda ids: [
    token or f"<{i}>"
    for i, token in zip(
      ids, tokenizer.convert_ids_to_tokens([int(i) for i in ids]), strict=True
    )
  ]


def vocabulary(
  directions: np.ndarray, model: Model, count: int
) -> tuple[list[list[str]], list[list[str]]]:
  """Tokens whose logits each direction raises and lowers most.

  Args:
    directions: [n, D] of the residual stream; others say nothing and get
      empty lists.
    model: for the final norm's gain and the unembedding.
    count: tokens for each side.
  """
  if directions.shape[1] != model.config.width:
    return [[] for _ in directions], [[] for _ in directions]
  words = to_text(model)
  gain = model.config.norm_offset + np.asarray(
    model.params["final_norm"], np.float32
  )
  head = model.params["embed" if model.config.tied else "unembed"]
  logits = np.asarray((directions * gain) @ head.T, np.float32)
  order = np.argsort(logits, axis=1)
  return (
    [words(row[::-1][:count]) for row in order],
    [words(row[:count]) for row in order],
  )


def labels(store: ActivationStore) -> dict[str, np.ndarray]:
  """What `context` needs to know of every row."""
  names = ("token", "document", "position")
  return {name: store.read(0, len(store), name) for name in names}


def context(
  label: Mapping[str, np.ndarray],
  windows: Windows,
  row: int,
  activations: Callable[[int, int], np.ndarray],
  words: ToText,
) -> Context:
  """The tokens around a row, within its window and document.

  Args:
    label: of `labels`.
    windows: that the store was harvested from.
    row: the peak.
    activations: (start, stop) -> those of the rows, [n].
    words: of `to_text`.
  """
  document, position = label["document"], label["position"]

  def together(a, b):  # neighbours in one window and document
    return document[a] == document[b] and position[a] + 1 == position[b]

  start = stop = row
  while start > 0 and row - start < BEFORE and together(start - 1, start):
    start -= 1
  last = len(document) - 1
  while stop < last and stop - row < AFTER and together(stop, stop + 1):
    stop += 1
  _, source, name = windows.documents[document[row]]
  return Context(
    tokens=words(label["token"][start : stop + 1]),
    activations=activations(start, stop + 1).tolist(),
    peak=row - start,
    source=source,
    document=name,
  )
