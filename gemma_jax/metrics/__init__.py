"""Numbers that decide: reconstruction, faithfulness, how latents behave."""

from gemma_jax.metrics.ablation import ABLATIONS, ByToken, Resample, ablations
from gemma_jax.metrics.definitions import RunningReconstruction
from gemma_jax.metrics.faithfulness import (
  SpliceLosses,
  ce_recovered,
  splice_losses,
  spliced_cross_entropy,
)
from gemma_jax.metrics.intervals import document_interval
from gemma_jax.metrics.latents import (
  RunningLatents,
  decoder_coherence,
  largest_cosines,
)
from gemma_jax.metrics.reconstruction import RunningFVU, fvu

__all__ = [
  "ABLATIONS",
  "ByToken",
  "Resample",
  "RunningFVU",
  "RunningLatents",
  "RunningReconstruction",
  "SpliceLosses",
  "ablations",
  "ce_recovered",
  "decoder_coherence",
  "document_interval",
  "fvu",
  "largest_cosines",
  "splice_losses",
  "spliced_cross_entropy",
]
