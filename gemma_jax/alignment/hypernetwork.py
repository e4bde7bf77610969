"""One network that writes the affine maps between all layers of models.

Ha, Dai and Le 2016, "HyperNetworks" (arXiv 1609.09106): a network whose output
is the weights of another. Here it reads where a map begins and ends, and
writes what is to be added to a map that all layers of two models share,

  y = x (base + U V) + bias,

so that layers which it has not seen get a map as well. x and y are in
normalised coordinates: each dim about its mean and in units of its deviation,
since what the largest dims of a residual stream carry differs by layer. These
take unpaired activations of a site alone.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.alignment.maps import Map, fit_ridge
from gemma_jax.alignment.moments import Moments

LEAST = 1e-6  # variance of a dim, as a share of the mean of all


class Route(NamedTuple):
  """Where a map begins and ends.

  Under `jax.jit`, `depths` may be traced; `direction` may not.

  Attributes:
    source: name of a site, such as `gemma:blocks.5.resid_post`.
    target: name of a site.
    direction: number of the two models in `Config.directions`.
    depths: of source and target: (layer + 1) / layers, in [0, 1].
  """

  source: str
  target: str
  direction: int
  depths: tuple[float, float]


class SiteScale(NamedTuple):
  """The coordinates of a site: (x - mean) / scale.

  From as many rows as there are: what the mean is off by, every map to or
  from the site is off by too.

  Attributes:
    mean: float32 [D].
    scale: float32 [D], the deviation of each dim times sqrt(D), so that the
      mean square length of x is 1.
  """

  mean: jax.Array
  scale: jax.Array

  @classmethod
  def of(cls, mean, variance) -> "SiteScale":
    """From the mean and the variance of every dim.

    Args:
      mean: [D].
      variance: [D].

    Raises:
      ValueError: shapes that do not fit, or no variance.
    """
    mean, variance = (np.asarray(a, np.float64) for a in (mean, variance))
    total = variance.sum()
    if mean.shape != variance.shape or mean.ndim != 1 or not 0 < total < np.inf:
      raise ValueError(
        "expected the mean [D] and variance [D] of a site that varies, got "
        f"shapes {mean.shape} and {variance.shape}, and a summed variance of "
        f"{total}"
      )
    variance = np.maximum(variance, LEAST * variance.mean())
    scale = np.sqrt(variance * len(variance))
    return cls(*(jnp.asarray(a, jnp.float32) for a in (mean, scale)))


@dataclasses.dataclass(frozen=True)
class Config:
  """What a hypernetwork maps, and how large it is.

  Attributes:
    directions: (source model, target model, D, E) of every ordered pair; a
      model may be mapped to itself.
    rank: of what is added to the base.
    width: of both hidden layers of the trunk.
    embedding: numbers that stand for two models, and as many again for which
      of them is mapped.
    frequencies: of depth: half a wave over the model, one, one and a half, ...
      The fewer, the slower do maps change with depth, and the surer are those
      of unseen layers.

  Raises:
    ValueError: sizes out of range, or directions that repeat.
  """

  directions: tuple[tuple[str, str, int, int], ...]
  rank: int
  width: int = 64
  embedding: int = 8
  frequencies: int = 2

  def __post_init__(self):
    named = [direction[:2] for direction in self.directions]
    if not named or len(set(named)) < len(named):
      raise ValueError(
        "expected directions, each from one model to another only once, got "
        f"{named}"
      )
    most = min(min(direction[2:]) for direction in self.directions)
    if not 1 <= self.rank <= most:
      raise ValueError(
        f"expected a rank of 1 to {most}, the narrowest side of all "
        f"directions, got {self.rank}"
      )
    sizes = self.width, self.embedding, self.frequencies
    if min(sizes) < 1:
      raise ValueError(
        "expected width, embedding and frequencies of 1 or more, got "
        f"{', '.join(map(str, sizes))}"
      )

  @property
  def pairs(self) -> tuple[tuple[str, str], ...]:
    """Of models, whichever of the two is mapped."""
    return tuple(sorted({_pair(direction) for direction in self.directions}))


def init(
  key: jax.Array,
  config: Config,
  bases: Sequence[jax.Array | None] | None = None,
) -> dict:
  """Parameters that write the base alone, whatever the route.

  Args:
    key: random key.
    config: of the hypernetwork.
    bases: [D, E] of every direction, such as its `pooled_base`; None is zeros.

  Returns:
    A tree of float32 arrays, all to be trained: the embeddings "pair" and
    "direction", the "trunk", and "maps" of every direction: the "base",
    "read", which writes U, and "write", which writes V and the bias.

  Raises:
    ValueError: bases that do not fit the directions.
  """
  shapes = [tuple(direction[2:]) for direction in config.directions]
  bases = [None] * len(shapes) if bases is None else list(bases)
  found = [None if base is None else np.shape(base) for base in bases]
  if len(found) != len(shapes) or any(
    f not in (None, s) for f, s in zip(found, shapes, strict=True)
  ):
    raise ValueError(
      f"expected a base of each direction, of shapes {shapes}, got {found}"
    )
  rank, width, embedding = config.rank, config.width, config.embedding
  keys = iter(jax.random.split(key, 4 + len(shapes)))

  def normal(*shape):
    return jax.random.normal(next(keys), shape)

  def trunk(rows):
    weights = normal(rows, width) / rows**0.5
    return {"weights": weights, "bias": jnp.zeros(width)}

  def head(bias):
    # What is written first depends on no route: depth is learnt, not drawn.
    return {"weights": jnp.zeros((width, bias.size)), "bias": bias}

  maps = [
    {
      "base": jnp.zeros(shape) if b is None else jnp.asarray(b, jnp.float32),
      # Of rows whose mean square length is 1, x U has variances of 1.
      "read": head(normal(shape[0] * rank)),
      "write": head(jnp.zeros((rank + 1) * shape[1])),
    }
    for b, shape in zip(bases, shapes, strict=True)
  ]
  features = 2 * (1 + 2 * config.frequencies) + 2 * embedding
  return {
    "pair": normal(len(config.pairs), embedding),
    "direction": normal(len(shapes), embedding),
    "trunk": [trunk(features), trunk(width)],
    "maps": maps,
  }


def factors(
  config: Config, params: dict, route: Route
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """What is written for a route, in normalised coordinates.

  Args:
    config: of the hypernetwork.
    params: of `init`.
    route: of which only the direction and depths are read.

  Returns:
    U [D, rank], V [rank, E] and the bias [E].

  Raises:
    ValueError: an unknown direction, or depths outside [0, 1].
  """
  direction = _checked(config, route)
  hidden = jnp.concatenate(
    [
      *(_waves(depth, config.frequencies) for depth in route.depths),
      params["pair"][config.pairs.index(_pair(direction))],
      params["direction"][route.direction],
    ]
  )
  for layer in params["trunk"]:
    hidden = jax.nn.gelu(_linear(layer, hidden))
  heads = params["maps"][route.direction]
  read = _linear(heads["read"], hidden).reshape(-1, config.rank)
  out = direction[3]
  # Entries of a map into E dims are of this order: one learning rate for all.
  write = _linear(heads["write"], hidden).reshape(-1, out) / out**0.5
  return read, write[:-1], write[-1]


def written(
  config: Config, params: dict, route: Route
) -> tuple[jax.Array, jax.Array]:
  """The map of a route in normalised coordinates: weights [D, E], bias [E].

  Raises:
    ValueError: as `factors`, whose arguments it takes.
  """
  read, write, bias = factors(config, params, route)
  base = params["maps"][route.direction]["base"]
  return base + jnp.matmul(read, write, precision="highest"), bias


def apply(
  config: Config,
  params: dict,
  route: Route,
  source: SiteScale,
  target: SiteScale,
  x,
) -> jax.Array:
  """The target's activations where the source has x.

  Args:
    config: of the hypernetwork.
    params: of `init`.
    route: as in `factors`.
    source: coordinates of the source's site.
    target: those of the target's.
    x: raw activations [..., D].

  Returns:
    float32 [..., E], raw.

  Raises:
    ValueError: as `factors`, or activations of another width.
  """
  read, write, bias = factors(config, params, route)
  if jnp.shape(x)[-1:] != read.shape[:1]:
    raise ValueError(
      f"expected activations [..., {len(read)}], got {jnp.shape(x)}"
    )
  x = (jnp.asarray(x, jnp.float32) - source.mean) / source.scale
  base = params["maps"][route.direction]["base"]
  # GPUs would otherwise round the factors to TF32.
  with jax.default_matmul_precision("highest"):
    y = x @ base + (x @ read) @ write + bias
  return target.mean + target.scale * y


def as_map(
  config: Config,
  params: dict,
  route: Route,
  source: SiteScale,
  target: SiteScale,
) -> Map:
  """The map of a route from raw to raw activations.

  Returns:
    A map whose `about` has the `rank` and both depths, and whose `parameters`
    are what is stored for this route beside the base, which all share.

  Raises:
    ValueError: as `factors`; the arguments are those of `apply`.
  """
  weights, bias, shift, mean = (
    np.asarray(a, np.float64)
    for a in (*written(config, params, route), source.mean, target.mean)
  )
  a, b = (np.asarray(site.scale, np.float64) for site in (source, target))
  weights = weights / a[:, None] * b
  bias = mean + b * bias - shift @ weights
  _, _, width, out = config.directions[route.direction]
  start, end = map(float, route.depths)
  return Map(
    jnp.asarray(weights, jnp.float32),
    jnp.asarray(bias, jnp.float32),
    {"rank": config.rank, "source_depth": start, "target_depth": end},
    "hypernetwork",
    config.rank * (width + out) + out,
  )


def pooled_base(
  fitted: Iterable[tuple[Moments, SiteScale, SiteScale]],
) -> jax.Array:
  """The ridge map of all routes of one direction, in normalised coordinates.

  Rows of all routes are pooled, each in its own sites' coordinates, and the
  penalty is that of `fit_ridge` for all; no row is read again.

  Args:
    fitted: moments of the training rows of every route, raw, and the
      coordinates of its source and target.

  Returns:
    float32 [D, E].

  Raises:
    ValueError: no routes, or routes of different widths.
  """
  pooled = Moments(full=False)
  for moments, source, target in fitted:
    pooled.merge(moments.standardised(source, target))
  return fit_ridge(pooled).weights


def _checked(config: Config, route: Route) -> tuple[str, str, int, int]:
  """The direction of a route."""
  if not 0 <= route.direction < len(config.directions):
    raise ValueError(
      f"expected a direction of 0 to {len(config.directions) - 1}, got "
      f"{route.direction} for {route.source} to {route.target}"
    )
  for depth in route.depths:
    if not isinstance(depth, jax.core.Tracer) and not 0 <= depth <= 1:
      raise ValueError(
        f"expected depths of 0 to 1, (layer + 1) / layers, got {depth} for "
        f"{route.source} to {route.target}"
      )
  return config.directions[route.direction]


def _pair(direction) -> tuple[str, str]:
  first, second = sorted(direction[:2])
  return first, second


def _waves(depth, frequencies: int):
  """The depth, and sines and cosines of it, [1 + 2 frequencies]."""
  at = jnp.pi * jnp.arange(1, frequencies + 1) * depth
  line = jnp.reshape(2 * depth - 1, 1)
  return jnp.concatenate([line, jnp.sin(at), jnp.cos(at)])


def _linear(layer, x):
  return x @ layer["weights"] + layer["bias"]
