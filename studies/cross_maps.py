"""The ladder of maps of one route: floors, linear maps, controls, ceilings.

A route goes from a source site to a target site. What maps give is scored as
codes of the target's dictionary: a map of activations goes through the target's
own encoder (stitching), a map of codes is taken as it is.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax import alignment
from gemma_jax.activations import ActivationStore, owner
from gemma_jax.alignment import controls
from gemma_jax.alignment.maps import Map
from gemma_jax.alignment.paired import Paired
from gemma_jax.dictionaries import Dictionary
from studies.cross_sides import Pair

ROWS = 8_192  # read at once
SHUFFLED = 65_536  # rows of a control's fit, at most
ROLES = ("floor", "linear", "network", "control", "ceiling")


class Batch(NamedTuple):
  """n paired rows of a route.

  Attributes:
    x: float32 [n, D], the source.
    z: float32 [n, M], its codes.
    y: float32 [n, E], the target; only ceilings look at it.
    actual: float32 [n, N], its codes.
    token: int32 [n], the source's.
    position: int32 [n], in the source's window.
    redrawn: float32 [n, D], the source with redrawn weights.
  """

  x: jax.Array
  z: jax.Array
  y: jax.Array
  actual: jax.Array
  token: np.ndarray
  position: np.ndarray
  redrawn: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Contender:
  """What predicts the target from the source.

  Attributes:
    name: of the map.
    role: one of `ROLES`.
    activations: (batch) -> [n, E], or None where only codes are predicted.
    codes: (batch) -> [n, N]; None: the target's encoder of the activations.
    parameters: numbers that it takes to store it.
    unseen: a network that never saw the route.
  """

  name: str
  role: str
  activations: Callable[[Batch], jax.Array] | None = None
  codes: Callable[[Batch], jax.Array] | None = None
  parameters: int = 0
  unseen: bool = False

  @property
  def space(self) -> str:
    """Where it predicts first."""
    return "codes" if self.activations is None else "activations"


class Codes:
  """Rows of a site as a lookup's fit reads them, encoded slice by slice."""

  def __init__(self, store: ActivationStore, site: str, dictionary=None):
    self._given = store, site, dictionary
    width = store.sites[site] if dictionary is None else dictionary.config.width
    self.shape = (len(store), width)

  def __getitem__(self, part: slice) -> np.ndarray:
    store, site, dictionary = self._given
    start, stop, _ = part.indices(len(store))
    x = np.asarray(store.read(start, stop, site), np.float32)
    return x if dictionary is None else np.asarray(dictionary.encode(x))


def blocks(
  store: ActivationStore, sites, *, rows: int | None = None
) -> Iterator[tuple[slice, list[np.ndarray]]]:
  """Rows of some sites, float32 [n, D] each, `ROWS` at a time."""
  total = len(store) if rows is None else min(rows, len(store))
  for start in range(0, total, ROWS):
    part = slice(start, min(start + ROWS, total))
    yield (
      part,
      [
        np.asarray(store.read(part.start, part.stop, site), np.float32)
        for site in sites
      ],
    )


def take(
  found: Paired,
  pair: Pair,
  source: Dictionary,
  target: Dictionary,
  rows: np.ndarray,
  redrawn: np.ndarray | None,
) -> Batch:
  """Some rows of a route.

  Args:
    found: paired rows.
    pair: source and target.
    source: dictionary of the source.
    target: of the target.
    rows: int [n].
    redrawn: of all rows, [P, D].
  """
  x, y = (np.asarray(found.store.take(rows, s), np.float32) for s in pair)
  name = owner(pair.a)[0]
  return Batch(
    jnp.asarray(x),
    source.encode(x),
    jnp.asarray(y),
    target.encode(y),
    found.tokens[name][rows].astype(np.int32),
    found.position(name)[rows].astype(np.int32),
    None if redrawn is None else redrawn[rows],
  )


def moments(
  found: Paired, pair: Pair, encoders: Mapping[str, Dictionary] | None = None
) -> alignment.Moments:
  """Of both sites of a pair; of their codes, with dictionaries."""
  out = alignment.Moments()
  for _, rows in blocks(found.store, pair):
    if encoders is not None:
      rows = [
        encoders[site].encode(x) for site, x in zip(pair, rows, strict=True)
      ]
    out.update(*rows)
  return out


