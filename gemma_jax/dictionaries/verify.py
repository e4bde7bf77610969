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
from gemma_jax.models.forward import check_tokens
from gemma_jax.models.sites import Site

ROWS = 128  # tokens encoded at a time
SHOWN = 6  # candidates in an error
TOPIC = 2000  # characters that a text of the standard library has at least
# What transcoders read and write.
OF_TRANSCODERS = ("resid_mid", "mlp_norm", "mlp_in"), ("mlp_raw", "mlp_out")


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
    self.candidates = tuple(sorted(candidates, key=_rank))
    label = "no label" if found.label is None else f"label {found.label:g}"
    best = next((c for c in self.candidates if c.fits), None)
    if best is None:
      advice = (
        "It fits no neighbouring site. Is the model the one that it was "
        "trained on? Was its input scaled, or its skip turned?"
      )
    else:
      site = repr(best.read)
      if best.write != best.read:
        site = f"({best.read!r}, {best.write!r})"
      advice = f"It fits {best}. Load it with site={site}."
    if found.fvu <= 1:
      advice += " Or its label is wrong."
    tried = "; ".join(map(str, self.candidates[:SHOWN])) or "nothing"
    super().__init__(
      f"{found} ({label}) over {found.tokens} tokens. Expected an L0 within a "
      f"factor of 2 of the label and an FVU of at most 1. {advice} Tried: "
      f"{tried}."
    )


def _rank(c: Verified):
  """Those that fit first; by L0, in steps of half an octave; then by FVU.

  Where a threshold is too low for the site, more latents make the FVU better.
  """
  off = 0
  if c.label is not None and c.l0 > 0:
    off = round(2 * abs(math.log2(c.l0 / c.label)))
  return not c.fits, off, math.inf if math.isnan(c.fvu) else c.fvu


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
      whose width is another; tokens that are not [B, T], or none to measure.
  """
  cfg = dictionary.config
  own = _places(cfg, model.config)
  if tokens is None:
    tokens, mask = _tokenise(dictionary, model, text, max_tokens, context)
  tokens = np.asarray(tokens)
  check_tokens(tokens)
  valid = np.ones(tokens.shape, bool)
  if mask is not None:
    valid = np.asarray(mask).astype(bool)
  if valid.shape != tokens.shape:
    raise ValueError(
      f"mask must be [B, T] as tokens are, {tokens.shape}; got {valid.shape}."
    )
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
  others = [p for p in _neighbours(*own, cfg, model) if p != own]
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
    got = sum(sites_lib.width(site, model) for site in found)
    if got != width:
      raise ValueError(
        f"The dictionary {end}s vectors of width {width}, and {joined} of this "
        f"{model.family} model is {got} wide. Load it with another site=, or "
        "the model that it was trained on."
      )
    places.append(found)
  return tuple(places)


def _neighbours(read, write, cfg, model: Model):
  """Places of the same width, in the same layers and in those beside them."""

  def renamed(place, names, by):
    for name in filter(known.__contains__, names):
      other = tuple(Site(s.layer + by, name) for s in place)
      widths = [
        [sites_lib.width(s, model.config) for s in p] for p in (other, place)
      ]
      if widths[0] == widths[1] and all(s.layer in loaded for s in other):
        yield other

  loaded = range(model.num_loaded)
  known = sites_lib.names(model.config)
  for by in (0, -1, 1):
    if cfg.is_transcoder:
      reads, writes = known, known
    else:
      yield from ((place, place) for place in renamed(read, known, by))
      reads, writes = OF_TRANSCODERS  # whose files look the same
    yield from itertools.product(
      renamed(read, reads, by), renamed(write, writes, by)
    )


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
  for read in dict.fromkeys(place[0] for place in places):
    rec, l0 = _reconstruct(dictionary, joined(read))
    for write in dict.fromkeys(w for r, w in places if r == read):
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
      Document(topic_text, "reference", topic, topic)
      for topic, topic_text in reference()
      if len(topic_text) >= TOPIC
    ]
  else:
    documents = [Document(text, "text", "text", "text")]
  context = min(context, model.config.max_context)
  windows = make_windows(
    documents,
    model.tokenizer.backend_tokenizer,
    context=context,
    max_tokens=max_tokens,
    document_tokens=context - 1 if text is None else None,
    bos_id=model.config.bos_id,
    pad_id=model.config.pad_id,
    packing="document",
    bos=bos,
  )
  return windows.tokens, windows.document >= 0
