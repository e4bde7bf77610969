"""One functional core for SAEs, transcoders, crosscoders.

Training happens in normalised coordinates (`Normalisation`), so that one
learning rate suits every site: `init`, then `loss` and its gradient. `fold`
brings a trained dictionary back to raw activations. What a dictionary is
stands in its `DictionaryConfig`, how it is trained in its `Recipe`.
"""

from gemma_jax.dictionaries.core.coordinates import (
  Normalisation,
  State,
  centre_tokens,
  normalisation,
  normalise,
)
from gemma_jax.dictionaries.core.folding import calibrate, fold
from gemma_jax.dictionaries.core.forward import (
  decode_prefixes,
  pre_activations,
  select,
)
from gemma_jax.dictionaries.core.objective import (
  can_be_sparse,
  check,
  constrain,
  hyper,
  loss,
  project,
)
from gemma_jax.dictionaries.core.restart import resample
from gemma_jax.dictionaries.core.start import geometric_median, init

__all__ = [
  "Normalisation",
  "State",
  "calibrate",
  "can_be_sparse",
  "centre_tokens",
  "check",
  "constrain",
  "decode_prefixes",
  "fold",
  "geometric_median",
  "hyper",
  "init",
  "loss",
  "normalisation",
  "normalise",
  "pre_activations",
  "project",
  "resample",
  "select",
]
