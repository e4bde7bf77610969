"""Two models on places of a text that are paired, and what changes in one."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma_jax import models
from gemma_jax.dictionaries import Dictionary
from gemma_jax.metrics import document_interval, splice_losses
from gemma_jax.models import sites


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
  """A model on a text of which P places are paired with another model's.

  Attributes:
    model: with its head.
    dictionary: an SAE of one resid_post of the model.
    tokens: int [W, T].
    mask: bool [W, T], positions that count.
    at: int [P, 2], window and position of each place.
    document: int [P], whose text it is, the same on both sides.
  """

  model: models.Model
  dictionary: Dictionary
  tokens: np.ndarray
  mask: np.ndarray
  at: np.ndarray
  document: np.ndarray

  def __post_init__(self):
    own, cfg = self.dictionary.config, self.model.config
    name = sites.parse(own.read, cfg).name
    if own.is_transcoder or own.layer_norm or name != "resid_post":
      raise ValueError(
        "expected an SAE of one resid_post without layer_norm, got one that "
        f"reads {own.read} and writes {own.write}, layer_norm={own.layer_norm}"
      )
    if own.d_in != cfg.width:
      raise ValueError(
        f"expected a dictionary of the model's width, {cfg.width}, got "
        f"{own.d_in}"
      )
    count = len(self.document)
    if self.mask.shape != self.tokens.shape or self.at.shape != (count, 2):
      raise ValueError(
        "expected tokens and mask [W, T], at [P, 2] and document [P], got "
        f"{self.tokens.shape}, {self.mask.shape}, {self.at.shape} and "
        f"{self.document.shape}"
      )
    if (np.diff(self.document) < 0).any():
      raise ValueError("expected places by document, as pair_windows has them")

  @property
  def site(self) -> str:
    """What the dictionary reads and writes."""
    return self.dictionary.config.read

  def decoder(self, latents) -> np.ndarray:
    """Decoder rows of some latents, float32 [K, E]."""
    return np.asarray(self.dictionary.params["W_dec"])[np.asarray(latents)]


def cut(
  a: Side, b: Side, config: Mapping[str, Any]
) -> tuple[Side, Side, np.ndarray]:
  """The first `documents` of the text, windows cut to `context` tokens.

  Returns:
    Both sides with the windows and places that are left, and which of the
    places these are, bool [P].

  Raises:
    ValueError: sides of other places, or none left.
  """
  if not np.array_equal(a.document, b.document):
    raise ValueError(
      f"expected the same places on both sides, got {len(a.document)} and "
      f"{len(b.document)} of other documents"
    )
  first = np.unique(a.document)[: config["documents"]]
  kept = np.isin(a.document, first)
  for side in (a, b):
    kept &= side.at[:, 1] < config["context"]
  if not kept.any():
    raise ValueError(
      f"expected paired places in the first {config['context']} tokens of "
      f"the windows of {len(first)} documents, got none"
    )
  left = []
  for side in (a, b):
    window, moved = np.unique(side.at[kept, 0], return_inverse=True)
    left.append(
      dataclasses.replace(
        side,
        tokens=side.tokens[window, : config["context"]],
        mask=side.mask[window, : config["context"]],
        at=np.stack([moved, side.at[kept, 1]], axis=1),
        document=side.document[kept],
      )
    )
  return *left, kept


def owners(side: Side, label: np.ndarray) -> np.ndarray:
  """Labels of places, spread to the tokens before each, int [W, T].

  -1 behind the last place of a window: the other model may not have that.
  """
  width = side.tokens.shape[1]
  known = np.full((len(side.tokens), width + 1), -1, np.int64)
  known[*side.at.T] = label
  following = np.where(known >= 0, np.arange(width + 1), width)
  following = np.minimum.accumulate(following[:, ::-1], axis=1)[:, ::-1]
  return np.take_along_axis(known, following[:, :width], axis=1)


def divergence(side: Side, replacements, owner: np.ndarray, config):
  """Owners that are known; of each its tokens, and KL of each replacement."""
  losses = splice_losses(
    side.model,
    side.tokens,
    side.mask,
    replacements,
    read=side.site,
    write=side.site,
    batch_size=config["batch_size"],
    document=owner,
  )
  there = losses.documents >= 0
  kl = {name: sums[there] for name, sums in losses.kl.items()}
  return losses.documents[there], losses.tokens[there], kl


def values(side: Side, config) -> np.ndarray:
  """The site in all windows, float32 [W, T, E]."""
  size, parts = config["batch_size"], []
  for start in range(0, len(side.tokens), size):
    some = side.tokens[start : start + size]
    padded = np.pad(some, ((0, size - len(some)), (0, 0)))
    _, found = side.model.forward(
      padded, capture=(side.site,), stop_at=side.site
    )
    values = np.asarray(found[side.site], np.float32)
    parts.append(values[: len(some)])
  return np.concatenate(parts)


def dealt(count: int, rng) -> np.ndarray:
  """Another one for each of `count`, each once."""
  order = rng.permutation(count)
  other = np.empty(count, int)
  other[order] = np.roll(order, 1)
  return other


def interval(values, config, seed) -> dict[str, float | None]:
  """Of a mean over latents."""
  return ends(values, np.ones(len(values)), config, seed)


def ends(top, bottom, config, seed) -> dict[str, float | None]:
  """Interval of a ratio of sums over units that are drawn together."""
  ends = document_interval(
    top, bottom, resamples=config["resamples"], seed=seed
  )
  return dict(zip(("low", "high"), ends or (None, None), strict=True))
