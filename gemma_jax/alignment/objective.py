"""What a map between models is trained to get right, in several terms.

Every term is 0 for a perfect prediction, and has no units: latents and models
of any scale take the same weights. Of codes:

| term | the train mean, logits at the train rates | a perfect prediction |
|---|---|---|
| reconstruction | 1 over the training rows | 0 |
| cosine | 1 | 0 |
| correlation | mean squared correlation of two codes | 0 |
| sparsity | 0 over the training rows | 0 |
| firing | 1 over the training rows | 0, at logits of infinity |

None is a score: a batch is small, and `scores.Scores` has names for what is
reported.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

TERMS = ("reconstruction", "cosine", "correlation", "sparsity", "firing")

# Least unit of a latent, as a share of the root mean square of all.
FLOOR = 0.1
# Rates are kept this far from 0 and 1, whose log odds have no end.
RARE = 1e-6

# Lengths that count as none, as shares of the usual one: what is divided by a
# length has bounded gradients where there is none.
_SHORT = 1e-3
_BLOCK = 2**22  # numbers that are float64 at once


class CodeStatistics(NamedTuple):
  """Codes of a dictionary over the training rows.

  Attributes:
    mean: float32 [M].
    std: float32 [M], 0 of latents that never vary.
    rate: float32 [M], share of rows on which a latent fires.
  """

  mean: jax.Array
  std: jax.Array
  rate: jax.Array

  @property
  def unit(self) -> jax.Array:
    """What a latent is measured in, [M]: its std, but no less than the floor.

    A latent that fires once in 10^5 rows is then 300 of its own std from the
    mean. With the floor, no latent weighs more than 1 / FLOOR^2 times what it
    does in raw squared errors: those that fire a hundredth as often as others
    count by how often they do.
    """
    usual = jnp.sqrt(jnp.mean(jnp.square(self.std)))
    return jnp.maximum(self.std, FLOOR * usual)

  @property
  def log_odds(self) -> jax.Array:
    """Of firing, [M], without what is known of a row."""
    rate = jnp.clip(self.rate, RARE, 1 - RARE)
    return jnp.log(rate) - jnp.log1p(-rate)


def code_statistics(batches: Iterable) -> CodeStatistics:
  """Mean, deviation and firing rate of codes, in one pass of float64 sums.

  Args:
    batches: codes [n, M] each, on the host or a device.

  Raises:
    ValueError: no rows, shapes that do not fit, codes that are negative or not
      finite, or none that vary.
  """
  count, shift, sums = 0, None, np.zeros(())
  for batch in batches:
    shape = np.shape(batch)
    if len(shape) != 2 or (shift is not None and shape[1] != len(shift)):
      known = "M" if shift is None else len(shift)
      raise ValueError(
        f"expected batches of one dictionary's codes, [n, {known}], got {shape}"
      )
    step = max(1, _BLOCK // max(1, shape[1]))
    for start in range(0, shape[0], step):
      rows = np.asarray(batch[start : start + step]).astype(np.float64)
      # NaN is not at least 0 either.
      if not (rows >= 0).all() or np.isinf(rows).any():
        raise ValueError(
          f"expected finite codes of 0 and more, got others in rows from "
          f"{count} on; leave those rows out"
        )
      if shift is None:
        shift, sums = rows.mean(0), np.zeros((3, shape[1]))
      away = rows - shift
      sums += [away.sum(0), np.square(away).sum(0), (rows > 0).sum(0)]
      count += len(rows)
  if not count:
    raise ValueError("expected batches of codes, got no rows")
  mean, square, rate = sums / count
  std = np.sqrt(np.maximum(square - mean**2, 0))
  if not std.any():
    raise ValueError(
      f"expected codes that vary, got {count} rows that are all the same"
    )
  return CodeStatistics(
    *(jnp.asarray(a, jnp.float32) for a in (shift + mean, std, rate))
  )


def code_losses(
  predicted, logits, actual, about: CodeStatistics, sampled
) -> dict[str, jax.Array]:
  """The terms for a batch of codes.

  With u the `unit` of each latent, sigma its std, and means over rows:

  * reconstruction: sum_j mean (p_j - y_j)^2 / u_j^2 over sum_j sigma_j^2 /
    u_j^2, an FVU whose latents count alike except for the rarest.
  * cosine: 1 - mean cos(p - train mean, y - train mean), of raw codes. Rows
    within a thousandth of the usual distance from the mean have none.
  * correlation: mean over pairs of two sampled latents of the squared
    difference between their correlation in p and in y within the batch; a
    column that is constant there has correlations of 0.
  * sparsity: (mean L1 of p / u - that of y / u)^2, over the square of what
    the latter is on the training rows. Errors about 0, on either side, are
    too much of it. It looks at the batch as a whole and says nothing of which
    latents fire; the mean has as much as the codes.
  * firing: cross-entropy of the logits with y > 0 over that of the train
    rates. Not balanced: balanced classes would be ranked as well, but their
    logits are off by the log odds of the rate, which is most of them. Divided
    by its sum, latents count by how uncertain they are.

  Args:
    predicted: p [n, M], raw codes; negative ones count as they are.
    logits: of firing, [n, M].
    actual: y [n, M], raw codes, not negative.
    about: of the training rows.
    sampled: int [S], different latents, S >= 2.

  Returns:
    Scalars by the names of `TERMS`.

  Raises:
    ValueError: shapes that do not fit.
  """
  shapes = [jnp.shape(a) for a in (predicted, logits, actual)]
  if len(set(shapes)) > 1 or shapes[0][1:] != about.mean.shape:
    raise ValueError(
      "expected predicted, logits and actual codes [n, "
      f"{len(about.mean)}], got {', '.join(map(str, shapes))}"
    )
  if jnp.ndim(sampled) != 1 or len(sampled) < 2:
    raise ValueError(
      f"expected sampled latents [S], two or more, got {jnp.shape(sampled)}"
    )
  p, logits, y = (
    jnp.asarray(a, jnp.float32) for a in (predicted, logits, actual)
  )
  unit = about.unit
  error = jnp.square((p - y) / unit).mean(0).sum()
  l1, actual_l1 = (jnp.abs(a / unit).sum(1).mean() for a in (p, y))
  usual = jnp.sqrt(jnp.sum(jnp.square(about.std)))
  fires = (y > 0).astype(jnp.float32)
  return {
    "reconstruction": error / jnp.sum(jnp.square(about.std / unit)),
    "cosine": _cosine(p - about.mean, y - about.mean, usual),
    "correlation": _correlation(
      *(a[:, sampled] / unit[sampled] for a in (p, y))
    ),
    "sparsity": jnp.square((l1 - actual_l1) / jnp.sum(about.mean / unit)),
    "firing": _entropy(logits, fires).mean(0).sum()
    / _entropy(about.log_odds, jax.nn.sigmoid(about.log_odds)).sum(),
  }


def activation_losses(
  predicted, actual, mean, variance
) -> dict[str, jax.Array]:
  """ "reconstruction" and "cosine" of a batch of activations.

  Reconstruction is mean |p - y|^2 / variance, the FVU about the training
  rows; cosine is 1 - mean cos(p - mean, y - mean).

  Args:
    predicted: p [n, E].
    actual: y [n, E].
    mean: of y over the training rows, [E].
    variance: mean |y - mean|^2 over them, a scalar.

  Raises:
    ValueError: shapes that do not fit.
  """
  shape = jnp.shape(actual)
  if jnp.shape(predicted) != shape or shape[1:] != jnp.shape(mean):
    raise ValueError(
      f"expected predicted and actual [n, E] and a mean [E], got "
      f"{jnp.shape(predicted)}, {shape} and {jnp.shape(mean)}"
    )
  p, y = (jnp.asarray(a, jnp.float32) - mean for a in (predicted, actual))
  error = jnp.square(p - y).sum(1).mean()
  return {
    "reconstruction": error / variance,
    "cosine": _cosine(p, y, jnp.sqrt(variance)),
  }


def total(losses: Mapping, weights: Mapping[str, float]) -> jax.Array:
  """Sum of the terms that have a weight, times it.

  Args:
    losses: scalars by name: `code_losses`, and what else the caller measured,
      such as the "kl" of a model's predictions after splicing.
    weights: by the same names; terms without one do not count.

  Raises:
    ValueError: no weights, or weights for a term that is not there.
  """
  unknown = sorted(set(weights) - set(losses))
  if unknown or not weights:
    raise ValueError(
      f"expected weights for some of {', '.join(sorted(losses))}, got "
      f"{', '.join(unknown) or 'none'}; measure a term or leave it out"
    )
  return sum(weight * losses[name] for name, weight in weights.items())


def _cosine(p, y, usual):
  """1 - mean cosine of rows; the usual length says which are too short."""

  def length(rows):
    return jnp.sqrt(jnp.square(rows).sum(1) + jnp.square(_SHORT * usual))

  return 1 - jnp.mean(jnp.sum(p * y, axis=1) / (length(p) * length(y)))


def _correlation(p, y):
  """Of columns [n, S] whose usual deviation is 1."""

  def correlations(columns):
    away = columns - columns.mean(0)
    length = jnp.sqrt(jnp.square(away).mean(0) + _SHORT**2)
    away /= length
    # GPUs would otherwise round the factors to TF32.
    return jnp.matmul(away.T, away, precision="highest") / len(away)

  size = p.shape[1]
  different = jnp.square(correlations(p) - correlations(y))
  return jnp.sum(different * (1 - jnp.eye(size))) / (size * (size - 1))


def _entropy(logits, fires):
  """Cross-entropy of what fires with its log odds, in nats."""
  return jax.nn.softplus(logits) - fires * logits
