"""One face for everything that can stand for an activation.

Clusterings, quantisers, dictionaries, principal components and lookups by
token: what each costs in bits, parameters and FLOPs, what it makes of a
vector, and which latents it has.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax.tree_util import Partial

from gemma_jax.activations import TokenMeans
from gemma_jax.clustering import Quantiser
from gemma_jax.dictionaries import Dictionary
from gemma_jax.dictionaries.dictionary import encode, reconstruct
from gemma_jax.metrics import rates

MOST_BITS = 16  # of a value
VALUE_BITS = 8  # of the gain of a spherical code
WORSE = 1.01  # times the FVU that rounded values may have


@dataclasses.dataclass(frozen=True)
class Code:
  """What stands for an activation.

  Attributes:
    name: unlike any other.
    kind: "kmeans", "residual", "product", "pca", "lookup", "dictionary", ...
    bits: per token, of a code of fixed length: support and values.
    parameters: numbers that are stored to decode and encode.
    encode_flops: per token.
    function: (tokens [...], x [..., D]) -> [..., D], a pytree with the arrays.
    latents: (x [n, D]) -> CSR [n, M], or None where there are none.
    origin: what has those latents.
    about: more numbers for the table.
  """

  name: str
  kind: str
  bits: float
  parameters: int
  encode_flops: float
  function: Partial
  latents: Callable[[np.ndarray], scipy.sparse.csr_matrix] | None = None
  origin: Quantiser | Dictionary | None = None
  about: dict = dataclasses.field(default_factory=dict)


def _quantised(quantiser, tokens, x):
  return quantiser.reconstruct(x)


def of_quantiser(
  name: str, kind: str, q: Quantiser, stages: int | None = None, **about
) -> Code:
  """A clustering, or the first `stages` of a residual quantiser."""
  if stages is not None:
    q = dataclasses.replace(q, centroids=q.centroids[:stages])
  gain = VALUE_BITS if q.kind == "spherical" else 0
  return Code(
    name,
    kind,
    q.bits + gain,
    q.parameters,
    q.encode_flops,
    Partial(_quantised, q),
    functools.partial(_memberships, q),
    q,
    about,
  )


def _memberships(q: Quantiser, x: np.ndarray) -> scipy.sparse.csr_matrix:
  """One latent for each centroid of each stage: 1 / (1 + distance) or 0."""
  codes, made = map(np.asarray, _both(q, x))
  n, stages = codes.shape
  near = 1 / (1 + np.linalg.norm(x - made, axis=1))
  columns = codes + q.clusters * np.arange(stages)
  return scipy.sparse.csr_matrix(
    (np.repeat(near, stages), columns.ravel(), np.arange(n + 1) * stages),
    shape=(n, q.clusters * stages),
  )


@jax.jit
def _both(q, x):
  return q.encode(x), q.reconstruct(x)


def _reconstructed(cfg, params, tokens, x):
  return reconstruct(cfg, params, x)


def of_dictionary(
  name: str, d: Dictionary, sample: np.ndarray, **about
) -> Code:
  """A dictionary; its bits are those of its support and of rounded values.

  Args:
    name: of the code.
    d: that reads and writes one site.
    sample: training rows [n, D], on which L0 and the bits of a value are
      measured.
    **about: more numbers for the table.
  """
  cfg = d.config
  z = np.asarray(encode(cfg, d.params, sample))
  l0 = (z > 0).sum(1)
  value = value_bits(z, lambda a: np.asarray(d.decode(a)), sample, signed=False)
  support = float(rates.support_bits(cfg.width, l0).mean())
  return Code(
    name,
    "dictionary",
    support + float(l0.mean()) * value,
    sum(int(np.size(a)) for a in d.params.values()),
    2.0 * cfg.d_in * cfg.width,
    Partial(functools.partial(_reconstructed, cfg), d.params),
    lambda x: scipy.sparse.csr_matrix(np.asarray(encode(cfg, d.params, x))),
    d,
    {
      "l0": float(l0.mean()),
      "value_bits": value,
      "bits_support": support,
      "bits_entropy": rates.firing_entropy((z > 0).mean(0))
      + float(l0.mean()) * value,
      **about,
    },
  )


def _projected(mean, directions, tokens, x):
  z = (x.astype(jnp.float32) - mean) @ directions
  return z @ directions.T + mean


def of_components(
  mean: np.ndarray, vectors: np.ndarray, sample: np.ndarray
) -> Code:
  """The projection on principal components [D, r], their values rounded."""
  mean, vectors = np.float32(mean), np.float32(vectors)
  z = (sample - mean) @ vectors
  value = value_bits(z, lambda a: a @ vectors.T + mean, sample, signed=True)
  rank = vectors.shape[1]
  return Code(
    f"pca{rank}",
    "pca",
    float(rank * value),
    vectors.size + mean.size,
    2.0 * vectors.size,
    Partial(_projected, jnp.asarray(mean), jnp.asarray(vectors)),
    about={"value_bits": value},
  )


def _looked_up(means, tokens, x):
  return jnp.broadcast_to(means(tokens), x.shape)


def _looked_up_and_more(means, quantiser, tokens, x):
  about = means(tokens)
  return about + quantiser.reconstruct(x - about)


def of_tokens(means: TokenMeans, quantiser: Quantiser | None = None) -> Code:
  """The mean by token, and what a quantiser makes of the rest.

  Its bits name the token among those that were seen; where the token is known
  anyway they are not needed.
  """
  rows = len(means.table)
  bits, parameters, flops = float(np.log2(rows)), means.table.size, 0.0
  if quantiser is None:
    return Code(
      "lookup", "lookup", bits, parameters, flops, Partial(_looked_up, means)
    )
  return Code(
    f"lookup+kmeans{quantiser.clusters}",
    "lookup",
    bits + quantiser.bits,
    parameters + quantiser.parameters,
    quantiser.encode_flops,
    Partial(_looked_up_and_more, means, quantiser),
  )


def value_bits(z, decode, x, *, signed: bool) -> int:
  """The fewest bits of a value that raise the squared error by under 1 %.

  Every latent is rounded to 2^bits equal steps up to its own largest value;
  an active one stays active.

  Args:
    z: latents [n, M].
    decode: [n, M] -> [n, D].
    x: [n, D].
    signed: whether values may be negative.
  """
  exact = np.square(x - decode(z), dtype=np.float64).sum()
  scale = np.maximum(np.abs(z).max(0), 1e-30)
  for bits in range(1, MOST_BITS):
    steps = max(1, 2 ** (bits - signed) - signed)
    level = np.rint(z / scale * steps)
    if not signed:
      level = np.where(z > 0, np.maximum(level, 1), 0)
    rounded = (level * scale / steps).astype(np.float32)
    error = np.square(x - decode(rounded), dtype=np.float64).sum()
    if error <= WORSE * exact:
      return bits
  return MOST_BITS