def linear(m: alignment.Moments, config: Mapping[str, Any]) -> dict[str, Map]:
  """Linear maps from the source's activations to the target's, by name.

  Args:
    m: of the route, `full`.
    config: `maps` of the study: the `rank` of those that have one.
  """
  rank = min(config["rank"], *m.widths)
  return {
    "procrustes": alignment.fit_procrustes(m),
    "scaled_procrustes": alignment.fit_procrustes(m, scaled=True),
    "ridge": alignment.fit_ridge(m),
    "reduced_rank": alignment.fit_reduced_rank(m, rank=rank),
    "cca": alignment.fit_cca(m, rank=rank, shrinkage=config["shrinkage"]),
  }


def of_map(name: str, role: str, one: Map, *, unseen: bool = False):
  """A contender that maps the source's activations."""
  return Contender(
    name, role, lambda b: one(b.x), parameters=one.parameters, unseen=unseen
  )


def of_codes(
  m: alignment.Moments, ridge: Map, source: Dictionary
) -> list[Contender]:
  """Maps that see the source's codes alone.

  Args:
    m: of codes of the route.
    ridge: of the activations.
    source: whose codes they are.
  """
  code = alignment.fit_ridge(m)
  return [
    Contender(
      "decoded_ridge",
      "linear",
      lambda b: ridge(source.decode(b.z)),
      parameters=ridge.parameters,
    ),
    Contender(
      "code_ridge",
      "linear",
      codes=lambda b: code(b.z),
      parameters=code.parameters,
    ),
  ]


def floors(found: Paired, pair: Pair, target: Dictionary) -> list[Contender]:
  """The mean, and lookups by position and by the source's token."""
  site, out = pair.b, []
  name = owner(pair.a)[0]
  keys = {
    "mean": np.zeros(len(found.store), np.int32),
    "position": found.position(name),
    "token": found.tokens[name],
  }
  read = {
    "mean": lambda b: np.zeros_like(b.token),
    "position": lambda b: b.position,
    "token": lambda b: b.token,
  }
  for kind, key in keys.items():
    x = alignment.fit_lookup(key, Codes(found.store, site))
    z = alignment.fit_lookup(key, Codes(found.store, site, target))
    out.append(
      Contender(
        kind,
        "floor",
        lambda b, x=x, kind=kind: x(read[kind](b)),
        lambda b, z=z, kind=kind: z(read[kind](b)),
        z.parameters,
      )
    )
  return out


def shuffled_pairs(found: Paired, pair: Pair, *, seed: int) -> list[Contender]:
  """Ridge maps fitted on wrong pairs: what is left is what those share."""
  store = found.store
  count = min(SHUFFLED, len(store))
  x, y = (np.asarray(store.read(0, count, site), np.float32) for site in pair)
  document = found.document[:count]
  token = found.tokens[owner(pair.a)[0]][:count]
  out = []
  for kind in controls.KINDS:
    partners = controls.shuffled(document, kind, seed=seed, tokens=token)
    kept = ~partners.alone
    one = alignment.fit_ridge(x[kept], y[partners.order][kept])
    name = "shuffled_" + kind.removeprefix("same_")
    out.append(of_map(name, "control", one))
  return out


def redrawn(x: np.ndarray, y: np.ndarray) -> Contender:
  """The ridge map from a source with redrawn weights.

  Args:
    x: its rows, [n, D].
    y: the target's, [n, E].
  """
  one = alignment.fit_ridge(x, y)
  return Contender(
    "redrawn",
    "control",
    lambda b: one(b.redrawn),
    parameters=one.parameters,
  )


def ceilings(target: list[Dictionary]) -> list[Contender]:
  """What the target's own dictionaries say of it."""
  own = target[0]
  out = [
    Contender(
      "own", "ceiling", lambda b: own.decode(b.actual), lambda b: b.actual
    )
  ]
  if len(target) > 1:
    other = target[1]
    out.insert(
      0, Contender("other_seed", "ceiling", lambda b: other.reconstruct(b.y))
    )
  return out


def moved(one: Map, there, here) -> Map:
  """The map of one route used at another, in each site's own scale.

  Args:
    one: fitted there.
    there: `SiteScale` of its source and target.
    here: likewise, where it is used.
  """
  (a, b), (x, y) = there, here
  weights = (a.scale / x.scale)[:, None] * one.weights * (y.scale / b.scale)
  bias = y.mean - x.mean @ weights
  return dataclasses.replace(
    one,
    weights=jnp.asarray(weights, jnp.float32),
    bias=jnp.asarray(bias, jnp.float32),
  )
