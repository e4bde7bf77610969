"""What a token's identity alone says of a site: the mean by token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax import progress
from gemma_jax.activations.store import ActivationStore

BLOCK = 2**14  # rows that are summed at once
PRIOR = 1.0  # rows of the site's mean that every token starts with


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenMeans:
  """Mean of a site for each token that was seen, else of all.

  A lookup that no dictionary may lose to: much of a residual stream is the
  token itself (Dooms and Wilhelm 2025, "Tokenized SAEs", arXiv 2502.17332).

  Attributes:
    index: int32 [V], row of the table; 0 for tokens that were not seen.
    table: float32 [rows, D]; row 0 is the mean of the site.
  """

  index: jax.Array
  table: jax.Array

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Token ids [...] -> [..., D]."""
    return self.table[self.index[tokens]]


def token_means(
  store: ActivationStore, site: str, vocabulary: int
) -> TokenMeans:
  """The means of a whole store by token, each with one row of the mean of all.

  Args:
    store: training activations.
    site: of it.
    vocabulary: V.
  """
  token = store.read(0, len(store), "token")
  seen, rows = np.unique(token, return_inverse=True)
  sums = np.zeros((len(seen), store.sites[site]))
  with progress.bar(len(store), "means by token", unit="tokens") as bar:
    for start in range(0, len(store), BLOCK):
      stop = min(start + BLOCK, len(store))
      x = np.asarray(store.read(start, stop, site), np.float64)
      order = np.argsort(rows[start:stop], kind="stable")
      own, first = np.unique(rows[start:stop][order], return_index=True)
      sums[own] += np.add.reduceat(x[order], first, axis=0)
      bar.update(stop - start)
  mean = sums.sum(0) / len(store)
  counts = np.bincount(rows)[:, None]
  means = (sums + PRIOR * mean) / (counts + PRIOR)
  index = np.zeros(vocabulary, np.int32)
  index[seen] = 1 + np.arange(len(seen))
  table = np.concatenate([mean[None], means]).astype(np.float32)
  return TokenMeans(jnp.asarray(index), jnp.asarray(table))
