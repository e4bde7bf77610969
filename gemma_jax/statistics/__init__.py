"""Statistics of prompts and documents, never of tokens."""

from gemma_jax.statistics.bootstrap import Interval, bootstrap_ci
from gemma_jax.statistics.effects import (
  Effect,
  cliffs_delta,
  cohens_d,
  d_z,
  hedges_g,
)
from gemma_jax.statistics.equivalence import (
  Equivalence,
  minimum_detectable_difference,
  minimum_n,
  tost,
)
from gemma_jax.statistics.jackknife import pseudo_values
from gemma_jax.statistics.multiple import (
  benjamini_hochberg,
  benjamini_yekutieli,
  holm,
)
from gemma_jax.statistics.permutation import (
  MaxPermutation,
  Permutation,
  least_n,
  max_permutation_test,
  permutation_test,
  smallest_p,
)

__all__ = [
  "Effect",
  "Equivalence",
  "Interval",
  "MaxPermutation",
  "Permutation",
  "benjamini_hochberg",
  "benjamini_yekutieli",
  "bootstrap_ci",
  "cliffs_delta",
  "cohens_d",
  "d_z",
  "hedges_g",
  "holm",
  "least_n",
  "max_permutation_test",
  "minimum_detectable_difference",
  "minimum_n",
  "permutation_test",
  "pseudo_values",
  "smallest_p",
  "tost",
]
