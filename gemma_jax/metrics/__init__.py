"""Numbers that decide: reconstruction and faithfulness."""

from gemma_jax.metrics.faithfulness import ce_recovered, spliced_cross_entropy
from gemma_jax.metrics.reconstruction import RunningFVU, fvu

__all__ = ["RunningFVU", "ce_recovered", "fvu", "spliced_cross_entropy"]
