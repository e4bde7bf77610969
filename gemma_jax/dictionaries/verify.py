"""Whether a dictionary sits at its site: L0 and FVU on a little text.

Wrong hooks are how loading dictionaries fails without an error: shapes fit, and
what is read has another scale, or lies before a norm instead of behind it.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable

import jax
import numpy as np

from gemma_jax.data import Document, make_windows
from gemma_jax.data.standard_library import reference
from gemma_jax.dictionaries.config import DictionaryConfig
from gemma_jax.dictionaries.dictionary import Dictionary, reconstruct_prefixes
from gemma_jax.metrics import RunningFVU
from gemma_jax.models import Model, ModelConfig
from gemma_jax.models import sites as sites_lib

ROWS = 128  # tokens encoded at a time
SHOWN = 6  # candidates in an error
TOPIC = 2000  # characters that a text of the standard library has at least


@dataclasses.dataclass(frozen=True)
class Verified:
  """What a dictionary does at a pair of sites.

  Attributes:
    read: site of the input; of a crosscoder, sites joined by "+".
    write: site of the output.
    l0: mean number of active latents per token.
    fvu: sum |y - y_hat|^2 / sum |y - mean(y)|^2 over all tokens.
    label: the L0 that it should have, where that is known.
    tokens: how many were measured; no BOS, no first position, no padding.
  """

  read: str
  write: str
  l0: float
  fvu: float
  label: float | None
  tokens: int

  @property
  def fits(self) -> bool:
    """L0 within a factor of 2 of its label, and FVU at most 1."""
    near = self.label is None or 0.5 <= self.l0 / self.label <= 2
    return near and self.fvu <= 1  # NaN is not

  def __str__(self) -> str:
    where = self.read
    if self.write != self.read:
      where += f" -> {self.write}"
    return f"{where}: L0 {self.l0:.3g}, FVU {self.fvu:.3g}"


class WrongSiteError(ValueError):
  """A dictionary does not do at its site what its label says.

  Attributes:
    found: what it does there.
    candidates: what it would do elsewhere, those that fit first.
  """

  def __init__(self, found: Verified, candidates: Iterable[Verified]):
    self.found = found
    self.candidates = tuple(
      sorted(candidates, key=lambda c: (not c.fits, _order(c.fvu)))
    )
    label = "no label" if found.label is None else f"label {found.label:g}"
    fitting = [c for c in self.candidates if c.fits]
    if fitting:
      best = fitting[0]
      site = repr(best.read)
      if best.write != best.read:
        site = f"({best.read!r}, {best.write!r})"
      advice = f"It fits {best}. Load it with site={site}."
    else:
      advice = (
        "It fits no neighbouring site. Check that the model is the one that it "
        "was trained on, and whether its input was scaled or its skip turned."
      )
    tried = "; ".join(map(str, self.candidates[:SHOWN])) or "nothing"
    super().__init__(
      f"{found} ({label}) over {found.tokens} tokens. Expected an L0 within a "
      f"factor of 2 of the label and an FVU of at most 1. {advice} Tried: "
      f"{tried}."
    )


def _order(fvu):
  return math.inf if math.isnan(fvu) else fvu


def verify(
  dictionary: Dictionary,
  model: Model,
  text: str | None = None,
  *,
  tokens=None,
  mask=None,
  max_tokens: int = 512,
  context: int = 128,
) -> Verified:
  """Measures a dictionary at its sites, and elsewhere if it does not fit.

  Args:
    dictionary: with sites.
    model: to read them from; of its layers, those that are needed.
    text: to measure on; None takes some of Python's language reference.
    tokens: int [B, T] instead of text.
    mask: bool [B, T], False at padding of `tokens`.
    max_tokens: of text, to measure.
    context: positions per window of text, with BOS.

  Returns:
    Numbers that fit the label.

  Raises:
    WrongSiteError: L0 is more than twice its label, or less than half of it;
      or FVU is above 1. Names the neighbouring sites that fit.
    ValueError: the dictionary has no site, or one that the model lacks or
      whose width is another; no tokens to measure.
  """
  cfg = dictionary.config
  own = _places(cfg, model.config)
  if tokens is None:
    tokens, mask = _tokenise(dictionary, model, text, max_tokens, context)
  tokens = np.asarray(tokens)
  valid = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask)
  # The first position draws attention and has a norm of its own, BOS or not.
  counted = valid & (np.cumsum(valid, axis=1) > 1)
  counted &= tokens != model.config.bos_id
  if not counted.any():
    raise ValueError(
      f"No tokens to measure: {tokens.shape} of them without padding, BOS and "
      "the first position. Give more text."
    )
  (found,) = _measure(dictionary, model, tokens, valid, counted, [own])
  if found.fits:
    return found
  others = [place for place in _neighbours(*own, cfg, model) if place != own]
  measured = _measure(dictionary, model, tokens, valid, counted, others)
  raise WrongSiteError(found, measured)


def _places(cfg: DictionaryConfig, model: ModelConfig):
  """(read, write), each a tuple of `Site`, one for each part."""
  places = []
  for end, joined, width in (
    ("read", cfg.read, cfg.d_in),
    ("write", cfg.write, cfg.d_out),
  ):
    if not joined:
      raise ValueError(
        f"It is not known what the dictionary {end}s. Load it with site=, such "
        "as site='blocks.12.resid_post'."
      )
    found = tuple(sites_lib.parse(name, model) for name in joined.split("+"))
    if any(site.layer is None for site in found):
      raise ValueError(f"{end}={joined!r} names all layers; expected one.")
    got = sum(_width(model, site.name) for site in found)
    if got != width:
      raise ValueError(
        f"The dictionary {end}s vectors of width {width}, and {joined} of this "
        f"{model.family} model is {got} wide. Load it with another site=, or "
        "the model that it was trained on."
      )
    places.append(found)
  return tuple(places)


def _width(model: ModelConfig, name: str) -> int:
  special = {
    "attn_z": model.num_heads * model.head_dim,
    "mlp_hidden": model.mlp_width,
  }
  return special.get(name, model.width)


def _neighbours(read, write, cfg, model: Model):
  """Places with other names in the same layers, or the same in the next."""
  names = sites_lib.names(model.config)

  def renamed(place):
    yield place
    for name in names:
      other = tuple(dataclasses.replace(s, name=name) for s in place)
      widths = [
        [_width(model.config, site.name) for site in p] for p in (other, place)
      ]
      if widths[0] == widths[1] and other != place:
        yield other

  def moved(place, by):
    return tuple(dataclasses.replace(s, layer=s.layer + by) for s in place)

  if cfg.is_transcoder:
    places = list(itertools.product(renamed(read), renamed(write)))
  else:
    places = [(place, place) for place in renamed(read)]
  places += [(moved(read, by), moved(write, by)) for by in (-1, 1)]
  inside = range(model.num_loaded)
  return [p for p in places if all(s.layer in inside for s in (*p[0], *p[1]))]


def _measure(dictionary, model, tokens, valid, counted, places):
  """A `Verified` for each of the places, from one forward pass."""
  if not places:
    return []
  needed = sorted({str(site) for place in places for s in place for site in s})
  deepest = max(s.layer for read, write in places for s in (*read, *write))
  _, found = model.forward(
    tokens, mask=valid, capture=needed, stop_at=deepest + 1
  )
  rows = {
    name: np.asarray(x).astype(np.float32)[counted] for name, x in found.items()
  }

  def joined(place):
    return np.concatenate([rows[str(site)] for site in place], axis=-1)

  out, cfg = [], dictionary.config
  # What is read together is reconstructed once.
  for read, group in itertools.groupby(places, lambda place: place[0]):
    rec, l0 = _reconstruct(dictionary, joined(read))
    for _, write in group:
      fvu = math.nan
      if np.isfinite(rec).all():
        fvu = RunningFVU().update(joined(write), rec).compute()
      names = ["+".join(map(str, place)) for place in (read, write)]
      out.append(Verified(*names, l0, fvu, cfg.k, int(counted.sum())))
  return out


def _reconstruct(dictionary, x) -> tuple[np.ndarray, float]:
  recs, fired = [], 0
  # GPUs would otherwise round the factors of float32 products to TF32.
  with jax.default_matmul_precision("highest"):
    for start in range(0, len(x), ROWS):
      acts, rec = reconstruct_prefixes(
        dictionary.config, dictionary.params, x[start : start + ROWS]
      )
      recs.append(np.asarray(rec[-1]))
      fired += int((np.asarray(acts) > 0).sum())
  return np.concatenate(recs), fired / len(x)


def _tokenise(dictionary, model, text, max_tokens, context):
  """Tokens [B, T], and a mask that is False at padding."""
  if model.tokenizer is None:
    raise ValueError(
      f"{model.directory} has no tokenizer, so text cannot be used. Pass "
      "tokens=."
    )
  metadata = dictionary.provenance.get("metadata", {})
  bos = "none" if metadata.get("prepend_bos") is False else "window"
  if text is None:
    documents = [
      Document(text, "reference", topic, topic)
      for topic, text in reference()
      if len(text) >= TOPIC
    ]
  else:
    documents = [Document(text, "text", "text", "text")]
  windows = make_windows(
    documents,
    model.tokenizer.backend_tokenizer,
    context=min(context, model.config.max_context),
    max_tokens=max_tokens,
    bos_id=model.config.bos_id,
    pad_id=model.config.pad_id,
    packing="document",
    bos=bos,
  )
  return windows.tokens, windows.document >= 0
